"""What a forward may not take along: views of memory that is used again, and gradients.

[Note: escapes]
Behind a forward the bytes of a streamed layer are overwritten by those of another one.
Whatever the forward hands out or keeps that looks at them must not be let go as it is:

* tensors in its output, in the containers and objects among its inputs and in the
  attributes of its module: they become copies, in place;
* a graph for backward through the layer's weights: `RuntimeError` at the output;
* the same graph kept on the side: PyTorch asks a hook about every tensor that it saves
  for backward (`GraphGuard`), from the beginning of the outermost call to its end.

A view that is hidden elsewhere (in a global, in a container that is not among the
inputs) escapes; poisoned memory (``OffloadPolicy(debug=True)``) shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from .calls import CallTracker, calls_under_way
from .containers import replace_tensors, tensors_in, tensors_within
from .device_memory import DeviceMemory
from .graph_guard import GraphGuard
from .layer import Layer
from .master import Master
from .packed import bytes_of
from .refusals import require_no_group_offloading
from .stand_ins import StandIns

if TYPE_CHECKING:
    from .hooks import Site

_PLAIN = (torch.Tensor, int, float, bool, str, type(None))
_FIXED = (nn.Parameter, int, float, bool, str)  # an attribute that is one stays one


class Escapes:
    """Looks at what leaves the forwards of one model.

    Args:
        model: the root module.
        memory: the compute device's.
        calls: who is inside the model.
        stand_ins: those for its tensors at rest.
    """

    def __init__(
        self,
        model: nn.Module,
        memory: DeviceMemory,
        calls: CallTracker,
        stand_ins: StandIns,
    ) -> None:
        self._memory = memory
        self._stand_ins = stand_ins
        self._calls = calls
        self._model_name = type(model).__name__
        self._names: dict[int, str] = {}
        # What packed tensors are made of; whoever holds one shares the master's object.
        self._parts: frozenset[int] = frozenset()
        self._guard: GraphGuard | None = None

    def set_sites(self, sites: Iterable[Site], masters: Iterable[Master]) -> None:
        """Learn the names of modules, for errors, and what moves beside parameters."""
        self._names = {id(site.module): site.name for site in sites}
        self._parts = frozenset(
            id(member.tensor)
            for master in masters
            for member in master.members
            if not isinstance(member.tensor, nn.Parameter)
        )

    # -- views ----------------------------------------------------------------------

    def checked_output(
        self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return an output that is safe to keep when the layers are released.

        Returns:
            The output to use instead; None if it is fine as it is.

        Raises:
            RuntimeError: It would need a gradient through a streamed weight, or cannot
                be kept clear of memory that is used again.
        """
        if not _any_streams(site.layers):
            return None
        self.clear_inputs(args, kwargs, site.name)
        if type(output) is torch.Tensor and output.grad_fn is None:  # nearly always
            return output.clone() if self._is_view(output) else None
        if output is None:
            return None
        for tensor in tensors_within(output):
            if tensor.grad_fn is not None:
                self.refuse_gradient(site, tensor, args)
        return self.outside_window(output, site.name)

    def clear_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
    ) -> None:
        """Copy views of the window that a forward has put into its inputs."""
        for value in (*args, *kwargs.values()):
            if type(value) is not torch.Tensor and not isinstance(value, _PLAIN):
                self._clear(value, self._is_view, name)

    def clear_attributes(self, site: Site) -> None:
        """Copy views of the window that a module has kept in its own attributes."""
        if _any_streams(site.layers):
            self._clear_attributes(site)

    def clear_attributes_inside(self, site: Site) -> None:
        """Do so for the modules inside a bundle, whose own hooks stand by."""
        if not _any_streams(site.layers):
            return
        for inner in site.bundled:
            if inner.watched or len(inner.module.__dict__) != inner.attribute_count:
                self._clear_attributes(inner)

    def _clear_attributes(self, site: Site) -> None:
        attributes = site.module.__dict__
        if len(attributes) != site.attribute_count:
            require_no_group_offloading(site.name or self._model_name, site.module)
            site.attribute_count = len(attributes)
            site.watched = tuple(
                name
                for name, value in attributes.items()
                if name not in _OF_PYTORCH and not _is_fixed(site.module, value)
            )
        self._clear_named(site.module, site.watched, site.name)

    def clear_all_attributes(self, module: nn.Module, name: str) -> None:
        """Copy views of the window that a module has kept, which need be no site's."""
        named = [key for key in module.__dict__ if key not in _OF_PYTORCH]
        self._clear_named(module, named, name)

    def _clear_named(self, module: nn.Module, named: Iterable[str], name: str) -> None:
        attributes = module.__dict__
        for key in named:
            value = attributes.get(key)
            if value is None:
                continue
            cleared = self._clear(value, self._is_view, name)
            if cleared is not None:
                attributes[key] = cleared

    def in_window(self, output: Any) -> bool:
        """Tell whether a tensor among these will have other bytes soon."""
        return any(map(self._is_borrowed, tensors_within(output)))

    def outside_window(self, output: Any, name: str = "") -> Any:
        """Return an output clear of memory that is used again; None if it is so.

        Raises:
            RuntimeError: It cannot be made so.
        """
        if isinstance(output, torch.Tensor):
            return output.clone() if self._is_borrowed(output) else None
        return self._clear(output, self._is_borrowed, name)

    def _clear(
        self, value: Any, is_borrowed: Callable[[torch.Tensor], bool], name: str
    ) -> Any:
        borrowed = {id(t): t for t in tensors_within(value) if is_borrowed(t)}
        if not borrowed:
            return None
        cleared = replace_tensors(
            value, lambda tensor: tensor.clone() if id(tensor) in borrowed else tensor
        )
        if any(id(tensor) in borrowed for tensor in tensors_within(cleared)):
            raise RuntimeError(
                f"{name or self._model_name} returns or keeps a {type(value).__name__} "
                "that holds a view of its streamed weights, which are overwritten "
                "behind its forward, and the view cannot be replaced by a copy there. "
                "Return a tensor or a container of tensors, or clone() the view"
            )
        return cleared

    def _is_borrowed(self, tensor: torch.Tensor) -> bool:
        """Tell whether an output will have other bytes soon.

        A parameter will: its bytes change with its bindings.
        """
        managed = isinstance(tensor, nn.Parameter) or id(tensor) in self._parts
        if managed and tensor.device == self._memory.device:
            return not self._stand_ins.holds(tensor)  # what is at rest goes as it is
        return self._is_view(tensor)

    def _is_view(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor is a view of memory that is used again."""
        memory = self._memory
        if tensor.device != memory.device:
            return False
        # Asking whether a tensor is a Parameter is slow, and most are none.
        if type(tensor) is not torch.Tensor and isinstance(tensor, nn.Parameter):
            return False
        if tensor.layout is not torch.strided or id(tensor) in self._parts:
            return False
        try:
            return self._is_transient(tensor)
        except RuntimeError:
            return True  # wrapped by a transform (vmap, jvp): nobody can say

    def _is_transient(self, tensor: torch.Tensor) -> bool:
        overlaps = self._memory.overlaps_transient
        if type(tensor) is torch.Tensor:  # nearly always, and asked in each hooked call
            return overlaps(tensor.data_ptr())
        return any(overlaps(part.data_ptr()) for part in bytes_of(tensor))

    # -- gradients ------------------------------------------------------------------

    def guard_graph(self) -> None:
        """Have PyTorch ask about what it saves for backward.

        Also under no_grad: a forward can enable gradients for itself.

        Raises:
            RuntimeError: A transform is under way that does not allow it.
        """
        if self._guard is not None:
            return
        guard = GraphGuard(self)
        try:
            guard.enter()
        except RuntimeError as error:
            raise RuntimeError(
                f"{self._model_name} has offload hooks attached, which run inference: "
                f"torch.func's grad, jvp and their kin do not go through ({error}). "
                "Call detach(model) first"
            ) from error
        self._guard = guard

    def drop_guard(self) -> None:
        """Undo `guard_graph`."""
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.leave()

    def is_under_way(self) -> bool:
        """Tell whether this thread is in a call that is guarded."""
        return self._guard is not None and self._calls.runs_here()

    def require_not_kept(self, tensor: torch.Tensor) -> None:
        """Raise if autograd keeps a streamed weight for backward."""
        memory = self._memory
        plain = tensor.device == memory.device and tensor.layout is torch.strided
        if self._calls.depth and plain and self._is_transient(tensor):
            inside = (self._names.get(id(module)) for module in calls_under_way())
            self._refuse(next((name for name in inside if name), ""))

    def refuse_gradient(
        self, site: Site, output: torch.Tensor, args: tuple[Any, ...]
    ) -> None:
        """Raise if an output carries a graph through weights that are gone later.

        Without gradients enabled around it, a forward may pass an input on that has a
        graph of its own; what else has one was made in the forward.
        """
        passed_on = any(output is tensor for tensor in tensors_in(args))
        if output.grad_fn is not None and (torch.is_grad_enabled() or not passed_on):
            self._refuse(site.name)

    def _refuse(self, name: str) -> NoReturn:
        raise RuntimeError(
            f"{name or self._model_name} is streamed, and its output would need a "
            "gradient through weights that are not there any more at backward. "
            "hookoffload runs inference: call the model under torch.no_grad() or "
            "torch.inference_mode(). To train, detach(model), or attach without a "
            "limit (limit_gb=None) where it fits"
        )


# What nn.Module keeps in a module's __dict__ for itself.
_OF_PYTORCH = frozenset(nn.Module().__dict__)


def _is_fixed(module: nn.Module, value: object) -> bool:
    """Tell whether an attribute stays what it is: a number, a name, a shape."""
    if type(value) is tuple:  # elsewhere one may come to hold tensors
        return type(module).__module__.startswith("torch.nn.")
    return isinstance(value, _FIXED)


def _any_streams(layers: Iterable[Layer]) -> bool:
    """Tell whether bytes of bound layers are overwritten behind their forward."""
    for layer in layers:  # in every hooked call: no generator
        if not layer.stays_bound and not (
            layer.resident is not None and layer.can_stay_bound
        ):
            return True
    return False
