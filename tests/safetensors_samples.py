"""Safetensors files that several test files make and look at."""

from __future__ import annotations

import gc
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors.torch import save_file

from hookoffload.torch_dtypes import CODES

DTYPES = sorted(CODES, key=str)


def random_tensor(dtype, shape, seed=0):
    size = torch.empty(shape, dtype=dtype).nbytes
    top = 2 if dtype == torch.bool else 256
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, top, (size,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).view(shape)


def same_bits(one, other):
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bits(one).equal(bits(other))
    )


def bits(tensor):
    if tensor.itemsize == 1:
        return tensor.view(torch.uint8)
    compact = tensor.clone(memory_format=torch.contiguous_format)
    return compact.view(-1).view(torch.uint8)


def write_raw(path, header, data, pad=0):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def save(path, **tensors):
    save_file(tensors, path)
    return path


def read(location):
    destination = torch.empty(location.nbytes, dtype=torch.uint8)
    location.file.read_into(location, destination)
    return destination.view(location.dtype).view(location.shape)


def failing(code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def write_two_shards(folder):
    save(folder / "a.safetensors", x=torch.arange(4.0), y=torch.ones(2))
    save(folder / "b.safetensors", y=torch.zeros(3), z=torch.arange(5))


@contextmanager
def descriptors_kept() -> Iterator[None]:
    """Asserts that as many descriptors are open after the block as before it."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before
