"""Which bytes of the window belong to whom, and whom a new owner must wait for."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque


class Region:
    """A contiguous part of a block of memory.

    Attributes:
        offset: Where it begins, in bytes from the start of the block.
        nbytes: Its length in bytes.
        freed: Whether its owner gave it back.
        token: What must be waited for before its bytes are overwritten, as given by
            its owner with the region; None: nothing.
    """

    __slots__ = ("freed", "nbytes", "offset", "token")

    def __init__(self, offset: int, nbytes: int) -> None:
        """Describes a live region; only `RegionRing` and `RegionStack` make them."""
        self.offset = offset
        self.nbytes = nbytes
        self.freed = False
        self.token: object | None = None

    @property
    def end(self) -> int:
        """The offset behind its last byte."""
        return self.offset + self.nbytes

    def __repr__(self) -> str:
        """Shows the range of bytes and whether it is live."""
        state = "freed" if self.freed else "live"
        return f"Region({self.offset}..{self.end}, {state})"


class _Tokens:
    """Remembers, for free bytes, the token of their last owner.

    The bytes of a region lose their older tokens when it is allocated, so spans never
    overlap. A range to be taken begins at the start of the block or where a region
    ended, so no span lies across its beginning.
    """

    __slots__ = ("_spans",)

    def __init__(self) -> None:
        self._spans: list[tuple[int, int, object]] = []

    def leave(self, region: Region) -> None:
        """Keeps a freed region's token for whoever takes its bytes next."""
        if region.token is not None and region.nbytes:
            span = (region.offset, region.end, region.token)
            insort(self._spans, span)  # no two begin at the same byte

    def take(self, start: int, end: int) -> tuple[object, ...]:
        """Returns the tokens of a range, each once, and forgets them for that range."""
        spans = self._spans
        first = last = bisect_left(spans, (start,))
        tokens: list[object] = []
        kept: list[tuple[int, int, object]] = []
        while last < len(spans) and spans[last][0] < end:
            _, span_end, token = spans[last]
            # One token may stand for several regions.
            if not any(token is seen for seen in tokens):
                tokens.append(token)
            if span_end > end:
                kept.append((end, span_end, token))
            last += 1
        spans[first:last] = kept
        return tuple(tokens)

    def clear(self) -> None:
        self._spans.clear()


class _Block:
    """What the ring and the stack share: a capacity, live regions, tokens."""

    __slots__ = ("_capacity", "_live", "_tokens")

    def __init__(self, capacity: int) -> None:
        """Starts with every byte free.

        Args:
            capacity: Bytes of the block.

        Raises:
            ValueError: If the capacity is negative.
        """
        if capacity < 0:
            raise ValueError(f"A block of {capacity} bytes cannot exist.")
        self._capacity = capacity
        self._live: set[Region] = set()
        self._tokens = _Tokens()

    @property
    def capacity(self) -> int:
        """Bytes of the block."""
        return self._capacity

    @property
    def live(self) -> int:
        """How many regions have not been freed, empty ones included."""
        return len(self._live)

    def _check_size(self, nbytes: int) -> None:
        if not 0 <= nbytes <= self._capacity:
            raise ValueError(
                f"A region of {nbytes} bytes can never fit in a block of "
                f"{self._capacity} bytes."
            )

    def _admit(self, offset: int, nbytes: int) -> tuple[Region, tuple[object, ...]]:
        region = Region(offset, nbytes)
        self._live.add(region)
        return region, self._tokens.take(offset, region.end) if nbytes else ()

    def _retire(self, region: Region, token: object | None) -> None:
        if region not in self._live:
            raise AssertionError(
                f"{region} was freed, but this block of {self._capacity} bytes has no "
                "such live region: it was freed before, or belongs elsewhere."
            )
        self._live.remove(region)
        region.freed = True
        region.token = token
        self._tokens.leave(region)

    def _forget(self) -> None:
        for region in self._live:
            region.freed = True
        self._live.clear()
        self._tokens.clear()


