"""Who owns a model: calls that run in it, or what a program does to it by hand."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .calls import CallTracker, calls_under_way
from .graph_guard import take_off_left_guards
from .probe_mode import take_off_left_modes

if TYPE_CHECKING:
    from .root_hooks import RootHooks
    from .session import Session

logger = logging.getLogger(__name__)


class Ownership:
    """Gets one session ready for its owners, and cleans up behind them.

    Which thread may come in is decided by its `CallTracker`, see [Note: who runs].

    Args:
        session: whose model it is.
        calls: tracks who is inside of it.

    Attributes:
        call_begun: whether the session is ready for calls.
        torn: whether an interrupt came in the middle of a hook.
    """

    __slots__ = ("_calls", "_session", "call_begun", "torn")

    def __init__(self, session: Session, calls: CallTracker) -> None:
        self._session = session
        self._calls = calls
        self.call_begun = False
        self.torn = False

    # -- calls ----------------------------------------------------------------------

    def enter_call(self) -> None:
        """Let the current thread in, after those that are inside."""
        if self._calls.enter() or (self.torn and self._calls.depth == 1):
            self._forget_interrupted_calls()

    def leave_call(self) -> None:
        """Come out of one hooked call."""
        if self._calls.depth == 1:
            self._end_outermost_call()
        self._calls.leave()

    def begin_outermost_call(self) -> None:
        """Get ready for calls, of the root or of a part."""
        if self.call_begun:
            return
        take_off_left_modes()
        take_off_left_guards()
        session = self._session
        session.store.check_unchanged()
        if session.group is not None:
            session.group.begin(session)
        if not session.all_stay:
            session.escapes.guard_graph()
        if not session.placement.onloaded:
            session.placement.onload()
        session.mover.engine.see_filled()
        session.always.enter()
        self.call_begun = True

    def _end_outermost_call(self) -> None:
        self.call_begun = False
        session = self._session
        session.escapes.drop_guard()
        session.mover.stand_ins.end()
        session.always.leave(training=session.model.training)

    # -- by hand --------------------------------------------------------------------

    @contextmanager
    def by_hand(self, what: str) -> Iterator[None]:
        """Own the model for what a program does to it between two forwards.

        Raises:
            RuntimeError: The model is running in this thread.
        """
        session = self._session
        if self._calls.enter(by_hand=True) or (self.torn and self._calls.depth == 1):
            self._forget_interrupted_calls()
        try:
            if session.ended:
                raise RuntimeError(
                    f"{what}: {session.label} was detached by another "
                    "thread in the meantime; call attach_offload_hooks first"
                )
            self.require_no_call(what)
            # Or they would go with the copies that wait in RAM.
            session.edits.take_over_writes()
            if what not in ("detach", "set_limit"):  # that knows the limit to come
                session.edits.take_over_untied()
            yield
        except BaseException as error:
            self.torn |= not isinstance(error, Exception)
            raise
        finally:
            self._calls.leave()

    def require_no_call(self, what: str) -> None:
        """Raise if this thread is inside the model; clean up if it no longer is."""
        if self._calls.depth == 1:
            return
        if self._calls.runs_here() or self._calls.is_guest:
            raise RuntimeError(
                f"{what} was called from inside the model's own forward; call it "
                "between two forwards"
            )
        self.recover()

    # -- behind an interrupt --------------------------------------------------------

    def is_left_behind(self, root: RootHooks) -> bool:
        """Tell whether the levels around a call of the root are a dead call's."""
        called = list(calls_under_way())
        inside = sum(module is root.module for module in called)
        if root.active:
            return inside <= root.active
        # The innermost is the call of the root that asks.
        return not any(self._calls.knows(module) for module in called[1:])

    def recover(self) -> None:
        """Clean up behind a call that never reached its post hook (Ctrl-C).

        The thread stays the owner all the time, and is at the outermost level then:
        that of the call which noticed.
        """
        self._forget_interrupted_calls()
        self._calls.back_to_outermost()

    def _forget_interrupted_calls(self) -> None:
        logger.info("cleaning up behind an interrupted forward")
        session = self._session
        session.passes.retire_probe()
        for site in (*session.sites, *session.entries):
            site.forget_calls()
        session.root.forget_calls()
        self._end_outermost_call()
        session.state_hooks.forget_calls()
        session.merges.take_over()  # while residents have what was merged
        session.edits.untie()  # before what is bound is taken for a forward's doing
        session.mover.drop_all()
        session.passes.interrupted()
        self.torn = False
