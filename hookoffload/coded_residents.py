"""Which residents are kept coded, so that more of them fit.

[Note: residents that are kept coded]
A resident whose bytes are coded for the link can stay as they come: about a quarter
more weights fit, and each forward decodes them into the scratch, as if they had been
streamed. Decoding takes a fraction of the time that a copy does, so the plan keeps
coded what it may as soon as not all layers fit decoded: the fewest bytes cross the
link. Memory that is left over once nothing streams decodes again, the small ones first,
up to all of them.

Decoded stay always: what is too small to be worth a launch, what is held (its scratch
would be taken for as long as others run), and giants (the scratch would be as large as
they are). This does not depend on the limit, and neither does the choice of the layers
that a share below 1 leaves: at one share, more memory keeps all residents and streams
no more.

Where a model computes longer than its copies take, decoding residents costs time that
no copy needs. How long it computes only a run of it tells: see `fastest`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from .cost import Rates
from .plan import LayerSpec, Plan
from .priorities import SMALL_LAYER_BYTES, giants_of

# Enough to come within a few parts in a hundred of the best.
_SHARES = (0.0, 0.25, 0.5, 0.75)

# What is predicted to save less is not worth another plan.
LEAST_GAIN = 0.02


def codable_residents(
    layers: Sequence[LayerSpec], order: Sequence[int], share: float
) -> list[int]:
    """List the layers that are kept coded where they stay and memory is short.

    Args:
        layers: every layer of the model.
        order: the layers of a pass.
        share: how much of what could be kept coded is to be, from 0 to 1.

    Returns:
        Their indices, the small ones first: these are decoded before the others.
    """
    if not any(layer.coded_bytes for layer in layers):
        return []
    giants = giants_of(tuple(layers))
    able = [
        index
        for index in dict.fromkeys([*order, *range(len(layers))])
        if layers[index].coded_bytes
        and layers[index].can_stay
        and not layers[index].held
        and layers[index].stream_bytes > SMALL_LAYER_BYTES
        and index not in giants
    ]
    places = spread([layers[index].coded_bytes for index in able], share)
    chosen = [able[place] for place in places]
    return sorted(chosen, key=lambda index: (layers[index].stream_bytes, index))


def spread(sizes: Sequence[int], share: float) -> list[int]:
    """Choose about this share of the bytes, spread over the sequence.

    Returns:
        Places in the sequence.

    Example:
        >>> spread([10] * 8, 0.5)
        [0, 2, 4, 6]
    """
    chosen, taken = [], 0
    for place, (size, seen) in enumerate(zip(sizes, accumulate(sizes), strict=True)):
        if taken + size / 2 <= seen * share:
            chosen.append(place)
            taken += size
    return chosen


def fastest(plan_at: Callable[[float], Plan], rates: Rates) -> Plan:
    """Return the plan with the share to keep coded that makes passes shortest.

    Args:
        plan_at: makes the plan for a share.
        rates: how fast the machine and the model are.

    Returns:
        The plan for a share of 1, unless another one is clearly faster: where not all
        is known, the link is the limit.
    """
    best = plan_at(1.0)
    first = best.predict(rates)
    if first is None or None in (rates.compute_seconds, rates.decode_bytes_per_second):
        return best
    if not best.kept_coded:
        return best
    seconds = first.seconds * (1 - LEAST_GAIN)
    for share in _SHARES:
        plan = plan_at(share)
        predicted = plan.predict(rates)
        assert predicted is not None, "there are rates"
        if predicted.seconds < seconds:
            best, seconds = plan, predicted.seconds
    return best
