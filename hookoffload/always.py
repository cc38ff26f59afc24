"""Buffers and their like: on the compute device for as long as a model is onloaded."""

from __future__ import annotations

import torch

from .device_memory import Block, DeviceMemory
from .layer import Layer
from .master import Master


class AlwaysResident:
    """What is on the compute device whatever the plan says.

    What needs no cast is bound between passes too. What has another dtype there than
    at rest is bound only while a call is under way, so that ``.dtype`` stays right.

    Args:
        uncast: masters that compute in the dtype in which they rest.
        cast: masters that do not.
        memory: the compute device's.
    """

    __slots__ = ("_cast", "_entered", "_memory", "_uncast")

    def __init__(self, uncast: Layer, cast: Layer, memory: DeviceMemory) -> None:
        self._uncast = uncast
        self._cast = cast
        self._memory = memory
        self._entered = False

    @property
    def masters(self) -> list[Master]:
        """All masters."""
        return [*self._uncast.masters, *self._cast.masters]

    def forget(self) -> None:
        """Drop the masters, behind detach."""
        self._uncast = self._cast = Layer(-1, "", ())

    def onload(self) -> None:
        """Take the memory, bind what needs no cast."""
        for layer in (self._uncast, self._cast):
            if layer.resident is not None:
                continue
            blocks: list[Block] = []
            try:
                for piece in layer.pieces:
                    size = piece.master.count * _dtype(piece.master).itemsize
                    name = piece.master.name
                    blocks.append(self._memory.allocate("always", size, name))
                self._fill(layer, blocks)
            except BaseException:
                for block in blocks:
                    self._memory.free(block)
                raise
            layer.resident = blocks
        if self._uncast.pieces and not self._uncast.stays_bound:
            self._uncast.stays_bound = True  # first: what is bound in part is undone
            self._uncast.bind(None)

    def _fill(self, layer: Layer, blocks: list[Block]) -> None:
        layer.copied_revision = layer.revision()
        for piece, block in zip(layer.pieces, blocks, strict=True):
            master = piece.master
            block.typed(_dtype(master))[: master.count].copy_(master.flat)

    def renew(self, master: Master) -> None:
        """Copy a master that was written to at rest to where it is bound.

        What is cast is looked at where a call begins.
        """
        layer = self._uncast
        for piece, block in zip(layer.pieces, layer.resident or (), strict=False):
            if piece.master is master:
                block.typed(_dtype(master))[: master.count].copy_(master.flat)

    def enter(self) -> None:
        """Bind what is cast, at the beginning of the outermost call."""
        layer = self._cast
        if self._entered or not layer.pieces:
            return
        assert layer.resident is not None, "calls begin behind onload"
        if layer.revision() != layer.copied_revision:
            self._fill(layer, layer.resident)
        self._entered = True
        layer.bind(None)

    def leave(self, *, training: bool = False) -> None:
        """Put what is cast to rest, at the end of the outermost call.

        Args:
            training: the model trains, so that statistics may have moved.
        """
        if not self._entered:
            return
        self._take_back(
            self._cast, compare=training and torch.is_inference_mode_enabled()
        )
        self._cast.put_to_rest()
        self._cast.copied_revision = self._cast.revision()
        self._entered = False

    def release(self) -> None:
        """Put everything to rest and give the memory back."""
        self.leave()
        if self._uncast.stays_bound:
            self._take_back(self._uncast)
            self._uncast.put_to_rest()
            self._uncast.stays_bound = False
        for layer in (self._uncast, self._cast):
            for block in layer.resident or ():
                self._memory.free(block)
            layer.resident = None

    def sync(self) -> None:
        """Bring what forwards wrote into the masters."""
        if self._uncast.stays_bound:
            self._take_back(self._uncast)
        else:
            for master in self._uncast.masters:
                master.reconcile(lenient=True)
        if self._entered:
            self._take_back(self._cast)
        else:
            for master in self._cast.masters:
                master.reconcile(lenient=True)

    @staticmethod
    def _take_back(layer: Layer, *, compare: bool = False) -> None:
        """Copy values that a forward changed into their masters.

        Values are compared, because some kernels write to statistics without moving
        their version (batch norm does under inference mode). What is cast on an
        accelerator goes by the version alone unless ``compare`` says otherwise:
        comparing waits for the accelerator.
        """
        for piece in layer.pieces:
            for member in piece.master.members:
                value, rest = member.tensor.data, member.rest
                cast_away = value.dtype != rest.dtype and value.device.type != "cpu"
                if cast_away and not compare:
                    piece.master.take_bound(member)
                elif not torch.equal(value, rest.to(value)):
                    rest.copy_(value)
                    piece.master.note_change()


def _dtype(master: Master) -> torch.dtype:
    return torch.uint8 if master.mixed else master.codec.resident
