"""Streams, events and the worker thread: the only code that knows of them.

[Note: streams and events]
Who owns a region of the window, and when:

1. *Free.* Nobody reads or writes it, except that work queued earlier may still run.
   What must end first are the tokens that the ring hands out with the region: the
   ``done`` events of its last users.
2. *Filling.* `start` gives it to the copy stream, which waits for those tokens and
   for nothing else, so that releasing a layer starts exactly the copies that waited
   for its region. Nothing but the copy stream (or the worker, on a CPU) writes to it.
3. *Ready.* The ``ready`` event was recorded behind the last copy. `wait` makes the
   current stream wait for it; from then on the forward may read, and only it.
4. *Released.* `done` records an event on the stream that was current during the
   forward. The region goes back to the ring with that event as its token (1).

A master must not change between 2 and 3: the session looks at its version before it
binds, and copies again if it moved. What the library itself writes there comes behind
`drain`: a forward whose hooks have all run may still have its copies before it.

Scratch is written and read by compute streams alone. Its token is the stream itself if
that is the default one: a next user on the same stream need not wait, and one on
another has an event recorded there, which is behind the last user. On other streams,
which their owners may destroy, it is an event.

A resident is brought once, and only the stream of that forward waits for it. Threads
may have streams of their own, which need not wait for each other to read weights: so a
call begins with a wait for the residents that came last, unless these are there.

The host runs ahead of the device: all of this is queued, nothing is waited for on
the host, with one exception. Bytes that are not page-locked (from a file, or beyond
what may be locked) pass through a ring of page-locked staging buffers (`Staging`) that
the worker thread alone owns; one is reused after the event behind its copy. `wait`
therefore first waits, on the host, until the worker has *queued* the copies. No
deadlock follows: a copy waits only for events that are already recorded, and the work
in front of those needed no later copy.

On a CPU the reader threads are the copy stream, "queued" is "done", and releases are
complete when the post hook runs, so that tokens are None. The worker thread hands
copies to them: Ctrl-C, which only the main thread knows, finds a copy given or not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from .copies import POISON, Copy, CopyEngine
from .copy_worker import Worker
from .entries import have_happened, stalled_seconds
from .host_copies import HostCopyEngine
from .master import Master
from .moves import Moves
from .profiler_ranges import profiler_range
from .reader_threads import ReaderThreads
from .staging import Coming, Staging


class StreamCopyEngine:
    """Copies to an accelerator: one copy stream, events both ways."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device)
        self._index = self._stream.device_index  # looked up faster than a device
        self._staging = Staging(ReaderThreads(), _page_locked)
        self._worker = Worker(_StagedCopies(device, self._stream, self._staging))
        self._stalled = 0.0
        self._filled: torch.Event | None = None  # behind residents that came last
        # Waits whose length is not known yet: an event in front of each, and what it
        # waits for.
        self._waits: deque[tuple[torch.Event, torch.Event]] = deque()

    def start(self, copy: Copy) -> None:
        """Begin a copy: queue it, or give it to the worker to be staged."""
        moves = copy.moves
        if moves is None and all(master.pinned for master, _ in copy.pieces):
            targets = [target for _, target in copy.pieces]
            moves = (targets, [master.bytes for master, _ in copy.pieces])
        if moves is None:
            self._worker.put(copy)
        else:
            self._queue(copy, moves)

    def _queue(self, copy: Copy, moves: Moves) -> None:
        stream = self._stream
        for token in copy.after:
            assert isinstance(token, torch.Event)
            token.wait(stream)
        if copy.entry is not None:
            copy.entry.begin(stream)
        with _current(stream), profiler_range("copy", copy.name):
            if moves[0]:  # one call: a layer of many tensors has a dozen of them
                torch._foreach_copy_(*moves, non_blocking=True)
        if copy.entry is not None:
            copy.entry.end(stream)
        copy.ready = self._behind(stream, timed=True)

    def wait(self, copy: Copy) -> None:
        """Make the current stream wait for the copy."""
        self._stalled += self._worker.finish(copy)
        ready = copy.ready
        if ready is None or ready.query():
            return
        stream = torch.accelerator.current_stream(self._index)
        before = self._behind(stream, timed=True)
        ready.wait(stream)
        self._waits.append((before, ready))
        if copy.entry is not None:
            copy.entry.stall(before, ready)
        while len(self._waits) > 1 and have_happened(self._waits[0]):
            self._add_stall()

    def expect(self, coming: Sequence[Coming], nbytes: int) -> None:
        """Read ahead in this order, round and round."""
        self._staging.expect(coming, nbytes)

    def staging_bytes(self) -> int:
        """Host RAM that is taken for what is read ahead."""
        return self._staging.nbytes

    def done(self) -> object | None:
        """Return an event behind the work that the current stream has so far."""
        return self._behind(torch.accelerator.current_stream(self._index))

    def computed(self) -> object | None:
        """Return the current stream if it is the default one, else an event.

        Most often the next user is on the same stream, and need not wait. Only the
        default stream is sure to be there when a next user on another stream comes.
        """
        stream = torch.accelerator.current_stream(self._index)
        return self._behind(stream) if stream.stream_id else stream

    def order_after(self, tokens: Sequence[object]) -> None:
        """Make the current stream wait for tokens of `computed`."""
        if not tokens:
            return
        stream = torch.accelerator.current_stream(self._index)
        for token in tokens:
            if isinstance(token, torch.Stream):
                if token.stream_id == stream.stream_id:
                    continue
                token = self._behind(token)
            assert isinstance(token, torch.Event)
            token.wait(stream)

    def note_filled(self) -> None:
        """Note that residents hold what the current stream has waited for or made."""
        stream = torch.accelerator.current_stream(self._index)
        if self._filled is not None:
            self._filled.wait(stream)  # so that the new event stands for both
        self._filled = self._behind(stream)

    def see_filled(self) -> None:
        """Make the current stream wait for residents that another one brought."""
        if self._filled is None:
            return
        if self._filled.query():
            self._filled = None
        else:
            self._filled.wait(torch.accelerator.current_stream(self._index))

    def _behind(self, stream: torch.Stream, *, timed: bool = False) -> torch.Event:
        event = torch.Event(self._device, enable_timing=timed)
        event.record(stream)
        return event

    def fence(self) -> None:
        """Make the copy stream wait for the work that the current stream has so far.

        Memory that the allocator just handed out may have been freed by work that is
        queued and has not run.
        """
        self._behind(torch.accelerator.current_stream(self._index)).wait(self._stream)

    def poison(self, destination: torch.Tensor, token: object | None) -> None:
        """Overwrite released memory, behind its last user and before its next."""
        assert isinstance(token, torch.Event)
        token.wait(self._stream)
        with _current(self._stream):
            destination.fill_(POISON)

    def drain(self) -> None:
        """Return when no copy is under way."""
        self._worker.drain()
        self._stream.synchronize()

    def stall_seconds(self) -> float:
        """Seconds for which compute has waited for copies, so far."""
        while self._waits:
            for event in self._waits[0]:
                event.synchronize()
            self._add_stall()
        return self._stalled

    def _add_stall(self) -> None:
        self._stalled += stalled_seconds(*self._waits.popleft())

    def close(self) -> None:
        """End the worker thread."""
        self._worker.join()


