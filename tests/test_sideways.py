"""Weights that are read without a call of the module that owns them, without a map."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    offload_plan,
    offload_stats,
    offloaded,
)
from tests.real_models import REAL_MODELS
from tests.samples import (
    GIB,
    STREAMING,
    Stack,
    assert_runs_alike,
    first_output,
    least_limit_gb,
    linears,
    run,
    same_bits,
    seen_inside,
)

ALL = pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
GPU_TOO = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WIDTH = 16
Use = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class _Reader(nn.Module):
    """Reads its child's tensors in one of many ways."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.child = nn.Linear(WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)
        self.use = use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.use(self, self.before(x)))


def _into(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    torch.matmul(x, weight, out=out)
    return out


USES: dict[str, Use] = {
    "linear": lambda m, x: functional.linear(x, m.child.weight, m.child.bias),
    "keywords": lambda m, x: functional.linear(input=x, weight=m.child.weight),
    "operator": lambda m, x: x @ m.child.weight,
    "reflected operator": lambda m, x: m.child.weight @ x.T,
    "transposed": lambda m, x: x @ m.child.weight.T,
    "index": lambda m, x: x * m.child.weight[3],
    "slice": lambda m, x: x * m.child.weight[1:2, :],
    "method": lambda m, x: x + m.child.weight.sum(0),
    "in a list": lambda m, x: x @ torch.cat([m.child.weight, m.other.weight]).T[:, :16],
    "in nested lists": lambda m, x: x * torch.stack((m.child.bias, m.other.bias))[0],
    "einsum": lambda m, x: torch.einsum("bi,oi->bo", x, m.child.weight),
    "data": lambda m, x: x @ m.child.weight.data,
    "detach": lambda m, x: x @ m.child.weight.detach(),
    "out": lambda m, x: _into(m.child.weight, x),
    "a value": lambda m, x: x * float(m.child.bias.abs().max()),
    "a list of numbers": lambda m, x: x * m.child.bias.tolist()[2],
    "numpy": lambda m, x: x * torch.from_numpy(m.child.bias.detach().numpy().copy()),
    "iteration": lambda m, x: x * sum(row[0] for row in m.child.weight),
    "copy": lambda m, x: x @ torch.empty_like(m.child.weight).copy_(m.child.weight),
    "forward itself": lambda m, x: m.child.forward(x),
    "sideways and called": lambda m, x: m.child(x @ m.child.weight),
    "called and sideways": lambda m, x: m.child(x) @ m.child.weight,
    "its own user": lambda m, x: functional.linear(x, m.before.weight),
    "like its dtype": lambda m, x: m.child(x.float().to(m.child.weight.dtype)),
    "many": lambda m, x: x @ sum(p for p in m.parameters() if p.dim() == 2),
}


@ALL
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_weight_may_be_read_sideways(use: Use, fields: dict[str, Any]) -> None:
    x = torch.randn(WIDTH, WIDTH)
    assert_runs_alike(nn.Sequential(_Reader(use), _Reader(use)), x, fields)


@ALL
def test_a_module_without_tensors_may_read_those_of_others(
    fields: dict[str, Any],
) -> None:
    class Borrows(nn.Module):
        def __init__(self, owner: nn.Module) -> None:
            super().__init__()
            self.owner = [owner]  # not a child

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, self.owner[0].weight)

    first = nn.Linear(WIDTH, WIDTH)
    model = nn.Sequential(first, Borrows(first), nn.Linear(WIDTH, WIDTH))
    x = torch.randn(2, WIDTH, dtype=fields.get("compute_dtype"))
    weights = [first.weight.detach().to(x.dtype), model[2].weight.detach().to(x.dtype)]
    want = functional.linear(x, weights[0], first.bias.detach().to(x.dtype))
    want = functional.linear(want, weights[0])
    want = functional.linear(want, weights[1], model[2].bias.detach().to(x.dtype))
    with offloaded(model, **fields):
        assert all(same_bits(run(model, x), want) for _ in range(3))


