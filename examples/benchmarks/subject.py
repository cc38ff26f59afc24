"""The models that are measured: their shape, their seeded weights, their inputs."""

from __future__ import annotations

import argparse
import gc
import os
import random
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

DTYPE = torch.bfloat16
SEED = 0
# Threads that build, and those that PyTorch has unless it is told otherwise.
BUILDERS = min(16, os.cpu_count() or 1)
THREADS = torch.get_num_threads()

# Drawing 20e9 normal numbers takes minutes, so one block of them fills every weight,
# each from its own place on. The length is a prime number: rows of no width repeat.
_BLOCK = 33_554_393
_SCALE = 0.02


class Subject(ABC):
    """A model of a known shape and what it is called with.

    Attributes:
        name: Of the benchmark.
        default_limits: In GiB, or "0.25x" for a share of the weights.
        resolution: Of the images, in pixels.
        batch: Images in one forward.
    """

    name: ClassVar[str]
    default_limits: ClassVar[tuple[str, ...]]

    def __init__(self, options: argparse.Namespace) -> None:
        self.resolution: int = options.resolution
        self.batch: int = options.batch

    @staticmethod
    @abstractmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Adds what scales this model."""

    @abstractmethod
    def skeleton(self, *, sample: bool = False) -> nn.Module:
        """Returns the model without weights, on the meta device.

        Args:
            sample: Leave out all but one layer of each shape.
        """

    @abstractmethod
    def inputs(self, resolution: int, device: torch.device) -> dict[str, Any]:
        """Returns the arguments of a forward, the same ones each time."""

    def resolutions(self) -> list[int]:
        """Returns the resolutions that the stress run alternates between."""
        sizes = (self.resolution, self.resolution * 3 // 4, self.resolution // 2)
        return sorted({max(64, size // 64 * 64) for size in sizes}, reverse=True)


def normal(*shape: int, seed: int, device: torch.device) -> Tensor:
    """Returns normal numbers that are the same on each machine."""
    generator = torch.Generator().manual_seed(SEED + seed)
    return torch.randn(shape, generator=generator).to(device, DTYPE)


def weight_bytes(model: nn.Module) -> int:
    """Returns the bytes of all weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


def empty(model: nn.Module) -> nn.Module:
    """Gives a model on the meta device the dtype that is measured."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPE)
    return model


def build(subject: Subject) -> nn.Module:
    """Returns the model with its weights in RAM, made by several threads.

    Every process that builds a subject gets the same weights.
    """
    model = subject.skeleton().to_empty(device="cpu")
    if next(model.buffers(), None) is not None:
        raise RuntimeError(f"{subject.name}: to_empty() left buffers without values")
    generator = torch.Generator().manual_seed(SEED)
    block = torch.empty(_BLOCK).normal_(0, _SCALE, generator=generator).to(DTYPE)
    places = random.Random(SEED)

    def fill(name: str, values: Tensor, place: int) -> None:
        flat, done = values.view(-1), 0
        while done < flat.numel():
            count = min(flat.numel() - done, _BLOCK - place)
            flat[done : done + count].copy_(block[place : place + count])
            done, place = done + count, 0
        if values.dim() == 1 and name.endswith("weight"):
            flat += 1  # a norm scales by about one

    with ThreadPoolExecutor(BUILDERS) as pool:
        filled = [
            pool.submit(fill, name, parameter.data, places.randrange(_BLOCK))
            for name, parameter in model.named_parameters()
        ]
    for each in filled:
        each.result()
    return model.eval().requires_grad_(False)


def own_pages(model: nn.Module) -> None:
    """Gives a forked process weights of its own instead of its parent's.

    Page-locking a page that is shared with the parent copies it first, one by one: a
    time that nobody pays who has loaded a model himself.
    """
    parameters = list(model.parameters())
    with ThreadPoolExecutor(BUILDERS) as pool:
        # All are copied before the first old one goes: what is freed in between would
        # be handed out again, in pieces.
        copies = list(pool.map(lambda parameter: parameter.data.clone(), parameters))
    for parameter, copied in zip(parameters, copies, strict=True):
        parameter.data = copied


def warm_kernels(subject: Subject, device: torch.device) -> None:
    """Runs every shape once: loading kernels is no method's time.

    Without it, the first forward of any process takes about half a second longer.
    """
    model = subject.skeleton(sample=True).to_empty(device=device).eval()
    with torch.no_grad():
        model(**subject.inputs(subject.resolution, device))
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