class RegionRing(_Block):
    """Hands out the bytes of a block first in, first out.

    Regions are taken at the head, which wraps to the start of the block when the rest
    up to its end is too short. They may be freed in any order; their space comes back
    from the oldest on, and from the youngest back, up to those that live. Freed bytes
    carry the token of their last owner, which goes to every later owner that
    overwrites some of them.

    Example:
        >>> ring = RegionRing(10)
        >>> first, _ = ring.allocate(6)
        >>> ring.free(first, token="first is done")
        >>> second, _ = ring.allocate(4)
        >>> third, wait_for = ring.allocate(5)
        >>> third.offset, wait_for
        (0, ('first is done',))
    """

    __slots__ = ("_head", "_queue", "_used")

    def __init__(self, capacity: int) -> None:
        """Starts with every byte free.

        Args:
            capacity: Bytes of the block.
        """
        super().__init__(capacity)
        self._head = 0
        self._used = 0
        # Oldest first. An empty region is not in here: it has no bytes to protect, and
        # would keep younger ones from giving their space back.
        self._queue: deque[Region] = deque()

    @property
    def used(self) -> int:
        """Bytes that cannot be taken: live, or freed between two live regions."""
        return self._used

    def has_room(self, nbytes: int, *, at_start: bool = False) -> bool:
        """Tells whether `allocate` would find a place now."""
        if nbytes > self._capacity:
            return False
        return self._place(nbytes, at_start=at_start) is not None

    def allocate(
        self, nbytes: int, *, at_start: bool = False
    ) -> tuple[Region, tuple[object, ...]] | None:
        """Takes a region at the head, or at the start of the block behind its end.

        Args:
            nbytes: Bytes; 0 gives an empty region.
            at_start: At the start of the block, however much is left behind the head.

        Returns:
            The region and the tokens to wait for before its bytes are written, or None
            when it does not fit now.

        Raises:
            ValueError: If it could never fit.
        """
        self._check_size(nbytes)
        offset = self._place(nbytes, at_start=at_start)
        if offset is None:
            return None
        admitted = self._admit(offset, nbytes)
        if nbytes:
            self._queue.append(admitted[0])
            self._head = offset + nbytes
            self._used += nbytes
        return admitted

    def free(self, region: Region, token: object | None = None) -> None:
        """Gives a region back.

        Args:
            region: A live region of this ring.
            token: What must be waited for before its bytes are overwritten.
        """
        self._retire(region, token)
        queue = self._queue
        while queue and queue[0].freed:
            self._used -= queue.popleft().nbytes
        # Copies that were given up are the youngest: the head goes back in front of
        # them, or a region that lives long would keep their space as well.
        while queue and queue[-1].freed:
            youngest = queue.pop()
            self._used -= youngest.nbytes
            self._head = youngest.offset

    def reset(self) -> None:
        """Takes all regions back and forgets all tokens."""
        self._forget()
        self._queue.clear()
        self._head = 0
        self._used = 0

    def _place(self, nbytes: int, *, at_start: bool = False) -> int | None:
        head = self._head
        if nbytes == 0:
            return head
        if not self._queue:
            tail = self._capacity
        else:
            tail = self._queue[0].offset
            # The head has wrapped: the free bytes are one stretch in front of the
            # oldest region (none at all when head and tail meet).
            if head <= tail:
                if at_start and head:
                    return None
                return head if nbytes <= tail - head else None
        if at_start:
            return 0 if nbytes <= tail else None
        # Going on at the head before going back to the start: the bytes there were
        # freed longest ago, so the copy has nothing, or the least, to wait for.
        if nbytes <= self._capacity - head:
            return head
        return 0 if nbytes <= tail else None


class RegionStack(_Block):
    """Hands out the bytes of a block last in, first out.

    Regions may be given back in any order, but their space comes back when everything
    above them is gone. Tokens follow the same rule as in `RegionRing`.

    Example:
        >>> stack = RegionStack(10)
        >>> outer, _ = stack.push(4)
        >>> inner, _ = stack.push(4)
        >>> stack.pop(outer, token="outer is done")
        >>> stack.push(4) is None
        True
        >>> stack.pop(inner)
        >>> stack.push(3)
        (Region(0..3, live), ('outer is done',))
    """

    __slots__ = ("_regions",)

    def __init__(self, capacity: int) -> None:
        """Starts with every byte free.

        Args:
            capacity: Bytes of the block.
        """
        super().__init__(capacity)
        # Bottom first, without empty regions, as in the ring.
        self._regions: list[Region] = []

    @property
    def used(self) -> int:
        """Bytes that cannot be taken: live, or freed below a live region."""
        return self._regions[-1].end if self._regions else 0

    def has_room(self, nbytes: int) -> bool:
        """Tells whether `push` would find a place now."""
        return nbytes <= self._capacity - self.used

    def push(self, nbytes: int) -> tuple[Region, tuple[object, ...]] | None:
        """Takes a region at the top.

        Args:
            nbytes: Bytes; 0 gives an empty region.

        Returns:
            The region and the tokens to wait for before its bytes are written, or None
            when it does not fit now.

        Raises:
            ValueError: If it could never fit.
        """
        self._check_size(nbytes)
        if nbytes > self._capacity - self.used:
            return None
        admitted = self._admit(self.used, nbytes)
        if nbytes:
            self._regions.append(admitted[0])
        return admitted

    def pop(self, region: Region, token: object | None = None) -> None:
        """Gives a region back.

        Args:
            region: A live region of this stack.
            token: What must be waited for before its bytes are overwritten.
        """
        self._retire(region, token)
        regions = self._regions
        while regions and regions[-1].freed:
            regions.pop()

    def reset(self) -> None:
        """Takes all regions back and forgets all tokens."""
        self._forget()
        self._regions.clear()
