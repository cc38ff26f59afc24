"""Which masters are coded losslessly, and when: before the plan, which needs sizes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from .assembly import Assembly, assemble
from .budget import MemoryBudget
from .gather import can_gather
from .lossless import fused_decoder
from .lossless_encoder import CODED_DTYPES, DEVICE_BYTES
from .lossless_layout import CodeLayout
from .master import Master
from .master_code import MasterCode
from .partition import Partition
from .pass_planner import PassPlanner
from .plan import Plan
from .policy import ResolvedPolicy
from .progress import progress_bar
from .safetensors_file import TensorLocation

# Less is not worth a launch of a decoder.
LEAST_CODED_BYTES = 2**16

# Weights and codes go through memory that is not page-locked, at what one core can
# copy: several keep the link busy.
_THREADS = 4


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
    if policy.codec != "lossless" or not can_code(policy):
        assembly = assemble(found, policy, locations, known)
        if policy.codec is None or not can_code(policy):
            return assembly
        order = tuple(sorted(assembly.moving))
        planner.set_assembly(assembly, order, frozenset())
        if not codes_pay(policy, planner.plan):
            return assembly
        known = assembly.masters
    tables = {
        id(site.module._parameters.get("weight"))
        for site in found.sites
        if can_gather(site.module)
    }

    def prepare(masters: list[Master]) -> None:
        chosen = [m for m in masters if m.code is None and _pays(m, tables)]
        if budget is not None:
            _encode(chosen, policy, budget)
            return
        for master in chosen:
            code = foreseen(master.count, master.codec.rest)
            if code is not None:
                master.code_as(code)

    with torch.inference_mode(False):
        return assemble(found, policy, locations, known, prepare)


def foreseen(count: int, dtype: torch.dtype) -> MasterCode | None:
    """Return what a code of so many values will take, without their values."""
    if dtype not in CODED_DTYPES or count * dtype.itemsize < LEAST_CODED_BYTES:
        return None
    return MasterCode(CodeLayout(dtype=dtype, count=count, base=0, patches=0), 0)


def can_code(policy: ResolvedPolicy) -> bool:
    """Tell whether all layers wait in host RAM; files stay as they are."""
    in_ram = policy.onload.device == torch.device("cpu")
    return in_ram and policy.host_limit_bytes is None


def codes_pay(policy: ResolvedPolicy, plan: Plan) -> bool:
    """Tell whether "auto" wants codes.

    Args:
        policy: what the user wants.
        plan: the plan without codes. If it copies nothing over a link in each pass,
            codes would only have to be decoded.
    """
    link = policy.compute_device.type != "cpu" and plan.pass_bytes > 0
    return policy.codec == "auto" and link


def _pays(master: Master, tables: set[int]) -> bool:
    codec = master.codec
    one_dtype = codec.rest == codec.compute == codec.resident == master.flat.dtype
    if not (master.castable and one_dtype and codec.rest in CODED_DTYPES):
        return False
    # Rows of tables are looked up where they rest.
    looked_up = any(id(member.tensor) in tables for member in master.members)
    return master.plain_bytes >= LEAST_CODED_BYTES and not looked_up


def renew_codes(
    masters: list[Master], policy: ResolvedPolicy, budget: MemoryBudget
) -> None:
    """Encode again what was dropped, doubted or written to."""
    _encode([m for m in masters if m.has_old_code], policy, budget)


def _encode(
    masters: list[Master], policy: ResolvedPolicy, budget: MemoryBudget
) -> None:
    """Encode masters, on the device if it has room for that."""
    if not masters:
        return
    device, taken = policy.compute_device, DEVICE_BYTES * _THREADS
    # Who wants as little as possible there shall not find it full at attach.
    on_device = policy.limit_bytes != 0 and budget.fits(taken)
    total = sum(master.plain_bytes for master in masters)
    with progress_bar("encoding weights", total) as bar:
        if device.type != "cuda" or not on_device:
            for master in masters:
                master.encode()
                bar.update(master.plain_bytes)
        else:
            budget.reserve("encoding", taken)
            try:
                with ThreadPoolExecutor(_THREADS) as pool:
                    encode = partial(_encode_on_stream, device=device)
                    for nbytes in pool.map(encode, masters):
                        bar.update(nbytes)
            finally:
                torch.cuda.empty_cache()  # no other stream can use what these took
                budget.release("encoding", taken)
    if device.type == "cuda":
        fused_decoder(device)  # compiled now rather than in the first forward


def _encode_on_stream(master: Master, device: torch.device) -> int:
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        # The weights themselves may lie on the device, and be barely there.
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            master.encode(device)
    return master.plain_bytes
