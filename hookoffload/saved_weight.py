"""A packed weight that a checkpoint has in the form in which its library saves it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from .safetensors_file import TensorLocation


@dataclass
class SavedWeight(ABC):
    """One parameter that is made around its tensors in files.

    [Note: saved forms] Libraries that pack weights save one parameter as several
    tensors, under names of their own. The large ones are mapped and stay in the file;
    the parameter is made around the maps by its library, which copies nothing.

    Attributes:
        name: its full name.
        owner: the module that has it.
        parts: where its tensors lie, by their paths in the parameter ("" is itself).
        names: all names of the checkpoint that belong to it.
    """

    name: str
    owner: nn.Module
    parts: dict[str, TensorLocation]
    names: set[str]

    @abstractmethod
    def register(self) -> None:
        """Make the parameter around its tensors, and give it to its module.

        Raises:
            CheckpointError: What the checkpoint has does not fit the model.
        """

    @property
    def key(self) -> str:
        """The name that the module has for it."""
        return self.name.rpartition(".")[2]

    def mapped(self) -> dict[str, torch.Tensor]:
        """Return its tensors by their paths, without reading them."""
        return {path: at.file.mapped(at) for path, at in self.parts.items()}

    def wanted_shape(self) -> tuple[int, ...] | None:
        """Return the shape that the model has for it; None if it does not say."""
        held = self.owner._parameters[self.key]
        return None if held is None or not held.is_meta else tuple(held.shape)
