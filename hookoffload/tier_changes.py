"""Layers of an attached model that change between host RAM and their files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from .assembly import choose_tiers
from .codable import host_sizes
from .codec import Codec
from .master import Master
from .master_code import MasterCode
from .partition import Partition
from .resolved_policy import ResolvedPolicy


class _Tier(NamedTuple):
    on_disk: bool
    codec: Codec
    code: MasterCode | None


class Tiers:
    """Where each of some masters waits, and as what.

    Args:
        chosen: for each master.
    """

    __slots__ = ("_chosen",)

    def __init__(self, chosen: dict[Master, _Tier]) -> None:
        self._chosen = chosen

    @classmethod
    def as_they_are(cls, masters: Iterable[Master]) -> Tiers:
        """Return the tiers that masters are in."""
        return cls({m: _Tier(m.on_disk, m.codec, m.code) for m in masters})

    @classmethod
    def for_policy(
        cls, masters: Sequence[Master], found: Partition, policy: ResolvedPolicy
    ) -> Tiers:
        """Return the tiers that masters would be in if they were attached now.

        Args:
            masters: all that move, at rest.
            found: the partition of the model.
            policy: with another host limit.
        """
        by_tensor = {id(m.tensor): master for master in masters for m in master.members}
        locations = {
            member.name: master.location
            for master in masters
            if master.location is not None and _is_users(master)
            for member in master.members
        }
        host_size = host_sizes(found, policy)
        in_ram = choose_tiers(found, policy, locations, {}, host_size)
        chosen = {}
        for index, sketch in enumerate(found.layers):
            on_disk = index not in in_ram
            for group in sketch.groups:
                master = by_tensor[id(group.members[0].tensor)]
                codec = _codec(master, policy, on_disk=on_disk)
                chosen[master] = _Tier(on_disk, codec, None)
        return cls(chosen)

    def apply(self) -> None:
        """Tell the masters; their bytes stay where they are."""
        for master, tier in self._chosen.items():
            master.forget_code()
            master.on_disk, master.codec = tier.on_disk, tier.codec
            if tier.code is not None:
                master.code_as(tier.code)


def _is_users(master: Master) -> bool:
    return master.location is not None and not master.location.file.writable_shared


def _codec(master: Master, policy: ResolvedPolicy, *, on_disk: bool) -> Codec:
    """Return a master's dtypes in a tier; see `make_master`."""
    codec = replace(master.codec, coded=False)
    if not master.castable:
        return codec
    rest = master.flat.dtype
    if not (on_disk and _is_users(master)):
        rest = policy.waits(on_disk=on_disk).dtype or rest
    kept = policy.preparing.dtype if policy.preparing is not None else None
    resident = kept or min(rest, codec.compute, key=lambda dtype: dtype.itemsize)
    return replace(codec, rest=rest, resident=resident)