class _current:
    """Make a stream the current one, on every torch since 2.6."""

    __slots__ = ("_before", "_stream")

    def __init__(self, stream: torch.Stream) -> None:
        self._stream = stream
        self._before = torch.accelerator.current_stream(stream.device_index)

    def __enter__(self) -> None:
        torch.accelerator.set_stream(self._stream)

    def __exit__(self, *exception: object) -> None:
        torch.accelerator.set_stream(self._before)


class _StagedCopies:
    """What the worker does for an accelerator: master -> staging buffer -> region."""

    def __init__(
        self, device: torch.device, stream: torch.Stream, staging: Staging
    ) -> None:
        self._device = device
        self._stream = stream
        self._staging = staging

    def perform(self, copy: Copy) -> None:
        for token in copy.after:
            assert isinstance(token, torch.Event)
            token.wait(self._stream)
        if copy.entry is not None:
            copy.entry.begin(self._stream)
        with (
            torch.inference_mode(False),
            _current(self._stream),
            profiler_range("copy", copy.name),
        ):
            self._bring(copy)
        if copy.entry is not None:
            copy.entry.end(self._stream)
        ready = torch.Event(self._device, enable_timing=True)
        ready.record(self._stream)
        copy.ready = ready
        copy.finish()

    def _bring(self, copy: Copy) -> None:
        staged: dict[Master, torch.Tensor] = {}
        for master, destination in copy.pieces:
            if not master.pinned:
                staged[master] = destination
            elif copy.entry is None:
                destination.copy_(master.bytes, non_blocking=True)
            else:
                copy.entry.begin_move(self._stream)
                destination.copy_(master.bytes, non_blocking=True)
                copy.entry.end_move(self._stream, destination.numel())
        for read in self._staging.take(tuple(staged)):
            if copy.entry is not None and read.chunk.from_file:
                copy.entry.read(read.began, read.ended, read.chunk.nbytes)
            if copy.entry is not None:
                copy.entry.begin_move(self._stream)
            try:
                offsets = read.offsets()
                for part in read.chunk.parts:
                    region = staged[part.master][part.start : part.start + part.nbytes]
                    region.copy_(read.place(part, offsets), non_blocking=True)
            finally:
                # Also where the device refuses: the ring has few buffers to lose.
                if copy.entry is not None:
                    copy.entry.end_move(self._stream, read.chunk.nbytes)
                event = torch.Event(self._device)
                event.record(self._stream)
                self._staging.give_back(read, event)

    def drained(self) -> None:
        self._staging.reset()

    def close(self) -> None:
        self._staging.close()


def _page_locked(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def make_copy_engine(device: torch.device) -> CopyEngine:
    """Return the engine for a compute device."""
    return HostCopyEngine() if device.type == "cpu" else StreamCopyEngine(device)
