"""Which masters are coded losslessly, and when: before the plan, which needs sizes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain

import torch

from .assembly import Assembly, assemble, make_master, only_looked_up
from .budget import BudgetExceededError, MemoryBudget, format_gib
from .cached_codes import CodeCache, codes_open
from .codable import (
    can_code,
    can_pay,
    codes_pay,
    foreseen,
    has_place_for_code,
    host_sizes,
    looked_up,
    waits_off_device,
)
from .host_memory import automatic_limit
from .lossless import TIMED_BYTES, decode_seconds, fused_decoder
from .lossless_device import CHUNK_BYTES, DeviceEncoder, fused_encoder, taken_bytes
from .lossless_encoder import ChunkEncoder
from .lossless_host import HostEncoder
from .master import Master
from .master_code import MasterCode
from .partition import Partition
from .pass_planner import PassPlanner
from .progress import progress_bar
from .resolved_policy import ResolvedPolicy
from .safetensors_file import TensorLocation

logger = logging.getLogger(__name__)

# Behind so many, copies in host RAM and the link are what takes the time; with fewer
# than a few, they wait for each other, see [Note: what encoding on a device takes].
# `examples/benchmarks/lossless.py --encoding` measures other numbers.
_DEVICE_THREADS, _FEW_THREADS = 8, 6
# What encoders may take of a device for a moment, and the part of what is free there.
_ENCODING_BYTES, _ENCODING_SHARE = 2**31, 2


def assemble_coded(
    found: Partition,
    policy: ResolvedPolicy,
    locations: dict[str, TensorLocation],
    known: dict[int, Master],
    planner: PassPlanner,
    budget: MemoryBudget | None,
) -> Assembly:
    """Make layers as `assemble` does, with the codes that the policy asks for.

    Args:
        found: the partition.
        policy: what the user wants.
        locations: where the bytes of tensors lie that were never in memory, by name.
        known: masters from an earlier assembly of the same model, which are kept.
        planner: plans without codes, to see whether "auto" wants them.
        budget: of the compute device; None only foresees codes, and reads no value.

    Raises:
        BudgetExceededError: The limit is below the least that the layers need.
    """
    wanted: set[int] | None = None
    tables_only: frozenset[int] = frozenset()
    if policy.codec != "lossless" or not waits_off_device(policy):
        assembly = assemble(found, policy, locations, known)
        if policy.codec != "auto" or not can_code(policy):
            return assembly
        order = tuple(sorted(assembly.moving))
        tables_only = frozenset(only_looked_up(found))
        planner.set_assembly(assembly, order, tables_only)
        if not codes_pay(policy, planner.plan):
            return assembly
        known = assembly.masters
        # See [Note: what "auto" codes].
        streamed = (assembly.layers[index] for index in planner.plan.streamed)
        masters = (master for layer in streamed for master in layer.masters)
        wanted = {id(m) for m in masters if m.location is not None}
        if not wanted:
            return assembly
    tables = looked_up(site.module for site in found.sites)

    new: list[Master] = []

    def prepare(masters: list[Master]) -> None:
        with codes_open(masters):
            chosen = [
                master
                for master in masters
                if master.code is None
                and can_pay(master, tables)
                and has_place_for_code(master, policy)
            ]
            if wanted is not None:
                chosen = [master for master in chosen if id(master) in wanted]
                new.extend(chosen)
            if budget is not None:
                _encode(chosen, policy, budget, Master.encode)
        if budget is None:
            for master in chosen:
                code = foreseen(master.count, master.codec.rest)
                if code is not None:
                    master.code_as(code)

    with torch.inference_mode(False):
        host_size = host_sizes(found, policy)
        coded = assemble(found, policy, locations, known, prepare, host_size)
    if wanted is not None and not _fits(coded, tables_only, planner):
        for master in new:
            master.forget_code()
        coded = assemble(found, policy, locations, known)
    return coded


def _fits(
    assembly: Assembly, tables_only: frozenset[int], planner: PassPlanner
) -> bool:
    """Tell whether the limit has room for what layers are decoded into."""
    try:
        planner.set_assembly(assembly, tuple(sorted(assembly.moving)), tables_only)
    except BudgetExceededError:
        return False
    return True


def complete_codes(
    cache: CodeCache,
    found: Partition,
    policy: ResolvedPolicy,
    locations: dict[str, TensorLocation],
    budget: MemoryBudget,
) -> None:
    """Have a cache keep the codes of a model's weights, and these know them.

    Comes before layers are divided among tiers, which needs sizes.

    Args:
        cache: the cache.
        found: the partition of the model.
        policy: what the user wants.
        locations: where the weights lie, by name; see `CodeCache.complete`.
        budget: of the compute device.

    Raises:
        CheckpointError: The cache's entry is damaged, or the disk is full.
    """
    tables = looked_up(site.module for site in found.sites)
    divided = policy.host_limit_bytes is not None
    tiers = (True, False) if divided else (policy.onload.on_disk,)

    def codable() -> Iterable[Master]:
        for group in chain.from_iterable(sketch.groups for sketch in found.layers):
            for on_disk in tiers:
                master = make_master(
                    group, policy, locations, always=False, on_disk=on_disk
                )
                if can_pay(master, tables):
                    yield master
                    break

    with torch.inference_mode(False):
        cache.complete(
            locations, codable, lambda masters: make_codes(masters, policy, budget)
        )


def renew_codes(
    masters: list[Master], policy: ResolvedPolicy, budget: MemoryBudget
) -> None:
    """Encode again what was dropped, doubted or written to."""
    _encode([m for m in masters if m.has_old_code], policy, budget, Master.encode)


def make_codes(
    masters: list[Master], policy: ResolvedPolicy, budget: MemoryBudget
) -> list[tuple[Master, MasterCode]]:
    """Encode masters without giving them their codes; those that would not shrink go.

    Layers have to be made anew when masters get codes: behind an interrupt here,
    everything is as before.
    """
    made: list[tuple[Master, MasterCode]] = []

    def make(master: Master, encoder: ChunkEncoder) -> None:
        code = master.make_code(encoder)
        if code is not None:
            made.append((master, code))

    with codes_open(masters):
        _encode(masters, policy, budget, make)
    return made


def _encode(
    masters: list[Master],
    policy: ResolvedPolicy,
    budget: MemoryBudget,
    work: Callable[[Master, ChunkEncoder], None],
) -> None:
    """Encode masters by several threads, on the device if it has room for that."""
    if not masters:
        return
    device = policy.compute_device
    dtypes = {master.flat.dtype for master in masters}
    threads, chunk_bytes, taken = _device_encoders(dtypes, policy, budget)
    if threads:
        # What the window and residents were in would be kept beside what encoders take.
        torch.cuda.empty_cache()
        budget.reserve("encoding", taken)
        try:
            make = partial(DeviceEncoder, device, chunk_bytes)
            _encode_in_threads(masters, threads, make, work)
            torch.cuda.empty_cache()  # no other stream can use what these took
            if taken >= 2 * TIMED_BYTES:
                decode_seconds(device, TIMED_BYTES)  # for figures
        finally:
            torch.cuda.empty_cache()
            budget.release("encoding", taken)
    else:
        _encode_in_threads(masters, torch.get_num_threads(), HostEncoder, work)
    if device.type == "cuda":
        fused_decoder(device)  # compiled now rather than in the first forward


def _device_encoders(
    dtypes: set[torch.dtype], policy: ResolvedPolicy, budget: MemoryBudget
) -> tuple[int, int, int]:
    """Return how many threads encode on the device, their chunks, and what they take.

    Chunks and what all of them take there together are in bytes.
    """
    device, limit = policy.compute_device, policy.limit_bytes
    # Who wants as little as possible there shall not find it full at attach.
    if device.type != "cuda" or limit == 0:
        return 0, 0, 0
    most = min(_ENCODING_BYTES, automatic_limit(device) // _ENCODING_SHARE)
    if limit is not None:
        most = min(most, limit - budget.total_used)
    # Compiled here, and not by several threads.
    fused = all([fused_encoder(device, dtype.itemsize == 4) for dtype in dtypes])
    threads = chunk_bytes = taken = 0
    for chunk_bytes in CHUNK_BYTES:
        taken = taken_bytes(chunk_bytes, fused=fused)
        threads = min(max(most, 0) // taken, _DEVICE_THREADS, os.cpu_count() or 1)
        if threads >= min(_FEW_THREADS, os.cpu_count() or 1):
            break
    return threads, chunk_bytes, threads * taken


def _encode_in_threads(
    masters: list[Master],
    threads: int,
    make_encoder: Callable[[], ChunkEncoder],
    work: Callable[[Master, ChunkEncoder], None],
) -> None:
    idle: list[ChunkEncoder] = []

    def encode(master: Master) -> int:
        try:
            encoder = idle.pop()
        except IndexError:
            encoder = make_encoder()
        work(master, encoder)
        idle.append(encoder)
        return master.plain_bytes

    # The largest first, so that all threads end at about the same time.
    ordered = sorted(masters, key=lambda master: -master.plain_bytes)
    total = sum(master.plain_bytes for master in masters)
    began = time.perf_counter()
    with (
        progress_bar("encoding weights", total) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        one_by_one = threads == 1 or len(masters) == 1
        for nbytes in map(encode, ordered) if one_by_one else pool.map(encode, ordered):
            bar.update(nbytes)
    seconds = time.perf_counter() - began
    logger.info("encoded %s in %.2f s", format_gib(total), seconds)
