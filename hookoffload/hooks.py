"""The hooks: bound methods of small objects, one object a hooked module."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from .calls import count_calls
from .layer import Layer
from .partition import needs_outside_hooks
from .refusals import NotCopied

if TYPE_CHECKING:
    from .session import Session


class Site(NotCopied):
    """A hooked module and the layers that its forward needs.

    [Note: order of hooks] The pre hook is prepended, so that hooks which the user
    registered before (old-style weight norm computes the weight in one) find the
    layer bound. The post hook is always called, also behind an exception.

    Args:
        session: what the module is attached to.
        name: full name of the module.
        module: the module.
        layers: the layers, its own first.
        atomic: the subtree moves as one.
        outside: the hooks hang on no module; the session's global hook calls them
            (see `Session.register_hooks`).
    """

    __slots__ = (
        "_handles",
        "active",
        "atomic",
        "layers",
        "module",
        "name",
        "outside",
        "session",
    )

    def __init__(
        self,
        session: Session,
        name: str,
        module: nn.Module,
        layers: tuple[Layer, ...],
        *,
        atomic: bool = False,
        outside: bool = False,
    ) -> None:
        self.session = session
        self.name = name
        self.module = module
        self.layers = layers
        self.atomic = atomic
        self.outside = outside
        self.active = 0
        self._handles: list[RemovableHandle] = []

    def register(self) -> None:
        """Hang the hooks on the module."""
        if self._handles or self.outside:
            return
        # One by one: what is registered must be known if the next one fails.
        self._handles.append(
            self.module.register_forward_pre_hook(
                self.pre, prepend=True, with_kwargs=True
            )
        )
        self._handles.append(
            self.module.register_forward_hook(self.post, always_call=True)
        )

    def remove(self) -> None:
        """Take the hooks off the module."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def pre(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Bind the layers; move the inputs if nothing around this call did."""
        session = self.session
        if module is not self.module:
            raise RuntimeError(
                f"{self.name or 'the model'} was copied (nn.DataParallel, replicate) "
                "while offload hooks are attached, and the copy cannot be offloaded. "
                "Call detach(model) first"
            )
        session.enter_call()
        if session.ended:
            session.leave_call()
            return None
        if self.active and count_calls(module) <= self.active:
            session.recover()  # an earlier call never reached its post hook
        self.active += 1
        entered: list[Layer] = []
        try:
            if session.calls.depth == 1:
                session.begin_outermost_call()
            for layer in self.layers:
                session.bind(layer)
                entered.append(layer)
            if session.probe is not None:
                session.probe.enter(self)
        except BaseException:
            self.active -= 1
            for layer in entered:
                session.release(layer)
            session.leave_call()
            raise
        if session.calls.depth == 1:
            return session.to_compute_device((args, kwargs))  # type: ignore[no-any-return]
        return None

    def post(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Release the layers; keep the output clear of memory that is reused."""
        if not self._began(module):
            return None
        session = self.session
        if session.probe is not None:
            session.probe.leave(self)
        try:
            kept = session.checked_output(self, args, output)
        finally:
            self.active -= 1
            for layer in reversed(self.layers):
                session.release(layer)
            session.leave_call()
        return kept

    def finish(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Do what there is to do behind a forward."""
        return self.post(module, args, output)

    def forget_calls(self) -> None:
        """Start anew after an interrupted call."""
        self.active = 0

    def _began(self, module: nn.Module) -> bool:
        """Tell whether the pre hook of the call that ends here did its work.

        It did not if another pre hook, or this one, raised. Then the count belongs to
        calls further out.
        """
        if module is not self.module or self.active == 0:
            return False
        return sys.exc_info()[0] is None or count_calls(module) <= self.active


class GatherSite(Site):
    """An embedding whose rows are looked up in the master.

    The table is neither moved nor resident: an embedding reads a few rows of it, so
    the rows cross the link, not the table. During the forward the weight is one row of
    zeros, expanded to the table's shape; the post hook returns the true rows.
    """

    __slots__ = ("_gathering",)

    def __init__(
        self, session: Session, name: str, module: nn.Module, layer: Layer
    ) -> None:
        super().__init__(session, name, module, (layer,))
        self._gathering = False

    def register(self) -> None:
        """Hang the hooks on the module."""
        if self._handles:
            return
        self._handles.append(
            self.module.register_forward_pre_hook(
                self.pre, prepend=True, with_kwargs=True
            )
        )
        self._handles.append(
            # In front of the user's hooks, which must see the true rows.
            self.module.register_forward_hook(
                self.finish, prepend=True, with_kwargs=True, always_call=True
            )
        )

    def pre(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Bind the stand-in row, unless the table is on the device anyway."""
        layer = self.layers[0]
        weight = module._parameters.get("weight")
        ours = any(m.tensor is weight for p in layer.pieces for m in p.master.members)
        if layer.bound or layer.keep or not ours:
            self._gathering = False
            return super().pre(module, args, kwargs)
        session = self.session
        session.enter_call()
        if session.ended:
            session.leave_call()
            return None
        if self.active and count_calls(module) <= self.active:
            session.recover()
        self.active += 1
        self._gathering = True
        try:
            session.bind_stand_in(layer)
            if session.probe is not None:
                session.probe.enter(self)
        except BaseException:
            self.active -= 1
            self._gathering = False
            session.leave_call()
            raise
        if session.calls.depth == 1:
            return session.to_compute_device((args, kwargs))  # type: ignore[no-any-return]
        return None

    def finish(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Return the rows, looked up where the table rests."""
        if not self._gathering:
            return self.post(module, args, output)
        if not self._began(module):
            return None
        self._gathering = False
        session = self.session
        layer = self.layers[0]
        try:
            if session.probe is not None:
                session.probe.leave(self)
            session.take_stand_in_away(layer)
            if not isinstance(output, torch.Tensor):
                return None
            session.refuse_gradient(self, output, args)
            indices = args[0] if args else kwargs["input"]
            table = layer.masters[0].members[0].rest
            rows = functional.embedding(indices.to(table.device), table)
            session.count_moved(layer, rows.nbytes)
            return rows.to(dtype=output.dtype).to(output.device, non_blocking=True)
        finally:
            self.active -= 1
            session.leave_call()


class OutsideHooks:
    """PyTorch's global module hooks, for modules that may not have hooks of their own.

    They exist for as long as such a module is attached, and look at one dictionary
    for every module that is called anywhere.
    """

    __slots__ = ("_sites",)

    def __init__(self, sites: Mapping[int, Site | RootHooks]) -> None:
        self._sites = sites

    def register(self, handles: list[RemovableHandle]) -> None:
        """Register with PyTorch; adds the handles that undo it to ``handles``."""
        handles.append(torch_module.register_module_forward_pre_hook(self._pre))
        # Without kwargs: PyTorch never forgets that a global hook wanted them.
        handles.append(
            torch_module.register_module_forward_hook(self._post, always_call=True)
        )

    def _pre(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        site = self._sites.get(id(module))
        if site is None:
            return None
        moved = site.pre(module, args, {})
        return None if moved is None else moved[0]

    def _post(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        output: Any,
    ) -> Any:
        site = self._sites.get(id(module))
        if site is None:
            return None
        if isinstance(site, RootHooks):
            return site.post(module, args, {}, output)
        return site.finish(module, args, {}, output)


def can_gather(module: nn.Module) -> bool:
    """Tell whether a module is an embedding that only looks rows up."""
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None
    )


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
        session = self.session
        if module is not self.module:
            raise RuntimeError(
                f"a copy of {type(module).__name__} (nn.DataParallel, replicate) was "
                "called while offload hooks are attached to the original. Call "
                "detach(model) first"
            )
        session.enter_call()
        if session.ended:
            session.leave_call()
            return None
        if session.calls.depth > 1 and session.is_left_behind(self):
            session.recover()
        outermost = session.calls.depth == 1
        self.active += 1
        begun = False
        try:
            inputs = None
            if outermost:
                inputs = session.begin_pass(args, kwargs)
                begun = True
            site = session.root_site
            if site is not None:
                site.pre(module, args, kwargs)
            self._sites.append(site)
        except BaseException:
            self.active -= 1
            if begun:
                session.end_pass(complete=False)
            session.leave_call()
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
        if module is not self.module or self.active == 0:
            return None
        failed = sys.exc_info()[0] is not None
        if failed and count_calls(module) > self.active:
            return None  # this call's own pre hook failed
        session = self.session
        kept = None
        try:
            site = self._sites.pop()
            if site is not None:
                kept = site.finish(module, args, kwargs, output)
            if session.probe is not None and output is not None:
                seen = output if kept is None else kept
                clear = session.probe.outside_window(seen)
                kept = kept if clear is None else clear
        except BaseException:
            failed, output = True, None
            raise
        finally:
            self.active -= 1
            try:
                if session.calls.depth == 1:
                    session.end_pass(complete=not (failed and output is None))
            finally:
                session.leave_call()
        return kept
