"""Hostile calibrations: whatever is sent is refused with a hint or calibrates; nothing else is raised."""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.errors import InvalidRequest
from loramux.http.asgi import json_object
from loramux.uncertainty.ask import Mode
from loramux.uncertainty.calibration import Sets, Settings, calibrate, of_answers, of_scores
from loramux.uncertainty.calibration.wish import wish_in

numbers = st.sampled_from(
    [0, 1, -1, 0.5, 8, 1e300, -1e-320, 10**400, float("nan"), float("inf"), True, None, "8", [], {}]
)
texts = st.sampled_from(["", "a", "b", "decide", "score", "\ud800", "x" * 1000])
anything = st.recursive(
    numbers | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
labels = st.lists(st.fixed_dictionaries({"label": texts | anything, "probability": numbers}) | anything, max_size=3)
told = st.fixed_dictionaries(
    {"mode": st.sampled_from(["decide", "score"]) | anything},
    optional={
        "noise": st.just("sequence") | anything,
        "samples": st.just(8) | numbers,
        "seed": st.just(0) | anything,
        "partial": st.just(False) | anything,
        "confidence": numbers,
        "total": numbers,
        "nll_ln": numbers,
        "labels": labels | anything,
    },
)
item = st.fixed_dictionaries(
    {},
    optional={
        "prompt": anything,
        "messages": anything,
        "completion": anything,
        "score": numbers,
        "uncertainty": told | anything,
        "correct": st.booleans() | anything,
        "label": texts | anything,
    },
)
body = st.fixed_dictionaries(
    {"model": st.just("a") | anything, "data": st.lists(item, max_size=4) | anything},
    optional={
        "uncertainty": st.just({"mode": "decide", "labels": ["a", "b"]}) | anything,
        "method": st.sampled_from(["platt", "isotonic"]) | anything,
        "score": texts | anything,
        "sets": anything,
        "risk": numbers,
        "from": texts | anything,
    },
)


@settings(max_examples=500, deadline=None)
@given(body | anything)
def test_bodies(value: Any) -> None:
    try:
        wish = wish_in(json_object(json.dumps(value).encode(), "Mend it."))
    except InvalidRequest as error:
        assert error.hint and len(error.message) < 1000
    else:
        assert wish.model == "a" and (wish.items is None or wish.items)


@settings(max_examples=500, deadline=None)
@given(st.lists(told, min_size=1, max_size=3), st.sampled_from([(), ("a", "b")]))
def test_fields_of_answers(some: list[dict[str, Any]], labels: tuple[str, ...]) -> None:
    wanted = Settings(Mode.DECIDE if labels else Mode.SCORE, "sequence", 8, 0, labels)
    right: list[bool | str] = ["a" if labels else True] * 40
    try:
        items = of_answers((some * 40)[:40], wanted, right)
    except InvalidRequest as error:
        assert error.hint and error.param is not None and error.param.startswith("data")
    else:
        assert all(math.isfinite(x) for values in items.scores.values() for x in values)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e300, 1e300), min_size=30, max_size=40), st.integers(0, 2**40))
def test_scores_of_any_size(x: list[float], bits: int) -> None:
    """Finite scores, however far apart, give finite confidences."""
    items = of_scores("mi_mean", x, [bool(bits >> i & 1) for i in range(len(x))])
    wanted = Settings(Mode.SCORE, "sequence", 8, 0)
    try:
        made = calibrate(items, wanted, score="mi_mean", method=None, sets=Sets.LAC, risk=0.1)
    except InvalidRequest as error:
        assert error.param == "data"
        return
    json.dumps(made.card(), allow_nan=False)
    answer = {"mode": "score", "confidence": 0.5, "mi_mean": x[0]}
    found = made.applied(answer, None)
    assert found is not None and 0 <= found["confidence"] <= 1
