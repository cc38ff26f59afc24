"""The coded bytes of a master, which cross the link instead of its bytes at rest.

[Note: coded masters]
At rest a tensor's ``.data`` must be readable by code that knows nothing of this
library, so it cannot be the coded bytes. They lie beside it: ``Master.flat`` is the
tensor's bytes wherever they rest, as without a codec, and ``Master.code`` is in host
RAM and page-locked, and what copies take. So host RAM shrinks where the bytes at rest
are a map of a file: after `load_model`, and where the offload placement is the disk
and the onload placement is RAM. What lies in RAM at attach stays there, and its code
comes beside it, which ``offload_stats`` counts. Its storage cannot be emptied
(``resize_(0)``) meanwhile: a sum, a clone or an edit of such a parameter ends the
process, and a copy by NumPy or `copy.deepcopy` has arbitrary values.

A resident layer has them decoded in its memory on the compute device, and is bound
between passes as without a codec; or it keeps the coded bytes there and is decoded into
the scratch for each forward, see [Note: residents that are kept coded]. Then its
members rest at their masters between forwards, as those of streamed layers do.

Codes that a cache on disk has, see [Note: kept codes], stay there for masters that
wait on disk: ``MasterCode.location`` says where, and a layer's bytes are read from
there. The bytes at rest stay a map of the checkpoint, which nothing reads meanwhile.
Such a code has no room for other patches. The first edit makes it one in host RAM,
where the edited weights are by then.

A code belongs to one revision of its master. Onload, for all of them at once, and
`Layer.revision`, before a copy begins, have the code of a master that was written to
made anew, in the same bytes; the layer keeps its geometry. Values that then need more
patches than there is room for cross the link as they are, into the scratch, until
others take their place.
"""

from __future__ import annotations

import torch

from .host_memory import empty_pages
from .lossless import Coded, decode, encode_from
from .lossless_encoder import ChunkEncoder, Source
from .lossless_layout import BYTES_PER_PATCH, CodeLayout
from .safetensors_file import TensorLocation

# Edited weights have other rare exponents than before, though not many more.
_SPARE_PATCHES = 256


class MasterCode:
    """The coded bytes of one master.

    Args:
        layout: what the bytes mean, or are expected to.
        revision: of the master that they stand for.

    Attributes:
        data: the bytes in host RAM; none if they lie in a file.
        location: where in a file they lie; None in host RAM.
        nbytes: how many are copied: of a code in host RAM with room for other patches.
        fits: whether they are the code of the bytes at rest, which may need more.
    """

    __slots__ = ("data", "fits", "layout", "location", "nbytes", "revision")

    def __init__(self, layout: CodeLayout, revision: int) -> None:
        spare = (layout.patches // 2 + _SPARE_PATCHES) * BYTES_PER_PATCH
        saved = max(layout.raw_bytes - layout.nbytes, 0)
        self.layout = layout
        self.nbytes = layout.nbytes + min(spare, saved) // 16 * 16
        self.data = torch.empty(0, dtype=torch.uint8)  # dropped, or only expected
        self.location: TensorLocation | None = None
        self.revision = revision
        self.fits = True

    @classmethod
    def of(cls, coded: Coded, revision: int) -> MasterCode:
        """Take over coded bytes."""
        code = cls(coded.layout, revision)
        code.nbytes = min(code.nbytes, coded.buffer.numel())
        code.data = coded.buffer[: code.nbytes]
        return code

    @classmethod
    def in_file(
        cls, layout: CodeLayout, location: TensorLocation, revision: int
    ) -> MasterCode:
        """Have coded bytes stay where they are."""
        code = cls(layout, revision)
        code.nbytes, code.location = location.nbytes, location
        return code

    def renew(self, source: Source, revision: int, encoder: ChunkEncoder) -> None:
        """Encode other values of the same count into as many bytes, in host RAM.

        Args:
            source: where they come from.
            revision: of the master that they are.
            encoder: what encodes them.
        """
        coded = encode_from(source, self.layout.count, self.layout.dtype, encoder)
        self.fits = coded is not None and coded.layout.nbytes <= self.nbytes
        if not self.data.numel():
            with torch.inference_mode(False):  # it is written to outside as well
                self.data = empty_pages(self.nbytes)
        if coded is not None and self.fits:
            self.data[: coded.layout.nbytes].copy_(coded.data)
            self.layout = coded.layout
        self.location = None
        # Last: behind an interrupt it is done again.
        self.revision = revision

    def drop(self) -> None:
        """Give the memory back until `renew`; there is none if it lies in a file."""
        if self.location is not None:
            return
        self.data = torch.empty(0, dtype=torch.uint8)
        self.revision = -1

    def decode_into(self, coded: torch.Tensor, output: torch.Tensor) -> None:
        """Decode bytes that were copied from here, on their device."""
        decode(self.layout, coded, output)
