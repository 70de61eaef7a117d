"""What the worker counts of routing, on a real pool: against gates worked out from the inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loramux.engine.routing import RoutingMonitor
from loramux_kernels import AdapterPool, SiteSpec, TokenGate, expand, shrink
from loramux_kernels.testing import Weights, exact_gates, load, mixed, random_adapter

SPECS = (SiteSpec("qk", ("q", "k"), 32, (16, 24)), SiteSpec("o", ("o",), 48, (32,)))
GATES = {"q": TokenGate(4, "top_k", k=2), "o": TokenGate(3, "adaptive", threshold=0.5, layer_norm_eps=1e-5)}
MIXTURE_ID, PLAIN_ID = 11, 12


class Worker:
    """The pool, its monitor, and steps as an engine makes them."""

    def __init__(self, sample_s: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        ranks = {"q": 8, "k": 4, "o": 6}
        self.mixture: dict[str, Weights] = mixed(
            random_adapter(SPECS, ranks, torch.float32, generator), GATES, generator
        )
        self.pool = AdapterPool(
            SPECS,
            capacity_bytes=1 << 20,
            slots=4,
            max_rank=16,
            max_tokens=64,
            max_requests=8,
            dtype=torch.float32,
            device="cpu",
        )
        self.plain_slot = load(self.pool, random_adapter(SPECS, ranks, torch.float32, generator))
        self.slot = load(self.pool, self.mixture)
        self.monitor = RoutingMonitor(self.pool, sample_s=sample_s)
        self.monitor.add_mixture(self.slot, MIXTURE_ID)
        self._generator = generator

    def step(self, rows: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
        """Run requests, id -> (slot, tokens); returns the inputs by site."""
        slots = np.array([slot for slot, _ in rows.values()], np.int32)
        lengths = np.array([tokens for _, tokens in rows.values()], np.int32)
        self.pool.set_batch(slots, lengths)
        self.monitor.before(slots, lengths, list(rows))
        inputs = {}
        for index, spec in enumerate(SPECS):
            x = torch.randn(int(lengths.sum()), spec.d_in, generator=self._generator)
            site = self.pool.site_ids[index]
            expand(torch.zeros(len(x), sum(spec.d_outs)), shrink(x, site, self.pool.h_width(index)), site)
            inputs[spec.name] = x
        self.monitor.after()
        return inputs

    @staticmethod
    def read(module: str, x: torch.Tensor) -> torch.Tensor:
        """What the module's router reads, x or its LayerNorm."""
        eps = GATES[module].layer_norm_eps
        return x if eps is None else torch.nn.functional.layer_norm(x, x.shape[1:], eps=eps)

    def gates(self, inputs: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
        """g_TE of each router for those tokens, in float64."""
        found = {}
        for module, site in (("q", "qk"), ("o", "o")):
            router = self.mixture[module].router
            assert router is not None
            x = self.read(module, inputs[site][rows].double())
            found[module] = exact_gates(GATES[module], x @ router.double().T).g
        return found


@pytest.fixture
def worker() -> Worker:
    return Worker()


def _check(found: dict[str, object] | None, gates: dict[str, torch.Tensor]) -> None:
    assert found is not None
    selected, weight = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for g in gates.values():
        selected[: g.shape[1]] += (g > 0).sum(0)
        weight[: g.shape[1]] += (g / g.sum(1, keepdim=True)).nan_to_num(0).sum(0)
    tokens = len(gates["q"])
    assert (found["tokens"], found["decisions"]) == (tokens, 2 * tokens)
    assert found["selected"] == selected.tolist()
    torch.testing.assert_close(torch.tensor(found["weight"], dtype=torch.float64), weight, rtol=1e-5, atol=1e-6)


def test_a_sampled_step_counts_the_mixtures_tokens_and_no_others(worker: Worker) -> None:
    inputs = worker.step({"a": (worker.plain_slot, 3), "b": (worker.slot, 5), "c": (-1, 2)})
    sums = worker.monitor.take_sums()
    assert list(sums) == [MIXTURE_ID]
    _check(sums[MIXTURE_ID], worker.gates(inputs, slice(3, 8)))
    assert worker.monitor.take_sums() == {}


def test_entropy_is_that_of_the_softmax(worker: Worker) -> None:
    inputs = worker.step({"b": (worker.slot, 6)})
    expected = 0.0
    for module, site in (("q", "qk"), ("o", "o")):
        router = worker.mixture[module].router
        assert router is not None
        # The threshold's own logit is no expert's.
        x = worker.read(module, inputs[site].double())
        p = torch.softmax(x @ router[: GATES[module].experts].double().T, 1)
        expected += float(-(p * p.log()).sum())
    assert worker.monitor.take_sums()[MIXTURE_ID]["entropy"] == pytest.approx(expected, rel=1e-5)


def test_a_request_that_asks_is_counted_in_every_step_and_alone() -> None:
    worker = Worker(sample_s=1e9)
    worker.step({"x": (worker.slot, 2)})  # the one sampled step
    worker.monitor.watch("b", "tag")
    parts = []
    for _ in range(3):
        inputs = worker.step({"a": (worker.slot, 2), "b": (worker.slot, 4), "c": (worker.plain_slot, 1)})
        parts.append(worker.gates(inputs, slice(2, 6)))
    _check(worker.monitor.take_report("tag"), {m: torch.cat([part[m] for part in parts]) for m in GATES})
    assert worker.monitor.take_report("tag") is None
    # What was traced on request is not a sample: metrics would weigh such requests more than others.
    assert worker.monitor.take_sums()[MIXTURE_ID]["tokens"] == 2


def test_a_report_outlives_its_request(worker: Worker) -> None:
    worker.monitor.watch("b", "tag")
    inputs = worker.step({"b": (worker.slot, 4)})
    worker.monitor.forget(["b", "unknown"])
    worker.step({"b": (worker.slot, 4)})  # another request, which may have the same id later
    _check(worker.monitor.take_report("tag"), worker.gates(inputs, slice(0, 4)))


def test_choices_of_one_request_share_its_report(worker: Worker) -> None:
    worker.monitor.watch("0_b", "tag")
    worker.monitor.watch("1_b", "tag")
    inputs = worker.step({"0_b": (worker.slot, 2), "1_b": (worker.slot, 3)})
    _check(worker.monitor.take_report("tag"), worker.gates(inputs, slice(0, 5)))


def test_steps_without_mixtures_are_not_traced(worker: Worker) -> None:
    worker.monitor.watch("a", "tag")
    worker.step({"a": (worker.plain_slot, 2), "b": (-1, 1)})
    assert worker.monitor.take_sums() == {}
    report = worker.monitor.take_report("tag")
    assert report is not None and report["decisions"] == 0


def test_an_unloaded_mixture_is_forgotten(worker: Worker) -> None:
    worker.monitor.remove_slot(worker.slot)
    worker.step({"b": (worker.slot, 2)})
    assert worker.monitor.take_sums() == {}


def test_reports_that_nobody_fetches_are_bounded(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux.engine.routing._MAX_REPORTS", 4)
    for i in range(9):
        worker.monitor.watch(f"r{i}", f"tag{i}")
    assert worker.monitor.take_report("tag4") is None
    assert worker.monitor.take_report("tag5") is not None
