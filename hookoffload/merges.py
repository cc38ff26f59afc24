"""Adapters that are merged into weights, which no version counter notices.

[Note: merges] peft merges, unmerges and fuses by ``weight.data += delta``, between two
forwards. PyTorch counts that nowhere, and the weight stays where it is. What lies in
RAM has the sum then, and what was copied ahead, is coded or waits in a file has not; a
resident has it, and its master has not. So the adapters' layers themselves are looked
at, wherever somebody could notice: before a pass, for a state dict, and before anything
moves by hand. peft keeps in ``merged_adapters`` what is merged.

Between two looks a layer can be wrapped, merged and unwrapped again
(``get_peft_model(model, config).merge_and_unload()``), and then nothing in the model
tells of it. But the wrapper took the layer as its child, and PyTorch has a global hook
for that.

Adapters that are switched, merged or disabled take forwards along other paths, on which
tensors may be read sideways: the probe looks at the next pass.

peft makes adapters where the base lies at that moment, which may be the compute device.
They are the base's, and go home with it.

Hot-swapped adapters (``load_lora_weights(..., hotswap=True)``) are written to by
``lora_A.weight.data.copy_``, of which nothing tells afterwards. But peft compares them
with the model's state dict first. So what is not of the base layers counts as written
to behind every state dict.

What a layer does in its own forward comes too late: the weight is on its way by then. A
merged layer whose adapters are disabled is unmerged there, so that is done before.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from .adapter_layers import BASE, has_merges
from .member import Member, version_of

if TYPE_CHECKING:
    from .session import Session


class _Watched:
    """A layer of adapters, and what was merged at the last look."""

    __slots__ = ("_adapters", "_names", "layer", "path", "seen")

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.seen: object = None  # its adapters may have changed the weight when made
        self.path: object = None
        self._names: tuple[str, ...] = ()
        self._adapters: list[torch.Tensor] = []

    def merged(self) -> object:
        """Return what the sum in the weight depends on; equal for equal sums."""
        names = tuple(self.layer.merged_adapters)
        if not names:
            return ()
        if names != self._names:
            own = self.layer.named_parameters()
            self._adapters = [p for n, p in own if not n.startswith(BASE)]
            self._names = names
        scaling = getattr(self.layer, "scaling", None)
        scales = dict(scaling) if isinstance(scaling, dict) else None
        return names, scales, [version_of(p) for p in self._adapters]

    def taken(self) -> object:
        """Return what decides how its forward goes."""
        layer = self.layer
        active = getattr(layer, "active_adapters", ())
        return bool(layer.merged_adapters), layer.disable_adapters, tuple(active)

    def forget_adapters(self) -> None:
        """List its adapters anew when it is looked at."""
        self._names = ()


class Merges:
    """The layers of adapters in one session's model.

    Args:
        session: whose model it is.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._watched: dict[int, _Watched] = {}
        self._fresh = False  # some were made since stock was taken
        self._at_home: set[Member] | None = None  # those known; None: not yet attached
        self._doubted = False  # the adapters may have been written to

    def take_stock(self) -> None:
        """Look which layers of adapters the model has."""
        found = {}
        for module in self._session.model.modules():
            if has_merges(module):
                known = self._watched.get(id(module))
                found[id(module)] = known or _Watched(module)
                found[id(module)].forget_adapters()
                if known is None:
                    watched = found[id(module)]
                    watched.seen, watched.path = watched.merged(), watched.taken()
        self._watched, self._fresh = found, False
        self._bring_home()
        _follow(self)

    def _bring_home(self) -> None:
        """Have adapters that came while the model is attached leave with their base."""
        find = self._session.inventory.find
        now: set[Member] = set()
        for watched in self._watched.values():
            base = watched.layer._modules[BASE]
            homes = [f[1].device for p in base.parameters() if (f := find(p))]
            for parameter in watched.layer.parameters():
                found = find(parameter)
                if found is None:
                    continue
                member = found[1]
                now.add(member)
                if self._at_home is not None and member not in self._at_home and homes:
                    member.device = homes[0]
        self._at_home = now

    def forget(self) -> None:
        """Drop what refers to the model, behind detach."""
        self._watched, self._at_home = {}, None
        _leave(self)

    def wrapped(self, layer: nn.Module, base: nn.Module) -> None:
        """Watch a layer of adapters that was made around a module, if it is managed."""
        find = self._session.inventory.find
        if any(find(p) is not None for p in base.parameters()):
            self._watched.setdefault(id(layer), _Watched(layer))
            self._fresh = True

    def forget_unwrapped(self) -> None:
        """Drop layers that were made and unwrapped again since stock was taken."""
        if self._fresh:
            self.take_stock()

    def doubt_adapters(self) -> None:
        """Take the adapters for written to at the next look: somebody compares them."""
        self._doubted = True

    def take_over(self) -> None:
        """Notice what was merged, unmerged and hot-swapped since the last look."""
        written: list[nn.Module] = []
        changed: list[tuple[_Watched, object]] = []
        for watched in list(self._watched.values()):
            merged = watched.merged()
            if merged != watched.seen:
                written.append(watched.layer._modules[BASE])
                changed.append((watched, merged))
            if self._doubted:
                parts = watched.layer._modules.items()
                written += [p for name, p in parts if p is not None and name != BASE]
            path = watched.taken()
            if path != watched.path:
                self._session.passes.probe_next()
                watched.path = path
        if written:
            self._session.edits.note_data_writes(written)
        # Last: behind an interrupt the next look does all of it again.
        for watched, merged in changed:
            watched.seen = merged
        self._doubted = False

    def unmerge_disabled(self) -> None:
        """Unmerge what the layers would unmerge in their forwards, being disabled."""
        disabled = [
            watched.layer
            for watched in self._watched.values()
            if watched.layer.merged_adapters and watched.layer.disable_adapters
        ]
        if not disabled:
            return
        self._session.placement.rest_everything()
        with torch.inference_mode(False), torch.no_grad():
            for layer in disabled:
                layer.unmerge()
        self.take_over()


# Weakly: a model that is dropped without detach must not stay for it.
_FOLLOWING: weakref.WeakSet[Merges] = weakref.WeakSet()
_HANDLES: list[RemovableHandle] = []


def _follow(merges: Merges) -> None:
    _FOLLOWING.add(merges)
    if not _HANDLES:
        register = torch_module.register_module_module_registration_hook
        _HANDLES.append(register(_registered))


def _leave(merges: Merges) -> None:
    _FOLLOWING.discard(merges)
    while _HANDLES and not _FOLLOWING:
        _HANDLES.pop().remove()


def _registered(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """Hear of every child that any module is given."""
    if name == BASE and child is not None and hasattr(type(module), "merged_adapters"):
        following: Iterable[Merges] = list(_FOLLOWING)
        for merges in following:
            merges.wrapped(module, child)