class _Tied(nn.Module):
    """A language model whose output weights are its embedding's, read sideways."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.body = Stack(WIDTH, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.body(self.embed(tokens)), self.embed.weight)


@ALL
@pytest.mark.parametrize("vocabulary", [30, 40_000])
def test_an_embedding_may_be_the_output_layer(
    vocabulary: int, fields: dict[str, Any]
) -> None:
    assert_runs_alike(_Tied(vocabulary), torch.randint(0, 30, (2, 3)), fields)


@ALL
@pytest.mark.parametrize("vocabulary", [30, 40_000])
def test_an_embedding_may_be_tied_to_a_head(
    vocabulary: int, fields: dict[str, Any]
) -> None:
    model = nn.Sequential(
        nn.Embedding(vocabulary, WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)
    )
    model[1].weight = model[0].weight
    assert_runs_alike(model, torch.randint(0, 30, (2, 3)), fields)


@ALL
@pytest.mark.parametrize("name", REAL_MODELS)
def test_real_models_need_no_map(name: str, fields: dict[str, Any]) -> None:
    model, inputs = REAL_MODELS[name]()
    dtype = fields.get("compute_dtype", torch.float32)
    inputs = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in inputs.items()
    }
    want = first_output(run(copy.deepcopy(model).to(dtype), **inputs))
    with offloaded(model, **fields):
        for _ in range(3):
            assert same_bits(first_output(run(model, **inputs)), want)


# -- what the probe costs and changes -----------------------------------------------


def test_a_tensor_read_sideways_comes_with_its_user_from_the_second_pass_on() -> None:
    model = nn.Sequential(_Reader(USES["linear"]), nn.Linear(WIDTH, WIDTH))
    bound = seen_inside(model[0].other, lambda _: model[0].child.weight.data_ptr())
    least = least_limit_gb(model, store="disk")
    with offloaded(model, store="disk", limit_gb=0):
        at_rest = model[0].child.weight.data_ptr()
        for _ in range(3):
            run(model, torch.randn(2, WIDTH))
        # (In the first pass it is bound for the length of the call that reads it.)
        assert bound[0] == at_rest and at_rest not in bound[1:]
        assert offload_plan(model).least_bytes > least * GIB
        before = offload_stats(model)
        run(model, torch.randn(2, WIDTH))
        after = offload_stats(model)
    moved = after.bytes_moved - before.bytes_moved
    assert moved == sum(parameter.nbytes for parameter in model.parameters())


def test_the_probe_watches_the_first_pass_only() -> None:
    model = Stack()
    watching = seen_inside(
        model.blocks[1].up, lambda _: len(_get_current_function_mode_stack())
    )
    with offloaded(model, store="disk", limit_gb=0):
        for _ in range(3):
            run(model, torch.randn(2, 32))
        assert len(_get_current_function_mode_stack()) == 0
    assert watching == [1, 0, 0]


def test_the_probe_does_not_wait_for_layers_that_are_never_asked_for() -> None:
    model = Stack()
    model.spare = nn.Linear(32, 32)
    watching = seen_inside(
        model.blocks[1].up, lambda _: len(_get_current_function_mode_stack())
    )
    with offloaded(model, store="disk", limit_gb=0):
        for _ in range(6):
            run(model, torch.randn(2, 32))
    assert watching == [1, 1, 1, 0, 0, 0]


def test_an_exception_under_the_probe_leaves_no_mode_behind() -> None:
    model = Stack()
    with offloaded(model, store="disk", limit_gb=0):
        for error in (RuntimeError, KeyboardInterrupt):

            def explode(*_: object, error: type[BaseException] = error) -> None:
                raise error

            handle = model.blocks[1].up.register_forward_hook(explode)
            with pytest.raises(error):
                run(model, torch.randn(2, 32))
            handle.remove()
            # Ctrl-C leaves it until the next call, which cleans up behind it.
            run(model, torch.randn(2, 32))
            assert len(_get_current_function_mode_stack()) == 0
    assert len(_get_current_function_mode_stack()) == 0


@pytest.mark.parametrize("then", ["call", "call of a part", "detach"])
def test_what_an_interrupt_leaves_in_the_thread_keeps_no_model_and_goes(
    then: str,
) -> None:
    other = attach_offload_hooks(Stack(), OffloadPolicy(store="disk", limit_gb=0))
    run(other, torch.randn(2, 32))
    interrupted = _interrupted_in_its_first_pass()
    assert len(_get_current_function_mode_stack()) == 1
    gc.collect()
    assert interrupted() is None, "the mode keeps the model"
    assert torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))
    if then == "detach":
        detach(other)
    else:
        run(other if then == "call" else other.blocks[0], torch.randn(2, 32))
    assert len(_get_current_function_mode_stack()) == 0
    # Nor does a hook for what is saved for backward, which torch.func refuses.
    assert torch.func.grad(torch.sin)(torch.zeros(())) == 1


def _interrupted_in_its_first_pass() -> weakref.ref[nn.Module]:
    """Return a model that nobody holds any more."""
    model = attach_offload_hooks(Stack(), OffloadPolicy(store="disk", limit_gb=0))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model.blocks[1].up.register_forward_hook(interrupt)
    try:
        run(model, torch.randn(2, 32))
    except KeyboardInterrupt:
        return weakref.ref(model)
    raise AssertionError("it was not interrupted")


def test_a_probe_stays_on_while_another_model_runs_inside_its_pass() -> None:
    inner = Stack()
    model = Stack()
    stacks: list[int] = []
    with offloaded(inner, store="disk", limit_gb=0):
        for _ in range(3):
            run(inner, torch.randn(2, 32))
        seen = seen_inside(
            model.blocks[1].up, lambda _: len(_get_current_function_mode_stack())
        )
        model.blocks[0].up.register_forward_hook(
            lambda *_: stacks.append(run(inner, torch.randn(2, 32)).numel())
        )
        with offloaded(model, store="disk", limit_gb=0):
            run(model, torch.randn(2, 32))
    assert stacks == [64]
    assert seen == [1]


class _Router(nn.Module):
    """Casts its child in each forward, as Switch Transformers' does."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.child = nn.Linear(WIDTH, WIDTH)
        self.after = nn.Linear(WIDTH, WIDTH)
        self.casts = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        if self.casts:
            self.child = self.child.to(torch.float32)
        return self.after(self.child(x.to(self.child.weight.dtype)).to(x.dtype))


