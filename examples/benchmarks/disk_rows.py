"""The rows of `disk.py`: each measures what it is compared with in the same process."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from disk_bench import GIB, Bench, anonymous_bytes, watched
from disk_others import WAYS
from safetensors.torch import load_file
from torch import nn

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    measure_rates,
    offload_stats,
)
from hookoffload.demo_model import DemoTransformer


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
        bound = float(number)
        if sign == "<":
            return self.ratio < bound
        return self.ratio >= bound if sign == ">=" else self.ratio <= bound


def rss(bench: Bench) -> list[Row]:
    """How much RAM a model on disk takes."""
    before = anonymous_bytes()
    limit = bench.options.limit_gb
    with watched(before) as peak:
        model = bench.load(store="disk", limit_gb=limit)
        for _ in range(2):
            bench.run(model)
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


def steady(bench: Bench) -> list[Row]:
    """Seconds of a steady pass from disk, cold."""
    with bench.computing() as compute:
        model = bench.load(store="disk", limit_gb=bench.options.limit_gb)
        found = bench.cold_rounds(model, compute, None)
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


def tiers(bench: Bench) -> list[Row]:
    """Seconds of a pass at host limits from none to all of the model."""
    link = measure_rates(bench.device).link_bytes_per_second
    weights = bench.checkpoint.tensor_bytes / GIB
    rows: list[Row] = []
    passes = []
    with bench.computing() as compute:
        for share in (0, 0.25, 0.5, 1.05):
            host = weights * share
            model = bench.load(limit_gb=bench.options.limit_gb, host_limit_gb=host)
            found = bench.cold_rounds(model, compute, link)
            passes.append(found["pass"])
            terms = (f"{found[term]:.2f}" for term in ("compute", "link", "disk"))
            row = Row(
                what=f"a cold pass, host_limit_gb={host:.2f}",
                ours=f"{found['pass']:.2f} s",
                against=f"compute, link, disk {', '.join(terms)}",
                ratio=found["ratio"],
                bound="<= 1.15",
                notes=found | {"host_gib": offload_stats(model).host_bytes / GIB},
            )
            rows.append(row)
            del model
            gc.collect()
    steps = [after / before for before, after in itertools.pairwise(passes)]
    rows.append(
        Row(
            what="seconds fall with each host_limit_gb",
            ours=", ".join(f"{seconds:.2f}" for seconds in passes),
            against="the step before",
            ratio=max(steps),
            bound="< 1",
            notes={"steps": steps},
        )
    )
    return rows


def coded(bench: Bench) -> list[Row]:
    """Bytes and seconds of a cold pass from kept codes, against the weights."""
    found: dict[bool, dict[str, float]] = {}
    narrow = bench.options.dtype == "bfloat16"
    fields = {"store": "disk", "limit_gb": bench.options.limit_gb}
    models = {
        kept: bench.load(cache_codes=kept, codec="lossless" if kept else None, **fields)
        for kept in (False, True)
    }
    for kept, model in models.items():
        for _ in range(2):
            bench.run(model)  # learns the order
        read = offload_stats(model).bytes_read
        bench.run(model)
        found[kept] = {"read": offload_stats(model).bytes_read - read}
    for _ in range(bench.options.passes):
        for kept, model in models.items():
            bench.cool()
            seconds = bench.run(model)
            found[kept]["pass"] = min(found[kept].get("pass", seconds), seconds)
    ours, theirs = found[True], found[False]
    return [
        Row(
            what="read in a pass from kept codes",
            ours=f"{ours['read'] / GIB:.3f} GiB",
            against=f"weights {theirs['read'] / GIB:.3f} GiB",
            ratio=ours["read"] / theirs["read"],
            bound="<= 0.78" if narrow else "<= 0.9",
        ),
        Row(
            what="a pass from kept codes, cold",
            ours=f"{ours['pass']:.2f} s",
            against=f"weights {theirs['pass']:.2f} s",
            ratio=ours["pass"] / theirs["pass"],
            bound="<= 0.85" if narrow else "<= 0.95",
        ),
    ]


def loading(bench: Bench) -> list[Row]:
    """Loading into RAM from a warm cache, against safetensors and pinning."""
    bench.warm()
    before = anonymous_bytes()
    with watched(before) as peak:
        _load_ours(bench)
    # In turns: whoever is the first to touch memory pays for the system to find it.
    rounds = range(bench.options.passes)
    times = [(_load_ours(bench), _load_theirs(bench)) for _ in rounds]
    ours, theirs = (min(column) for column in zip(*times, strict=True))
    size = bench.checkpoint.tensor_bytes
    way = "load_file, pinned" if bench.device.type == "cuda" else "load_file, copied"
    return [
        Row(
            what="loading to RAM, warm",
            ours=f"{size / ours / 1e9:.2f} GB/s",
            against=f"{way} {size / theirs / 1e9:.2f} GB/s",
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


def _load_ours(bench: Bench) -> float:
    began = time.perf_counter()
    model = bench.load(store="cpu", limit_gb=bench.options.limit_gb)
    took = time.perf_counter() - began
    del model
    gc.collect()
    return took


def _load_theirs(bench: Bench) -> float:
    began = time.perf_counter()
    loaded = load_file(bench.path)
    if bench.device.type == "cuda":
        loaded = {name: tensor.pin_memory() for name, tensor in loaded.items()}
    else:  # it maps the file: what has to be in RAM must be read
        loaded = {name: tensor.clone() for name, tensor in loaded.items()}
    took = time.perf_counter() - began
    del loaded
    gc.collect()
    if bench.device.type == "cuda":
        # PyTorch keeps page-locked memory, and the next round would find it ready: a
        # program that loads its model locks it for the first time.
        torch._C._host_emptyCache()
    return took


def first(bench: Bench) -> list[Row]:
    """From the files, warm, to the first output."""
    bench.warm()
    # In turns, as in `loading`.
    rounds = range(bench.options.passes)
    times = [(_first_of_ours(bench), _first_of_theirs(bench)) for _ in rounds]
    ours, theirs = (min(column) for column in zip(*times, strict=True))
    return [
        Row(
            what="from warm files to the first output",
            ours=f"{ours[0]:.2f} s",
            against=f"load_file and attach {theirs[0]:.2f} s",
            ratio=ours[0] / theirs[0],
            bound="< 1",
            notes={
                "loaded": ours[1],
                "theirs loaded and attached": theirs[1],
                "rounds": times,
            },
        )
    ]


def _first_of_ours(bench: Bench) -> tuple[float, float]:
    """Returns seconds to the first output, and to where that forward began."""
    began = time.perf_counter()
    model = bench.load(limit_gb=bench.options.limit_gb, store=bench.options.first_store)
    loaded = time.perf_counter() - began
    bench.run(model)
    took = time.perf_counter() - began
    del model
    gc.collect()
    return took, loaded


def _first_of_theirs(bench: Bench) -> tuple[float, float]:
    began = time.perf_counter()
    with torch.device("meta"):
        plain = DemoTransformer(**asdict(bench.shape))
    plain.load_state_dict(load_file(bench.path), assign=True)
    policy = OffloadPolicy(compute_device=bench.device, limit_gb=bench.options.limit_gb)
    attach_offload_hooks(plain, policy, progress=False)
    attached = time.perf_counter() - began
    bench.run(plain)
    took = time.perf_counter() - began
    del plain
    gc.collect()
    return took, attached


def others(bench: Bench) -> list[Row]:
    """Passes of accelerate and of the plain way, on the same file."""
    model: nn.Module = bench.load(store="disk", limit_gb=bench.options.limit_gb)
    ours = _warm_and_cold(bench, model)
    del model
    gc.collect()
    rows = []
    for name, make in WAYS.items():
        model = make(bench)
        theirs = _warm_and_cold(bench, model)
        for state, bound in (("warm", ">= 3"), ("cold", ">= 1")):
            row = Row(
                what=f"{name}, {state}",
                ours=f"{ours[state]:.2f} s",
                against=f"{theirs[state]:.2f} s",
                ratio=theirs[state] / ours[state],
                bound=bound,
            )
            rows.append(row)
        del model
        gc.collect()
    return rows


def _warm_and_cold(bench: Bench, model: nn.Module) -> dict[str, float]:
    bench.warm()
    bench.run(model)
    warm = min(bench.run(model) for _ in range(2))
    cold = []
    for _ in range(bench.options.passes):
        bench.cool()
        cold.append(bench.run(model))
    return {"warm": warm, "cold": min(cold)}


ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    "rss": rss,
    "steady": steady,
    "tiers": tiers,
    "coded": coded,
    "loading": loading,
    "first": first,
    "others": others,
}
