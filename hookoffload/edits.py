"""What users do to the tensors of an attached model, between its forwards."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import nn

from .holders import Holders
from .master import Master
from .member import Member, version_of
from .private_pages import can_be_told, written_privately
from .refusals import hint_at_accelerate
from .registered import check_packed, check_tensors, plain_tensors
from .wrappers import require_undivided

if TYPE_CHECKING:
    from .session import Session


logger = logging.getLogger(__name__)


class Edits:
    """Notices edits of one session's tensors and takes them over.

    Attributes:
        parted: masters of tensors that were given other data, and that belong to no
            layer yet.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.parted: list[Master] = []

    def forget(self) -> None:
        """Drop what refers to tensors, behind detach."""
        self.parted = []

    def part_changed(self) -> bool:
        """Take edits over before a part is called by itself, without the root.

        Returns:
            Whether layers and sites were made anew.
        """
        self._session.merges.unmerge_disabled()
        self.take_over_writes()
        renewed = self._session.rebuilding.finish()
        return self.take_over_untied() or renewed

    def take_over_writes(self) -> None:
        """Notice what was merged, and what whoever has a state dict wrote to it."""
        self._session.merges.take_over()
        self.take_over_held()

    def take_over_held(self) -> None:
        """Notice what whoever has a state dict wrote to it."""
        for written in self._session.inventory.written_by_holders():
            self.note_write(written)

    def take_over_replaced(self) -> None:
        """Manage parameters that replaced others (``load_state_dict(assign=True)``)."""
        session = self._session
        self.untie()  # or one's new bytes would go to the others as well
        require_undivided(session.model)
        try:
            check_tensors(session.model)
            known = session.inventory.holders
            check_packed(session.model, session.policy.compute_device, known)
        except ValueError as error:
            hint = hint_at_accelerate(session.model)
            raise RuntimeError(f"{error}{hint}") from error
        session.units.forget()
        session.rebuilding.rebuild()
        session.passes.probe_next()  # new modules may read weights sideways
        session.page_lock.unlock(session.store.masters)
        session.store.replace_masters(session.moved_masters, session.policy.rests)
        if not session.policy.waits_where_it_rests:
            session.placement.onloaded = False
        session.page_lock.lock(session.store.masters)
        session.always.release()
        session.placement.adopt_buffers()
        if session.placement.onloaded:
            session.always.onload()
        self.parted = []

    def take_over_untied(self) -> bool:
        """Make layers anew if tensors that shared memory do so no longer."""
        self.untie()
        untied = bool(self.parted)
        if untied:
            with torch.inference_mode(False):
                self.take_over_replaced()
        return untied

    def untie(self) -> None:
        """Give tensors that were given other data masters of their own.

        ``tensor.data = new`` leaves the bytes before as they are: for others that share
        them, and for a program that keeps them (``old = tensor.data``) to give them
        back, see [Note: who holds the bytes]. New strides and another shape
        (``resize_token_embeddings``) need a master of their own as well. These belong
        to no layer until layers are made anew.
        """
        session = self._session
        given = session.inventory.given_other_data()
        if given:
            with torch.inference_mode(False):
                session.inventory.take_apart(given)
        masters = {id(master): master for master in session.masters.values()}
        holders = Holders(masters.values() if given else ())
        for master, member in given:
            if member not in master.members:
                continue  # parted already, and not yet taken stock of
            apart = (
                len(master.members) > 1
                or not member.lies_as_before()
                or holders.are_of_a_master(member.tensor)
                or holders.holds(master, member)
            )
            if apart and member.has_data_of_its_own():
                alone = master.split_off(member)
                self.parted.append(alone)
                session.masters[id(member.tensor)] = alone
                if master.members:
                    session.masters[id(master.members[0].tensor)] = master

    def sync_masters(self) -> None:
        """Bring everything that was written to tensors into their masters."""
        session = self._session
        # Forwards may still be under way on the device, and read the masters.
        session.mover.engine.drain()
        self.take_over_writes()  # or copies that are older would go over them
        self.take_over_untied()
        with torch.inference_mode(False):
            session.always.sync()
            for layer in session.layers:
                session.mover.sync(layer)
        session.hooks.hang_if_needed()

    def note_write(self, master: Master) -> None:
        """Take the bytes at rest for newer than those that are resident."""
        session = self._session
        master.note_change()
        with torch.inference_mode(False):
            session.always.renew(master)
        for layer in session.layers:
            if master in layer.masters and layer.stays_bound:
                self._tell_of_two_writes(master)
                with torch.inference_mode(False):
                    session.mover.evict(layer)
                session.mover.plan = None  # so that it is made resident again
        session.hooks.hang_if_needed()

    def note_data_writes(self, modules: Iterable[nn.Module]) -> None:
        """Take weights as they are now, which may have been written to uncounted.

        Args:
            modules: those that they belong to, see [Note: merges].
        """
        session = self._session
        bound = {
            id(master)
            for layer in session.layers
            if layer.stays_bound
            for master in layer.masters
        }
        with torch.inference_mode(False):
            for _, tensor in chain.from_iterable(map(plain_tensors, modules)):
                found = session.inventory.find(tensor)
                if found is None:
                    continue
                master, member = found
                if id(master) in bound:
                    _take_resident(master, member)
                elif master.lies_in_private_map and can_be_told():
                    if any(written_privately([master.flat])):
                        master.note_change()
                else:
                    master.note_change()

    @staticmethod
    def _tell_of_two_writes(master: Master) -> None:
        """Warn where a resident was written to as well: one of both must be lost."""
        for member in master.members:
            if version_of(member.tensor) != member.version:
                logger.warning(
                    "%s was changed both through a state dict and as itself between "
                    "two forwards, while a copy of it stayed on the compute device: "
                    "what the state dict wrote is lost. Make both changes in one way, "
                    "or call offload(model) before them",
                    member.name,
                )


def _take_resident(master: Master, member: Member) -> None:
    """Copy the value of a member that is bound between passes into its master."""
    value = member.tensor.data
    if value.data_ptr() != member.bound_pointer or not member.lies_as_before():
        return  # not bound, or given other data, which is noticed by itself
    value = value.to(member.rest.device)
    if not torch.equal(value, member.rest):
        member.rest.copy_(value)
        master.note_change()
