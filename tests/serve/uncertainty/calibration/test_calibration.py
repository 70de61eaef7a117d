"""A calibration from its items to an answer: what it says of itself, where it holds, what outlives the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loramux.errors import CalibrationNotFound, InvalidRequest, StateNotWritten
from loramux.registry import Store
from loramux.uncertainty.ask import Mode
from loramux.uncertainty.calibration import (
    Calibration,
    Calibrations,
    Items,
    Method,
    Sets,
    Settings,
    calibrate,
    of_answers,
    of_scores,
)
from loramux.uncertainty.calibration.calibration import loaded

from ...fakes import BASE, World

SCORE = Settings(Mode.SCORE, "sequence", 8, 0)
DECIDE = Settings(Mode.DECIDE, "sequence", 8, 0, ("a", "b", "c"))


def scored(n: int = 300, seed: int = 0) -> Items:
    """Likelihoods that are far too sure: right with a probability of exp(−5 nll)."""
    rng = np.random.default_rng(seed)
    x = rng.exponential(0.2, n)
    return of_scores("nll_ln", x.tolist(), (rng.random(n) < np.exp(-5 * x)).tolist())


def decided(n: int = 300) -> tuple[list[dict[str, Any]], list[bool | str]]:
    """Answers too sure by a temperature of 3, and right labels."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1.5, (n, 3))
    honest, sharp = (np.exp(t * logits) / np.exp(t * logits).sum(1, keepdims=True) for t in (1, 3))
    labels = [rng.choice(list("abc"), p=p) for p in honest]
    return [decision(p) for p in sharp], labels


def decision(p: Any) -> dict[str, Any]:
    entries = [{"label": label, "probability": float(q), "deviation": 0.1} for label, q in zip("abc", p, strict=True)]
    total = float(-(np.array(p) * np.log(p)).sum())
    head = {"mode": "decide", "noise": "sequence", "samples": 8, "seed": 0, "partial": False}
    return {**head, "total": total, "confidence": float(max(p)), "labels": entries}


def answer(**more: Any) -> dict[str, Any]:
    head = {"mode": "score", "noise": "sequence", "samples": 8, "seed": 0, "partial": False}
    return {**head, "nll_ln": 0.1, "confidence": 0.9, "raw": {"total": 1.0}, **more}


def make(items: Items | None = None, settings: Settings = SCORE, **more: Any) -> Calibration:
    asked = {"score": "nll_ln", "method": None, "sets": Sets.LAC, "risk": 0.3} | more
    return calibrate(items or scored(), settings, **asked)


@pytest.mark.parametrize("method", [Method.PLATT, Method.ISOTONIC])
def test_confidences_become_honest(method: Method) -> None:
    """On items that it has not seen, too; what it says of itself is of unseen items and near what those show."""
    made, fresh = make(method=method), scored(5000, seed=9)
    assert made.told["before"]["ece"] > 0.2 > 0.1 > made.told["ece"]
    confidence = np.array([made.applied(answer(nll_ln=x), None)["confidence"] for x in fresh.scores["nll_ln"]])  # type: ignore[index]
    assert abs(confidence.mean() - fresh.right.mean()) < 0.05
    assert np.square(confidence - fresh.right).mean() == pytest.approx(made.told["brier"], abs=0.03)


def test_the_method_with_the_smaller_error_serves() -> None:
    made = make()
    assert set(made.told["compared"]) == {"platt", "isotonic"}
    assert made.told["brier"] == min(made.told["compared"].values()) == made.told["compared"][made.method]


def test_a_decision_gets_a_temperature_and_sets() -> None:
    told, right = decided()
    made = make(of_answers(told, DECIDE, right), DECIDE, score="total", method=Method.TEMPERATURE)
    assert made.map == pytest.approx(3.0, rel=0.3) and made.told["ece"] < made.told["before"]["ece"]
    one = decision([0.7, 0.2, 0.1])
    found = made.applied(one, 0.1)
    assert found is not None
    p = [entry["probability"] for entry in found["labels"]]
    assert sum(p) == pytest.approx(1) and found["confidence"] == max(p) < 0.7 and found["raw"]["confidence"] == 0.7
    assert found["prediction_set"]["labels"][0] == "a" and found["prediction_set"]["alpha"] == 0.1
    assert one == decision([0.7, 0.2, 0.1])  # untouched
    tight, wide = (made.applied(one, alpha)["prediction_set"]["labels"] for alpha in (0.9, 0.001))  # type: ignore[index]
    assert tight == ["a"] and wide == ["a", "b", "c"]


@pytest.mark.parametrize("method", Method)
def test_what_is_written_is_read(method: Method) -> None:
    told, right = decided()
    made = make(of_answers(told, DECIDE, right), DECIDE, score="total", method=method)
    back = loaded(made.dumped())
    for one in (decision([0.5, 0.3, 0.2]), decision([0.01, 0.98, 0.01])):
        assert back.applied(one, 0.2) == made.applied(one, 0.2)
    assert back.card() == made.card() and json.dumps(made.card(), allow_nan=False)


