"""Entropies of the tokens of an answer, step by step as an engine schedules them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loramux.engine.entropies import Entropies

V = 40


class Steps:
    """An engine's steps over rows of random logits; remembers what the entropies are."""

    def __init__(self) -> None:
        self.worker = Entropies()
        self.logits = torch.zeros(0, V)
        self.compute = self.worker.wrapped(lambda hidden: self.logits)
        self.computed: dict[str, int] = {}
        self.generator = torch.Generator().manual_seed(0)

    def step(self, scheduled: dict[str, int], new: tuple[str, ...] = (), rows: int | None = None) -> list[float]:
        """Returns the entropy of every row, in the order of `scheduled`."""
        self.computed |= dict.fromkeys(new, 0)
        ids = [request_id for request_id in scheduled if request_id not in new]
        scheduler_output: Any = SimpleNamespace(
            scheduled_new_reqs=[SimpleNamespace(req_id=i, num_computed_tokens=self.computed[i]) for i in new],
            scheduled_cached_reqs=SimpleNamespace(req_ids=ids, num_computed_tokens=[self.computed[i] for i in ids]),
            num_scheduled_tokens=scheduled,
        )
        self.worker.plan(scheduler_output)
        self.worker.order(list(scheduled))
        self.logits = torch.randn(rows or len(scheduled), V, generator=self.generator) * 3
        assert self.compute("hidden") is self.logits
        expected = torch.special.entr(torch.softmax(self.logits.double(), -1)).sum(-1).tolist()
        self.logits = torch.zeros(1, V)
        self.compute("hidden")  # prompt log-probabilities: not what is sampled from
        for request_id, count in scheduled.items():
            self.computed[request_id] += count
        return expected


def test_prompt_in_chunks_then_tokens_beside_others() -> None:
    steps = Steps()
    steps.worker.watch("x", "tag", 10)
    steps.step({"other": 3, "x": 6}, new=("other", "x"))
    found = [steps.step({"x": 4, "other": 1})[0]]
    found += [steps.step({"other": 1, "x": 1})[1] for _ in range(3)]
    steps.worker.forget(["x"])
    steps.step({"other": 1})
    assert steps.worker.take("tag") == pytest.approx(found, abs=1e-5)
    assert steps.worker.take("tag") == []  # once


def test_a_request_that_is_computed_again() -> None:
    """After a preemption the tokens so far are prompt: the last row is the next token's."""
    steps = Steps()
    steps.worker.watch("x", "tag", 4)
    found = steps.step({"x": 4}, new=("x",)) + steps.step({"x": 1})
    steps.worker.watch("x", "tag", 4)
    found += steps.step({"x": 6}, new=("x",))
    assert steps.worker.take("tag") == pytest.approx(found, abs=1e-5)


def test_a_token_that_was_not_read_is_none() -> None:
    steps = Steps()
    steps.worker.watch("x", "tag", 4)
    steps.step({"x": 4}, new=("x",), rows=3)  # speculative decoding: rows are not requests
    steps.step({"x": 1})
    found = steps.worker.take("tag")
    assert found[0] is None and found[1] is not None


def test_a_step_that_was_not_planned_is_not_read() -> None:
    steps = Steps()
    steps.worker.watch("x", "tag", 4)
    found = steps.step({"x": 4}, new=("x",))
    steps.worker.order(["x"])
    steps.logits = torch.randn(1, V)
    steps.compute("hidden")
    assert steps.worker.take("tag") == pytest.approx(found, abs=1e-5)


def test_a_step_goes_on_without_its_entropies(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps()
    steps.worker.watch("x", "tag", 4)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "log_softmax", lambda *_, **__: 1 / 0)  # as if the device had no memory left
        steps.step({"x": 4}, new=("x",))  # which takes the logits as they are
    found = steps.step({"x": 1})
    assert steps.worker.take("tag") == [None, pytest.approx(found[0], abs=1e-5)]


def test_zeros_have_no_entropy() -> None:
    steps = Steps()
    steps.worker.watch("x", "tag", 1)
    steps.worker.plan(
        SimpleNamespace(
            scheduled_new_reqs=[SimpleNamespace(req_id="x", num_computed_tokens=0)],
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
            num_scheduled_tokens={"x": 1},
        )
    )
    steps.worker.order(["x"])
    steps.logits = torch.full((1, V), -torch.inf)
    steps.logits[0, 3] = 5.0
    steps.compute("hidden")
    assert steps.worker.take("tag") == [0.0]


def test_many_requests_that_nobody_asks_about() -> None:
    worker = Entropies()
    for number in range(5000):
        worker.watch(f"{number}", f"{number}", 1)
    assert len(worker._found) == 4096
    worker.forget([f"{number}" for number in range(5000)])
    assert not worker._tags and worker.take("0") == []
