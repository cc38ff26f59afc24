"""Which layers wait in host RAM and which in their files: pure arithmetic.

[Note: three tiers] One list of priorities says who stays on the compute device; it is
filled from the front, as far as the limit reaches. The same list says who waits in host
RAM; it is filled from the back, as far as the host limit reaches. So the two limits
never pay for one layer twice as long as there is a third tier, whatever becomes of the
first (`set_limit`, activations that grow): what is read from disk in a pass is the
middle of the list. Every beginning and every end of it is spread evenly over the order
of a pass, so that what one tier brings in hides behind the others; and more host RAM
only adds layers to the tier, it never exchanges them.

What no pass visits (tables whose rows are looked up) comes last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .plan import LayerSpec
from .priorities import priorities

# What is read ahead of the copies to an accelerator. Twice the largest layer: one is
# being copied while the next is read. With less than the least, reads and copies wait
# for each other; the usual size keeps a fast disk busy with small layers.
STAGING_LAYERS = 2
STAGING_LEAST = 32 * 2**20
STAGING_USUAL = 128 * 2**20
STAGING_MOST = 512 * 2**20


def host_tier(
    layers: Sequence[LayerSpec], order: Sequence[int], host_bytes: int
) -> frozenset[int]:
    """Chooses the layers that wait in host RAM.

    Args:
        layers: Every layer; ``host_bytes`` of each is what it takes in RAM.
        order: The layers of a pass, as indices, in sequence.
        host_bytes: The most that they may take together.

    Example:
        >>> specs = [
        ...     LayerSpec(name=f"blocks.{i}", stream_bytes=2**30, copy_bytes=2**30,
        ...               resident_bytes=2**30, host_bytes=2**30)
        ...     for i in range(8)
        ... ]
        >>> sorted(host_tier(specs, range(8), 2 * 2**30))
        [3, 7]
    """
    waiting = [
        layer
        if layer.can_stay == (layer.host_bytes > 0)
        else replace(layer, can_stay=not layer.can_stay)
        for layer in layers
    ]
    ranked, _ = priorities(tuple(waiting), order)
    visited = set(order)
    backwards = [index for index in reversed(ranked) if index in visited]
    absent = [index for index in ranked if index not in visited]
    chosen: list[int] = []
    for index in (*backwards, *absent):
        host_bytes -= layers[index].host_bytes
        if host_bytes < 0:
            break
        chosen.append(index)
    return frozenset(chosen)


def host_shares(
    host_limit: int | None, sizes: Mapping[str, int]
) -> dict[str, int | None]:
    """Divides a host limit among models, by their sizes.

    Args:
        host_limit: The limit in bytes; None: there is none.
        sizes: The bytes of each model's weights.

    Example:
        >>> host_shares(30, {"encoder": 20, "transformer": 40})
        {'encoder': 10, 'transformer': 20}
    """
    if host_limit is None:
        return dict.fromkeys(sizes)
    total = max(sum(sizes.values()), 1)
    return {name: host_limit * size // total for name, size in sizes.items()}


def host_bytes_left(layers: Sequence[LayerSpec], host_limit: int, device: str) -> int:
    """Returns how much of a host limit is left for layers.

    Args:
        layers: Every layer; ``host_bytes`` of each is what it takes in RAM.
        host_limit: The limit in bytes.
        device: The kind of the compute device. A CPU reads files into its window; for
            another one they pass through buffers in RAM, unless no layer is on disk.
    """
    total = sum(layer.host_bytes for layer in layers)
    if total <= host_limit or device == "cpu":
        return host_limit
    largest = max((layer.copy_bytes for layer in layers), default=0)
    return max(host_limit - staging_bytes(largest, total, host_limit), 0)


def staging_bytes(largest: int, total: int, host_limit: int | None) -> int:
    """Returns the size of the ring of buffers that layers are read into.

    Args:
        largest: Bytes of the largest layer that is read.
        total: Bytes of all of them.
        host_limit: The host limit; the ring takes at most half of one, if it can. At
            0, as without one, nothing but the ring is there.
    """
    wanted = min(max(STAGING_LAYERS * largest, STAGING_USUAL), STAGING_MOST, total)
    if host_limit:
        wanted = min(wanted, max(host_limit // 2, STAGING_LEAST))
    return wanted
