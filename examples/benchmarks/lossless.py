"""The lossless code by itself: bits, ratio, bytes written and encoded per second.

    python examples/benchmarks/lossless.py
    python examples/benchmarks/lossless.py --encoding

The second only shows how fast a GPU encodes the weights of a large transformer, by
threads and sizes of chunks: 20 seconds, 5 GB of memory.

On a GPU, the Triton kernel is first checked against the decoder in plain PyTorch, bit
for bit, over many sizes; then timed over rows and warps a program. Without one, only
ratios and the speeds of the CPU are shown. Takes about a minute and 6 GB of memory.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from hookoffload.lossless import Coded, decode, encode, encode_from
from hookoffload.lossless_chunk import EncodeChunk, encode_in_torch, words_of
from hookoffload.lossless_decoder import decode_in_torch
from hookoffload.lossless_device import CHUNK_BYTES, DeviceEncoder, fused_encoder
from hookoffload.lossless_encoder import ChunkEncoder, _choose_base
from hookoffload.lossless_host import HostEncoder
from hookoffload.lossless_layout import CodeLayout

BF16, FP32 = torch.bfloat16, torch.float32
BITS = {BF16: torch.int16, FP32: torch.int32}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def main() -> None:
    """Prints a line for each figure."""
    parser = argparse.ArgumentParser(description="The lossless code by itself.")
    parser.add_argument(
        "--mib", type=int, nargs="+", default=[128, 2048], help="sizes to time on a GPU"
    )
    parser.add_argument(
        "--encoding", action="store_true", help="only how fast a GPU encodes"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.encoding:
        print(torch.cuda.get_device_name(), "torch", torch.__version__)
        print_encoding_on_gpu()
        return
    print_ratios()
    print_cpu()
    print_encoding_on_cpu()
    if not torch.cuda.is_available():
        print("no CUDA device: the kernel is not timed")
        return
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    check_kernel()
    for mib in arguments.mib:
        print_kernel(mib * 2**20)
    print_encoding_on_gpu()


def samples(count: int) -> dict[str, torch.Tensor]:
    """Returns weights of different kinds, in fp32."""
    normal = torch.randn(count) * 0.02
    sparse = normal.clone()
    sparse[torch.rand(count) < 0.5] = 0
    bits = torch.randint(-(2**15), 2**15, (count,)).to(torch.int16)
    return {
        "normal": normal,
        "uniform": torch.rand(count) - 0.5,
        "half zeros": sparse,
        "heavy tails": normal * torch.randn(count).abs().pow(4),
        "rows of sizes from 1e-6 to 1": (
            normal.view(-1, 1024) * torch.logspace(-6, 0, count // 1024)[:, None]
        ).reshape(-1),
        "random bits": bits.view(BF16).float(),
    }


def print_ratios() -> None:
    """Prints how much smaller weights of different kinds become."""
    for name, values in samples(2**22).items():
        cells = []
        for dtype in (BF16, FP32):
            coded = encode(values.to(dtype))
            if coded is None:
                cells.append(f"{dtype} raw")
                continue
            ratio = coded.data.numel() / coded.layout.raw_bytes
            share = coded.layout.patches / coded.layout.count
            cells.append(f"{dtype} {ratio:.4f} ({share:.3%} patched)")
        print(f"ratio  {name:<30}{', '.join(cells)}")


def print_cpu() -> None:
    """Prints how fast the CPU encodes and decodes."""
    values = torch.randn(2**25, dtype=BF16)
    encoding, coded = seconds(lambda: encode(values), 2)
    assert coded is not None
    output = torch.empty_like(values)
    decoding, _ = seconds(lambda: decode(coded.layout, coded.data, output), 2)
    threads = torch.get_num_threads()
    print(
        f"cpu    {threads} threads: encodes {gb_per_second(values, encoding)}, "
        f"decodes {gb_per_second(values, decoding)}"
    )


def check_kernel() -> None:
    """Compares the two decoders and the values over many sizes."""
    from hookoffload.lossless_kernel import decode_in_triton

    counts = [1024, 4096, 4097, 8191, 8192, 8193, 65537, 999_999, 2**20 + 2051, 2**24]
    checked = 0
    for dtype in (BF16, FP32):
        for count in counts:
            values = torch.randn(count).to(dtype)
            values[::97] = float("inf")
            values[1::98] = 0
            coded = encode(values, GPU)
            if coded is None:
                continue
            data, layout = coded.data.to(GPU), coded.layout
            plain = torch.full_like(values, 7, device=GPU)
            decode_in_torch(layout, data, plain)
            for rows in (4, 8, 16):
                around = torch.full((count + 128,), 7.0, dtype=dtype, device=GPU)
                fused = around[64 : 64 + count]
                decode_in_triton(layout, data, fused, rows=rows)
                bits = BITS[dtype]
                same = torch.equal(fused.view(bits), plain.view(bits))
                same &= torch.equal(plain.cpu().view(bits), values.view(bits))
                same &= bool((around[:64] == 7).all() and (around[-64:] == 7).all())
                assert same, f"{count} values of {dtype}, {rows} rows"
                checked += 1
    # The same where no 16 bytes are aligned: four bytes into memory.
    values = torch.randn(2**20, dtype=BF16)
    coded = encode(values)
    assert coded is not None
    moved = torch.empty(2**20 + 2, dtype=BF16, device=GPU)[2:]
    decode(coded.layout, coded.data.to(GPU), moved)
    assert torch.equal(moved.cpu().view(torch.int16), values.view(torch.int16))
    print(f"bits   the same from Triton and PyTorch in {checked + 1} cases")


def print_kernel(nbytes: int) -> None:
    """Prints bytes written a second, for bf16 weights of so many bytes."""
    from hookoffload.lossless_kernel import decode_in_triton

    coded = on_gpu(nbytes)
    layout, data = coded.layout, coded.data.to(GPU)
    output = torch.empty(layout.count, dtype=BF16, device=GPU)
    cells = []
    for rows in (4, 8, 16, 32):
        for warps in (2, 4, 8, 16):
            if not 16 <= rows * 32 // warps <= 512:
                continue

            def run(rows: int = rows, warps: int = warps) -> None:
                decode_in_triton(layout, data, output, rows=rows, warps=warps)

            cells.append((nbytes / device_seconds(run) / 1e12, rows, warps))
    cells.sort(reverse=True)
    mib = nbytes / 2**20
    for rate, rows, warps in cells:
        print(f"kernel {mib:5.0f} MiB  rows {rows:2} warps {warps:2}  {rate:.2f} TB/s")
    torch_rate = nbytes / device_seconds(
        lambda: decode_in_torch(layout, data, output), 3
    )
    copy_rate = nbytes / device_seconds(lambda: output.clone())
    print(
        f"       {mib:5.0f} MiB  PyTorch alone {torch_rate / 1e12:.2f} TB/s, "
        f"a copy {copy_rate / 1e12:.2f} TB/s"
    )
    small = on_gpu(2**20)
    data, output = small.data.to(GPU), output[: small.layout.count]
    launch = wall_seconds(lambda: decode(small.layout, data, output), 300)
    print(f"       a launch takes the host {launch * 1e6:.1f} us")


def print_encoding_on_cpu() -> None:
    """Prints how fast weights are encoded by threads side by side."""
    weights = [(torch.randn(2**23) * 0.02).to(BF16) for _ in range(8)]
    cores = os.cpu_count() or 1
    cells = []
    for threads in [n for n in (1, 2, 4, 8, 16) if n <= cores]:
        rate = encoding_rate(HostEncoder, weights * max(threads // 4, 1), threads)
        cells.append(f"{threads}: {rate / 1e9:.2f}")
    print(f"encode on the CPU, GB/s by threads  {'  '.join(cells)}")


def print_encoding_on_gpu() -> None:
    """Prints how fast the weights of a large transformer are encoded."""
    shapes = [(12288, 3072)] * 6 + [(3072, 3072)] * 24
    weights = []
    for shape in shapes:
        made = torch.randn(*shape, dtype=BF16, device=GPU) * 0.02
        weights.append(made.flatten().cpu())
    small = weights[-1]
    fused = fused_encoder(GPU, False)
    ways = [encode_in_torch] if fused is None else [fused, encode_in_torch]
    expected = encode(small)
    for way in ways:
        encoder = DeviceEncoder(GPU, CHUNK_BYTES[0], way)
        found = encode_from(small, small.numel(), BF16, encoder)
        assert expected is not None and found is not None
        assert torch.equal(found.data, expected.data)
        assert_gpu_encodes_all_bits(encoder)
    print("encode gives the same bytes as on the CPU")
    print_encoding_by_parts(weights, ways[0])
    cores = os.cpu_count() or 1
    best = (0.0, 0, 0)
    for chunk in CHUNK_BYTES:
        cells = []
        for threads in [n for n in (1, 4, 6, 8, 12, 16) if n <= cores]:
            make = partial(DeviceEncoder, GPU, chunk, ways[0])
            rate = encoding_rate(make, weights * 2, threads)
            best = max(best, (rate, threads, chunk))
            cells.append(f"{threads:2}: {rate / 1e9:5.2f}")
        mib = chunk // 2**20
        print(f"encode {mib:2} MiB a chunk, GB/s by threads  {'  '.join(cells)}")
    rate, threads, chunk = best
    make = partial(DeviceEncoder, GPU, chunk, ways[0])
    rate = encoding_rate(make, weights * 6, threads)
    print(
        f"encode {threads} threads, {chunk // 2**20} MiB, three times as long: "
        f"{rate / 1e9:.2f} GB/s, 41 GB in {41e9 / rate:.2f} s"
    )
    make = partial(DeviceEncoder, GPU, chunk, encode_in_torch)
    rate = encoding_rate(make, weights, threads)
    print(f"encode the same in plain PyTorch: {rate / 1e9:.2f} GB/s")


def assert_gpu_encodes_all_bits(encoder: DeviceEncoder) -> None:
    """Compares codes of all values, of which half of a chunk are patches."""
    values = (torch.randn(2**21) * 0.02).to(BF16)
    values.view(torch.int16)[-(2**16) :] = torch.arange(-(2**15), 2**15).short()
    expected = encode(values)
    found = encode_from(values, values.numel(), BF16, encoder)
    assert expected is not None and found is not None
    assert torch.equal(found.data, expected.data)


def print_encoding_by_parts(weights: Sequence[torch.Tensor], way: EncodeChunk) -> None:
    """Prints what one weight takes one thread, and the kernel alone."""
    small = weights[-1]
    layout = CodeLayout(dtype=BF16, count=small.numel(), base=108, patches=0)
    chunk = torch.zeros(words_of(layout), dtype=torch.int32, device=GPU)
    chunk.copy_(small.view(torch.int32))
    output = torch.empty_like(chunk)
    kernel = device_seconds(lambda: way(layout, chunk, output))
    launch = wall_seconds(lambda: way(layout, chunk, output), 100)
    base, _ = seconds(lambda: _choose_base(small, small.numel(), BF16), 5)
    encoder = DeviceEncoder(GPU, CHUNK_BYTES[0], way)

    def whole() -> object:
        return encode_from(small, small.numel(), BF16, encoder)

    taken, _ = seconds(whole, 10)
    print(
        f"encode a weight of {small.nbytes / 1e6:.1f} MB in one thread: "
        f"{taken * 1e3:.2f} ms, of that its base {base * 1e3:.2f} and the kernel "
        f"{kernel * 1e3:.3f} ({small.nbytes / kernel / 1e12:.2f} TB/s); "
        f"to launch that {launch * 1e6:.0f} us"
    )


def encoding_rate(
    make_encoder: Callable[[], ChunkEncoder],
    weights: Sequence[torch.Tensor],
    threads: int,
) -> float:
    """Returns bytes of weights that are encoded in a second."""
    idle = [make_encoder() for _ in range(threads)]
    ordered = sorted(weights, key=lambda weight: -weight.nbytes)

    def begin(encoder: ChunkEncoder) -> None:
        encode_from(ordered[0], ordered[0].numel(), BF16, encoder)

    def work(weight: torch.Tensor) -> Coded | None:
        encoder = idle.pop()
        coded = encode_from(weight, weight.numel(), BF16, encoder)
        idle.append(encoder)
        return coded

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(begin, idle))  # they take their memory
        # Codes are kept meanwhile, as those of a model are.
        taken, _ = seconds(lambda: list(pool.map(work, ordered)), 1)
    return sum(weight.nbytes for weight in weights) / taken


def on_gpu(nbytes: int) -> Coded:
    """Returns coded normal weights."""
    values = torch.randn(nbytes // 2, dtype=BF16, device=GPU) * 0.02
    coded = encode(values, GPU)
    assert coded is not None
    return coded


def device_seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Returns the device's seconds for one run, behind a warm-up."""
    run()
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def wall_seconds(run: Callable[[], object], repeats: int) -> float:
    """Returns the host's seconds for one launch."""
    run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    taken = (time.perf_counter() - began) / repeats
    torch.cuda.synchronize()
    return taken


def seconds(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Returns the least of the seconds of some runs, and what they return."""
    least = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        result = run()
        least = min(least, time.perf_counter() - began)
    return least, result


def gb_per_second(values: torch.Tensor, taken: float) -> str:
    """Returns a rate in words."""
    return f"{values.nbytes / taken / 1e9:.2f} GB/s"


if __name__ == "__main__":
    main()
