"""What one session tells of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lossless import known_decode_seconds
from .run_report import Report, make_report
from .stats import OffloadStats

if TYPE_CHECKING:
    from .session import Session


def stats_of(session: Session) -> OffloadStats:
    """Return what has happened since attach."""
    counters = session.mover.counters
    measured = session.mover.memory.measures_peak
    coded = [m for m in session.moved_masters if m.code is not None]
    # What is held against the limit is that of all models that share it.
    budget = session.budget if session.group is None else session.group.budget
    return OffloadStats(
        forwards=counters.forwards,
        bytes_moved=counters.bytes_moved,
        bytes_written_back=counters.bytes_written_back,
        peak_bytes=session.planner.peak_bytes if measured else budget.peak,
        limit_bytes=session.policy.limit_bytes,
        stall_seconds=session.mover.engine.stall_seconds(),
        hits=counters.hits,
        misses=counters.misses,
        peak_by_kind=session.budget.peak_by_kind(),
        host_bytes=session.store.host_bytes + session.mover.engine.staging_bytes(),
        host_limit_bytes=session.policy.host_limit_bytes,
        disk_bytes=session.store.disk_bytes,
        bytes_read=counters.bytes_read,
        coded_bytes=sum(m.nbytes for m in coded),
        decoded_bytes=sum(m.plain_bytes for m in coded),
        decode_seconds=_decode_seconds(session),
        coded_resident_bytes=sum(
            block.bytes.numel()
            for layer in session.layers
            if layer.keeps_code
            for block in layer.resident or ()
        ),
    )


def _decode_seconds(session: Session) -> float | None:
    known = known_decode_seconds(session.policy.compute_device)
    return None if known is None else known * session.plan.decoded_bytes


def report_of(session: Session) -> Report:
    """Return what has happened, in detail.

    Raises:
        RuntimeError: The policy says nothing of recording.
    """
    name = type(session.model).__name__
    if session.recorder is None:
        raise RuntimeError(
            f"report: {name} was attached without recording. Attach it with "
            "OffloadPolicy(record=True); offload_stats(model) has the totals"
        )
    session.mover.engine.drain()
    device = session.policy.compute_device
    return make_report(name, device, stats_of(session), session.recorder)
