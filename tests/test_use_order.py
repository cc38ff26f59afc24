"""Which model is needed soonest, told from what was called before."""

from __future__ import annotations

from hookoffload.use_order import UseOrder


def _seen(*names: str) -> UseOrder:
    order = UseOrder()
    for name in names:
        order.note(name)
    return order


def _listed(order: UseOrder, name: str, others: list[str]) -> list[str]:
    sooner, later = order.split(name, others)
    return [*sooner, *later]


def test_nothing_is_known_of_models_that_were_never_called() -> None:
    assert UseOrder().split("unet", ["text", "vae"]) == ([], ["text", "vae"])
    assert _seen("unet").split("unet", ["text", "vae"]) == ([], ["text", "vae"])


def test_models_are_listed_as_they_followed_in_the_run_before() -> None:
    order = _seen("text", "unet", "vae", "text")
    assert _listed(order, "text", ["vae", "unet"]) == ["unet", "vae"]


def test_a_model_that_is_called_many_times_in_its_turn_is_needed_first_itself() -> None:
    order = _seen("text", *["unet"] * 4, "vae", "text", "unet")
    assert order.repeats("unet")
    assert order.split("unet", ["text", "vae"]) == ([], ["vae", "text"])


def test_a_model_that_is_called_once_a_run_is_needed_after_all_others() -> None:
    order = _seen("text", *["unet"] * 4, "vae", "text", "unet", "unet", "vae")
    assert not order.repeats("vae")
    assert order.split("vae", ["unet", "text"]) == (["text", "unet"], [])


def test_second_call_in_its_first_turn_shows_that_a_model_is_repeated() -> None:
    assert not _seen("text", "unet").repeats("unet")
    assert _seen("text", "unet", "unet").repeats("unet")


def test_parts_that_are_each_called_once_are_no_repetition() -> None:
    order = UseOrder()
    for part in ("post_quant_conv", "decoder"):
        order.note("vae", part)
    assert not order.repeats("vae")
    order.note("vae", "decoder")
    assert order.repeats("vae")


def test_two_models_that_take_turns_in_a_loop_are_sooner_than_the_others() -> None:
    loop = ["control", "unet"] * 5
    order = _seen("text", *loop, "vae", "text", *loop[:3])
    assert order.split("control", ["text", "unet", "vae"]) == (
        ["unet"],
        ["vae", "text"],
    )


def test_where_a_model_has_several_places_in_a_run_its_predecessor_decides() -> None:
    order = _seen("a", "x", "b", "x", "c", "a", "x")
    assert _listed(order, "x", ["b", "c", "a"])[0] == "b"
    order.note("b")
    order.note("x")
    assert _listed(order, "x", ["b", "c", "a"])[0] == "c"


def test_a_name_is_listed_once() -> None:
    assert _listed(_seen("a", "b", "a", "b", "a"), "a", ["b", "b"]) == ["b"]
