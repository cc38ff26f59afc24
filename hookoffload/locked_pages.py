"""Memory that a device copies from and to at the speed of the link, see pinning.py."""

from __future__ import annotations

import logging
import weakref

import torch

from .host_memory import empty_pages

logger = logging.getLogger(__name__)


class LockedPages:
    """New memory in host RAM, page-locked for as long as this lives.

    PyTorch's own (``pin_memory=True``) takes a second for 2 GB, is rounded up to a
    power of two, and is kept until the process ends.

    Args:
        nbytes: how much.
        device: what copies; a CPU needs nothing locked.

    Attributes:
        memory: the bytes. Where the system refuses to lock them, copies are slower.
    """

    __slots__ = ("__weakref__", "memory")

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.memory = empty_pages(nbytes)
        start = self.memory.data_ptr()
        if device.type == "cuda" and lock_pages(start, nbytes, device):
            # It holds the memory until it was unlocked.
            weakref.finalize(self, _unlock, self.memory)


def lock_pages(start: int, nbytes: int, device: torch.device) -> bool:
    """Lock the pages of memory for a CUDA device; tell whether the system does it."""
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):
        error = int(runtime.cudaHostRegister(start, nbytes, 0))
        if error:
            _forget_last_error(device)
    return error == 0


def unlock_pages(start: int) -> None:
    """Unlock what `lock_pages` locked from an address on."""
    torch.cuda.cudart().cudaHostUnregister(start)


def _unlock(memory: torch.Tensor) -> None:
    unlock_pages(memory.data_ptr())


def _forget_last_error(device: torch.device) -> None:
    # CUDA remembers the refusal, and PyTorch would report it at its next launch.
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        logger.debug("page-locking was refused: %s", error)
