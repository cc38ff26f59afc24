"""What says for a tensor at rest that it is on the compute device, if a model asks.

[Note: stand-ins]
``torch.arange(n, device=self.child.weight.device)`` and ``mask.to(self.device)`` ask a
tensor for its device outside its layer's forward, where it rests in host RAM, and what
the model makes of the answer does not go together with what it computes. The probe sees
who is asked. From then on, from the beginning of the outermost call to its end, such a
tensor that is not bound is one element on the compute device, expanded to the shape,
in the dtype that it has in its forward. The element is NaN: what a model reads there on
a path that no probe saw, it cannot take for a weight. (Integers have no such value, and
nothing stands in for them.) What it writes there is refused when the layer is bound
next; other data (``weight.data = new``) is taken over then, as from any tensor at rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .codec import is_movable
from .layer import Layer
from .master import Master
from .member import Member, rest_members, version_of

PLACES = frozenset({"device", "is_cuda", "is_cpu", "is_xpu", "is_mps", "get_device"})


class StandIns:
    """Has tensors at rest stand in for themselves while the model runs.

    Args:
        device: the compute device.
    """

    __slots__ = ("_active", "_device", "_elements", "_layers", "_names")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._elements: dict[torch.dtype, torch.Tensor] = {}
        self._names: set[str] = set()  # of tensors; they outlive the layers
        self._layers: list[Layer] = []  # that have some
        self._active = False

    def set_layers(self, layers: Sequence[Layer]) -> None:
        """Take other layers, all of which rest."""
        self._elements = {}
        for layer in layers if self._names else ():
            layer.asked = [
                (master, member)
                for master in layer.masters
                for member in master.members
                if member.name in self._names and self._can_stand_in(member)
            ]
        self._layers = [layer for layer in layers if layer.asked]

    def note(self, layer: Layer, tensor: torch.Tensor) -> None:
        """Learn that a model asks a tensor at rest where it is."""
        for master in layer.masters:
            for member in master.members:
                if member.tensor is not tensor or not self._can_stand_in(member):
                    continue
                if member.name not in self._names:
                    self._names.add(member.name)
                    self.drop(layer)
                    if not layer.asked:
                        self._layers.append(layer)
                    layer.asked = [*layer.asked, (master, member)]
                self.put_up(layer)

    def begin(self) -> None:
        """Put up those of all layers that are not bound: the model runs."""
        self._active = True
        for layer in self._layers:
            self.put_up(layer)

    def end(self) -> None:
        """Have all tensors be what they are at rest."""
        self._active = False
        for layer in self._layers:
            self.drop(layer)

    def put_up(self, layer: Layer) -> None:
        """Put up those of one layer, unless it is bound or the model does not run."""
        if not layer.asked or not self._active or layer.poses or layer.stands_in:
            return
        if layer.bound or layer.away or layer.stays_bound:
            return
        layer.poses = True  # first: an interrupt leaves some of them up
        with torch.inference_mode(False):
            for master, member in layer.asked:
                element = self._element(master, member)
                # First, or behind an interrupt it would seem to be the program's data.
                member.bound_pointer = element.data_ptr()
                member.set_data(element.expand(member.shape))

    def drop(self, layer: Layer) -> None:
        """Have those of one layer be what they are at rest.

        Other data that one was given meanwhile stays: who binds the layer looks at it.
        """
        if layer.poses:
            rest_members(m for _, m in layer.asked if not _has_other_data(m))
            layer.poses = False

    def require_unwritten(self, layer: Layer) -> None:
        """Raise if a forward wrote to one instead of to the weight.

        Raises:
            RuntimeError: It did; nothing has changed, and the next forward is probed.
        """
        if not layer.poses:
            return
        written = [
            member.name
            for _, member in layer.asked
            if version_of(member.tensor) != member.version
        ]
        if not written:
            return
        self._elements = {}
        self.end()
        raise RuntimeError(
            f"{', '.join(written)}: a module wrote to it before its own module was "
            "called, on a path that no forward took before, and the value is lost. The "
            "weight is as it was, and the next forward looks for such writes: call the "
            "model again"
        )

    def holds(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor stands in for itself at the moment."""
        if not self._elements or tensor.device.type != self._device.type:
            return False
        pointer = tensor.data_ptr()
        return any(pointer == element.data_ptr() for element in self._elements.values())

    def pause(self) -> bool:
        """Have all tensors be what they are at rest; tell whether `begin` undoes it."""
        active = self._active
        self.end()
        return active

    def _can_stand_in(self, member: Member) -> bool:
        tensor = member.tensor
        plain = member.stays and not member.is_packed and is_movable(tensor)
        floating = tensor.dtype.is_floating_point and tensor.numel() > 0
        return plain and floating and self._rests_elsewhere(member)

    def _rests_elsewhere(self, member: Member) -> bool:
        return member.rest.device.type != self._device.type

    def _element(self, master: Master, member: Member) -> torch.Tensor:
        dtype = master.codec.value_dtype if member.castable else member.dtype
        element = self._elements.get(dtype)
        if element is None:
            element = torch.full((), torch.nan, dtype=dtype, device=self._device)
            self._elements[dtype] = element
        return element


def _has_other_data(member: Member) -> bool:
    return member.tensor.data_ptr() not in (member.bound_pointer, member.rest_pointer)
