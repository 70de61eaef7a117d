"""What may be asked for, what the adapter makes of it, and every way to ask badly."""

from __future__ import annotations

from typing import Any

import pytest

from loramux.errors import AdapterNotBayesian, InvalidRequest
from loramux.uncertainty.abstain import Action, Rule
from loramux.uncertainty.ask import MAX_LABELS, SCORES, Ask, Mode, parse, resolve


@pytest.mark.parametrize("value", [None, False, {"mode": "off"}])
def test_nothing_is_asked_for(value: Any) -> None:
    assert parse(value) is None


@pytest.mark.parametrize("value", [True, {}, {"mode": None, "samples": None}])
def test_the_defaults(value: Any) -> None:
    assert parse(value) == Ask()


def test_everything() -> None:
    value = {
        "mode": "decide",
        "samples": 16,
        "seed": 3,
        "noise": "sequence",
        "scores": ["epistemic", "label_mass"],
        "per_token": True,
        "labels": ["yes", "no"],
        "on_unsupported": "error",
        "timeout_ms": 400,
    }
    assert parse(value) == Ask(
        Mode.DECIDE, 16, 3, ("epistemic", "label_mass"), True, ("yes", "no"), fast_if_unsupported=False, timeout_s=0.4
    )


@pytest.mark.parametrize("mode", Mode)
def test_every_score_of_a_mode_can_be_asked_for(mode: Mode) -> None:
    labels = {"labels": ["a", "b"]} if mode is Mode.DECIDE else {}
    for name in SCORES[mode]:
        asked = parse({"mode": mode.value, "scores": [name], **labels})
        assert asked is not None and asked.scores == (name,)


ABOVE = {"score": "mi_mean", "value": 1}


