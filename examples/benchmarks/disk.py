"""Models in files: memory, seconds of a pass, loading, and others on the same files.

    python examples/benchmarks/disk.py --size-gb 6 --limit-gb 1

A random transformer is written to a safetensors file once. Each row runs in a process
of its own and measures what it is compared with in the same run. A cold cache is made
by asking the system to drop the file's pages, before every pass.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    load_model,
    measure_rates,
    offload_plan,
    offload_stats,
)
from hookoffload.demo_model import Checkpoint, DemoTransformer, Shape

GIB = 2**30
CHUNK = 2**21
READERS = max(4, min(os.cpu_count() or 1, 16))


@dataclass(kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        what: What was measured.
        ours: The figure, with its unit.
        against: What it is compared with.
        ratio: The figure that is held against the bound.
        bound: Of the ratio: "<= 1.15", ">= 2", ...
        notes: More figures.
    """

    what: str
    ours: str
    against: str
    ratio: float
    bound: str
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        """Whether the ratio keeps the bound."""
        sign, number = self.bound.split()
        least, most = sign == ">=", float(number)
        return self.ratio >= most if least else self.ratio <= most


class Bench:
    """What all rows share: the checkpoint, the device, the input."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        dtype = getattr(torch, options.dtype)
        self.shape = Shape.of_size(options.size_gb * GIB, dtype)
        self.checkpoint = Checkpoint(options.folder, self.shape, dtype)
        self.path = self.checkpoint.path
        self.file_bytes = self.checkpoint.file_bytes
        generator = torch.Generator().manual_seed(0)
        vocabulary = 4 * self.shape.width
        self.tokens = torch.randint(
            vocabulary, (1, options.tokens), generator=generator
        ).to(self.device)

    def load(self, **fields: Any) -> DemoTransformer:
        """Loads the model from its file under a policy."""
        policy = OffloadPolicy(compute_device=self.device, **fields)
        return load_model(
            DemoTransformer,
            self.path,
            policy,
            config=asdict(self.shape),
            progress=False,
        )

    def run(self, model: nn.Module) -> float:
        """Returns the seconds of a forward."""
        began = time.perf_counter()
        with torch.no_grad():
            model(self.tokens)
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def cool(self) -> None:
        """Drops the file from the page cache."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def warm(self) -> None:
        """Has the file in the page cache."""
        self.read_all()

    def read_all(self) -> float:
        """Reads the file by plain parallel reads; returns bytes per second."""
        fd = os.open(self.path, os.O_RDONLY)
        starts = iter(range(0, self.file_bytes, CHUNK))
        lock = threading.Lock()

        def read() -> None:
            with mmap.mmap(-1, CHUNK) as buffer:
                while True:
                    with lock:
                        start = next(starts, None)
                    if start is None:
                        return
                    os.preadv(fd, [buffer], start)

        threads = [threading.Thread(target=read) for _ in range(READERS)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - began
        os.close(fd)
        return self.file_bytes / took

    @contextmanager
    def computing(self) -> Iterator[Callable[[], float]]:
        """Yields what measures a pass with every weight on the device, or in RAM."""
        if self.device.type == "cpu":
            model = self.load()
            # Beside what it is compared with: other programs take their turns here.
            yield lambda: self.run(model)
        else:
            seconds = self._resident_seconds()
            yield lambda: seconds

    def _resident_seconds(self) -> float:
        model = self.load()
        self.run(model)
        seconds = min(self.run(model) for _ in range(3))
        del model  # the limit counts all that this process has on the device
        gc.collect()
        return seconds

    def cold_rounds(
        self, model: nn.Module, compute: Callable[[], float], link: float | None
    ) -> dict[str, float]:
        """Runs cold passes in turns with what they are compared with.

        Returns:
            The medians of their seconds, of the bounds', and of the ratios.
        """
        self.run(model)  # learns the order
        self.run(model)
        plan = offload_plan(model)
        crossing = plan.link_bytes / link if link else 0.0
        rounds = []
        for _ in range(self.options.passes):
            self.cool()
            rate = self.read_all()
            self.cool()
            seconds = self.run(model)
            terms = {
                "compute": compute(),
                "link": crossing,
                "disk": plan.disk_bytes / rate,
            }
            bound = max(terms.values())
            figures = {"pass": seconds, "bound": bound, "ratio": seconds / bound}
            rounds.append(terms | figures)
        found = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        return found | {"disk_gib_a_pass": plan.disk_bytes / GIB}

    # -- rows -----------------------------------------------------------------------

    def rss(self) -> list[Row]:
        """How much RAM a model on disk takes."""
        before = anonymous_bytes()
        limit = self.options.limit_gb
        with watched(before) as peak:
            model = self.load(store="disk", limit_gb=limit)
            for _ in range(2):
                self.run(model)
        return [
            Row(
                what=f"RAM of a model on disk, limit_gb={limit:g}",
                ours=f"{peak[0] / GIB:.3f} GiB",
                against=f"{limit:g} GiB",
                ratio=peak[0] / GIB / limit,
                bound="<= 1.25",
                notes={"library": offload_stats(model).peak_bytes},
            )
        ]

    def steady(self) -> list[Row]:
        """Seconds of a steady pass from disk, cold."""
        with self.computing() as compute:
            model = self.load(store="disk", limit_gb=self.options.limit_gb)
            found = self.cold_rounds(model, compute, None)
        return [
            Row(
                what="a steady pass from disk, cold",
                ours=f"{found['pass']:.2f} s",
                against=f"compute {found['compute']:.2f}, read {found['disk']:.2f} s",
                ratio=found["ratio"],
                bound="<= 1.15",
                notes=found,
            )
        ]

    def tiers(self) -> list[Row]:
        """Seconds of a pass at host limits from none to all of the model."""
        link = measure_rates(self.device).link_bytes_per_second
        weights = self.checkpoint.tensor_bytes / GIB
        rows: list[Row] = []
        before = float("inf")
        with self.computing() as compute:
            for share in (0, 0.25, 0.5, 1.05):
                host = weights * share
                model = self.load(limit_gb=self.options.limit_gb, host_limit_gb=host)
                found = self.cold_rounds(model, compute, link)
                in_ram = offload_stats(model).host_bytes / GIB
                row = Row(
                    what=f"a cold pass, host_limit_gb={host:.2f}",
                    ours=f"{found['pass']:.2f} s",
                    against=f"three terms {found['bound']:.2f} s",
                    ratio=found["ratio"],
                    bound="<= 1.15",
                    notes=found | {"falls": found["pass"] < before, "host_gib": in_ram},
                )
                rows.append(row)
                before = found["pass"]
                del model
                gc.collect()
        return rows

    def loading(self) -> list[Row]:
        """Loading into RAM from a warm cache, against safetensors and pinning."""
        self.warm()
        before = anonymous_bytes()
        with watched(before) as peak:
            self._load_ours()
        # In turns: whoever is the first to touch memory pays for the system to find it.
        times = [(self._load_ours(), self._load_theirs()) for _ in range(2)]
        ours, theirs = (min(column) for column in zip(*times, strict=True))
        size = self.checkpoint.tensor_bytes
        return [
            Row(
                what="loading to RAM, warm",
                ours=f"{size / ours / 1e9:.2f} GB/s",
                against=f"load_file {size / theirs / 1e9:.2f} GB/s",
                ratio=theirs / ours,
                bound=">= 2",
            ),
            Row(
                what="peak RAM while loading to RAM",
                ours=f"{peak[0] / GIB:.3f} GiB",
                against=f"model {size / GIB:.3f} GiB",
                ratio=peak[0] / size,
                bound="<= 1.03",
            ),
        ]

    def _load_ours(self) -> float:
        began = time.perf_counter()
        model = self.load(store="cpu", limit_gb=self.options.limit_gb)
        took = time.perf_counter() - began
        del model
        gc.collect()
        return took

    def _load_theirs(self) -> float:
        began = time.perf_counter()
        loaded = load_file(self.path)
        if self.device.type == "cuda":
            loaded = {name: tensor.pin_memory() for name, tensor in loaded.items()}
        else:  # it maps the file: what has to be in RAM must be read
            loaded = {name: tensor.clone() for name, tensor in loaded.items()}
        took = time.perf_counter() - began
        del loaded
        gc.collect()
        return took

    def first(self) -> list[Row]:
        """From the files, warm, to the first output."""
        limit = self.options.limit_gb
        self.warm()
        began = time.perf_counter()
        model = self.load(limit_gb=limit, store=self.options.first_store)
        self.run(model)
        ours = time.perf_counter() - began
        del model
        gc.collect()
        began = time.perf_counter()
        with torch.device("meta"):
            plain = DemoTransformer(**asdict(self.shape))
        plain.load_state_dict(load_file(self.path), assign=True)
        policy = OffloadPolicy(compute_device=self.device, limit_gb=limit)
        attach_offload_hooks(plain, policy)
        self.run(plain)
        theirs = time.perf_counter() - began
        return [
            Row(
                what="from warm files to the first output",
                ours=f"{ours:.2f} s",
                against=f"load_file and attach {theirs:.2f} s",
                ratio=theirs / ours,
                bound=">= 1",
            )
        ]

    def others(self) -> list[Row]:
        """Passes of accelerate and of the plain way, on the same file."""
        ways: dict[str, Callable[[], nn.Module]] = {
            "accelerate disk_offload": self._accelerate,
            "open, get tensor, to device": self._open_and_get,
        }
        seconds: dict[str, dict[str, float]] = {}
        ours = self.load(store="disk", limit_gb=self.options.limit_gb)
        seconds["ours"] = self._warm_and_cold(ours)
        del ours
        gc.collect()
        rows = []
        for name, make in ways.items():
            model = make()
            theirs = self._warm_and_cold(model)
            for state, bound in (("warm", ">= 3"), ("cold", ">= 1")):
                mine = seconds["ours"][state]
                row = Row(
                    what=f"{name}, {state}",
                    ours=f"{mine:.2f} s",
                    against=f"{theirs[state]:.2f} s",
                    ratio=theirs[state] / mine,
                    bound=bound,
                )
                rows.append(row)
            del model
            gc.collect()
        return rows

    def _warm_and_cold(self, model: nn.Module) -> dict[str, float]:
        self.warm()
        self.run(model)
        self.warm()
        warm = min(self.run(model) for _ in range(2))
        cold = []
        for _ in range(self.options.passes):
            self.cool()
            cold.append(self.run(model))
        return {"warm": warm, "cold": statistics.median(cold)}

    def _accelerate(self) -> nn.Module:
        from accelerate import disk_offload

        with torch.device("meta"):
            model = DemoTransformer(**asdict(self.shape))
        folder = self.options.folder / "accelerate"
        folder.mkdir(exist_ok=True)
        names = {name for name, _ in model.named_parameters()}
        index = {
            name: {
                "safetensors_file": str(self.path),
                "weight_name": name,
                "dtype": self.options.dtype,
            }
            for name in names
        }
        (folder / "index.json").write_text(json.dumps(index))
        disk_offload(model, folder, execution_device=self.device)
        return model

    def _open_and_get(self) -> nn.Module:
        with torch.device("meta"):
            model = DemoTransformer(**asdict(self.shape))
        for name, module in model.named_modules():
            own = [
                key for key, weight in module._parameters.items() if weight is not None
            ]
            if own:
                _Fetch(self.path, f"{name}.", own, self.device).hang_on(module)
        return model


class _Fetch:
    """Opens the file before a forward and drops the tensors behind it."""

    def __init__(
        self, path: Path, prefix: str, names: list[str], device: torch.device
    ) -> None:
        self.path, self.prefix, self.names = path, prefix, names
        self.device = device
        self.empty: dict[str, Any] = {}

    def hang_on(self, module: nn.Module) -> None:
        """Hangs both hooks."""
        self.empty = dict(module._parameters)
        module.register_forward_pre_hook(self._fetch)
        module.register_forward_hook(self._drop)

    def _fetch(self, module: nn.Module, _: Any) -> None:
        with safe_open(self.path, framework="pt", device="cpu") as file:
            for name in self.names:
                tensor = file.get_tensor(self.prefix + name).to(self.device)
                module._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    def _drop(self, module: nn.Module, *_: Any) -> None:
        module._parameters.update(self.empty)


def anonymous_bytes() -> int:
    """Returns the RAM of this process without pages of files."""
    fields = ("RssAnon:", "RssShmem:")
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(fields))


