"""Small tensors that are neighbours in host RAM and in the window travel as one."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from hookoffload import OffloadPolicy, offloaded
from hookoffload.device_memory import Block
from hookoffload.gather import _rows
from hookoffload.layer import Layer
from hookoffload.layer_parts import RegionViews
from hookoffload.layer_values import views_in
from hookoffload.master import Master
from hookoffload.pinning import _move_into_slab
from hookoffload.ring import Region
from hookoffload.state_hooks import session_of


def _views(masters: list[Master]) -> tuple[RegionViews, Block]:
    """Return the views of a layer of these masters, as an accelerator would have it."""
    layer = Layer(0, "layer", masters)
    layer.measure(torch.device("cuda"), may_stay=True)
    block = Block(torch.zeros(layer.stream_bytes, dtype=torch.uint8), "window")
    layer.region = Region(0, layer.stream_bytes)
    return views_in(layer, block), block


def _masters(model: nn.Module) -> list[Master]:
    session = session_of(model)
    assert session is not None
    return session.store.masters


def _lock(masters: list[Master]) -> None:
    for master in masters:
        master.pinned = True


def _chain(*widths: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(widths)])


def _pairs(views: RegionViews) -> list[tuple[torch.Tensor, torch.Tensor]]:
    moves = views.moves()
    assert moves is not None, "all is page-locked"
    return list(zip(*moves, strict=True))


def _perform(views: RegionViews) -> None:
    for destination, source in _pairs(views):
        destination.copy_(source)


def _arrived(views: RegionViews) -> bool:
    return all(torch.equal(target, master.bytes) for master, target in views.targets)


POLICY = OffloadPolicy(compute_device="cpu")


def test_locked_neighbours_travel_as_one() -> None:
    with offloaded(_chain(24, 20, 24, 8), POLICY) as model:
        masters = _masters(model)
        _move_into_slab(masters)
        _lock(masters)
        views, _ = _views(masters)
        assert len(views.targets) == 6
        assert len(_pairs(views)) == 1
        _perform(views)
        assert _arrived(views)


def test_a_large_tensor_between_small_ones_does_not_part_them() -> None:
    with offloaded(_chain(24, 512, 600, 8), POLICY) as model:
        masters = _masters(model)
        small = [master for master in masters if master.nbytes < 2**20]
        assert len(small) == len(masters) - 1
        _move_into_slab(small)
        _lock(masters)
        views, _ = _views(masters)
        assert len(_pairs(views)) == 2
        _perform(views)
        assert _arrived(views)


def test_what_lies_elsewhere_travels_alone() -> None:
    with offloaded(_chain(24, 20, 24), POLICY) as model:
        masters = _masters(model)
        _move_into_slab(masters[:2])
        _lock(masters)
        views, _ = _views(masters)
        assert len(_pairs(views)) == 3
        _perform(views)
        assert _arrived(views)


def test_nothing_travels_from_where_it_lies_if_some_of_it_is_not_locked() -> None:
    with offloaded(_chain(24, 20, 24), POLICY) as model:
        masters = _masters(model)
        _move_into_slab(masters)
        _lock(masters[:2] + masters[3:])
        views, _ = _views(masters)
        assert views.moves() is None
        _lock(masters)
        assert len(_pairs(views)) == 1
        masters[0].pinned = False
        assert views.moves() is None


def test_masters_that_move_are_found_where_they_are() -> None:
    with offloaded(_chain(24, 20, 24), POLICY) as model:
        masters = _masters(model)
        _lock(masters)
        views, _ = _views(masters)
        assert len(_pairs(views)) == 4
        _move_into_slab(masters)
        _lock(masters)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        assert len(_pairs(views)) == 1
        _perform(views)
        assert _arrived(views)


def test_copies_that_were_made_in_inference_mode_are_performed_outside() -> None:
    with offloaded(_chain(24, 20, 24), POLICY) as model:
        masters = _masters(model)
        _move_into_slab(masters)
        _lock(masters)
        with torch.inference_mode():
            views, _ = _views(masters)
            _pairs(views)
        _perform(views)
        assert _arrived(views)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (5,), (2, 3)])
def test_rows_for_another_device_are_those_of_the_table(shape: tuple[int, ...]) -> None:
    table = torch.randn(10, 4)
    indices = torch.randint(10, shape)
    rows = _rows(table, indices, torch.device("xpu"))
    assert torch.equal(rows, nn.functional.embedding(indices, table))


def test_rows_are_looked_up_under_vmap() -> None:
    table, indices = torch.randn(10, 4), torch.randint(10, (3, 5))
    rows = torch.vmap(lambda one: _rows(table, one, torch.device("xpu")))(indices)
    assert torch.equal(rows, nn.functional.embedding(indices, table))
