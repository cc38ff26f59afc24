"""The demo's transformer and its checkpoint of seeded random weights."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .budget import GIB
from .progress import progress_bar

SEED = 0
HEAD_WIDTH = 64
# Fewer blocks would make each layer a large part of the model.
_FEWEST_BLOCKS = 12
_STORED_AS = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large the transformer is.

    Attributes:
        width: Length of a token's vector; a multiple of the width of a head.
        blocks: Number of blocks.
    """

    width: int
    blocks: int

    @classmethod
    def of_size(cls, size_bytes: float, dtype: torch.dtype) -> Shape:
        """Returns the shape whose weights take about `size_bytes`.

        A block has 12 width**2 weights, embedding and head together 8 width**2. The
        width is the largest power of two that leaves at least a dozen blocks.
        """
        weights = size_bytes / dtype.itemsize
        width = HEAD_WIDTH
        while weights / (2 * width) ** 2 >= 12 * _FEWEST_BLOCKS + 8:
            width *= 2
        return cls(width=width, blocks=round((weights / width**2 - 8) / 12))


class Block(nn.Module):
    """One pre-norm block: causal attention, then an MLP."""

    def __init__(self, width: int) -> None:
        """Makes the block's four linear layers and two norms."""
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, tokens, width) to the same shape."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, -1, HEAD_WIDTH))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.mlp_norm(x))))
        return x


class DemoTransformer(nn.Module):
    """A plain decoder: embedding, pre-norm blocks, norm, head."""

    def __init__(self, *, width: int, blocks: int) -> None:
        """Makes the layers; the vocabulary has 4 * `width` tokens."""
        super().__init__()
        self.embedding = nn.Embedding(4 * width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4 * width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps token numbers (batch, tokens) to logits (batch, tokens, vocabulary)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Checkpoint:
    """A safetensors file with the random weights of one shape.

    The file is not held in memory at any time, so that a checkpoint may be larger than
    the RAM of the machine that writes it.
    """

    def __init__(self, folder: Path, shape: Shape, dtype: torch.dtype) -> None:
        """Names the file and works out its layout; touches no disk.

        Args:
            folder: Where the file lies or shall lie.
            shape: The size of the transformer.
            dtype: What the weights are stored as: float32 or bfloat16.
        """
        kind = str(dtype).removeprefix("torch.")
        name = f"demo-{shape.blocks}x{shape.width}-{kind}.safetensors"
        self.path = folder / name
        self._dtype = dtype
        with torch.device("meta"):
            model = DemoTransformer(**asdict(shape))
        self._shapes = {name: w.shape for name, w in model.state_dict().items()}
        self._header, self.tensor_bytes = self._lay_out()
        self.file_bytes = len(self._header) + self.tensor_bytes

    def exists(self) -> bool:
        """Says whether the file is there and has the length that it must have."""
        return self.path.is_file() and self.path.stat().st_size == self.file_bytes

    def write(self, *, alike: bool = False) -> None:
        """Writes the file aside and renames it when it is whole.

        Args:
            alike: Whether all blocks get the same weights. Making random numbers takes
                longer than writing them.

        Raises:
            OSError: The folder cannot be written to, or the disk has too little room.
        """
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < self.file_bytes:
            raise OSError(
                f"the checkpoint takes {self.file_bytes / GIB:.2f} GiB, but {folder} "
                f"has {free / GIB:.2f} GiB free: choose another --cache-dir or a "
                "smaller --size-gb"
            )
        generator = torch.Generator().manual_seed(SEED)
        with (
            _renamed_when_whole(self.path) as file,
            progress_bar("writing the checkpoint", self.tensor_bytes) as bar,
        ):
            file.write(self._header)
            made: dict[torch.Size, Tensor] = {}
            for shape in self._shapes.values():
                values = made.get(shape)
                if values is None:
                    values = self._values(shape, generator)
                    if alike:
                        made[shape] = values
                raw = values.view(torch.uint8).numpy()
                bar.update(file.write(raw.data))

    def _values(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        values = torch.randn(shape, generator=generator).mul_(0.02)
        if values.dim() == 1:
            # The weights and biases of norms: a weight of 0.02 would hide all that
            # comes before it.
            values.add_(1)
        return values.to(self._dtype)

    def _lay_out(self) -> tuple[bytes, int]:
        """Returns what precedes the tensors in the file, and their bytes."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in self._shapes.items():
            end = offset + shape.numel() * self._dtype.itemsize
            entries[name] = {
                "dtype": _STORED_AS[self._dtype],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(entries).encode()
        # Tensors that begin at a multiple of 8 can be mapped as they lie.
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text, offset


@contextmanager
def _renamed_when_whole(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file beside `path` that takes its name at the end, or is removed."""
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f"{path.stem}-", suffix=".part", delete=False
    ) as file:
        try:
            yield file
            file.close()
            os.replace(file.name, path)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise
