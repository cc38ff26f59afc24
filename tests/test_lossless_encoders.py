"""Wherever values are encoded, in chunks of whatever size: the same bytes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hookoffload as ho
from hookoffload import coding, lossless_device
from hookoffload.locked_pages import LockedPages
from hookoffload.lossless import Coded, encode, encode_from
from hookoffload.lossless_chunk import EncodeChunk, encode_in_torch
from hookoffload.lossless_device import DeviceEncoder, fused_encoder, taken_bytes
from hookoffload.lossless_encoder import _choose_base
from hookoffload.lossless_host import HostEncoder
from hookoffload.lossless_layout import BLOCK

from .test_lossless_offload import Model, policy

BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")


def weights(count: int, dtype: torch.dtype, patched: float = 0.0) -> torch.Tensor:
    """Returns normal values, of which a part needs patches."""
    values = torch.randn(count)
    values[torch.rand(count) < patched] *= 2.0**60
    return values.to(dtype)


def assert_same_code(values: torch.Tensor, encoder: DeviceEncoder) -> Coded | None:
    """Compares what encoders make of values in memory, and of such that are read."""

    def read(start: int, part: torch.Tensor) -> None:
        part.copy_(values[start : start + part.numel()])

    expected = encode(values)
    for source, other in ((values, encoder), (read, encoder), (read, HostEncoder())):
        found = encode_from(source, values.numel(), values.dtype, other)
        assert (found is None) == (expected is None)
        if expected is not None and found is not None:
            assert found.layout == expected.layout
            assert torch.equal(found.data, expected.data)
    return expected


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("blocks", [1, 3, 64])
def test_chunks_of_any_size_give_the_same_bytes(
    dtype: torch.dtype, blocks: int
) -> None:
    encoder = DeviceEncoder(CPU, blocks * BLOCK * dtype.itemsize)
    for count in (40 * BLOCK, 40 * BLOCK - 1, 39 * BLOCK + 2, 25 * BLOCK + 1):
        coded = assert_same_code(weights(count, dtype, 0.002), encoder)
        assert coded is not None


@pytest.mark.parametrize("dtype", [BF16, FP32])
# Of a chunk's values: as many as come with its planes, as there is room for, and more.
@pytest.mark.parametrize("patched", [0.001, 0.02, 0.06, 0.07, 0.5, 1.0])
def test_chunks_with_patches_of_any_number_give_the_same_bytes(
    dtype: torch.dtype, patched: float
) -> None:
    encoder = DeviceEncoder(CPU, 16 * BLOCK * dtype.itemsize)
    for count in (1024 * BLOCK, 1000 * BLOCK + 1):
        values = weights(count, dtype)
        values[64 * BLOCK : 80 * BLOCK] = weights(16 * BLOCK, FP32, patched).to(dtype)
        values[-5 * BLOCK :] = weights(5 * BLOCK, FP32, patched).to(dtype)
        coded = assert_same_code(values, encoder)
        assert coded is not None
        assert coded.layout.patches > 0.8 * patched * 21 * BLOCK


def test_a_tensor_that_is_no_single_piece_is_coded_in_the_order_of_its_values() -> None:
    values = weights(2 * 40 * BLOCK, FP32)[::2]
    for other in (values, values.view(BLOCK, 40).t()):
        coded = encode(other)
        expected = encode(other.clone(memory_format=torch.contiguous_format))
        assert coded is not None and expected is not None
        assert torch.equal(coded.data, expected.data)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    "count",
    [
        *(1, 77, 4095, 4096, 4097, 8191),
        *(64 * 4096 - 1, 64 * 4096, 64 * 4096 + 1, 65 * 4096 + 33, 64 * 4097, 999_999),
    ],
)
def test_a_tensor_is_judged_by_the_slices_that_are_read_of_a_file(
    dtype: torch.dtype, count: int
) -> None:
    # Each slice's own power of two, so that one more or less gives another share.
    scales = torch.arange(count // 4096 + 1).repeat_interleave(4096)[:count] % 60
    values = (torch.randn(count) * torch.exp2(-scales.float())).to(dtype)
    asked = []

    def read(start: int, part: torch.Tensor) -> None:
        asked.append((start, start + part.numel()))
        part.copy_(values[start : start + part.numel()])

    expected = _choose_base(read, count, dtype)
    step = max(4096, count // 64)
    assert asked == [(at, min(at + 4096, count)) for at in range(0, count, step)]
    assert _choose_base(values, count, dtype) == expected


def test_an_encoder_takes_its_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def counted(nbytes: int, device: torch.device) -> LockedPages:
        taken.append(nbytes)
        return LockedPages(nbytes, device)

    monkeypatch.setattr(lossless_device, "LockedPages", counted)
    encoder = DeviceEncoder(CPU, 64 * BLOCK)
    for blocks in (100, 33, 32, 7):  # from the largest on
        assert_same_code(weights(blocks * BLOCK, BF16), encoder)
    assert taken == [64 * BLOCK]
    # It is no larger than what is encoded.
    assert_same_code(weights(7 * BLOCK - 5, FP32), DeviceEncoder(CPU))
    assert taken[1:] == [7 * BLOCK * 4]


TRITON = """
from functools import partial
import torch
from hookoffload.lossless_chunk import encode_in_torch, words_of
from hookoffload.lossless import encode, encode_from
from hookoffload.lossless_encode_kernel import encode_in_triton
from hookoffload.lossless_device import DeviceEncoder
from hookoffload.lossless_layout import CodeLayout
from tests.test_lossless_encoders import BF16, CPU, FP32, weights

torch.manual_seed(0)
every = torch.arange(-(2**15), 2**15)
lower = torch.randint(0, 2**16, every.shape)
for dtype, bits in ((BF16, every.short()), (FP32, (every << 16 | lower).int())):
    for base, count in ((0, 65536), (111, 65535), (240, 64511)):
        layout = CodeLayout(dtype=dtype, count=count, base=base, patches=0)
        chunk = torch.zeros(words_of(layout), dtype=torch.int32)
        chunk.view(bits.dtype)[:count] = bits[torch.randperm(65536)[:count]]
        one, other = torch.full_like(chunk, 7), torch.full_like(chunk, 7)
        encode_in_torch(layout, chunk, one)
        encode_in_triton(layout, chunk, other, rows=64 if base else 16)
        planes = layout.starts_at // 4
        assert torch.equal(one[:planes], other[:planes]), (dtype, base)
    # A few large programs: the interpreter takes its time for each.
    encode_chunk = partial(encode_in_triton, rows=8)
    encoder = DeviceEncoder(CPU, 6 * 1024 * dtype.itemsize, encode_chunk)
    for count, patched in ((18 * 1024, 0.1), (18 * 1024 - 1, 0.0), (18 * 1024, 1.0)):
        values = weights(count, dtype)
        values[-500:] = weights(500, FP32, patched).to(dtype)
        for at, value in enumerate((0.0, -0.0, 1e-39, 1e38)):
            values[at::990] = value  # zeros, a subnormal, a patch
        expected = encode(values)
        coded = encode_from(values, count, dtype, encoder)
        assert coded.layout == expected.layout and coded.layout.patches > 20
        assert torch.equal(coded.data, expected.data)
"""


def test_the_triton_kernel_gives_the_same_bytes() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = dict(os.environ, TRITON_INTERPRET="1")
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, *sys.path])
    subprocess.run([sys.executable, "-c", TRITON], env=environment, check=True)


@pytest.fixture(params=["triton", "torch"])
def encode_chunk(request: pytest.FixtureRequest) -> EncodeChunk:
    """What encodes chunks on a GPU."""
    if request.param == "torch":
        return encode_in_torch
    fused = fused_encoder(torch.device("cuda"), False)
    if fused is None:
        pytest.skip("Triton does not work here")
    return fused


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_gpu_gives_the_same_bytes(
    dtype: torch.dtype, encode_chunk: EncodeChunk
) -> None:
    gpu = torch.device("cuda")
    for chunk_bytes in (2**16, 2**22, 2**25):
        encoder = DeviceEncoder(gpu, chunk_bytes, encode_chunk)
        for count in (9 * BLOCK, 2**20 - 1, 2**20 + 1025, 5 * 2**20 + 2):
            for patched in (0.0, 0.001, 0.02):
                values = weights(count, dtype, patched)
                values[count // 2 : count // 2 + count // 200] = float("nan")
                assert_same_code(values, encoder)
                found = encode_from(values.to(gpu), count, dtype, encoder)
                expected = encode(values)
                assert expected is not None and found is not None
                assert torch.equal(found.data, expected.data)
        bits = torch.randint(-(2**31), 2**31 - 1, (2**19,)).int().view(dtype)
        assert_same_code(bits, encoder)  # not coded
        # Half of a chunk is patches, in a tensor that is coded all the same.
        values = weights(2**22, dtype)
        values[-(2**15) :] = bits[: 2**15]
        coded = assert_same_code(values, encoder)
        assert coded is not None and coded.layout.patches > 2**14


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("lowest", [1, 115, 241])
def test_a_gpu_codes_every_bf16_value_in_every_position(
    dtype: torch.dtype, lowest: int, encode_chunk: EncodeChunk
) -> None:
    every = np.arange(2**16, dtype=np.uint16)
    exponents = every >> 7 & 0xFF
    inside = (exponents == 0) | ((exponents >= lowest) & (exponents < lowest + 15))
    common = torch.from_numpy(every[inside].view(np.int16))  # of all signs, mantissas
    rare = torch.from_numpy(every[~inside].view(np.int16))
    parts = [common.roll(shift) for shift in range(BLOCK)]
    # And those that are patched, each at some place, where 31 others are not.
    around = common.repeat(len(rare) * 31 // len(common) + 1)[: len(rare) * 31]
    parts.append(torch.cat([around.view(-1, 31), rare[:, None]], 1).view(-1))
    upper = torch.cat(parts)
    if dtype == FP32:
        values = (upper.int() << 16 | torch.randint(0, 2**16, upper.shape)).int()
    else:
        values = upper
    encoder = DeviceEncoder(torch.device("cuda"), 2**24, encode_chunk)
    coded = assert_same_code(values.view(dtype), encoder)
    assert coded is not None and coded.layout.patches == len(rare)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("patched", [0.0, 0.03])
def test_an_encoder_takes_no_more_of_a_gpu_than_it_says(
    dtype: torch.dtype, patched: float, encode_chunk: EncodeChunk
) -> None:
    gpu, chunk_bytes = torch.device("cuda"), 2**24
    values = weights(2**24, dtype, patched)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    encoder = DeviceEncoder(gpu, chunk_bytes, encode_chunk)
    for _ in range(3):
        encode_from(values, values.numel(), dtype, encoder)
    taken = torch.cuda.max_memory_allocated() - before
    fused = encode_chunk is not encode_in_torch
    assert taken <= taken_bytes(chunk_bytes, fused=fused)


@pytest.mark.gpu
def test_what_the_allocator_keeps_is_given_back_before_weights_are_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.cuda.empty_cache()
    before = _unused()  # of other tests, in pools of their own
    work, unused = coding._encode_in_threads, []

    def noted(*arguments: object) -> None:
        unused.append(_unused())
        work(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(coding, "_encode_in_threads", noted)
    block = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    del block
    ho.attach_offload_hooks(Model().eval(), policy("cuda", 2**28))
    assert unused and max(unused) < before + 2**25
    assert _unused() < before + 2**25


def _unused() -> int:
    return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
