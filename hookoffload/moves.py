"""Copies of a layer's masters, neighbours as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .alignment import ALIGNMENT
from .master import Master

# Destinations and sources.
Moves = tuple[list[torch.Tensor], list[torch.Tensor]]


def joined_moves(targets: Sequence[tuple[Master, torch.Tensor]]) -> Moves:
    """Return the destination and the source of each copy that a layer needs.

    Masters that lie one behind the other, in the same distance as in the window,
    travel as one: a copy costs the host more than a small tensor
    costs the link. What lies between two of them is shorter than `ALIGNMENT`, on their
    own pages, and belongs to nobody in the window.

    Args:
        targets: page-locked masters and the flat ``uint8`` tensors that take their
            bytes.
    """
    runs: list[list[tuple[Master, torch.Tensor]]] = []
    for target in sorted(targets, key=lambda target: target[1].data_ptr()):
        if runs and _continues(runs[-1][-1], target):
            runs[-1].append(target)
        else:
            runs.append([target])
    destinations, sources = [], []
    for run in runs:
        first, begin = run[0]
        end = run[-1][1]
        nbytes = end.data_ptr() + end.numel() - begin.data_ptr()
        destinations.append(_longer(begin, nbytes))
        sources.append(_longer(first.bytes, nbytes))
    return destinations, sources


def _continues(
    before: tuple[Master, torch.Tensor], behind: tuple[Master, torch.Tensor]
) -> bool:
    (one, to_one), (other, to_other) = before, behind
    distance = to_other.data_ptr() - to_one.data_ptr()
    return (
        distance - one.nbytes < ALIGNMENT
        and other.bytes.data_ptr() - one.bytes.data_ptr() == distance
        and _storage(other.bytes) == _storage(one.bytes)
        and _storage(to_other) == _storage(to_one)
    )


def _storage(tensor: torch.Tensor) -> object:
    return tensor.untyped_storage()._cdata


def _longer(start: torch.Tensor, nbytes: int) -> torch.Tensor:
    """Return the bytes that begin where a flat ``uint8`` tensor does."""
    if nbytes == start.numel():
        return start
    longer = torch.empty(0, dtype=torch.uint8, device=start.device)
    offset = int(start.storage_offset())
    return longer.set_(start.untyped_storage(), offset, (nbytes,), (1,))
