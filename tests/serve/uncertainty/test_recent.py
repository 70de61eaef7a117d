"""What is remembered of answers: enough to judge them later, never more than so much."""

from __future__ import annotations

from typing import Any

import pytest

from loramux.errors import AnswerNotFound, FeedbackConflict, InvalidRequest
from loramux.uncertainty import recent as module
from loramux.uncertainty.recent import Recent, Scored

HEAD = {"noise": "sequence", "samples": 8, "seed": 0, "partial": False}


def told(**more: Any) -> dict[str, Any]:
    return {**HEAD, "mode": "score", "nll_ln": 0.5, "tokens": [1] * 100, "raw": {}, **more}


def chosen(*labels: str) -> dict[str, Any]:
    return {**HEAD, "mode": "decide", "prediction": labels[0]}


def add(recent: Recent, id: str = "r", name: str = "a", digest: str = "d", **more: Any) -> Scored:
    one = recent.add(name, digest, told(**more), (), 0.6)
    assert one is not None
    recent.call(one, [id, f"chatcmpl-{id}"], 0)
    return one


def give(recent: Recent, id: str = "r", names: Any = ("a",), choice: int = 0, **given: Any) -> tuple[Scored, bool]:
    return recent.feedback(id, choice, names, **{"correct": None, "label": None, **given})


def test_feedback_counts_once() -> None:
    recent = Recent()
    one = add(recent)
    assert "tokens" not in one.told and "raw" not in one.told
    assert give(recent, correct=True) == (one, True)
    assert give(recent, "chatcmpl-r", correct=True) == (one, False)
    with pytest.raises(FeedbackConflict):
        give(recent, correct=False)
    assert one.right is True and recent.labelled("a", "d", one.settings) == [one]


@pytest.mark.parametrize(
    ("id", "names", "choice"), [("x", ("a",), 0), ("r", ("b",), 0), ("r", (), 0), ("r", ("a",), 1)]
)
def test_answers_that_are_not_known_or_another_tenants(id: str, names: Any, choice: int) -> None:
    recent = Recent()
    add(recent)
    with pytest.raises(AnswerNotFound):
        give(recent, id, names, choice, correct=True)


def test_nobody_takes_the_id_of_another_adapters_answer() -> None:
    """Ids are the clients' to choose."""
    recent = Recent()
    mine, theirs = add(recent), add(recent, name="b")
    assert give(recent, correct=True)[0] is mine and give(recent, names=("b",), correct=False)[0] is theirs


def test_labels() -> None:
    recent = Recent()

    def one(*labels: str) -> Scored:
        found = recent.add("a", "d", chosen(*labels), labels, 0.6)
        assert found is not None
        recent.call(found, ["r"], 0)
        return found

    right = one("x", "y")
    assert give(recent, label="x") == (right, True) and (right.right, right.label) == (True, "x")
    wrong = one("x", "y", "z")
    give(recent, label="z")
    assert (wrong.right, wrong.label) == (False, "z") and not give(recent, correct=False)[1]
    with pytest.raises(FeedbackConflict):
        give(recent, label="y")
    other = one("x", "y")
    give(recent, correct=False)
    assert other.label == "y"  # there are two
    unknown = one("x", "y", "z")
    give(recent, correct=False)
    assert unknown.label is None and unknown.right is False
    with pytest.raises(InvalidRequest):
        give(recent, label="w")


def test_what_has_no_scores_is_not_remembered() -> None:
    assert Recent().add("a", "d", told(partial=True), (), None) is None


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in {"NAMED": 10, "VERSIONS": 3}.items():
        monkeypatch.setattr(module, name, most)
    recent = Recent()
    for i in range(1000):
        add(recent, f"r{i}", digest=str(i % 2))
        give(recent, f"r{i}", correct=True)
    for i in range(20):
        add(recent, "x", name=f"n{i}")
    assert len(recent._named) == 10 and len(recent._windows) == 3
    recent = Recent()
    for i in range(module.LABELLED + 300):
        add(recent, f"r{i}")
        give(recent, f"r{i}", correct=True)
    ((_, _, window),) = recent.windows()
    assert (len(window.last), len(window.labelled)) == (module.WINDOW, module.LABELLED)
    with pytest.raises(AnswerNotFound):
        give(recent, "r0", correct=True)


def test_the_version_that_was_scored_last_is_shown() -> None:
    recent = Recent()
    for digest in ("old", "new", "old"):
        add(recent, digest=digest)
    assert [(name, digest, len(window.last)) for name, digest, window in recent.windows()] == [("a", "old", 2)]
