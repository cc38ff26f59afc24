"""An embedding whose rows are looked up where its table rests."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import functional

from .compiling import dynamo_is_at_work, outside_graphs
from .hooks import Site
from .layer import Layer

if TYPE_CHECKING:
    from .session import Session


# Looking rows up in the master pays when the table is larger than a few copies.
_GATHER_BYTES = 2**20


class GatherSite(Site):
    """An embedding whose rows are looked up in the master.

    The table is neither moved nor resident: an embedding reads a few rows of it, so
    the rows cross the link, not the table. During the forward the weight is one row of
    zeros, expanded to the table's shape; the post hook returns the true rows.
    """

    __slots__ = ("_gathering", "_row")

    def __init__(
        self, session: Session, name: str, module: nn.Module, layer: Layer
    ) -> None:
        super().__init__(session, name, module, (layer,))
        self._gathering = False
        self._row: torch.Tensor | None = None

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
                self.post, prepend=True, with_kwargs=True, always_call=True
            )
        )

    @property
    def can_stand_by(self) -> bool:
        """Never: whether the table is on the device is asked anew at each call."""
        return False

    def pre(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Bind the stand-in row, unless the table is on the device anyway."""
        if dynamo_is_at_work():
            return outside_graphs(self.pre)(module, args, kwargs)
        layer = self.layers[0]
        weight = module._parameters.get("weight")
        ours = any(m.tensor is weight for p in layer.pieces for m in p.master.members)
        if layer.bound or layer.keep or not ours:
            self._gathering = False
            return super().pre(module, args, kwargs)
        session = self.session
        session.ownership.enter_call()
        if session.ended:
            session.ownership.leave_call()
            return None
        self.recover_if_left()
        self.active += 1
        self._gathering = True
        try:
            self._bind_stand_in(layer)
            if session.probe is not None:
                session.probe.enter(self)
        except BaseException as error:
            session.ownership.torn |= not isinstance(error, Exception)
            self.active -= 1
            self._gathering = False
            session.ownership.leave_call()
            raise
        if session.calls.depth == 1:
            return session.to_compute_device((args, kwargs))
        return None

    def post(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Return the rows, looked up where the table rests."""
        if dynamo_is_at_work():
            return outside_graphs(self.post)(module, args, kwargs, output)
        if not self._gathering:
            return super().post(module, args, kwargs, output)
        if not self._began(module):
            return None
        self._gathering = False
        session = self.session
        session.calls.resume()
        layer = self.layers[0]
        try:
            if session.probe is not None:
                session.probe.leave(self)
            layer.masters[0].put_to_rest()
            layer.stands_in = False
            session.mover.stand_ins.put_up(layer)
            if not isinstance(output, torch.Tensor):
                return None
            session.escapes.refuse_gradient(self, output, args)
            indices = args[0] if args else kwargs["input"]
            rows = _rows(layer.masters[0].members[0].rest, indices, output.device)
            session.count_moved(layer, rows.nbytes)
            return rows.to(output.device, non_blocking=True).to(output.dtype)
        except BaseException as error:
            session.ownership.torn |= not isinstance(error, Exception)
            raise
        finally:
            self.active -= 1
            session.ownership.leave_call()

    def _bind_stand_in(self, layer: Layer) -> None:
        """Point the weight at one row of zeros on the compute device."""
        session = self.session
        session.ownership.begin_outermost_call()
        session.mover.stand_ins.drop(layer)
        layer.revision()
        member = layer.masters[0].members[0]
        dtype = layer.masters[0].codec.compute
        row = self._row
        if row is None or row.dtype != dtype:
            device = session.policy.compute_device
            with torch.inference_mode(False):
                row = torch.zeros(member.shape[1], dtype=dtype, device=device)
            self._row = row
        layer.stands_in = True
        member.tensor.data = row.expand(member.shape)


def _rows(
    table: torch.Tensor, indices: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Look rows up on the host, for a device."""
    wanted = indices.to(table.device)
    if device.type == "cpu" or is_functorch_wrapped_tensor(wanted):
        return functional.embedding(wanted, table)
    # Page-locked: a long prompt's rows would take longer than its looking up.
    flat = wanted.reshape(-1)
    shape = (flat.numel(), table.shape[1])
    with torch.inference_mode(False):
        rows = torch.empty(shape, dtype=table.dtype, pin_memory=device.type == "cuda")
    torch.index_select(table.detach(), 0, flat, out=rows)
    return rows.view(*indices.shape, table.shape[1])


def can_gather(module: nn.Module) -> bool:
    """Tell whether a module is an embedding that only looks rows up."""
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None
    )


class Lookup(enum.Enum):
    """How rows of an embedding are looked up without bringing its table.

    IN_PLACE: The compute device is the CPU and reads them where the table rests.
    GATHERED: They are looked up in the master, and cross the link.
    """

    IN_PLACE = enum.auto()
    GATHERED = enum.auto()


def lookup_of(
    module: nn.Module, layers: Sequence[Layer], device: torch.device
) -> Lookup | None:
    """Return how a module's rows are looked up; None if it brings its layers.

    Args:
        module: the module.
        layers: the layers that its forward needs.
        device: the compute device.
    """
    if len(layers) != 1 or not can_gather(module):
        return None
    masters = layers[0].masters
    if len(masters) != 1 or len(masters[0].members) != 1:
        return None
    if device.type == "cpu" and not masters[0].codec.casts_streamed:
        return Lookup.IN_PLACE
    return Lookup.GATHERED if masters[0].nbytes >= _GATHER_BYTES else None