@pytest.mark.parametrize(
    ("right", "message"),
    [
        ([True] * 29, "29 items"),
        ([True] * 60, "60 of 60"),
        ([False] * 60, "0 of 60"),
        ([True] * 56 + [False] * 4, "56"),
    ],
)
def test_items_that_teach_nothing(right: list[bool], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        make(of_scores("nll_ln", [0.1 * i for i in range(len(right))], right))
    assert error.value.hint and error.value.param == "data"


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "score"},
        {"samples": 4},
        {"seed": 1},
        {"noise": "token"},
        {"labels": decision([0.5, 0.5, 1e-9])["labels"][:2]},
        {"labels": None},
        {"partial": True},
        {"confidence": None},
        {"confidence": float("nan")},
        {"calibration": {"id": "cal-0"}},
        {"labels": [{"label": name, "probability": float("inf")} for name in "abc"]},
        {"labels": [{"label": name, "probability": 0} for name in "abc"]},
    ],
)
def test_answers_of_other_settings_or_without_scores(change: dict[str, Any]) -> None:
    told, right = decided(40)
    told[17] |= change
    with pytest.raises(InvalidRequest) as error:
        of_answers(told, DECIDE, right)
    assert error.value.param == "data[17]" and error.value.hint


def test_scores_that_some_items_lack_are_none() -> None:
    told = [answer(mi_mean=None if i == 3 else 0.1) for i in range(40)]
    items = of_answers(told, SCORE, [i % 2 == 0 for i in range(40)])
    assert set(items.scores) == {"nll_ln"}
    with pytest.raises(InvalidRequest, match="mi_mean"):
        make(items, score="mi_mean")
    with pytest.raises(InvalidRequest, match="decisions"):
        make(items, method=Method.TEMPERATURE)


@pytest.mark.parametrize(
    "other",
    [{"mode": "fast"}, {"samples": 7}, {"seed": 1}, {"noise": "token"}, {"partial": True}, {"nll_ln": None}],
)
async def test_it_holds_for_nothing_else(other: dict[str, Any]) -> None:
    world = World()
    version, calibrations = await world.load("a"), Calibrations(world.store)
    await calibrations.keep(version, make())
    found = calibrations.applied(version, answer(), (), None)
    assert found is not None and found["confidence"] != 0.9 and found["raw"] == {"total": 1.0, "confidence": 0.9}
    assert calibrations.applied(version, answer(**other), (), None) is None
    assert calibrations.applied(version, answer(), ("x", "y"), None) is None


async def test_a_new_version_does_not_get_it_and_a_rollback_does() -> None:
    world = World()
    old, calibrations = await world.load("a"), Calibrations(world.store)
    twin = await world.load("b", "a")  # the same content by another name
    await calibrations.keep(old, make())
    assert not list(calibrations.of(twin))
    new = await world.load("a", "a2", replace=True)
    assert not list(calibrations.of(new)) and list(calibrations.of(old))
    assert [card["version"] for card in calibrations.cards(world.registry.adapter("a"))] == [old.digest]
    await world.registry.rollback("a")
    assert calibrations.applied(world.current("a"), answer(), (), None) is not None
    for content in ("a3", "a4"):  # now it is out of reach
        await world.load("a", content, replace=True)
    assert not world.store.calibrations("a")
    await calibrations.keep(world.current("a"), make())
    await world.registry.delete("a")
    assert not list(calibrations.of(await world.load("a", "a4")))


async def test_one_for_each_settings() -> None:
    world = World()
    version, calibrations = await world.load("a"), Calibrations(world.store)
    first, second, other = make(), make(), make(settings=Settings(Mode.SCORE, "sequence", 4, 0))
    for one in (first, other, second):
        await calibrations.keep(version, one)
    assert [one.id for one in calibrations.of(version)] == [other.id, second.id]
    card = await calibrations.forget(calibrations.find(other.id))
    assert card["id"] == other.id and [one.id for one in calibrations.of(version)] == [second.id]
    with pytest.raises(CalibrationNotFound):
        calibrations.find(other.id)


def open_store(folder: Path, base: str = BASE) -> Store:
    return Store.open(folder / "state.sqlite", base=base, cache=folder)


async def test_a_restart_keeps_it_and_another_base_does_not(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    version, made = await World(store=store).load("a"), make()
    await Calibrations(store).keep(version, made)
    store._connection.execute("PRAGMA query_only = ON")
    with pytest.raises(StateNotWritten):
        await Calibrations(store).keep(version, make())
    store._connection.execute("PRAGMA query_only = OFF")
    full = "CREATE TEMP TRIGGER full BEFORE INSERT ON calibrations BEGIN SELECT RAISE(ABORT, 'full'); END"
    store._connection.execute(full)
    with pytest.raises(StateNotWritten):  # when the one that it replaces is gone already
        await Calibrations(store).keep(version, make())
    assert [one.id for one in Calibrations(store).of(version)] == [made.id]  # nothing has changed
    store.close()
    store = open_store(tmp_path)
    assert [one.card() for one in Calibrations(store).of(version)] == [made.card()]
    store.close()
    store = open_store(tmp_path, base="another")
    assert not store.calibrations("a")


def test_a_file_from_before_there_were_any(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store._connection.execute("DROP TABLE calibrations")
    store.close()
    assert open_store(tmp_path).calibrations("a") == ()
