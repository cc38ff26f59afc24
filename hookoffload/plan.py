"""Plans: pure data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .cost import CurvePoint, Prediction, Rates, predict
from .plan_table import format_plan


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What a plan has to know about a layer.

    Attributes:
        name: The full name of its module.
        stream_bytes: Bytes of its region in the window while streamed, aligned.
        copy_bytes: Bytes that cross the link each time it is brought in.
        cast_bytes: Bytes of scratch while bound, when streamed.
        resident_bytes: Bytes it keeps on the device when resident.
        resident_cast_bytes: Bytes of scratch while bound, when resident.
        transit_bytes: Bytes of the region that it passes through on its way to
            becoming resident, if it is cast there.
        held: Whether other layers can run while it is bound. Its region is then in the
            window's stack and not in its first-in-first-out part.
        can_stay: Whether it may be resident at all.
        disk_bytes: Bytes that are read from disk each time it is brought in.
        host_bytes: Bytes of it that wait in host RAM.
        decoded_bytes: What `copy_bytes` are once they are decoded, if they are coded.
        coded_bytes: Bytes it keeps on the device when resident and kept coded; it is
            decoded into `cast_bytes` of scratch then. 0 if it cannot be.
        dtype: What its tensors are, for readers: "BF16", or "F8_E4M3>BF16" for one
            that is cast. Empty where it does not matter.
    """

    name: str
    stream_bytes: int
    copy_bytes: int
    cast_bytes: int = 0
    resident_bytes: int = 0
    resident_cast_bytes: int = 0
    transit_bytes: int = 0
    held: bool = False
    can_stay: bool = True
    disk_bytes: int = 0
    host_bytes: int = 0
    decoded_bytes: int = 0
    coded_bytes: int = 0
    dtype: str = ""

    @property
    def in_place(self) -> bool:
        """Whether forwards read it where it rests, so that nothing of it moves."""
        return not (self.stream_bytes or self.copy_bytes or self.cast_bytes)


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """Which layers are resident, how large the window is, and what it costs.

    ``str(plan)`` is a table for readers, in GiB. With rates it says how long a pass
    will take; without, it names no seconds.

    Attributes:
        layers: Every layer of the model; all indices point into it.
        resident: The layers that stay on the compute device between passes.
        order: The layers of a pass, in sequence; one that runs twice is in it twice.
        limit_bytes: The limit the plan keeps, in bytes; None: no limit. A limit of 0
            was replaced by `least_bytes`.
        least_bytes: The smallest limit that this model runs with, in bytes.
        ring_bytes: The first-in-first-out part of the window, in bytes.
        stack_bytes: The part of the window for layers that other layers run inside of.
        scratch_bytes: The most that casts take at once, in bytes.
        always_bytes: Bytes that are on the device whatever is planned: buffers.
        activation_bytes: Bytes left free for what the model itself computes.
        chains: Layers that are bound at the same time at some moment, by index.
        kept_coded: Those of `resident` that are kept coded, and decoded for each of
            their forwards.
        code_share: What share of the layers it was free to keep coded.
        device: The compute device by name; empty where it does not matter.
        rates: How fast the machine is, if somebody said so.
    """

    layers: tuple[LayerSpec, ...]
    resident: frozenset[int]
    order: tuple[int, ...]
    limit_bytes: int | None
    least_bytes: int
    ring_bytes: int
    stack_bytes: int
    scratch_bytes: int
    always_bytes: int
    activation_bytes: int
    chains: tuple[tuple[int, ...], ...] = ()
    kept_coded: frozenset[int] = frozenset()
    code_share: float = 1.0
    device: str = ""
    rates: Rates | None = None

    @property
    def window_bytes(self) -> int:
        """Bytes of the block that streamed layers pass through."""
        return self.ring_bytes + self.stack_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of all resident layers."""
        decoded = self.resident - self.kept_coded
        whole = sum(self.layers[index].resident_bytes for index in decoded)
        return whole + self.kept_coded_bytes

    @property
    def kept_coded_bytes(self) -> int:
        """Bytes of the residents that are kept coded."""
        return sum(self.layers[index].coded_bytes for index in self.kept_coded)

    @property
    def streamed(self) -> tuple[int, ...]:
        """The layers that are not resident, by index."""
        return tuple(i for i in range(len(self.layers)) if i not in self.resident)

    @property
    def total_bytes(self) -> int:
        """Bytes taken on the device at the peak, without activations."""
        taken = self.always_bytes + self.window_bytes + self.scratch_bytes
        return taken + self.resident_bytes

    @property
    def pass_bytes(self) -> int:
        """Bytes that are copied to the compute device in one pass."""
        return sum(layer.copy_bytes for layer in self._brought_in())

    @property
    def coded_share(self) -> float:
        """What part of their decoded bytes a pass copies: 1 where nothing is coded."""
        brought = self._brought_in()
        decoded = sum(layer.decoded_bytes or layer.copy_bytes for layer in brought)
        return self.pass_bytes / decoded if decoded else 1.0

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the weights that one pass decodes."""
        kept = self.resident - self.kept_coded
        return sum(self.layers[i].decoded_bytes for i in self.order if i not in kept)

    @property
    def link_bytes(self) -> int:
        """Those of `pass_bytes` that cross a link: none where the CPU computes."""
        return 0 if self.device.startswith("cpu") else self.pass_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes that one pass reads from disk."""
        return sum(layer.disk_bytes for layer in self._brought_in())

    @property
    def host_bytes(self) -> int:
        """Bytes of weights that wait in host RAM."""
        return sum(layer.host_bytes for layer in self.layers)

    @property
    def from_disk(self) -> tuple[int, ...]:
        """The layers that are read from disk each time, by index."""
        return tuple(i for i in self.streamed if self.layers[i].disk_bytes)

    @property
    def divided(self) -> bool:
        """Whether layers wait in host RAM and on disk."""
        return self.host_bytes > 0 and any(layer.disk_bytes for layer in self.layers)

    def _brought_in(self) -> list[LayerSpec]:
        return [self.layers[i] for i in self.order if i not in self.resident]

    def predict(self, rates: Rates | None = None) -> Prediction | None:
        """Returns how long a pass will take.

        Args:
            rates: How fast the machine is; default: the plan's own.

        Returns:
            The prediction; None without rates.
        """
        rates = rates or self.rates
        if rates is None:
            return None
        return predict(
            rates,
            link_bytes=self.link_bytes,
            disk_bytes=self.disk_bytes,
            decoded_bytes=self.decoded_bytes,
        )

    def curve(
        self, limits_gb: Sequence[float] | None = None, rates: Rates | None = None
    ) -> list[CurvePoint]:
        """Returns what other limits would give: what would 2 GiB more buy me?

        Args:
            limits_gb: In GiB; default: about eight, from the least to where everything
                is resident.
            rates: How fast the machine is; default: the plan's own.

        Returns:
            A point for each limit; its seconds are None without rates.

        Raises:
            BudgetExceededError: A limit is below the least.
            ValueError: A limit is not a number, or negative.
        """
        from .curve import curve_of  # which makes plans, and so imports this module

        return curve_of(self, limits_gb, rates or self.rates)

    def __repr__(self) -> str:
        """Counts residents and streamed layers, because all fields fill pages."""
        return f"Plan({self.summary})"

    def __str__(self) -> str:
        """Shows what the plan takes and costs, and its layers with repeats folded."""
        return format_plan(self)

    @property
    def summary(self) -> str:
        """How many layers stay and how many stream, in words."""
        resident, layers = len(self.resident), len(self.layers)
        moving = [i for i in self.streamed if not self.layers[i].in_place]
        words = f"{resident} of {layers} layers resident, {len(moving)} streamed"
        if self.divided:
            words += f" ({len(self.from_disk)} from disk)"
        rest = layers - resident - len(moving)
        return f"{words}, {rest} in place" if rest else words


class Plans(dict[str, Plan]):
    """The plans of several models that share a limit, by the models' names.

    Each is what its model does when no other one keeps anything on the device.
    ``str(plans)`` is a table for each.
    """

    def __str__(self) -> str:
        """Shows each plan under its model's name."""
        return "\n\n".join(f"{name}\n{plan}" for name, plan in self.items())
