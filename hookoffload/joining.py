"""A model that `load_model` attached by itself joins others under one limit."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .registered import group_tensors
from .safetensors_file import CheckpointFile, TensorLocation
from .session import Session
from .state_hooks import session_of


def loaded_alone(model: nn.Module) -> Session | None:
    """Return the session that `load_model` made for a model, if it has no other one."""
    session = session_of(model)
    if session is None or session.model is not model:
        return None
    return session if session.loaded and session.group is None else None


class Handover:
    """What a loaded model leaves to the session that takes it over.

    [Note: loaded models join] Nothing is read or copied for it: weights that lie in
    files stay memory maps of them, and those in RAM stay where they are. The files are
    opened a second time, so that until the new session stands the old one can be made
    again, whatever has become of the new one and its files.

    Args:
        session: the model's session, which ends.

    Attributes:
        locations: where the weights lie that are read from files, by name; for the new
            session.
    """

    def __init__(self, session: Session) -> None:
        self._old = session
        self._model = session.model  # which that forgets
        self._left: dict[str, TensorLocation] = {}
        self.locations: dict[str, TensorLocation] = {}

    def begin(self) -> None:
        """Detach the model, and leave the files open.

        Raises:
            RuntimeError: The model is running, or has LoRAs.
            CheckpointError: A file has changed.
        """
        old = self._old
        with old.ownership.by_hand("attach_offload_hooks"):
            if old.adapters.nbytes:
                raise RuntimeError(
                    f"{old.label} has LoRAs, which end with its own limit. Call "
                    "clear_lora(model), attach all models, and add the LoRAs again"
                )
            # What waits in RAM and rests in a file lies there again.
            old.placement.offload()
            tensors, _ = group_tensors(self._model)
            names = {id(m.tensor): m.name + m.path for m in tensors}
            self._left = {
                names[id(member.tensor)]: master.location
                for master in old.store.masters_in_files()
                for member in master.members[:1]
                if master.location is not None and id(member.tensor) in names
            }
            again: dict[CheckpointFile, CheckpointFile] = {}
            for name, location in self._left.items():
                file = location.file
                again[file] = again.get(file) or file.opened_again()
                self.locations[name] = replace(location, file=again[file])
            old.store.leave_open(again)
            old.end()

    def take_back(self) -> None:
        """Attach the model as it was before, if it was detached."""
        _close(self.locations)
        old = self._old
        if old.ended:
            session = Session(self._model, old.policy, self._left, poison=old.poison)
            session.loaded = True
            session.begin()

    def done(self, session: Session) -> None:
        """Close what the session that has begun does not read from."""
        _close(self._left)
        _close(self.locations, session.store.files)
        # Tensors that are registered later have no place in a file.
        self.locations.clear()


def _close(
    locations: dict[str, TensorLocation], used: frozenset[CheckpointFile] = frozenset()
) -> None:
    for file in {location.file for location in locations.values()} - used:
        file.close()
