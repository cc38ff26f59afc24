"""What keeps the model's own life right while it is attached.

``state_dict`` returns masters, ``load_state_dict`` writes to them, ``model.to`` and its
kin are refused before they move anything.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from .refusals import NotCopied
from .store import Master, Member

if TYPE_CHECKING:
    from .session import Session


class StateHooks(NotCopied):
    """Hooks on saving, loading and moving.

    [Note: the one attribute] PyTorch has hooks for forwards and for state dicts, and
    none for ``model.to``. The root gets ``_apply`` as an instance attribute, through
    which all of ``to``, ``half``, ``cuda`` and ``cpu`` go; detach deletes it. Without
    it, ``model.to("cuda")`` would fill the device that the limit protects, and be
    noticed at the next forward only.
    """

    __slots__ = ("_expected", "_handles", "_managed", "session")

    def __init__(self, session: Session) -> None:
        self.session = session
        self._handles: list[RemovableHandle] = []
        self._managed: dict[int, tuple[Master, Member]] = {}
        # What was registered where, to notice that something else took its place.
        self._expected: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def register(self) -> None:
        """Hang the hooks on every module with tensors of its own."""
        self.renew()
        for module in self.session.model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # they refuse hooks
            if not module._parameters and not module._buffers:
                continue
            keep = self._handles.append
            keep(module.register_state_dict_pre_hook(self._before_state_dict))
            # A partial, because PyTorch sets an attribute on what it registers.
            keep(module.register_state_dict_post_hook(partial(self._after_state_dict)))
            keep(module.register_load_state_dict_pre_hook(self._before_load))
        self.session.model.__dict__["_apply"] = self._refuse_to_move
        for _, member in self._managed.values():
            _OWNERS[member.tensor] = weakref.ref(self.session)

    def renew(self) -> None:
        """Look up the masters anew, after layers were built again."""
        session = self.session
        self._managed = {
            id(member.tensor): (master, member)
            for master in (*session.store.masters, *session.always.masters)
            for member in master.members
        }
        self._expected = [
            (registry, dict(registry))
            for module in session.model.modules()
            for registry in (module._parameters, module._buffers, module._modules)
            if registry
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.session.model.__dict__.pop("_apply", None)

    def forget(self) -> None:
        """Drop what refers to tensors, behind detach."""
        for _, member in self._managed.values():
            _OWNERS.pop(member.tensor, None)
        self._managed = {}
        self._expected = []

    def replaced_parameters(self) -> bool:
        """Tell whether another tensor or module is registered than was attached."""
        for registry, before in self._expected:
            if len(registry) != len(before):
                return True
            for key, value in registry.items():
                if before.get(key) is not value:
                    return True
        return False

    def edited_while_bound(self) -> bool:
        """Tell whether a tensor that is bound between passes was given other data.

        Raises:
            RuntimeError: It was moved or cast.
        """
        edited = False
        for master, member in self._managed.values():
            pointer = member.tensor.data_ptr()
            if pointer != member.rest_pointer and pointer != member.bound_pointer:
                master.check_same(member)
                edited = True
        return edited

    def _before_state_dict(self, module: nn.Module, *_: Any) -> None:
        """Let the probe look away: saving reads every tensor and uses none."""
        if self.session.probe is not None:
            self.session.probe.look_away(1)

    def _after_state_dict(
        self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any
    ) -> None:
        """Return the masters of tensors that are bound between passes."""
        session = self.session
        if session.probe is not None:
            session.probe.look_away(-1)
        session.sync_masters()
        for registry in (module._parameters, module._buffers):
            for key, tensor in registry.items():
                found = self._managed.get(id(tensor))
                value = state.get(prefix + key)
                if found is None or not isinstance(value, torch.Tensor):
                    continue
                if value is not tensor:  # keep_vars=True asks for the objects
                    state[prefix + key] = found[1].rest

    def _before_load(self, module: nn.Module, *_: Any) -> None:
        """Put the module's tensors to rest: what is loaded goes into the masters."""
        self.session.rest_for_loading()

    def _refuse_to_move(
        self, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> nn.Module:
        model = self.session.model
        tensors = (member.tensor for _, member in self._managed.values())
        if recurse and all(self._is_kept(function, tensor) for tensor in tensors):
            return model
        raise RuntimeError(
            f"{type(model).__name__} has offload hooks attached, which decide where "
            "its tensors lie and in which dtype they compute. Call detach(model) "
            "before .to(), .cuda(), .cpu(), .half() and the like, or say so in the "
            "policy: OffloadPolicy(compute_device=..., compute_dtype=...)"
        )

    @staticmethod
    def _is_kept(
        function: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor
    ) -> bool:
        """Try what would be done to a tensor on an empty one like it."""
        like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        try:
            return function(like) is like and not like.is_shared()
        except Exception:
            return False  # a device that is not there


# Whose a tensor is: two attached models must not swap one tensor's data.
_OWNERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def owner_of(tensor: torch.Tensor) -> Session | None:
    """Return the session that manages a tensor, None without one."""
    found = _OWNERS.get(tensor)
    return None if found is None else found()


def session_of(module: nn.Module) -> Session | None:
    """Return the session that a module's tensors are attached to, None without one."""
    guard = getattr(module.__dict__.get("_apply"), "__self__", None)
    if isinstance(guard, StateHooks):
        return guard.session
    for hook in module._state_dict_hooks.values():
        owner = getattr(getattr(hook, "func", None), "__self__", None)
        if isinstance(owner, StateHooks):
            return owner.session
    return None
