"""What the rows of `disk.py` share: the checkpoint, its reads, a cold page cache."""

from __future__ import annotations

import argparse
import ctypes
import gc
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookoffload import OffloadPolicy, load_model, offload_plan
from hookoffload.demo_model import Checkpoint, DemoTransformer, Shape

GIB = 2**30
CHUNK = 2**21
READERS = max(4, min(os.cpu_count() or 1, 16))


class Bench:
    """The checkpoint, the device, the input."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        dtype = getattr(torch, options.dtype)
        self.shape = Shape.of_size(options.size_gb * GIB, dtype)
        self.checkpoint = Checkpoint(options.folder, self.shape, dtype)
        self.path = self.checkpoint.path
        self.file_bytes = self.checkpoint.file_bytes
        self.codes = options.folder / "codes"
        generator = torch.Generator().manual_seed(0)
        vocabulary = 4 * self.shape.width
        self.tokens = torch.randint(
            vocabulary, (1, options.tokens), generator=generator
        ).to(self.device)

    def load(self, *, cache_codes: bool = False, **fields: Any) -> DemoTransformer:
        """Loads the model from its file, or what is coded of it, under a policy."""
        policy = OffloadPolicy(compute_device=self.device, **fields)
        return load_model(
            DemoTransformer,
            self.path,
            policy,
            config=asdict(self.shape),
            cache_dir=self.codes,
            cache_codes=cache_codes,
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
        """Drops the file, and its codes, from the page cache."""
        for path in (self.path, *self.codes.glob("*/*.safetensors")):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def cached_share(self) -> float:
        """Returns how much of the file is in the page cache, from 0 to 1."""
        pages = -(-self.file_bytes // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        with (
            self.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped,
        ):
            start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            libc = ctypes.CDLL(None, use_errno=True)
            size = ctypes.c_size_t(len(mapped))
            if libc.mincore(ctypes.c_void_p(start), size, found):
                raise OSError(ctypes.get_errno(), "mincore")
        return sum(page & 1 for page in found) / pages

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
            self.run(model)
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
    ) -> dict[str, Any]:
        """Runs cold passes in turns with what they are compared with.

        Other programs make each figure larger and none smaller, so the best of each
        are compared. Where they share the disk its rate changes from round to round,
        and the best of it is luck: the middle one of the rounds' own ratios is told
        as well.

        Returns:
            The best of their seconds and of each term of the bound, the bound, the
            ratio, the middle ratio, and the seconds of each round.
        """
        self.run(model)  # learns the order
        self.run(model)
        plan = offload_plan(model)
        rounds = []
        for _ in range(self.options.passes):
            self.cool()
            rate = self.read_all()
            self.cool()
            seconds = self.run(model)
            terms = {
                "compute": compute(),
                "link": plan.link_bytes / link if link else 0.0,
                "disk": plan.disk_bytes / rate,
            }
            rounds.append({"pass": seconds, **terms})
        best = {key: min(r[key] for r in rounds) for key in rounds[0]}
        ratios = [r["pass"] / max(r["compute"], r["link"], r["disk"]) for r in rounds]
        bound = max(best["compute"], best["link"], best["disk"])
        return {
            **best,
            "bound": bound,
            "ratio": best["pass"] / bound,
            "middle_ratio": statistics.median(ratios),
            "disk_gib": plan.disk_bytes / GIB,
            "rounds": [list(r.values()) for r in rounds],
        }


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