@contextmanager
def watched(before: int) -> Iterator[list[int]]:
    """Notes the most RAM above what there was, while the block runs."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peak[0] = max(peak[0], anonymous_bytes() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


ROWS = ("rss", "steady", "tiers", "loading", "first", "others")


def main() -> int:
    """Measures each row in a process of its own and prints a table."""
    options = _parse()
    bench = Bench(options)
    if options.row:
        rows = getattr(bench, options.row)()
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    if not bench.checkpoint.exists():
        bench.checkpoint.write()
    print(
        f"{bench.checkpoint.tensor_bytes / GIB:.2f} GiB of {options.dtype}, "
        f"{bench.shape.blocks} blocks of width {bench.shape.width}, "
        f"{options.tokens} tokens on {options.device}, limit {options.limit_gb:g} GiB"
    )
    found: list[Row] = []
    for name in options.rows:
        ended = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--row", name],
            stdout=subprocess.PIPE,
            text=True,
        )
        if ended.returncode:
            print(f"{name}: failed")
            continue
        for fields in json.loads(ended.stdout.splitlines()[-1]):
            row = Row(**fields)
            found.append(row)
            print(
                f"{row.what:<40} {row.ours:>12}  {row.against:<32} "
                f"{row.ratio:6.2f} ({row.bound}) {'' if row.kept else 'MISSED'}",
                flush=True,
            )
            if options.notes and row.notes:
                print(f"    {json.dumps(row.notes)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1))
    if options.remove:
        bench.path.unlink()
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    accelerator = torch.accelerator.is_available()
    parser.add_argument("--folder", type=Path, default=Path("disk-benchmark"))
    parser.add_argument("--size-gb", type=float, default=6.0)
    parser.add_argument("--limit-gb", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--device", default="cuda" if accelerator else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if accelerator else "float32")
    parser.add_argument("--first-store", choices=("cpu", "disk"), default="cpu")
    # From files on a CPU nothing has to come first: they are used as they are mapped.
    usual = [row for row in ROWS if accelerator or row != "first"]
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=usual)
    parser.add_argument("--notes", action="store_true", help="show more figures")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--remove", action="store_true", help="remove the checkpoint")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
