"""Figures of what has happened, counted always."""

from __future__ import annotations

from dataclasses import dataclass, field

from .budget import MemoryBudget, format_gib


@dataclass(frozen=True, kw_only=True)
class OffloadStats:
    """What happened since the hooks were attached.

    Attributes:
        forwards: Complete forwards of the root module.
        bytes_moved: Bytes copied to the compute device.
        bytes_written_back: Bytes of layers whose forward changed them.
        peak_bytes: The figure that is held against the limit. On an accelerator the
            peak of PyTorch's allocator, activations included; on a CPU the most that
            the library itself took: window, residents, casts.
        limit_bytes: The limit; None is unlimited, 0 as little as possible.
        stall_seconds: Seconds for which compute waited for copies.
        hits: Layers whose copy had begun before their forward did.
        misses: Layers whose copy began when their forward needed it.
        peak_by_kind: The library's own bytes at their peak, by kind.
        host_bytes: Host RAM that waiting weights take now, with the buffers that files
            are read into; the figure that is held against the host limit.
        host_limit_bytes: The host limit; None: there is none.
        disk_bytes: Weights that wait in files, or what their codes take there.
        bytes_read: Bytes that forwards had read from files.
        coded_bytes: Bytes of the weights that are coded losslessly, as they wait in
            host RAM and are copied.
        decoded_bytes: Bytes of the same weights when they are decoded.
        decode_seconds: Seconds that a pass takes to decode what it copies, at the rate
            that was measured on this device; None where that was not measured.
        coded_resident_bytes: Bytes of the residents that are coded on the device, too,
            and decoded for each forward.
        by_model: Of several models that share limits, the figures of each; the peak
            and its limit are those of all of them, the host limit is each one's share.
    """

    forwards: int
    bytes_moved: int
    bytes_written_back: int
    peak_bytes: int
    limit_bytes: int | None
    stall_seconds: float
    hits: int
    misses: int
    peak_by_kind: dict[str, int]
    host_bytes: int = 0
    host_limit_bytes: int | None = None
    disk_bytes: int = 0
    bytes_read: int = 0
    coded_bytes: int = 0
    decoded_bytes: int = 0
    decode_seconds: float | None = None
    coded_resident_bytes: int = 0
    by_model: dict[str, OffloadStats] = field(default_factory=dict)

    @classmethod
    def of_several(
        cls,
        by_model: dict[str, OffloadStats],
        budget: MemoryBudget,
        host_limit_bytes: int | None,
    ) -> OffloadStats:
        """Add up the figures of models that share a budget and a host limit."""
        each = list(by_model.values())
        return cls(
            forwards=sum(stats.forwards for stats in each),
            bytes_moved=sum(stats.bytes_moved for stats in each),
            bytes_written_back=sum(stats.bytes_written_back for stats in each),
            peak_bytes=max(stats.peak_bytes for stats in each),
            limit_bytes=each[0].limit_bytes,
            stall_seconds=sum(stats.stall_seconds for stats in each),
            hits=sum(stats.hits for stats in each),
            misses=sum(stats.misses for stats in each),
            peak_by_kind=budget.peak_by_kind(),
            host_bytes=sum(stats.host_bytes for stats in each),
            host_limit_bytes=host_limit_bytes,
            disk_bytes=sum(stats.disk_bytes for stats in each),
            bytes_read=sum(stats.bytes_read for stats in each),
            coded_bytes=sum(stats.coded_bytes for stats in each),
            decoded_bytes=sum(stats.decoded_bytes for stats in each),
            coded_resident_bytes=sum(stats.coded_resident_bytes for stats in each),
            by_model=by_model,
        )

    def __str__(self) -> str:
        limit = "none" if self.limit_bytes is None else format_gib(self.limit_bytes)
        like = self.limit_bytes or self.peak_bytes
        kinds = ", ".join(
            f"{kind} {format_gib(n, like)}" for kind, n in self.peak_by_kind.items()
        )
        coded = ""
        if self.decoded_bytes:
            share = self.coded_bytes / self.decoded_bytes
            coded = f", {format_gib(self.decoded_bytes)} coded in {share:.1%}"
            if self.decode_seconds is not None:
                coded += f" ({self.decode_seconds:.4f} s a pass to decode)"
            if self.coded_resident_bytes:
                coded += f", {format_gib(self.coded_resident_bytes)} resident so"
        return (
            f"{self.forwards} forwards, peak {format_gib(self.peak_bytes, like)} "
            f"(limit {limit}; {kinds or 'nothing of the library'}), "
            f"{format_gib(self.bytes_moved)} copied, "
            f"{self.stall_seconds:.3f} s stalled, "
            f"{self.hits} hits, {self.misses} misses{coded}{self._tiers()}"
        )

    def _tiers(self) -> str:
        """Names what waits where, if anything waits on disk."""
        if not self.disk_bytes:
            return ""
        limit = self.host_limit_bytes
        named = "" if limit is None else f" (limit {format_gib(limit)})"
        return (
            f"; {format_gib(self.host_bytes)} in host RAM{named}, "
            f"{format_gib(self.disk_bytes)} on disk, {format_gib(self.bytes_read)} read"
        )
