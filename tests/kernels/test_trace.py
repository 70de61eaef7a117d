"""The trace holds the logits that the gates saw, on request and nowhere else, and changes no result."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import loramux_kernels as lk
from loramux_kernels import AdapterPool, SiteSpec, TokenGate
from loramux_kernels.testing import Weights, load, mixed, random_adapter, worst_trace
from loramux_kernels.trace import TRACE_TOKENS

SPECS = (SiteSpec("qkv", ("q", "k", "v"), 48, (64, 33, 32)), SiteSpec("o", ("o",), 67, (48,)))
RANKS = ({"q": 8, "v": 3, "o": 12}, {"k": 5, "o": 4}, {"q": 6})
GATES = (
    {"q": TokenGate(4, "top_k", k=2), "v": TokenGate(3, absolute=True), "o": TokenGate(4, "top_k", k=2)},
    {"k": TokenGate(4, layer_norm_eps=1e-5), "o": TokenGate(15, "adaptive", threshold=0.1)},
    {},
)


class Step:
    """Three adapters, two of them mixtures, and one step of requests that name them."""

    def __init__(self, backend: str, lengths: list[int]) -> None:
        generator = torch.Generator().manual_seed(1)
        self.adapters: list[dict[str, Weights]] = [
            mixed(random_adapter(SPECS, ranks, torch.float32, generator), gates, generator)
            for ranks, gates in zip(RANKS, GATES, strict=True)
        ]
        self.pool = AdapterPool(
            SPECS,
            capacity_bytes=1 << 20,
            slots=5,
            max_rank=16,
            max_tokens=TRACE_TOKENS + 64,
            max_requests=8,
            dtype=torch.float32,
            device="cpu",
            backend=backend,
        )
        self.slots = [load(self.pool, adapter) for adapter in self.adapters]
        self.tokens = sum(lengths)
        rows = np.array([self.slots[i % 3] if i < 6 else -1 for i in range(len(lengths))], np.int32)
        self.pool.set_batch(rows, np.array(lengths, np.int32))
        self.x = {s.name: torch.randn(self.tokens, s.d_in, generator=generator) for s in SPECS}

    def run(self) -> list[torch.Tensor]:
        outputs = []
        for index, spec in enumerate(SPECS):
            y, site = torch.zeros(self.tokens, sum(spec.d_outs)), self.pool.site_ids[index]
            lk.expand(y, lk.shrink(self.x[spec.name], site, self.pool.h_width(index)), site)
            outputs.append(y)
        return outputs


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_logits_are_those_of_the_routers(backend: str) -> None:
    step = Step(backend, [3, 1, 4, 1, 5, 2, 2])
    step.pool.trace(True)
    step.run()
    traced = step.pool.take_trace()
    assert traced.ready
    assert worst_trace(traced, SPECS, dict(zip(step.slots, step.adapters, strict=True)), step.x) <= 1
    routed = list(traced)
    # Gates with equal rules come together; the plain adapter has none.
    assert [(r.slot, len(r.gates), len(r.rows)) for r in routed] == [
        (step.slots[0], 2, 4),
        (step.slots[0], 1, 4),
        (step.slots[1], 1, 6),
        (step.slots[1], 1, 6),
    ]


def test_rows_beyond_the_first_are_left_out() -> None:
    step = Step("cpu", [TRACE_TOKENS - 10, 15, 20])
    step.pool.trace(True)
    step.run()
    rows = {r.slot: r.rows.tolist() for r in step.pool.take_trace()}
    assert rows[step.slots[0]] == list(range(TRACE_TOKENS - 10))
    assert rows[step.slots[1]] == list(range(TRACE_TOKENS - 10, TRACE_TOKENS))
    assert worst_trace(step.pool.take_trace(), SPECS, dict(zip(step.slots, step.adapters, strict=True)), step.x) <= 1


def test_results_do_not_depend_on_it() -> None:
    step = Step("cpu", [3, 1, 4, 1, 5, 2, 2])
    without = step.run()
    step.pool.trace(True)
    for a, b in zip(without, step.run(), strict=True):
        assert torch.equal(a, b)


def test_off_means_nothing_is_kept() -> None:
    step = Step("cpu", [3, 1, 4])
    step.run()
    assert all(not r.logits.any() for r in step.pool.take_trace())


def test_a_slot_released_after_the_step_is_still_readable() -> None:
    step = Step("cpu", [3, 1, 4])
    step.pool.trace(True)
    step.run()
    traced = step.pool.take_trace()
    step.pool.release(step.slots[0])
    assert {r.slot for r in traced} == {step.slots[0], step.slots[1]}
