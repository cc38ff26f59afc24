"""Models in files: memory, seconds of a pass, loading, and others on the same files.

    python examples/benchmarks/disk.py --size-gb 6 --limit-gb 1

A random transformer is written to a safetensors file once; its blocks are alike. Each
row runs in a process of its own and measures what it is compared with in the same run.
A cold cache is made by asking the system to drop the file's pages, before every pass.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from disk_bench import GIB, READERS, Bench
from disk_rows import ROWS, Row


def main() -> int:
    """Measures each row in a process of its own and prints a table."""
    options = _parse()
    bench = Bench(options)
    if options.row:
        rows = ROWS[options.row](bench)
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    began = time.perf_counter()
    if not bench.checkpoint.exists():
        bench.checkpoint.write(alike=True)
    print(
        f"{bench.checkpoint.tensor_bytes / GIB:.2f} GiB of {options.dtype}, "
        f"{bench.shape.blocks} blocks of width {bench.shape.width}, "
        f"{options.tokens} tokens on {options.device}, limit {options.limit_gb:g} GiB"
    )
    bench.cool()
    cached = bench.cached_share()
    rate = bench.read_all()
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; plain reads by "
        f"{READERS} threads {rate / 1e9:.2f} GB/s with {cached:.0%} of the file cached"
        f" [{time.perf_counter() - began:.0f} s]",
        flush=True,
    )
    found: list[Row] = []
    failed = 0
    for name in options.rows:
        began = time.perf_counter()
        rows = _measured(name, options.row_seconds)
        failed += not rows
        for row in rows:
            found.append(row)
            print(
                f"{row.what:<41} {row.ours:>12}  {row.against:<36} "
                f"{row.ratio:6.2f} ({row.bound}) {'' if row.kept else 'MISSED'}"
            )
            if options.notes and row.notes:
                print(f"    {json.dumps(_rounded(row.notes))}")
        print(f"[{name}: {time.perf_counter() - began:.0f} s]", flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1))
    if options.remove:
        bench.path.unlink()
        shutil.rmtree(bench.codes, ignore_errors=True)
    return min(failed, 1)


def _measured(name: str, most_seconds: float) -> list[Row]:
    """Measures a row in a process of its own; says why if it fails."""
    try:
        ended = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--row", name],
            capture_output=True,
            text=True,
            timeout=most_seconds,
        )
    except subprocess.TimeoutExpired:
        print(f"{name}: takes longer than {most_seconds:g} s")
        return []
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-3:]
        print(f"{name}: failed ({ended.returncode})", *last, sep="\n    ")
        return []
    return [Row(**fields) for fields in json.loads(ended.stdout.splitlines()[-1])]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    accelerator = torch.accelerator.is_available()
    parser.add_argument("--folder", type=Path, default=Path("disk-benchmark"))
    parser.add_argument("--size-gb", type=float, default=6.0)
    parser.add_argument("--limit-gb", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--passes", type=int, default=3, help="of which the best count")
    parser.add_argument("--device", default="cuda" if accelerator else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if accelerator else "float32")
    parser.add_argument("--first-store", choices=("cpu", "disk"), default="cpu")
    # From files on a CPU nothing has to come first: they are used as they are mapped.
    # And a CPU decodes more slowly than most disks are read.
    usual = [row for row in ROWS if accelerator or row not in ("first", "coded")]
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=usual)
    parser.add_argument("--row-seconds", type=float, default=3600, help="at most a row")
    parser.add_argument("--notes", action="store_true", help="show more figures")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--remove", action="store_true", help="remove the checkpoint")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
