"""What a pass costs in seconds, from bytes and from rates that somebody measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

_RATES = (
    "link_bytes_per_second",
    "disk_bytes_per_second",
    "decode_bytes_per_second",
)

# By which part computing takes longer while copies arrive: a forward of 0.173 s that
# needed none took 0.181 with 9.46 GB of them beside it (20.4B transformer, one H200).
COPIES_SLOW_COMPUTE = 0.05


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a machine is. What is None is not known, and nothing is guessed for it.

    `measure_rates` measures all but one: how long a model computes, only a run of it
    tells.

    Attributes:
        link_bytes_per_second: From page-locked host RAM to the compute device.
        disk_bytes_per_second: From the files to host RAM.
        compute_seconds: One pass with every weight on the compute device.
        decode_bytes_per_second: Weights from their lossless codes, on the compute
            device; in bytes of the weights.

    Raises:
        ValueError: A rate is not a positive number, or the seconds are not a number.

    Example:
        >>> Rates(link_bytes_per_second=25 * 2**30).disk_bytes_per_second is None
        True
    """

    link_bytes_per_second: float | None = None
    disk_bytes_per_second: float | None = None
    compute_seconds: float | None = None
    decode_bytes_per_second: float | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in _RATES:
            rate = getattr(self, name)
            if rate is not None and not (rate > 0 and math.isfinite(rate)):
                raise ValueError(
                    f"{name}={rate!r} should be a positive number, or None"
                )
        seconds = self.compute_seconds
        if seconds is not None and not (seconds >= 0 and math.isfinite(seconds)):
            raise ValueError(
                f"compute_seconds={seconds!r} should be a number of seconds, or None"
            )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How long a pass takes, by what keeps it busy.

    [Note: the cost model] Compute, copies over the link and reads from disk run at the
    same time, each ahead of the next as far as the window allows, and passes follow
    each other. So the slowest of the three sets the pace:
    ``max(compute, streamed bytes / link, disk bytes / disk)``. What decodes weights is
    the compute device, between its layers: that is added to what it computes. And it
    computes more slowly for as long as copies run, see `COPIES_SLOW_COMPUTE`.

    Attributes:
        compute_seconds: None where nobody measured it.
        link_seconds: 0 if nothing crosses the link; None where its rate is not known.
        disk_seconds: The same for the disk.
        decode_seconds: 0 if nothing is coded; None where the rate is not known.
    """

    compute_seconds: float | None
    link_seconds: float | None
    disk_seconds: float | None
    decode_seconds: float | None = 0.0

    @property
    def parts(self) -> dict[str, float | None]:
        """What there is to do, by name; decoding only where something is coded."""
        parts = {
            "compute": self.compute_seconds,
            "link": self.link_seconds,
            "disk": self.disk_seconds,
        }
        return (
            parts
            if self.decode_seconds == 0
            else {**parts, "decoding": self.decode_seconds}
        )

    @property
    def complete(self) -> bool:
        """Whether all is known; `seconds` is a lower bound otherwise."""
        return None not in self.parts.values()

    @property
    def seconds(self) -> float:
        """The most of what is known."""
        on_device = (self.compute_seconds or 0.0) + (self.decode_seconds or 0.0)
        link = self.link_seconds or 0.0
        on_device += COPIES_SLOW_COMPUTE * min(link, on_device)
        return max(on_device, link, self.disk_seconds or 0.0)


class CurvePoint(NamedTuple):
    """What one limit would give.

    Attributes:
        limit_bytes: The limit; None is unlimited.
        seconds: The predicted seconds of a pass, as far as the rates tell; None
            without rates.
        resident_bytes: Bytes of the layers that stay on the compute device.
    """

    limit_bytes: int | None
    seconds: float | None
    resident_bytes: int


def predict(
    rates: Rates, *, link_bytes: int, disk_bytes: int, decoded_bytes: int = 0
) -> Prediction:
    """Applies the cost model to one pass.

    Args:
        rates: What is known about the machine.
        link_bytes: Bytes that cross the link in a pass.
        disk_bytes: Bytes that a pass reads from disk.
        decoded_bytes: Bytes of weights that a pass decodes.

    Example:
        >>> rates = Rates(link_bytes_per_second=10e9, compute_seconds=0.5)
        >>> predict(rates, link_bytes=20 * 10**9, disk_bytes=0).seconds
        2.0
    """
    return Prediction(
        compute_seconds=rates.compute_seconds,
        link_seconds=_seconds(link_bytes, rates.link_bytes_per_second),
        disk_seconds=_seconds(disk_bytes, rates.disk_bytes_per_second),
        decode_seconds=_seconds(decoded_bytes, rates.decode_bytes_per_second),
    )


def _seconds(nbytes: int, rate: float | None) -> float | None:
    if nbytes == 0:
        return 0.0
    return None if rate is None else nbytes / rate
