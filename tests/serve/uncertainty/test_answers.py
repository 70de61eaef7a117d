"""The field `uncertainty` of a choice: every mode, partial, filtered, and always JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from loramux.uncertainty import answers
from loramux.uncertainty.ask import SCORES, Ask, Mode
from loramux.uncertainty.exchange import Exchange


def exchange(mode: Mode, samples: int = 3, **ask: Any) -> Exchange:
    return Exchange(Ask(mode=mode, **ask), mode, samples)


def reads(draws: int = 3, tokens: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return -rng.random((draws, tokens)), rng.random((draws, tokens)), np.ones(tokens)


def as_json(value: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    return result


def test_a_score_of_everything() -> None:
    value = as_json(answers.scored(exchange(Mode.SCORE, per_token=True), "diagonal_a", *reads()))
    assert set(SCORES[Mode.SCORE]) < set(value) and len(value["tokens"]) == 4
    assert value["total"] == pytest.approx(np.mean([token["total"] for token in value["tokens"]]))
    assert value["raw"].keys() == {"total", "epistemic"} and value["raw"]["epistemic"] < value["epistemic"]
    assert (value["mode"], value["samples"], value["noise"], value["seed"]) == ("score", 3, "sequence", 0)


def test_only_what_was_asked_for() -> None:
    asked = exchange(Mode.SCORE, scores=("mi_max",))
    value = answers.asked_for(asked, answers.scored(asked, "diagonal_a", *reads()))
    assert set(value) & set(SCORES[Mode.SCORE]) == {"mi_max"} and "tokens" not in value


def test_a_draw_that_read_half_counts_for_that_half() -> None:
    logp, entropy, total = reads()
    logp[2, 2:] = entropy[2, 2:] = np.nan
    value = as_json(answers.scored(exchange(Mode.SCORE, per_token=True), "diagonal_a", logp, entropy, total))
    assert value["partial"] and value["samples"] == 2
    whole = answers.scored(exchange(Mode.SCORE, 2), "diagonal_a", logp[:2], entropy[:2], total)
    assert value["nll_ln"] == whole["nll_ln"]
    assert value["tokens"][0]["aleatoric"] == pytest.approx(entropy[:, 0].mean())
    assert value["tokens"][3]["aleatoric"] == pytest.approx(entropy[:2, 3].mean())


@pytest.mark.parametrize("complete", [0, 1])
def test_less_than_two_draws_tell_nothing(complete: int) -> None:
    logp, entropy, total = reads()
    logp[complete:] = entropy[complete:] = np.nan
    value = as_json(answers.scored(exchange(Mode.SCORE), "diagonal_a", logp, entropy, total))
    assert value["partial"] and all(value[name] is None for name in SCORES[Mode.SCORE])


def test_a_decision() -> None:
    asked = exchange(Mode.DECIDE, labels=("a", "b"), scores=("confidence",))
    value, place = answers.decided(asked, "diagonal_a", np.log([[0.6, 0.2], [0.2, 0.2], [0.3, 0.1]]), 3)
    assert place == 0 and value["prediction"] == "a" and "epistemic" not in answers.asked_for(asked, value)
    assert [entry["label"] for entry in as_json(value)["labels"]] == ["a", "b"]
    assert sum(entry["probability"] for entry in value["labels"]) == pytest.approx(1)


def test_a_decision_by_one() -> None:
    asked = exchange(Mode.DECIDE, labels=("a", "b"))
    value, _ = answers.decided(asked, None, np.log([[0.6, 0.2]]), 1)
    assert value["epistemic"] is None and value["total"] == value["aleatoric"] and not value["partial"]
    assert value["labels"][0]["deviation"] is None and value["noise"] is None


def test_samples() -> None:
    value = answers.sampled(exchange(Mode.SAMPLE), "diagonal_a", {0: "Yes", 1: "no", 2: "yes."})
    assert [one["cluster"] for one in value.values()] == [0, 1, 0]
    assert [one["draw"] for one in value.values()] == [0, 1, 2]
    assert as_json(value[1])["agreement"] == pytest.approx(2 / 3)


def test_fast() -> None:
    value = answers.fast(exchange(Mode.FAST, per_token=True), None, [0.5, 1.0], [-0.1, -0.2])
    assert set(SCORES[Mode.FAST]) < set(as_json(value)) and value["samples"] == 0
    assert value["tokens"][1] == {"total": 1.0, "aleatoric": None, "epistemic": None}


@pytest.mark.parametrize(("entropies", "logp"), [([], []), ([0.5], [-0.1, -0.2]), ([0.5, float("nan")], [-0.1, -0.2])])
def test_fast_of_what_is_not_known(entropies: list[float], logp: list[float]) -> None:
    value = as_json(answers.fast(exchange(Mode.FAST), None, entropies, logp))
    assert value["partial"] and all(value[name] is None for name in SCORES[Mode.FAST])


def test_a_failure_is_of_the_same_shape() -> None:
    asked = exchange(Mode.SCORE, scores=("total",))
    value = as_json(answers.asked_for(asked, answers.failed(asked, "diagonal_a", "code", "message")))
    assert value["partial"] and value["total"] is None and value["error"] == {"code": "code", "message": "message"}
    assert "epistemic" not in value