@pytest.mark.parametrize("limit", [0, 0.0001, None])
@pytest.mark.parametrize("device", GPU_TOO)
def test_a_module_that_its_user_casts_computes_so_and_keeps_its_dtype(
    limit: float | None, device: str
) -> None:
    model = _Router().to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, WIDTH).to(device, torch.bfloat16)
    expected = run(copy.deepcopy(model).to(device), x)
    objects = dict(model.named_parameters())
    with offloaded(model, store="disk", limit_gb=limit, compute_device=device):
        for _ in range(4):
            assert same_bits(run(model, x), expected)
    after = model.state_dict()
    assert all(same_bits(after[name], before[name]) for name in before)
    assert all(p is objects[name] for name, p in model.named_parameters())


def test_a_resident_that_is_cast_on_a_later_path_computes_where_it_is_resident(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hookoffload.layer.is_readable", lambda *_: False)
    model = _Router().to(torch.bfloat16)
    model.casts = False
    x = torch.randn(2, WIDTH).to(torch.bfloat16)
    with offloaded(model, compute_device="cpu"):
        rests = run(model, x), model.state_dict()["child.weight"].data_ptr()
        with pytest.raises(RuntimeError):
            run(model, x[:, :3])  # the next forward is probed
        lay = seen_inside(model.child, lambda child: child.weight.data_ptr())
        for casts in (True, False, False):
            moved = offload_stats(model).bytes_moved
            model.casts = casts
            assert run(model, x).isfinite().all()
            if casts:
                assert offload_stats(model).bytes_moved == moved, "it was taken for old"
        assert rests[1] not in lay, "it computed where it rests"


@pytest.mark.parametrize("limit", [0, None])
def test_a_module_that_is_cast_up_again_keeps_what_it_rests_in(
    limit: float | None,
) -> None:
    """It computes in what bf16 leaves of it, which must not come back."""
    model, x = _Router(), torch.randn(2, WIDTH).to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = run(copy.deepcopy(model).to(torch.bfloat16), x)
    with offloaded(
        model, compute_device="cpu", compute_dtype=torch.bfloat16, limit_gb=limit
    ):
        for _ in range(3):
            assert same_bits(run(model, x), expected)
    after = model.state_dict()
    assert all(same_bits(after[name], before[name]) for name in before)


@ALL
def test_a_sideways_read_that_fails_leaves_nothing_bound(
    fields: dict[str, Any],
) -> None:
    def use(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(RuntimeError, match="shape"):
            functional.linear(x[:, :3], module.child.weight)
        return x

    model = nn.Sequential(_Reader(use), *linears(WIDTH, 3))
    x = torch.randn(2, WIDTH, dtype=fields.get("compute_dtype"))
    with offloaded(model, **{**fields, "limit_gb": 0}):
        at_rest = [parameter.data_ptr() for parameter in model.parameters()]
        for _ in range(2):
            run(model, x)
            assert [parameter.data_ptr() for parameter in model.parameters()] == at_rest


class _Branches(nn.Module):
    """Reads a weight sideways on one of two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears(WIDTH, 4)
        self.sideways = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        if self.sideways:
            x = functional.linear(x, self.layers[2].weight)
        return self.layers[3](x)


@ALL
def test_a_sideways_read_on_a_path_taken_later_works_when_tried_again(
    fields: dict[str, Any],
) -> None:
    model, x = _Branches(), torch.randn(2, WIDTH, dtype=fields.get("compute_dtype"))
    plain = copy.deepcopy(model).to(x.dtype)
    with offloaded(model, **fields):
        for sideways in (False, False, True, False, True):
            model.sideways = plain.sideways = sideways
            want = run(plain, x)
            try:
                got = run(model, x)
            except RuntimeError as error:
                assert sideways and "dtype" in str(error)
                got = run(model, x)
            assert same_bits(got, want)


def test_reading_metadata_brings_nothing() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = linears(WIDTH, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.layers[3].weight
            assert weight.dim() == len(weight.shape) == 2 and weight.requires_grad
            assert weight.numel() == weight.size(0) * weight.stride(0)
            assert weight.is_floating_point() and weight.device == x.device
            return self.layers[0](x.to(weight.dtype))

    model = Asks()
    with offloaded(model, store="disk", limit_gb=0):
        least = offload_plan(model).least_bytes
        for _ in range(2):
            run(model, torch.randn(2, WIDTH))
        assert offload_plan(model).least_bytes == least
        assert offload_stats(model).peak_bytes == least


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("use", ["linear", "in a list", "many"])
def test_weights_read_sideways_keep_an_exact_limit(
    use: str, dtype: torch.dtype
) -> None:
    model = nn.Sequential(_Reader(USES[use]), *linears(WIDTH, 6))
    x = torch.randn(2, WIDTH, dtype=dtype)
    want = run(copy.deepcopy(model).to(dtype), x)
    fields: dict[str, Any] = {"store": "disk", "compute_dtype": dtype}
    with offloaded(model, **fields, limit_gb=0):
        run(model, x)
        least = offload_plan(model).least_bytes
    for limit in range(least, 2 * least, 1024):
        with offloaded(model, **fields, limit_gb=limit / GIB):
            for _ in range(3):
                assert same_bits(run(model, x), want)
            assert offload_stats(model).peak_bytes <= limit


@ALL
def test_a_weight_may_be_written_sideways(fields: dict[str, Any]) -> None:
    def count(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        module.child.bias.add_(1)
        return module.child(x)

    model = nn.Sequential(_Reader(count), nn.Linear(WIDTH, WIDTH))
    x = torch.randn(2, WIDTH, dtype=fields.get("compute_dtype"))
    plain = copy.deepcopy(model).to(x.dtype)
    with offloaded(model, **fields):
        for _ in range(4):
            assert torch.allclose(run(model, x), run(plain, x))
            mine = model.state_dict()["0.child.bias"]
            assert torch.allclose(mine, plain[0].child.bias.detach().to(mine.dtype))
    assert torch.allclose(model[0].child.bias, plain[0].child.bias.to(torch.float32))


class _Shows(nn.Module):
    """Returns a view of its child's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"row": self.child.weight[1], "all": self.child.weight}


class _Scales(nn.Module):
    """Uses what another module showed, after other layers have run."""

    def __init__(self) -> None:
        super().__init__()
        self.shows = _Shows()
        self.layers = linears(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shown = self.shows(x)
        return (self.layers(x) * shown["row"]) @ shown["all"]


@pytest.mark.parametrize("layers_in_window", [0, 1, 2, 3, 5])
def test_a_view_of_a_weight_read_sideways_may_be_returned(
    layers_in_window: int,
) -> None:
    model, x = _Scales(), torch.randn(2, WIDTH)
    want = run(copy.deepcopy(model), x)
    least = least_limit_gb(model, store="disk")
    limit_gb = layers_in_window * least
    with offloaded(model, store="disk", limit_gb=limit_gb, debug=True):
        for _ in range(3):
            assert same_bits(run(model, x), want)


class _Takes(nn.Module):
    """Returns a view of its child's weight, or keeps one for later forwards.

    Args:
        keeps: which of both.
        own: it has a parameter itself, so that it has hooks before it was seen to read.
    """

    def __init__(self, *, keeps: bool, own: bool) -> None:
        super().__init__()
        self.child, self.other = linears(WIDTH, 2)
        self.gain = nn.Parameter(torch.rand(WIDTH)) if own else 1.0
        self.keeps = keeps
        self.kept: list[torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.keeps:
            turned = self.child.weight.t()
        elif self.kept is None:
            turned = self.child.weight.t()
            self.kept = [turned]
        else:
            turned = self.kept[0]
        return {"view": turned, "out": self.other((x * self.gain) @ turned)}


@pytest.mark.parametrize("limit", [0, 2.2, 4])
@pytest.mark.parametrize("inside", [False, True], ids=["root", "a block"])
@pytest.mark.parametrize("own", [False, True], ids=["no weights", "own weights"])
@pytest.mark.parametrize("keeps", [False, True], ids=["returns", "keeps"])
def test_a_view_of_a_weight_read_sideways_may_be_taken_along(
    keeps: bool, own: bool, inside: bool, limit: float
) -> None:
    taker = _Takes(keeps=keeps, own=own)
    model = nn.Sequential(linears(WIDTH, 2), taker) if inside else taker
    plain, x = copy.deepcopy(model), torch.randn(2, WIDTH)
    limit_gb = limit * least_limit_gb(model, store="disk")
    with offloaded(model, store="disk", limit_gb=limit_gb, debug=True):
        for _ in range(3):
            mine, theirs = run(model, x), run(plain, x)
            assert same_bits(mine["out"], theirs["out"])
            assert same_bits(mine["view"].contiguous(), theirs["view"].contiguous())


class _Puts(nn.Module):
    """Puts a view of its child's weight into a list that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, *, box: list[torch.Tensor]) -> torch.Tensor:
        box.append(self.child.weight.t())
        return x


class _LooksInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.puts = _Puts()
        self.layers = linears(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        box: list[torch.Tensor] = []
        return self.layers(self.puts(x, box=box)) @ box[0]


@pytest.mark.parametrize("limit", [0, 1, 2.2, 4])
def test_a_view_of_a_weight_read_sideways_may_be_put_into_an_input(
    limit: float,
) -> None:
    model, x = _LooksInside(), torch.randn(2, WIDTH)
    want = run(copy.deepcopy(model), x)
    limit_gb = limit * least_limit_gb(model, store="disk")
    with offloaded(model, store="disk", limit_gb=limit_gb, debug=True):
        for _ in range(3):
            assert same_bits(run(model, x), want)


class _Rescales(nn.Module):
    """Writes to its children's weights in its first forward, as RWKV does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))
        self.done = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.done:
            for layer in self.layers:
                layer.weight.div_(2.0)
            self.done = True
        for layer in self.layers:
            x = layer(x)
        return x


def test_weight_that_is_written_to_sideways_is_let_go_behind_the_call() -> None:
    model = _Rescales()
    plain = copy.deepcopy(model)
    x = torch.randn(2, 64)
    size = sum(p.nbytes for p in model.parameters())
    with offloaded(model, store="disk", limit_gb=0.3 * size / GIB):
        for _ in range(2):
            assert same_bits(run(model, x), run(plain, x))


class _Mixer(nn.Module):
    """Holds views of two children's weights while it calls a third."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.rand(64))
        self.a, self.b, self.c, self.out = (
            nn.Linear(64, 64, bias=False) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x * self.own)
        one, other = self.b.weight.view(64, 64), self.c.weight[:]
        return self.out(x @ one @ other)


def _mixers() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*(_Mixer() for _ in range(6)))
    return model, copy.deepcopy(model), torch.randn(2, 64)


@pytest.mark.parametrize("part", [1.3, 1.5, 2.0, 3.0])
def test_views_that_are_held_do_not_cut_up_the_window(part: float) -> None:
    model, plain, x = _mixers()
    with offloaded(model, store="disk", limit_gb=0):
        run(model, x)
        least = offload_plan(model).least_bytes
    with offloaded(model, store="disk", limit_gb=part * least / GIB):
        for _ in range(3):
            assert same_bits(run(model, x), run(plain, x))


def test_limit_that_is_too_small_for_views_works_from_the_second_forward_on() -> None:
    """What one block was seen to read, the others are taken to read as well."""
    model, plain, x = _mixers()
    with offloaded(model, store="disk", limit_gb=0):
        run(model, x)
        least = offload_plan(model).least_bytes
    with offloaded(model, store="disk", limit_gb=1.05 * least / GIB):
        with pytest.raises(RuntimeError, match="call the model again"):
            run(model, x)
        for _ in range(2):
            assert same_bits(run(model, x), run(plain, x))


class _TakesAnotherPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, sideways: bool) -> torch.Tensor:
        x = self.other(self.child(x))
        return functional.linear(x, self.child.weight) if sideways else x


def test_path_taken_later_says_what_to_do_and_works_the_next_time() -> None:
    model = _TakesAnotherPath()
    plain = copy.deepcopy(model).double()
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    with offloaded(model, compute_dtype=torch.float64, store="disk", limit_gb=0):
        for _ in range(2):
            run(model, x, False)
        with pytest.raises(RuntimeError, match=r"dtype.*call the model again"):
            run(model, x, True)
        for _ in range(2):
            assert same_bits(run(model, x, True), run(plain, x, True))


def test_error_that_has_nothing_to_do_with_it_says_nothing_of_weights() -> None:
    model = linears(WIDTH, 2)
    with offloaded(model, store="disk", limit_gb=0):
        for _ in range(2):
            run(model, torch.zeros(1, WIDTH))
        with pytest.raises(RuntimeError) as error:
            run(model, torch.zeros(1, WIDTH + 1))
    assert "hookoffload" not in str(error.value)


class SidewaysBlock(nn.Module):
    """Four layers, none of which is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = functional.linear(x, layer.weight, layer.bias)
        return x


def test_reads_that_do_not_fit_the_limit_together_are_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(SidewaysBlock(), SidewaysBlock())
    limit_gb = 2 * 65 * 64 * 4 / 2**30
    with offloaded(model, limit_gb=limit_gb, store="disk", compute_device="cpu"):
        for _ in range(4):
            with torch.no_grad():
                model(torch.ones(2, 64))
    (told,) = caplog.messages
    assert "0, 1 read(s) weights of other modules" in told
    assert "Set limit_gb=" in told
