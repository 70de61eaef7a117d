"""What the worker reads of given tokens, step by step, against sums over the whole vocabulary in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from loramux.engine.scoring import Rows, Scoring

V, WIDTH, DRAWS = 50, 8, 3
HEAD = torch.randn(V, WIDTH, generator=torch.Generator().manual_seed(0))


def logits(hidden: torch.Tensor) -> torch.Tensor:
    return hidden @ HEAD.T


def scoring(rows: int = 100) -> Scoring:
    return Scoring(vocabulary=V, state_bytes=rows * V * 4, device=torch.device("cpu"))


class Sequences:
    """Hidden states of one prompt and answer under every draw."""

    def __init__(self, prompt: int = 5, answer: int = 7) -> None:
        generator = torch.Generator().manual_seed(1)
        self.first = prompt - 1
        self.hidden = torch.randn(DRAWS, prompt + answer - 1, WIDTH, generator=generator)
        self.answer = torch.randint(V, (answer,), generator=generator).tolist()
        p = torch.softmax((self.hidden[:, self.first :] @ HEAD.T).double(), -1)
        self.logp = p.log().gather(2, torch.tensor(self.answer)[None, :, None].expand(DRAWS, -1, 1)).numpy()
        self.entropy = torch.special.entr(p).sum(-1).numpy()
        self.total = torch.special.entr(p.mean(0)).sum(-1).numpy()

    def watch(self, worker: Scoring, draw: int, job: str = "job", **changes: Any) -> str:
        spec = {"job": job, "draw": draw, "draws": DRAWS, "first": self.first, "full": True}
        worker.watch(f"{job}-{draw}", spec | {"targets": [[token] for token in self.answer]} | changes)
        return f"{job}-{draw}"

    def step(self, worker: Scoring, *spans: tuple[str, int, int, int]) -> None:
        """One step with these rows: request, draw, first position, end."""
        parts, layout = [torch.zeros(2, WIDTH)], []  # somebody else's rows come first
        for request_id, draw, begin, end in spans:
            layout.append(Rows(request_id, sum(map(len, parts)), begin, end - begin))
            parts.append(self.hidden[draw, begin:end])
        worker.observe(torch.cat(parts), layout, logits)


def assert_read(report: dict[str, Any] | None, expected: Sequences) -> None:
    assert report is not None and report["error"] is None and np.all(report["seen"])
    np.testing.assert_allclose(report["logp"], expected.logp, atol=1e-5)
    np.testing.assert_allclose(report["entropy"], expected.entropy, atol=1e-5)
    np.testing.assert_allclose(report["total"], expected.total, atol=1e-5)


def test_draws_together_and_in_chunks() -> None:
    worker, sequences = scoring(), Sequences()
    a, b, c = (sequences.watch(worker, draw) for draw in range(DRAWS))
    sequences.step(worker, (b, 1, 0, 11), (a, 0, 0, 3))  # the second ends before what is read begins
    sequences.step(worker, (a, 0, 3, 7), (c, 2, 0, 6))
    sequences.step(worker, (c, 2, 6, 11), (a, 0, 7, 11))
    assert_read(worker.take("job"), sequences)


def test_rows_that_are_computed_again_count_once() -> None:
    worker, sequences = scoring(), Sequences()
    for draw in range(DRAWS):
        request = sequences.watch(worker, draw)
        sequences.step(worker, (request, draw, 0, 8))
        sequences.step(worker, (request, draw, 2, 11))
    assert_read(worker.take("job"), sequences)


def test_what_is_missing_is_said_and_can_be_read_later() -> None:
    worker, sequences = scoring(), Sequences()
    requests = [sequences.watch(worker, draw) for draw in range(DRAWS)]
    sequences.step(worker, (requests[0], 0, 6, 11), (requests[1], 1, 0, 11))
    report = worker.take("job")
    assert report is not None
    assert report["seen"] == [[False] * 2 + [True] * 5, [True] * 7, [False] * 7]
    assert np.isnan(report["entropy"]).tolist() == (~np.array(report["seen"])).tolist()
    # Of those draws that have read the token.
    p = torch.softmax((sequences.hidden[:2, 10] @ HEAD.T).double(), -1).mean(0)
    assert report["total"][-1] == pytest.approx(float(torch.special.entr(p).sum()), abs=1e-5)
    worker.forget(requests)
    assert worker.idle
    for draw in (0, 2):
        sequences.step(worker, (sequences.watch(worker, draw), draw, 0, 11))
    assert_read(worker.take("job"), sequences)


def test_more_tokens_than_are_held_at_once() -> None:
    worker, sequences = scoring(300), Sequences(3, 200)
    for draw in range(DRAWS):
        sequences.step(worker, (sequences.watch(worker, draw), draw, 0, 202))
    assert_read(worker.take("job"), sequences)


def test_only_targets() -> None:
    worker, sequences = scoring(0), Sequences()
    targets = [[1, 2, token] for token in sequences.answer]
    request = sequences.watch(worker, 1, full=False, targets=targets)
    sequences.step(worker, (request, 1, 0, 11))
    report = worker.take("job")
    assert report is not None and report["entropy"] is None and report["total"] is None and report["error"] is None
    np.testing.assert_allclose(np.array(report["logp"])[1, :, 2], sequences.logp[1, :, 0], atol=1e-5)


def test_rows_come_back_and_are_clean() -> None:
    worker, sequences = scoring(10), Sequences()
    for job in ("one", "two", "three"):
        for draw in range(DRAWS):
            sequences.step(worker, (sequences.watch(worker, draw, job), draw, 0, 11))
        assert_read(worker.take(job), sequences)
        worker.drop(job)
        worker.drop(job)
        assert worker.take(job) is None and worker.idle
    worker.drop("never")


def test_a_job_without_room_ends_with_an_error_and_the_others_go_on() -> None:
    worker, sequences = scoring(10), Sequences()
    requests = [sequences.watch(worker, draw) for draw in range(DRAWS)]
    refused = sequences.watch(worker, 0, "late")
    assert not worker.wants(refused)
    for draw, request in enumerate(requests):
        sequences.step(worker, (request, draw, 0, 11), (refused, 0, 0, 11))
    assert_read(worker.take("job"), sequences)
    late = worker.take("late")
    assert late is not None and "do not fit" in late["error"]


def test_a_step_is_never_ended_by_a_read() -> None:
    worker, sequences = scoring(), Sequences()
    bad, good = sequences.watch(worker, 0, "bad", targets=[[V + 5]] * 7), sequences.watch(worker, 0, "good")
    sequences.step(worker, (bad, 0, 0, 11), (good, 0, 0, 11))
    reports = worker.take("bad"), worker.take("good")
    assert reports[0] is not None and reports[0]["error"]
    assert reports[1] is not None and reports[1]["error"] is None and np.all(reports[1]["seen"][0])


def test_jobs_that_nobody_takes_go() -> None:
    worker, sequences = scoring(14), Sequences()
    for number in range(300):
        sequences.watch(worker, 0, f"{number}", full=number % 100 == 0)
    assert worker.take("0") is None and worker.take("299") is not None


def test_equal_draws_have_no_mutual_information() -> None:
    worker, sequences = scoring(), Sequences()
    for draw in range(DRAWS):
        sequences.step(worker, (sequences.watch(worker, draw), 0, 0, 11))
    report = worker.take("job")
    assert report is not None
    assert np.abs(np.array(report["total"]) - np.mean(report["entropy"], 0)).max() < 1e-6
