"""`adapters` and `router`: what they can say, and every way to say it wrongly."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.errors import InvalidRequest
from loramux.http.parts import MAX_PARTS, Wish, names_in, wish_in
from loramux.registry import Share
from loramux_adapters.compose.prepared import Router

THREE = [Share("a"), Share("b"), Share("c")]


def test_what_they_say() -> None:
    assert wish_in({"adapters": ["a", {"name": "b"}, "c"]}) == Wish(THREE, None)
    assert wish_in({"adapters": [{"name": "a", "weight": -3, "task": 2}]}) == Wish([Share("a", -3.0, 2)], None)
    abc = ["a", "b", "c"]
    assert wish_in({"adapters": abc, "router": "arrow"}) == Wish(THREE, Router(3, 1.0))
    assert wish_in({"adapters": abc[:2], "router": {"type": "arrow"}}) == Wish(THREE[:2], Router(2, 1.0))
    assert wish_in({"adapters": list("abcde"), "router": "arrow"}) == Wish([Share(n) for n in "abcde"], Router(3, 1.0))
    assert wish_in({"adapters": list("abcde"), "router": {"type": "arrow", "top_k": 5}}).router == Router(5, 1.0)  # type: ignore[union-attr]
    routed = {"adapters": abc, "router": {"type": "arrow", "top_k": 1, "temperature": 2}, "temperature": 0, "top_k": 40}
    assert wish_in(routed) == Wish(THREE, Router(1, 2.0))
    tasks = [{"name": "med", "task": 0}, {"name": "med", "task": 1}]
    assert wish_in({"adapters": tasks, "router": "arrow"}) == Wish(
        [Share("med", 1.0, 0), Share("med", 1.0, 1)], Router(2)
    )
    for nothing in ({}, {"adapters": None}, {"router": None}, {"adapters": None, "router": None}, {"top_k": 3}):
        assert wish_in(nothing) is None


ARROW: dict[str, Any] = {"type": "arrow"}
HUGE = (10**4000, -(10**4000), 10**400)
ODD = (None, True, "1", [1], {}, float("nan"), float("inf"), float("-inf"), *HUGE)


@pytest.mark.parametrize(
    ("router", "param"),
    [
        (True, "router"),
        (False, "router"),
        (0, "router"),
        ([], "router"),
        (["arrow"], "router"),
        ({}, "router"),
        ({"top_k": 2}, "router"),
        ({**ARROW, "k": 2}, "router"),
        ({**ARROW, "seed": 1}, "router"),
        ({**ARROW, "weights": [1, 2]}, "router"),
        ("", "router.type"),
        ("Arrow", "router.type"),
        ("xlora", "router.type"),
        ("a" * 10**5, "router.type"),
        *(({"type": kind}, "router.type") for kind in (None, 7, ["arrow"], {"type": "arrow"})),
        *(({**ARROW, "top_k": value}, "router.top_k") for value in (0, -1, 4, 1.0, 2.5, *ODD)),
        *(({**ARROW, "temperature": value}, "router.temperature") for value in (0, -1.0, 1e-4, 1e-300, 1001, *ODD)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_router_is_refused(router: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        wish_in({"adapters": ["a", "b", "c"], "router": router})
    assert refusal.value.param == param and refusal.value.hint
    assert len(refusal.value.message) + len(refusal.value.hint) < 400


@pytest.mark.parametrize(
    ("adapters", "param"),
    [
        (None, "adapters"),
        ([], "adapters"),
        ("a", "adapters"),
        (["a"], "adapters"),
        ([{"name": "a", "task": 1}], "adapters"),
        (["a"] * (MAX_PARTS + 1), "adapters"),
        (["a"] * 10**6, "adapters"),
        (["a", {"name": "b", "weight": 1.0}], "adapters[1].weight"),
        (["a", {"name": "b", "weight": None}], "adapters[1].weight"),
        (["a", {"name": "b", "top_k": 1}], "adapters[1]"),
        (["a", {"name": "b", "task": "x"}], "adapters[1].task"),
        (["a", ""], "adapters[1].name"),
        (["a", 7], "adapters[1]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_routed_is_refused(adapters: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        wish_in({"adapters": adapters, "router": "arrow"})
    assert refusal.value.param == param and refusal.value.hint
    assert len(refusal.value.message) + len(refusal.value.hint) < 400


words = st.sampled_from(["adapters", "router", "name", "weight", "task", "type", "arrow", "top_k", "temperature"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=500, deadline=None)
@given(st.fixed_dictionaries({"adapters": values, "router": values}))
def test_nothing_but_a_wish_or_a_refusal_comes_of_it(request: Any) -> None:
    request = json.loads(json.dumps(request))
    try:
        wish = wish_in(request)
    except InvalidRequest as refusal:
        assert refusal.status == 400 and refusal.param and refusal.hint
        return
    assert (wish is None) == (request["adapters"] is None)
    if wish is not None and wish.router is not None:
        assert 1 <= wish.router.top_k <= len(wish.parts) > 1 and {part.weight for part in wish.parts} == {1.0}


@given(values)
def test_logs_have_the_names_alone(value: Any) -> None:
    names = names_in(value)
    assert names is None or all(isinstance(name, str) for name in names)


def test_names_of_all_spellings_are_logged() -> None:
    assert names_in(["a", {"name": "b"}, {"name": 7}, 7, None, "c" * 1000]) == ["a", "b", "c" * 256]
