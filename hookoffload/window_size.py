"""How large the window should be that streamed layers pass through."""

from __future__ import annotations

# The window that a plan wants. One layer computes while the next is being copied and
# the one after it has a place: more than three of the largest buys almost nothing.
# 256 MiB are 5 ms of copying at 50 GiB/s, which covers the launch gaps between many
# small layers; a sixteenth of the streamed bytes keeps that in proportion in a model
# that is itself small, where the memory does more good as residents.
#
# Where a forward computes longer than its bytes take to cross the link, the window must
# make up for what a block needs unevenly: attention computes long with few bytes, the
# layers behind it need many at once. Over a whole block it evens out, so a window that
# holds the streamed layers of one lets the link go on copying. (With 0.32 GiB instead
# of the 0.63 GiB of a block of Qwen-Image's transformer, a forward of batch 6 on one
# H200 waited for 127 of its 1082 ms.) Where the link is the limit it gains nothing, so
# it gets no more than a quarter of the room.
WINDOW_LAYERS = 3
WINDOW_BYTES = 256 * 2**20
WINDOW_SHARE = 16
WINDOW_ROOM_SHARE = 4


def ring_wanted(largest: int, total: int, block: int = 0) -> int:
    """The first-in-first-out part that streamed layers of these sizes are given.

    Args:
        largest: Bytes of the largest layer.
        total: Bytes of all layers.
        block: Bytes of the largest of several equal blocks, or less.
    """
    enough = min(max(WINDOW_BYTES, block), total // WINDOW_SHARE)
    return min(total, max(WINDOW_LAYERS * largest, enough))


def largest_for_free(total: int, room: int) -> int:
    """How large a layer may be that does not make the window larger.

    Args:
        total: Bytes of all layers.
        room: Bytes for window and residents, half of which the window may take.
    """
    return min(WINDOW_BYTES, total // WINDOW_SHARE, room // 2) // WINDOW_LAYERS
