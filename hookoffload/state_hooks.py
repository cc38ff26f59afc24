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

from .refusals import NotCopied

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

    __slots__ = ("_handles", "_paused", "_under_way", "session")

    def __init__(self, session: Session) -> None:
        self.session = session
        self._handles: list[RemovableHandle] = []
        self._under_way = 0  # modules whose saving or loading has begun
        self._paused = False  # stand-ins of the call in which that happens

    def register(self) -> None:
        """Hang the hooks on every module with tensors of its own."""
        for module in self.session.model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # they refuse hooks
            # The root's are around all others: one owner from beginning to end.
            own = module._parameters or module._buffers
            if not own and module is not self.session.model:
                continue
            keep = self._handles.append
            keep(module.register_state_dict_pre_hook(self._before_state_dict))
            # Partials, because PyTorch sets an attribute on what it registers.
            keep(module.register_state_dict_post_hook(partial(self._after_state_dict)))
            keep(module.register_load_state_dict_pre_hook(self._before_load))
            keep(module.register_load_state_dict_post_hook(partial(self._after_load)))
        self.session.model.__dict__["_apply"] = self._refuse_to_move
        _ATTACHED.add(self.session)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.session.model.__dict__.pop("_apply", None)

    def forget(self) -> None:
        """Drop what says whose the tensors are, behind detach."""
        _ATTACHED.discard(self.session)

    def forget_calls(self) -> None:
        """Start anew after saving or loading was interrupted."""
        self._under_way, self._paused = 0, False

    def _enter(self, *, loading: bool) -> None:
        """Own the model until `_leave`; the outermost brings the masters up to date.

        Raises:
            RuntimeError: It is to be loaded from inside its own forward.
            CheckpointError: A file that weights rest in was changed.
        """
        session = self.session
        session.ownership.enter_call()
        try:
            inner = 0 < self._under_way == session.calls.depth - 1
            if not inner:
                # The system kills a process that touches what was cut off a map.
                session.store.check_unchanged()
            if loading and not inner:
                session.ownership.require_no_call("load_state_dict")
                session.placement.rest_everything()
            elif not inner:
                self._paused |= session.mover.stand_ins.pause()
                calls = session.calls
                inside = calls.runs_here() or calls.is_guest
                if calls.depth > 1 and not inside:
                    session.ownership.recover()
                session.edits.sync_masters()
                session.merges.doubt_adapters()
                if session.unreadable_at_rest is not None:
                    raise RuntimeError(
                        f"state_dict: {session.unreadable_at_rest}, waits in host RAM "
                        f"while offload hooks are attached, where its class cannot "
                        f"read it. Call {session.undo} first"
                    )
                if session.inventory.has_packed and calls.depth == 1:
                    # Their classes make entries of parts, from where these lie.
                    session.placement.rest_everything()
        except BaseException as error:
            session.ownership.torn |= not isinstance(error, Exception)
            session.calls.leave()
            raise
        self._under_way += 1

    def _leave(self) -> None:
        if self._under_way:
            self._under_way -= 1
            if self._paused and not self._under_way:
                self._paused = False
                if self.session.ownership.call_begun:
                    self.session.mover.stand_ins.begin()
            self.session.calls.leave()

    def _before_state_dict(self, module: nn.Module, *_: Any) -> None:
        """Let the probe look away: saving reads every tensor and uses none."""
        self._enter(loading=False)
        if self.session.probe is not None:
            self.session.probe.look_away(1)

    def _after_state_dict(
        self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any
    ) -> None:
        """Return the masters of tensors that are bound between passes, or can be."""
        if self.session.probe is not None:
            self.session.probe.look_away(-1)
        inventory = self.session.inventory
        for registry in (module._parameters, module._buffers):
            for key, tensor in registry.items():
                found = None if tensor is None else inventory.find(tensor)
                value = state.get(prefix + key)
                if found is None or type(value) is not torch.Tensor:
                    continue  # keep_vars=True asks for the objects; GGUF has its own
                bound = value.data_ptr() != found[1].rest_pointer
                # What is at rest may be bound by the time that its holder writes to
                # it, and would count as written by a forward: it shares its version.
                if bound or self.session.may_be_bound(found[0]):
                    state[prefix + key] = inventory.hand_out(*found)
                    if self.session.hooks.all_off:
                        self.session.hooks.hang_all()  # to see writes to it
        self._leave()

    def _before_load(self, module: nn.Module, *_: Any) -> None:
        """Put all tensors to rest: what is loaded goes into the masters."""
        self._enter(loading=True)

    def _after_load(self, module: nn.Module, _: Any) -> None:
        self._leave()

    def _refuse_to_move(
        self, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> nn.Module:
        session, model = self.session, self.session.model
        tensors = [member.tensor for member in session.inventory]
        if recurse and all(self._is_kept(function, tensor) for tensor in tensors):
            if any(self._lays_out_anew(function, tensor) for tensor in tensors):
                with session.ownership.by_hand("to"):
                    session.placement.rest_everything()
                    type(model)._apply(model, function)  # what rests takes other data
            return model
        raise RuntimeError(
            f"{self.session.label} has offload hooks attached, which decide where its "
            f"tensors lie and in which dtype they compute. Call {self.session.undo} "
            "before .to(), .cuda(), .cpu(), .half() and the like, or say so in the "
            "policy: OffloadPolicy(compute_device=..., compute_dtype=...). "
            "Accelerator.prepare leaves it where it is with device_placement=[False]"
        )

    @staticmethod
    def _is_kept(
        function: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor
    ) -> bool:
        """Try what would be done to a tensor on an empty one like it."""
        like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        try:
            kept = function(like) is like
            # ``share_memory`` moves what is in host RAM; on a GPU all is shared.
            return kept and not (like.device.type == "cpu" and like.is_shared())
        except Exception:
            return False  # a device that is not there

    @staticmethod
    def _lays_out_anew(
        function: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor
    ) -> bool:
        """Tell whether ``memory_format=`` gives a tensor like this other strides."""
        if tensor.dim() not in (4, 5):
            return False
        # A corner of it, with its strides: they say what it is laid out as by now.
        shape = [min(size, 2) for size in tensor.shape]
        like = torch.empty_strided(
            shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        return function(like) is not like


# Two attached models must not swap one tensor's data. The tensors themselves are not
# referred to: what has weak references cannot be swapped (`torch.utils.swap_tensors`).
_ATTACHED: weakref.WeakSet[Session] = weakref.WeakSet()


def owner_of(tensor: torch.Tensor) -> Session | None:
    """Return the session that manages a tensor, None without one."""
    for session in list(_ATTACHED):
        if session.inventory.find(tensor) is not None:
            return session
    return None


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
