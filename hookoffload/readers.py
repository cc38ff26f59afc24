"""Reading tensors of checkpoint files into host RAM, with several threads.

Each byte is read once, straight into the memory where it stays, unless the tensor is
to have another dtype: then a chunk at a time passes through a small buffer and is cast
from there, so that the wide tensor never exists.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from .alignment import SMALL_TENSOR_BYTES
from .host_memory import empty_pages
from .reader_threads import reader_count
from .safetensors_file import TensorLocation

Read = tuple[TensorLocation, torch.Tensor]

# A power of two, so that chunks end between elements of every dtype.
_CHUNK = 8 * 2**20
# What is cast is read again from the processor's cache; each thread has such a buffer.
_CAST_CHUNK = 2**20


def read_tensors(
    reads: Sequence[Read], progress: Callable[[int], object] | None = None
) -> None:
    """Fills tensors from their files.

    Args:
        reads: What to read, and the contiguous CPU tensor to fill with it; it has as
            many elements as the location's shape, and any dtype that they can be cast
            to.
        progress: Called with the number of bytes of the files that were read.

    Raises:
        CheckpointError: A file ends early or cannot be read.
    """
    progress = progress or (lambda nbytes: None)
    tasks = list(_tasks(sorted(reads, key=_place)))
    buffers = threading.local()
    if len(tasks) <= 1:
        for task in tasks:
            progress(_run(task, buffers))
        return
    count = min(len(tasks), reader_count())
    with ThreadPoolExecutor(count, thread_name_prefix="hookoffload-read") as pool:
        try:
            for done in as_completed([pool.submit(_run, t, buffers) for t in tasks]):
                progress(done.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # `with` waits for the rest
            raise


def empty_in_ram(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor without values, in huge pages where the system has them.

    A large one has pages of its own: it can be page-locked where it lies, and goes back
    to the system when it is dropped.
    """
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    if tensor.nbytes < SMALL_TENSOR_BYTES:
        return torch.empty(shape, dtype=dtype)
    return empty_pages(tensor.nbytes).view(dtype).view(tuple(shape))


def _place(read: Read) -> tuple[str, int]:
    location = read[0]
    return str(location.file.path), location.offset


class _Piece:
    """A part of one tensor: its first element, and the memory that it fills."""

    __slots__ = ("destination", "location", "start")

    def __init__(
        self, location: TensorLocation, destination: torch.Tensor, start: int
    ) -> None:
        self.location = location
        self.destination = destination
        self.start = start

    @property
    def nbytes(self) -> int:
        return self.destination.numel() * self.location.dtype.itemsize

    def read(self, buffers: threading.local) -> None:
        location, destination = self.location, self.destination
        first = self.start * location.dtype.itemsize
        if location.dtype == destination.dtype:
            location.file.read_into(location, destination, first)
            return
        buffer = getattr(buffers, "buffer", None)
        if buffer is None:
            buffer = buffers.buffer = torch.empty(_CAST_CHUNK, dtype=torch.uint8)
        for part in torch.split(destination, _CAST_CHUNK // location.dtype.itemsize):
            wide = buffer[: part.numel() * location.dtype.itemsize]
            location.file.read_into(location, wide, first)
            part.copy_(wide.view(location.dtype))
            first += wide.numel()


def _tasks(reads: Sequence[Read]) -> Iterator[list[_Piece]]:
    """Cuts large tensors into chunks and puts small ones together."""
    task: list[_Piece] = []
    size = 0
    for location, destination in reads:
        flat = destination.detach().view(-1)
        step = _CHUNK // location.dtype.itemsize
        for start in range(0, flat.numel(), step):
            piece = _Piece(location, flat[start : start + step], start)
            if task and size + piece.nbytes > _CHUNK:
                yield task
                task, size = [], 0
            task.append(piece)
            size += piece.nbytes
    if task:
        yield task


@torch.inference_mode(False)
@torch.no_grad()
def _run(task: list[_Piece], buffers: threading.local) -> int:
    for piece in task:
        piece.read(buffers)
    return sum(piece.nbytes for piece in task)
