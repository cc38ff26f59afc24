"""Bytes at rest and the value they stand for.

A tensor has up to three dtypes: the one of its master (*rest*), the one in which it
stays on the compute device when its layer is resident (*resident*), and the one its
forward reads (*compute*). The identity codec has one dtype for all three; the cast
codec differs in at least one. Casts happen on the compute device, from the bytes in
the window into the scratch, on the stream that computes: never on the host. Where the
forward multiplies in 8 bits, a scale for each row goes with the value; see
[Note: fp8 compute].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .fp8 import is_fp8, wide_dtype

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
        wide: where ``compute`` are 8 bits with scales, the dtype that these stand for.
    """

    rest: torch.dtype
    resident: torch.dtype
    compute: torch.dtype
    coded: bool = False
    wide: torch.dtype | None = None

    @property
    def scaled(self) -> bool:
        """Whether the forward multiplies in 8 bits, with scales."""
        return self.wide is not None

    @property
    def value_dtype(self) -> torch.dtype:
        """The dtype that the tensor says it has inside the forward."""
        return self.wide or self.compute

    @property
    def casts_streamed(self) -> bool:
        """Whether a streamed layer needs scratch for this master."""
        return self.coded or self.scaled or self.changes_dtype

    @property
    def changes_dtype(self) -> bool:
        """Whether the forward reads another dtype than there is at rest."""
        return self.rest != self.value_dtype

    @property
    def casts_resident(self) -> bool:
        """Whether a resident layer needs scratch for this master."""
        return self.resident != self.compute

    @property
    def resident_as_copied(self) -> bool:
        """Whether a resident layer holds the bytes that are copied, and no others."""
        keeps_scales = self.scaled and not self.casts_resident
        return self.resident == self.rest and not self.coded and not keeps_scales

    def unscaled(self) -> Codec:
        """Return a codec of the same bytes without 8-bit products and without code."""
        if self.wide is None:
            return replace(self, coded=False)
        resident = min(self.rest, self.wide, key=lambda dtype: dtype.itemsize)
        return Codec(self.rest, resident, self.wide)


def choose_codec(
    tensor: torch.Tensor,
    *,
    storage_dtype: torch.dtype | None,
    resident_dtype: torch.dtype | None,
    compute_dtype: torch.dtype | None,
    multiplies: bool = False,
) -> Codec:
    """Choose the three dtypes of a tensor from what the policy asks for.

    Args:
        tensor: the tensor as the user's model has it, or as its file has it.
        storage_dtype: dtype at rest; None keeps the tensor's own.
        resident_dtype: dtype of residents; None takes the smaller of the other two.
        compute_dtype: dtype in the forward; None keeps the tensor's own. One of 8 bits
            is for the weights of Linear layers only.
        multiplies: it is such a weight, and its device can multiply so.
    """
    own = tensor.dtype
    if not is_castable(tensor):
        return Codec(own, own, own)
    rest = storage_dtype or own
    wide = wide_dtype(own, compute_dtype) or own
    scaled = multiplies and is_fp8(compute_dtype)
    compute = compute_dtype if scaled and compute_dtype is not None else wide
    if is_fp8(compute_dtype) and is_fp8(resident_dtype) and not scaled:
        resident_dtype = None  # that was said of what computes so
    resident = resident_dtype or min(rest, compute, key=lambda d: d.itemsize)
    return Codec(rest, resident, compute, wide=wide if scaled else None)
