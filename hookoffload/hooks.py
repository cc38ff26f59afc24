"""The hooks: bound methods of small objects, one object a hooked module."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .calls import count_calls
from .compiling import dynamo_is_at_work, outside_graphs
from .layer import Layer
from .refusals import NotCopied

if TYPE_CHECKING:
    from .session import Session


class Site(NotCopied):
    """A hooked module and the layers that its forward needs.

    [Note: order of hooks] The pre hook is prepended, so that hooks which the user
    registered before (old-style weight norm computes the weight in one) find the
    layer bound. The post hook is always called, also behind an exception.

    [Note: compiled code] The hooks swap pointers, which no graph can hold. So each
    steps out if TorchDynamo is at work: while it traces, which ends the graph before
    the hook, and while it runs what is between two graphs, which keeps it from
    compiling what the hook calls. Compiled are the functions that the hooks are around.

    [Note: hooks that stand by] Inside a forward of the root there is nothing to do for
    a module whose layers all stay bound, nor inside a bundle for one that is part of
    it. Then one hook is left, which looks whether the module is called by itself; if so
    it hangs the pair again. Memory of layers that stay bound is their own, so what the
    forward hands out may be a view of it. A bundle's is not: its own hooks clear what
    leaves it and what is kept inside it, and a module whose output was a view of a
    weight when the probe looked is part of none. What makes a layer rest again, in the
    middle of a pass or between two, hangs the pair first (`HookSet.layer_evicted`).
    Nothing runs inside a module that stands by and can have its layer evicted, so that
    is never done to one that is running; where another model could, bundles do not
    stand by.

    Args:
        session: what the module is attached to.
        name: full name of the module.
        module: the module.
        layers: the layers, its own first.
        atomic: the subtree moves as one.
        outside: the hooks hang on no module; the session's global hook calls them
            (see `HookSet`).
        casts_buffers: buffers of the module have another dtype while a call goes on.
    """

    __slots__ = (
        "_handles",
        "active",
        "asked",
        "atomic",
        "attribute_count",
        "bundle",
        "bundled",
        "casts_buffers",
        "layers",
        "module",
        "name",
        "outside",
        "session",
        "stands_by",
        "watched",
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
        casts_buffers: bool = False,
    ) -> None:
        self.session = session
        self.name = name
        self.module = module
        self.layers = layers
        self.atomic = atomic
        self.outside = outside
        self.casts_buffers = casts_buffers
        self.bundle: Site | None = None  # of the module that brings this one's layer
        self.bundled: tuple[Site, ...] = ()  # the sites inside, if this is a bundle's
        self.asked = False  # called in this pass; kept for those inside a bundle only
        self.active = 0
        # Attributes of the module that can come to hold a view, see `Escapes`.
        self.watched: tuple[str, ...] = ()
        self.attribute_count = -1
        self.stands_by = False
        self._handles: list[RemovableHandle] = []

    def register(self) -> None:
        """Hang the hooks on the module."""
        if self.stands_by:
            self.remove()
        if self._handles or self.outside:
            return
        # One by one: what is registered must be known if the next one fails.
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
        """Take the hooks off the module."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.stands_by = False

    @property
    def _is_hung(self) -> bool:
        """Whether the pair of hooks of a call that begins now will run."""
        session = self.session
        return bool(self._handles) or self.outside or self is session.root_site

    @property
    def can_stand_by(self) -> bool:
        """Whether there is nothing to do inside a forward of the root, or a bundle."""
        if self.outside or self.casts_buffers or self.active or not self.layers:
            return False
        if self.bundle is not None:
            return True
        if self.bundled and self.session.group is not None:
            return False  # another model may run inside, and have layers give way
        return all(layer.stays_bound and not layer.held for layer in self.layers)

    def stand_by(self) -> None:
        """Leave one hook, which only looks for calls of the module by itself."""
        self.remove()
        self.stands_by = True
        self._handles.append(
            self.module.register_forward_pre_hook(
                self.look, prepend=True, with_kwargs=True
            )
        )

    def look(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hang the pair again if nothing around this call takes care of the model."""
        # This runs for most modules: no calls but these two. Between two graphs, where
        # `dynamo_is_at_work` as well, there is nothing in it to be compiled.
        if torch.compiler.is_dynamo_compiling():
            return outside_graphs(self._look_in_graph)(module, args, kwargs)
        self.asked = True
        if self.session.calls.owner == threading.get_ident() and module is self.module:
            for layer in self.layers:
                if not (layer.stays_bound or layer.bound):
                    break
            else:
                return None
        return self.pre(module, args, kwargs)

    def pre(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Bind the layers; move the inputs if nothing around this call did."""
        if dynamo_is_at_work():
            return outside_graphs(self._pre_in_graph)(module, args, kwargs)
        session = self.session
        if module is not self.module:
            raise RuntimeError(
                f"{self.name or 'the model'} was copied (nn.DataParallel, replicate) "
                "while offload hooks are attached, and the copy cannot be offloaded. "
                "Call detach(model) first"
            )
        session.ownership.enter_call()
        if session.ended:
            session.ownership.leave_call()
            return None
        if self.stands_by or not self._is_hung:
            # Taken off while this thread waited for another one, or `look` found that
            # it is needed. PyTorch reads the post hooks behind the forward.
            renewed = session.site_of(module)
            if renewed is not self:
                session.ownership.leave_call()
                return None if renewed is None else renewed.pre(module, args, kwargs)
            self.register()
            session.hooks.slim_again()
        try:
            if self.active:
                self.recover_if_left()
            outermost = session.calls.depth == 1
            changed = outermost and session.edits.part_changed()
        except BaseException:
            session.ownership.leave_call()
            raise
        if changed:
            # The layers were made anew, and so were the sites. The post hook that will
            # run is the new one's.
            session.ownership.leave_call()
            renewed = session.site_of(module)
            return None if renewed is None else renewed.pre(module, args, kwargs)
        self.active += 1
        self.asked = True
        entered: list[Layer] = []
        try:
            if outermost:
                session.passes.begin_part(self.name, args, kwargs)
            elif self.bundle is not None and not self.layers[0].is_usable:
                session.units.divide(self.bundle.name)
            for layer in self.layers:
                session.bind(layer)
                entered.append(layer)
            if session.probe is not None:
                session.probe.enter(self)
        except BaseException as error:
            session.ownership.torn |= not isinstance(error, Exception)
            self.active -= 1
            for layer in entered:
                session.release(layer)
            session.ownership.leave_call()
            raise
        return session.to_compute_device((args, kwargs)) if outermost else None

    def _look_in_graph(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.atomic:
            self.session.units.note_compiled()
        return self.look(module, args, kwargs)

    def _pre_in_graph(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.atomic:
            self.session.units.note_compiled()
        return self.pre(module, args, kwargs)

    def post(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Release the layers; keep the output clear of memory that is reused."""
        if dynamo_is_at_work():
            return outside_graphs(self.post)(module, args, kwargs, output)
        if not self._began(module):
            return None
        session = self.session
        session.calls.resume()
        escapes, probe = session.escapes, session.probe
        try:
            kept = escapes.checked_output(self, args, kwargs, output)
            escapes.clear_attributes(self)
            if self.bundled:
                escapes.clear_attributes_inside(self)
            if probe is not None:
                seen = output if kept is None else kept
                clear = probe.keep_clear(self.name, module, args, kwargs, seen)
                kept = kept if clear is None else clear
                if kept is not None:
                    probe.note_kept(self)
        finally:
            if probe is not None:
                probe.leave(self)
            self.active -= 1
            try:
                for layer in reversed(self.layers):
                    session.release(layer)
                if session.calls.depth == 1:
                    failed = output is None and sys.exc_info()[0] is not None
                    session.passes.end_part(output, complete=not failed)
            except BaseException:
                session.ownership.torn = True
                raise
            finally:
                session.ownership.leave_call()
        return kept

    def forget_calls(self) -> None:
        """Start anew after an interrupted call."""
        self.active = 0

    def was_wasted(self) -> bool:
        """Tell, once a pass, whether most of a bundle was brought in for nothing."""
        asked = 0
        for site in self.bundled:
            asked += site.asked
            site.asked = False
        return 0 < 2 * asked < len(self.bundled)

    def recover_if_left(self) -> None:
        """Clean up if an earlier call of the module never reached its post hook."""
        if not self.active or self.session.calls.is_guest:
            return
        if count_calls(self.module) <= self.active:
            self.session.ownership.recover()

    def _began(self, module: nn.Module) -> bool:
        """Tell whether the pre hook of the call that ends here did its work.

        It did not if another pre hook, or this one, raised. Then the count belongs to
        calls further out.
        """
        if module is not self.module or self.active == 0:
            return False
        return sys.exc_info()[0] is None or count_calls(module) <= self.active
