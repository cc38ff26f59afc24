"""One pass that was measured: how long it took, and how long it waited for copies."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from .codable import has_link
from .coded_residents import LEAST_GAIN
from .mover import LayerMover
from .plan import Plan
from .resolved_policy import ResolvedPolicy

# Passes with a plan before one is measured: the first brings in what stays.
_UNSETTLED_PASSES = 1
# In the next ones much is done for the first time (views of places, launches), and
# something else may keep a machine busy: both look like compute. So another pass is
# measured for as long as each takes less than this part of the fastest before.
_STILL_FASTER, _MOST_PASSES = 0.95, 5
# A machine may be busy for longer than that. So "auto" measures again, ever more
# rarely: the 8th pass with a plan, the 16th, the 32nd and so on.
_FIRST_AGAIN = 8


@dataclass(frozen=True, kw_only=True)
class MeasuredPass:
    """One pass with the residents that the plan wants.

    Attributes:
        seconds: How long it took.
        stalled_seconds: How long of that compute waited for copies.
    """

    seconds: float
    stalled_seconds: float

    @property
    def waits(self) -> bool:
        """Whether it waited long enough for codes to be worth a thought."""
        return self.stalled_seconds > LEAST_GAIN * self.seconds

    def share_to_code(
        self, *, link_seconds: float, saved: float, decode_seconds: float
    ) -> float:
        """Return which share of the streamed bytes should be coded, from 0 to 1.

        Args:
            link_seconds: what copies take, where none waits for its place.
            saved: the share of its bytes that a coded layer does not copy.
            decode_seconds: what a pass would take to decode all of them.

        Example:
            >>> measured = MeasuredPass(seconds=1.0, stalled_seconds=0.5)
            >>> cost = {"saved": 0.25, "decode_seconds": 0.05}
            >>> measured.share_to_code(link_seconds=1.0, **cost)
            1.0
            >>> measured.share_to_code(link_seconds=0.65, **cost)
            0.7058823529411765
            >>> measured.share_to_code(link_seconds=0.4, **cost)
            0.0
        """
        if not self.waits:
            return 0.0
        return share_that_balances(
            link_seconds=min(link_seconds, self.seconds),
            compute_seconds=self.seconds - self.stalled_seconds,
            saved=saved,
            decode_seconds=decode_seconds,
        )


def share_that_balances(
    *,
    link_seconds: float,
    compute_seconds: float,
    saved: float,
    decode_seconds: float,
) -> float:
    """Return the share to code with which copies take as long as the device computes.

    Args:
        link_seconds: what copies take with nothing of it coded.
        compute_seconds: what the device computes and decodes meanwhile.
        saved: the share of the copies that goes where all of it is coded.
        decode_seconds: what the device decodes longer then.
    """
    # link * (1 - share * saved) == compute + share * decode
    longer = link_seconds - compute_seconds
    share = min(longer / (link_seconds * saved + decode_seconds), 1.0)
    return share if share * saved > LEAST_GAIN else 0.0


class PassMeter:
    """Measures passes that decide about codes, see [Note: what "auto" codes].

    Args:
        policy: what the user wants.
        mover: copies the layers.

    Attributes:
        speeds: of the link and the decoder, in seconds a byte, once they are measured.
    """

    __slots__ = (
        "_auto",
        "_begun",
        "_count",
        "_decided",
        "_ended",
        "_fastest",
        "_known",
        "_mover",
        "_passes",
        "_plan",
        "_stalled",
        "_wants",
        "speeds",
    )

    def __init__(self, policy: ResolvedPolicy, mover: LayerMover) -> None:
        self._wants = policy.codec is not None and has_link(policy)
        self._auto = policy.codec == "auto"
        self.speeds: tuple[float, float] | None = None
        self._mover = mover
        self._plan: Plan | None = None  # of the pass before
        self._passes = 0  # with that plan, before the one that runs
        self._known: Plan | None = None  # what was measured
        self._count = 0  # measured with that plan
        self._fastest: MeasuredPass | None = None  # of these
        self._decided: MeasuredPass | None = None  # what `take` returned last
        self._stalled = 0.0
        self._begun: float | torch.Event | None = None
        self._ended: float | torch.Event | None = None

    def begin(self) -> None:
        """Begin to measure, if the pass that begins is one to be measured."""
        if not self._wants:
            return
        before, plan = self._plan, self._mover.plan
        self._plan, self._begun, self._ended = plan, None, None
        self._passes = self._passes + 1 if plan is before else 0
        if plan is not before:
            self._count, self._fastest = 0, None
        if plan is None or self._passes < _UNSETTLED_PASSES:
            return
        if not self._auto and not plan.kept_coded:
            return
        if self._is_known(plan) and not self._is_due():
            return
        # Waits for the pass before, a few times for each set of residents.
        self._stalled = self._mover.engine.stall_seconds()
        self._begun = self._mark()

    def _is_known(self, plan: Plan) -> bool:
        """Tell whether passes with the same residents were measured."""
        known = self._known
        return known is not None and (
            plan is known
            or (plan.resident, plan.kept_coded) == (known.resident, known.kept_coded)
        )

    def _is_due(self) -> bool:
        """Tell whether it is time to measure again what is known."""
        passes = self._passes
        return self._auto and passes >= _FIRST_AGAIN and passes & (passes - 1) == 0

    def end(self, *, complete: bool) -> None:
        """Note that the pass has ended."""
        if self._begun is not None:
            self._ended = self._mark() if complete else None

    def take(self) -> MeasuredPass | None:
        """Return the fastest pass that was measured, once others are no faster.

        Later ones are returned that are faster than what was returned before. What was
        measured is of the plan that the device still follows.
        """
        begun, ended, plan = self._begun, self._ended, self._plan
        self._begun = self._ended = None
        if begun is None or ended is None:
            return None
        if plan is None or plan is not self._mover.plan:
            return None
        if isinstance(begun, float) or isinstance(ended, float):
            assert isinstance(begun, float) and isinstance(ended, float)
            seconds = ended - begun
        else:
            ended.synchronize()
            seconds = begun.elapsed_time(ended) / 1e3
        stalled = self._mover.engine.stall_seconds() - self._stalled
        measured = MeasuredPass(seconds=seconds, stalled_seconds=min(stalled, seconds))
        if self._is_known(plan):
            assert self._decided is not None, "known is what was returned"
            if seconds >= _STILL_FASTER * self._decided.seconds:
                return None
            self._decided = measured
            return measured
        fastest, self._count = self._fastest, self._count + 1
        if fastest is None or seconds < fastest.seconds:
            self._fastest = measured
        settled = fastest is not None and seconds >= _STILL_FASTER * fastest.seconds
        if not settled and self._count < _MOST_PASSES:
            return None
        self._known, self._decided = plan, self._fastest
        return self._fastest

    def _mark(self) -> float | torch.Event:
        device = self._mover.memory.device
        if device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(device, enable_timing=True)
        event.record(torch.accelerator.current_stream(device.index))
        return event
