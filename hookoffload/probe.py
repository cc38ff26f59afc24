"""The probe: sees a tensor used while its layer is not bound.

``F.linear(x, self.child.weight)`` reads a weight without calling the module that owns
it, so that no hook of that module runs. While the probe is on (the first pass, and the
first after an exception) every call of a torch function is looked at; a managed tensor
among the arguments whose layer is not bound is bound on the spot, for the length of
that call (or of the module's, if the result is a view), and its layer joins the module
that uses it for later passes.

A torch function mode makes some modules take another path than without one (the fused
paths of multi-head attention look for it), and results would differ in their last
bits. The probe steps aside inside those, and inside atomic layers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .budget import BudgetExceededError
from .calls import count_calls
from .layer import Layer
from .probe_mode import ProbeMode
from .refusals import NotCopied
from .stand_ins import PLACES
from .torch_calls import METADATA, VIEWS, name_of, property_of

if TYPE_CHECKING:
    from .hooks import Site
    from .session import Session

_OURS = str(Path(__file__).parent) + os.sep
_MODE = str(Path(__file__).with_name("probe_mode.py"))

_STEPS_ASIDE = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerEncoder,
)


class _User(NotCopied):
    """Hooks that tell the probe which module runs, for modules without layers."""

    __slots__ = ("handles", "module", "name", "probe", "session")

    def __init__(self, probe: Probe, name: str, module: nn.Module) -> None:
        self.probe = probe
        self.session = probe.session
        self.name = name
        self.module = module
        self.handles: list[RemovableHandle] = []

    def pre(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.probe.note_begin(self.name, module)

    def post(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        try:
            return self.probe.keep_clear(self.name, module, args, kwargs, output)
        finally:
            self.probe.note_end(self.name)


class Probe:
    """Watches one pass of one thread.

    Args:
        session: whose layers to watch.

    Attributes:
        joined: pairs of a module's name and a tensor's: the module used the tensor
            while its layer was not bound.
        enclosing: for the name of each site that was called, the names of the modules
            that were around it in every call.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._layers: dict[int, tuple[Layer, str]] = {
            id(tensor): (layer, member.name)
            for layer in session.layers
            for piece in layer.pieces
            for member in piece.master.members
            for tensor in (member.tensor, *member.holders)
            if id(member.tensor) not in session.read_in_place
        }
        self._users: list[_User] = []
        # Modules that run: name, and the layers bound on the spot for them.
        self._stack: list[tuple[str, list[Layer]]] = []
        self._aside = 0
        self._on = False  # looking
        self._mode = ProbeMode(self)
        self._away = 0
        self.joined: list[tuple[str, str]] = []
        self.enclosing: dict[str, frozenset[str]] = {}

    def begin(self, *, compiled: bool) -> None:
        """Hang the probe's hooks on the model and start to look.

        Args:
            compiled: the call of the root is: its graphs see no mode of PyTorch's.
        """
        sites = {id(site.module): site for site in self.session.sites}
        for name, module in self.session.model.named_modules():
            site = sites.get(id(module))
            if module is self.session.model:
                continue  # it is at the bottom of the stack
            if site is not None or self._inside_atomic(module):
                continue
            user = _User(self, name, module)
            self._users.append(user)
            user.handles.append(
                module.register_forward_pre_hook(user.pre, prepend=True)
            )
            user.handles.append(
                module.register_forward_hook(
                    user.post, with_kwargs=True, always_call=True
                )
            )
        self._stack = [("", [])]
        self._aside = 0
        self._mode.begin(self.session.model, compiled=compiled)
        self._on = True

    def end(self) -> list[tuple[str, str]]:
        """Stop to look, take the hooks off.

        Returns:
            Pairs of a module's name and a tensor's name: the module used the tensor
            while its layer was not bound.
        """
        for user in self._users:
            for handle in user.handles:
                handle.remove()
        self._users = []
        while self._stack:
            for layer in reversed(self._stack.pop()[1]):
                self.session.release(layer)
        self._on = False
        self._mode.end()
        return self.joined

    def abandon(self) -> None:
        """Stop to look after an interrupted pass, whose bindings are gone already."""
        self._stack = []
        self.end()

    def look_away(self, levels: int) -> None:
        """Look away one level more (1) or less (-1)."""
        self._away = max(self._away + levels, 0)

    def keep_clear(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Keep what a module takes along clear of what was bound on the spot for it.

        Returns:
            The output to use instead; None if it is fine as it is.
        """
        if not self._on or self._stack[-1][0] != name or not self._stack[-1][1]:
            return None
        escapes = self.session.escapes
        escapes.clear_inputs(args, kwargs, name)
        escapes.clear_all_attributes(module, name)
        return None if output is None else escapes.outside_window(output, name)

    def is_watching(self) -> bool:
        """Tell whether this thread is in the pass that the probe looks at."""
        return self._on and count_calls(self.session.model) > 0

    def enter(self, site: Site) -> None:
        """Note that a site's module runs."""
        if self._on:
            around = frozenset(name for name, _ in self._stack)
            self.enclosing[site.name] = self.enclosing.get(site.name, around) & around
        self.note_begin(site.name, site.module)

    def note_kept(self, site: Site) -> None:
        """Note that a site's output had to be copied: only its own hooks do that."""
        self.enclosing[site.name] = frozenset()

    def leave(self, site: Site) -> None:
        """Note that a site's module has ended."""
        self.note_end(site.name)

    def note_begin(self, name: str, module: nn.Module) -> None:
        """Note that a module runs; step aside if the probe would change its path."""
        if not self._on:
            return
        self._stack.append((name, []))
        atomic = id(module) in self.session.atomic
        if self._aside or atomic or isinstance(module, _STEPS_ASIDE):
            self._aside += 1
            if self._aside == 1 and not self._mode.take_off():
                self._aside = 0

    def note_end(self, name: str) -> None:
        """Note that a module has ended; release what was bound for it."""
        if not self._on or len(self._stack) < 2 or self._stack[-1][0] != name:
            return  # its pre hook did not run
        for layer in reversed(self._stack.pop()[1]):
            self.session.release(layer)
        if self._aside:
            self._aside -= 1
            if not self._aside:
                self._mode.put_on()

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Bind what a torch function uses, then call it."""
        if torch.compiler.is_compiling() or not self._on or self._away:
            return func(*args, **kwargs)  # Dynamo traces this with tensors of its own
        if not kwargs and self._layers.keys().isdisjoint(map(id, args)):
            for value in args:
                if isinstance(value, list | tuple):
                    break
            else:  # most calls: nothing that is managed, nowhere to look for it
                return func(*args)
        if _is_called_by_library():
            return func(*args, **kwargs)
        sets_data = _sets_data(func)
        bound: list[Layer] = []
        try:
            self._look(func, args, bound)
            if kwargs:
                self._look(func, kwargs.values(), bound)
            result = func(*args, **kwargs)
        except BaseException:
            self._release(bound)
            raise
        in_place = any(result is value for value in args)
        is_view = not in_place and bound and self.session.escapes.in_window(result)
        if sets_data:
            self._note_other_data(args[0])
        if is_view or sets_data:
            # A view of the weight, or other data that it has in this forward: either
            # may be used until the module has ended.
            self._stack[-1][1].extend(bound)
        else:
            self._release(bound)
        return result

    def _note_other_data(self, tensor: torch.Tensor) -> None:
        """Let a tensor that forwards give other data never stay bound behind them."""
        found = self._layers.get(id(tensor))
        for master in () if found is None else found[0].masters:
            for member in master.members:
                if member.tensor is tensor:
                    member.stays = False

    def _release(self, layers: list[Layer]) -> None:
        for layer in reversed(layers):
            self.session.release(layer)

    def _look(self, func: Callable[..., Any], values: Any, bound: list[Layer]) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                found = self._layers.get(id(value))
                if found is None or found[0].bound or found[0].stands_in:
                    continue
                if not PLACES.isdisjoint((property_of(func), name_of(func))):
                    self.session.mover.stand_ins.note(found[0], value)
                else:
                    self._use(func, *found, bound)
            elif isinstance(value, list | tuple):
                self._look(func, value, bound)

    def _use(
        self, func: Callable[..., Any], layer: Layer, name: str, bound: list[Layer]
    ) -> None:
        stays = layer.stays_bound and not _sets_data(func)
        if stays or not self._needs_bytes(func, layer):
            return
        if not count_calls(self.session.model):
            self._on = False  # left over from a pass that Ctrl-C ended
            return
        if layer.stays_bound:  # nor will it again, see `_note_other_data`
            self.session.mover.unbind_resident(layer)
        self.joined.append((self._stack[-1][0], name))
        try:
            self.session.bind(layer, aside=True)
        except BudgetExceededError:
            if not layer.readable_at_rest:
                raise
            return  # the compute device can use it where it rests
        bound.append(layer)

    @staticmethod
    def _needs_bytes(func: Callable[..., Any], layer: Layer) -> bool:
        name = name_of(func)
        if name == "__get__":
            attribute = property_of(func)
            if attribute == "dtype":
                return any(p.master.codec.changes_dtype for p in layer.pieces)
            return attribute in VIEWS
        return name not in METADATA and (name != "__set__" or _sets_data(func))

    def _inside_atomic(self, module: nn.Module) -> bool:
        return id(module) in self.session.inside_atomic


def _sets_data(func: Callable[..., Any]) -> bool:
    return name_of(func) == "__set__" and property_of(func) == "data"


def _is_called_by_library() -> bool:
    """Tell whether the torch function that the probe sees is not the model's doing."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in (__file__, _MODE):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(_OURS)