@pytest.mark.parametrize(
    ("value", "param"),
    [
        (1, ""),
        ("score", ""),
        ([], ""),
        ({"sample": 4}, "sample"),
        ({"mode": "guess"}, "mode"),
        ({"mode": ["score"]}, "mode"),
        ({"mode": {}}, "mode"),
        ({"samples": 0}, "samples"),
        ({"samples": "auto"}, "samples"),  # without anything to decide
        ({"samples": "many", "abstain_above": ABOVE}, "samples"),
        ({"samples": "auto", "mode": "fast", "abstain_above": {"score": "total", "value": 1}}, "samples"),
        ({"samples": "auto", "max_samples": 65, "abstain_above": ABOVE}, "max_samples"),
        ({"samples": 8, "max_samples": 16, "abstain_above": ABOVE}, "max_samples"),
        ({"alpha": 0.1}, "alpha"),
        ({"alpha": 0, "mode": "decide", "labels": ["a", "b"]}, "alpha"),
        ({"alpha": 1, "mode": "decide", "labels": ["a", "b"]}, "alpha"),
        ({"alpha": float("nan"), "mode": "decide", "labels": ["a", "b"]}, "alpha"),
        ({"alpha": "0.1", "mode": "decide", "labels": ["a", "b"]}, "alpha"),
        ({"calibrated": 1}, "calibrated"),
        ({"samples": 1}, "samples"),
        ({"samples": 65}, "samples"),
        ({"samples": 10**6}, "samples"),
        ({"samples": -8}, "samples"),
        ({"samples": 8.0}, "samples"),
        ({"samples": True}, "samples"),
        ({"samples": "8"}, "samples"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"noise": "token"}, "noise"),
        ({"noise": 1}, "noise"),
        ({"per_token": 1}, "per_token"),
        ({"scores": []}, "scores"),
        ({"scores": "epistemic"}, "scores"),
        ({"scores": ["epistemic", 1]}, "scores"),
        ({"scores": ["vibes"]}, "scores"),
        ({"mode": "score", "scores": ["label_mass"]}, "scores"),
        ({"labels": ["a", "b"]}, "labels"),
        ({"mode": "score", "labels": ["a", "b"]}, "labels"),
        ({"mode": "decide"}, "labels"),
        ({"mode": "decide", "labels": []}, "labels"),
        ({"mode": "decide", "labels": ["a"]}, "labels"),
        ({"mode": "decide", "labels": "ab"}, "labels"),
        ({"mode": "decide", "labels": ["a", 1]}, "labels"),
        ({"mode": "decide", "labels": ["a", ""]}, "labels[1]"),
        ({"mode": "decide", "labels": ["a", "b", "a"]}, "labels[2]"),
        ({"mode": "decide", "labels": ["a", "b" * 257]}, "labels[1]"),
        ({"mode": "decide", "labels": [f"{i}" for i in range(MAX_LABELS + 1)]}, "labels"),
        ({"on_unsupported": "ignore"}, "on_unsupported"),
        ({"timeout_ms": 0}, "timeout_ms"),
        ({"timeout_ms": 0.5}, "timeout_ms"),
        ({"timeout_ms": 10**9}, "timeout_ms"),
        ({"abstain_above": 0.1}, "abstain_above"),
        ({"abstain_above": {"score": "mi_mean"}}, "abstain_above"),
        ({"abstain_above": {"score": "mi_mean", "value": 1, "then": 1}}, "abstain_above"),
        ({"abstain_above": {"score": "vibes", "value": 1}}, "abstain_above.score"),
        ({"abstain_above": {"score": ["mi_mean"], "value": 1}}, "abstain_above.score"),
        ({"abstain_above": {"score": "confidence", "value": 1}}, "abstain_above.score"),  # sure answers have more
        ({"abstain_below": {"score": "mi_mean", "value": 1}}, "abstain_below.score"),
        ({"abstain_above": {"score": "mi_mean", "value": "1"}}, "abstain_above.value"),
        ({"abstain_above": {"score": "mi_mean", "value": True}}, "abstain_above.value"),
        ({"abstain_above": {"score": "mi_mean", "value": float("nan")}}, "abstain_above.value"),
        ({"abstain_above": {"score": "mi_mean", "value": 10**400}}, "abstain_above.value"),
        ({"abstain_above": {"score": "mi_mean", "value": 1, "action": "cry"}}, "abstain_above.action"),
        ({"abstain_above": {"score": "mi_mean", "value": 1, "action": "route"}}, "abstain_above.route_to"),
        ({"abstain_above": {"score": "mi_mean", "value": 1, "route_to": "base"}}, "abstain_above.route_to"),
        (
            {"abstain_above": {"score": "mi_mean", "value": 1}, "abstain_below": {"score": "confidence", "value": 1}},
            "abstain_above",
        ),
    ],
)
def test_refusals_name_the_field_and_what_to_do(value: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        parse(value)
    assert error.value.param == ("uncertainty" + (f".{param}" if param else "")) and error.value.hint


def test_a_name_that_is_long_is_cut() -> None:
    with pytest.raises(InvalidRequest) as error:
        parse({"x" * 10**6: 1})
    assert len(error.value.message) < 200


@pytest.mark.parametrize("mode", [None, *Mode])
def test_a_posterior_can_do_all(mode: Mode | None) -> None:
    assert resolve(Ask(mode), bayesian=True) is (mode or Mode.SCORE)


@pytest.mark.parametrize(
    ("mode", "instead"),
    [(None, Mode.FAST), (Mode.FAST, Mode.FAST), (Mode.SCORE, Mode.FAST), (Mode.DECIDE, Mode.DECIDE)],
)
def test_without_a_posterior(mode: Mode | None, instead: Mode) -> None:
    assert resolve(Ask(mode), bayesian=False) is instead


@pytest.mark.parametrize("mode", [Mode.SCORE, Mode.DECIDE, Mode.SAMPLE])
def test_without_a_posterior_and_wanting_one(mode: Mode) -> None:
    with pytest.raises(AdapterNotBayesian) as error:
        resolve(Ask(mode, fast_if_unsupported=False), bayesian=False)
    assert error.value.hint and error.value.status == 400
    assert resolve(Ask(None, fast_if_unsupported=False), bayesian=False) is Mode.FAST


def test_as_many_samples_as_it_takes() -> None:
    for most in (None, 16):
        asked = parse({"samples": "auto", "max_samples": most, "abstain_above": ABOVE})
        assert asked is not None and asked.adaptive and asked.samples == most
    decided = parse({"mode": "decide", "labels": ["a", "b"], "alpha": 0.1, "calibrated": False})
    assert decided is not None and (decided.alpha, decided.calibrated, decided.adaptive) == (0.1, False, False)


def test_a_threshold() -> None:
    rule = {"score": "mi_max", "value": 1, "action": "route", "route_to": "base"}
    asked = parse({"scores": ["total"], "abstain_above": rule})
    assert asked is not None and asked.abstain == Rule("mi_max", 1.0, False, Action.ROUTE, "base")
    assert asked.scores == ("total", "mi_max")  # it is told what decided
    asked = parse({"abstain_below": {"score": "confidence", "value": 0.5}})
    assert asked is not None and asked.abstain == Rule("confidence", 0.5, True, Action.FLAG)


@pytest.mark.parametrize(
    ("rule", "score", "abstained", "action"),
    [
        (Rule("total", 1.0, False), 1.1, True, "flag"),
        (Rule("total", 1.0, False), 1.0, False, None),
        (Rule("total", 1.0, False), None, None, None),
        (Rule("confidence", 0.5, True), 0.4, True, "flag"),
        (Rule("confidence", 0.5, True), 0.5, False, None),
        (Rule("total", 1.0, False, Action.REFUSE), 1.1, True, "refuse"),
        (Rule("total", 1.0, False, Action.REFUSE), 0.9, False, None),
        (Rule("total", 1.0, False, Action.REFUSE), None, None, "refuse"),  # what is not known is not sure
        (Rule("total", 1.0, False, Action.ROUTE, "base"), float("nan"), None, "route"),
    ],
)
def test_who_abstains(rule: Rule, score: float | None, abstained: bool | None, action: str | None) -> None:
    assert rule.judged({rule.score: score}) == {"abstained": abstained, "action": action}
