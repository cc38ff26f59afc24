"""The hooks on the root module, where passes begin and end."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .calls import count_calls
from .compiling import dynamo_is_at_work, outside_graphs
from .hooks import Site
from .outside_hooks import OutsideHooks
from .partition import needs_outside_hooks
from .refusals import NotCopied

if TYPE_CHECKING:
    from .session import Session


class RootHooks(NotCopied):
    """The pair of hooks on the root: passes begin and end here.

    They also do the work of the root's own site. So the root's hooks stay the same
    from attach to detach, whatever becomes of the sites: PyTorch iterates over them
    while they run, and behind an exception it does so without a copy.
    """

    __slots__ = ("_handles", "_sites", "active", "module", "session")

    def __init__(self, session: Session, module: nn.Module) -> None:
        self.session = session
        self.module = module
        self.active = 0
        self._sites: list[Site | None] = []  # of the calls under way
        self._handles: list[RemovableHandle] = []

    def register(self) -> None:
        """Hang the hooks on the root."""
        if needs_outside_hooks(self.module):
            OutsideHooks({id(self.module): self}).register(self._handles)
            return
        self._handles.append(
            self.module.register_forward_pre_hook(
                self.pre, prepend=True, with_kwargs=True
            )
        )
        self._handles.append(
            self.module.register_forward_hook(
                self.post, with_kwargs=True, always_call=True
            )
        )

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def forget_calls(self) -> None:
        """Start anew after an interrupted call."""
        self.active = 0
        self._sites = []

    def pre(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Begin a pass, bind the root's own layers."""
        if dynamo_is_at_work():
            return outside_graphs(self._begin)(module, args, kwargs, True)
        return self._begin(module, args, kwargs, False)

    def _begin(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        compiled: bool,
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        session = self.session
        if session.ended:
            return None  # it is off by now, and this call knew it before
        if module is not self.module:
            raise RuntimeError(
                f"a copy of {type(module).__name__} (nn.DataParallel, replicate) was "
                "called while offload hooks are attached to the original. Call "
                "detach(model) first"
            )
        ownership, calls = session.ownership, session.calls
        ownership.enter_call()
        if session.ended:
            ownership.leave_call()
            return None
        if calls.depth > 1 and not calls.is_guest and ownership.is_left_behind(self):
            ownership.recover()
        outermost = session.calls.depth == 1
        self.active += 1
        try:
            inputs = None
            if outermost:
                inputs = session.passes.begin(args, kwargs, compiled=compiled)
            site = session.root_site
            if site is not None:
                site.pre(module, args, kwargs)
            self._sites.append(site)
        except BaseException as error:
            session.ownership.torn |= not isinstance(error, Exception)
            self.active -= 1
            if outermost:
                session.passes.end(None, complete=False)
            session.ownership.leave_call()
            raise
        return inputs

    def post(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Release the root's own layers, end the pass."""
        if dynamo_is_at_work():
            return outside_graphs(self.post)(module, args, kwargs, output)
        if module is not self.module or self.active == 0:
            return None
        failed = sys.exc_info()[0] is not None
        if failed and count_calls(module) > self.active:
            return None  # this call's own pre hook failed
        session = self.session
        session.calls.resume()
        kept = None
        try:
            site = self._sites.pop()
            if site is not None:
                kept = site.post(module, args, kwargs, output)
            if session.probe is not None:
                seen = output if kept is None else kept
                clear = session.probe.keep_clear("", module, args, kwargs, seen)
                kept = kept if clear is None else clear
        except BaseException:
            failed, output = True, None
            raise
        finally:
            self.active -= 1
            try:
                if session.calls.depth == 1:
                    session.passes.end(output, complete=not (failed and output is None))
            except BaseException as error:
                session.ownership.torn |= not isinstance(error, Exception)
                raise
            finally:
                session.ownership.leave_call()
        return kept
