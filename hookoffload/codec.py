"""Bytes at rest and the value they stand for.

A tensor has up to three dtypes: the one of its master (*rest*), the one in which it
stays on the compute device when its layer is resident (*resident*), and the one its
forward reads (*compute*). The identity codec has one dtype for all three; the cast
codec differs in at least one. Casts happen on the compute device, from the bytes in
the window into the scratch, on the stream that computes: never on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def is_castable(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor may change its dtype: only plain floating ones may."""
    return tensor.dtype.is_floating_point and type(tensor) in _PLAIN_TYPES


def is_movable(tensor: torch.Tensor) -> bool:
    """Tell whether ``.data`` can carry this tensor from place to place.

    Strided tensors and parameters can, and so can subclasses of ``Parameter`` that
    leave ``__torch_function__`` alone; those that override it (quantised tensors)
    keep state beside their data, which ``.data`` would leave behind.
    """
    plain = type(tensor) in _PLAIN_TYPES or (
        type(tensor).__torch_function__ is torch.nn.Parameter.__torch_function__
    )
    plain = plain and type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    lazy = torch.nn.parameter.is_lazy(tensor)
    strided = tensor.layout is torch.strided and not tensor.is_quantized
    return plain and not lazy and strided


@dataclass(frozen=True)
class Codec:
    """How the bytes of one master become the value that a forward reads.

    Attributes:
        rest: dtype of the master.
        resident: dtype kept on the compute device while the layer is resident.
        compute: dtype of the value inside the forward.
        coded: the bytes that are copied are coded losslessly, see
            [Note: coded masters]; then the three dtypes are one.
    """

    rest: torch.dtype
    resident: torch.dtype
    compute: torch.dtype
    coded: bool = False

    @property
    def casts_streamed(self) -> bool:
        """Whether a streamed layer needs scratch for this master."""
        return self.coded or self.changes_dtype

    @property
    def changes_dtype(self) -> bool:
        """Whether the forward reads another dtype than there is at rest."""
        return self.rest != self.compute

    @property
    def casts_resident(self) -> bool:
        """Whether a resident layer needs scratch for this master."""
        return self.resident != self.compute

    @property
    def resident_as_copied(self) -> bool:
        """Whether a resident layer holds the bytes that are copied, as they are."""
        return self.resident == self.rest and not self.coded


def choose_codec(
    tensor: torch.Tensor,
    *,
    storage_dtype: torch.dtype | None,
    resident_dtype: torch.dtype | None,
    compute_dtype: torch.dtype | None,
) -> Codec:
    """Choose the three dtypes of a tensor from what the policy asks for.

    Args:
        tensor: the tensor as the user's model has it, or as its file has it.
        storage_dtype: dtype at rest; None keeps the tensor's own.
        resident_dtype: dtype of residents; None takes the smaller of the other two.
        compute_dtype: dtype in the forward; None keeps the tensor's own.
    """
    own = tensor.dtype
    if not is_castable(tensor):
        return Codec(own, own, own)
    rest = storage_dtype or own
    compute = compute_dtype or own
    resident = resident_dtype or min(rest, compute, key=lambda d: d.itemsize)
    return Codec(rest, resident, compute)
