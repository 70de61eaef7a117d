"""Gates with a capacity: what a token gets depends on earlier tokens of its own sequence, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loramux_kernels import AdapterPool, CountRows, SiteSpec, TokenGate
from loramux_kernels.testing import Adapter, Ints, exact, load, mixed, random_adapter, worst

from .applied import Sequenced, apply, clear, same_bits

QKV = SiteSpec("qkv", ("q", "k", "v"), 48, (64, 33, 32))
# Rows of whole cache lines: a BLAS may add in another order where a row begins elsewhere.
OUT = SiteSpec("o", ("o",), 64, (49,))
SPECS = (QKV, OUT)
# Limits that bind at once, later, and never; beside a gate without, groups, thresholds and a plain slice.
GATES: tuple[dict[str, TokenGate], ...] = (
    {
        "q": TokenGate(4, "top_k", k=2, capacity=3),
        "v": TokenGate(3, "top_k", k=1, renormalise=False, capacity=1),
        "o": TokenGate(8, "top_k", k=2, capacity=2, groups=(0b00001111, 0b11110000, 0b10000001)),
    },
    {
        "q": TokenGate(2, "top_k", k=1),
        "k": TokenGate(5, "threshold", threshold=0.2, one=True, capacity=4),
        "o": TokenGate(4, "adaptive", threshold=0.3, capacity=2),
    },
    {"k": TokenGate(4, "top_k", k=1, capacity=3, layer_norm_eps=1e-5), "o": TokenGate(3, capacity=5)},
    {"o": TokenGate(3, "top_p", p=0.6, capacity=1 << 30)},
)
RANKS = {"q": 12, "k": 7, "v": 5, "o": 16}
BACKENDS = ("cpu", "reference")
TOKENS = 64

pytestmark = pytest.mark.usefixtures("poison")


def make(backend: str = "cpu", dtype: torch.dtype = torch.float32, **changes: Any) -> AdapterPool:
    sizes: dict[str, Any] = {"slots": 6, "max_rank": 16, "max_tokens": TOKENS, "max_requests": 8}
    return AdapterPool(SPECS, capacity_bytes=2 << 20, dtype=dtype, device="cpu", backend=backend, **sizes | changes)


def adapters_of(dtype: torch.dtype, generator: torch.Generator) -> list[Adapter]:
    plain = random_adapter(SPECS, RANKS, dtype, generator)
    return [*(mixed(random_adapter(SPECS, RANKS, dtype, generator), g, generator) for g in GATES), plain]


def chunks_of(lengths: Sequence[int], cuts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Per step how many tokens of each request; `cuts` where each request's chunks end."""
    steps = max(len(cut) for cut in cuts) + 1
    ends = [[*cut, *[n] * (steps - len(cut))] for cut, n in zip(cuts, lengths, strict=True)]
    return [[e[i] - (e[i - 1] if i else 0) for e in ends] for i in range(steps)]


class Run:
    """Requests of several adapters and their inputs, and one pool to put them through."""

    def __init__(self, backend: str, dtype: torch.dtype, which: Sequence[int], lengths: Sequence[int]) -> None:
        generator = torch.Generator().manual_seed(7)
        self.adapters, self.pool = adapters_of(dtype, generator), make(backend, dtype)
        slots = [*(load(self.pool, a) for a in self.adapters), -1]
        self.slots = np.array([slots[i] for i in which], np.int32)
        self.which, self.lengths = np.array(which, np.int32), np.array(lengths, np.int32)
        self.inputs = [
            clear(spec, self.adapters, self.which, self.lengths, sum(lengths), dtype, generator) for spec in SPECS
        ]
        self.begin = np.cumsum([0, *lengths])

    def exact(self, index: int) -> Any:
        return exact(SPECS[index], self.adapters, self.which, self.lengths, *self.inputs[index])

    def steps(self, steps: Sequence[Sequence[int]], sequences: Sequenced | None = None) -> list[Tensor]:
        """Results of all requests, by site, from steps that take so many tokens of each request."""
        sequences, done = sequences or Sequenced(len(self.slots)), np.zeros(len(self.slots), int)
        results = [torch.empty_like(y) for _, y in self.inputs]
        for step in steps:
            rows = torch.from_numpy(
                np.concatenate([np.arange(b + d, b + d + n) for b, d, n in zip(self.begin, done, step, strict=False)])
            )
            lengths: Ints = np.array(step, np.int32)
            self.pool.set_batch(self.slots, lengths, sequences.step(done, lengths))
            for index, (x, y) in enumerate(self.inputs):
                results[index][rows] = apply(self.pool, index, x[rows], y[rows])
            done += lengths
        return results


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_whole_and_in_chunks_against_float64(backend: str, dtype: torch.dtype) -> None:
    run = Run(backend, dtype, [0, -1, 1, 0, 4, 2, 3], [11, 3, 9, 12, 4, 10, 8])
    whole = [run.lengths.tolist()]
    cut = chunks_of(run.lengths.tolist(), [[4, 5, 9], [1], [1, 2, 3, 8], [10], [2], [5], [7]])
    one_by_one = [[int(n > i) for n in run.lengths] for i in range(12)]
    for steps in (whole, cut, one_by_one):
        for index, got in enumerate(run.steps(steps)):
            assert worst(got, run.exact(index)) <= 1


def test_the_bound_notices_a_wrong_count() -> None:
    run = Run("cpu", torch.float32, [0, 0], [12, 12])
    want = run.exact(0)
    for wrong in (2, 4, 0):
        gates = {"q": TokenGate(4, "top_k", k=2, capacity=wrong)}
        other = {m: w._replace(gate=gates.get(m, w.gate)) for m, w in run.adapters[0].items()}
        got = exact(SPECS[0], [other], run.which, run.lengths, *run.inputs[0])
        assert worst(got.y.float(), want) > 10


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_chunks_change_no_bit(data: st.DataObject) -> None:
    """Token by token on the reference: any chunks of any requests, in any company."""
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    which = [data.draw(st.integers(-1, 4)) for _ in lengths]
    run = Run("reference", torch.float64, which, lengths)
    cuts = [sorted(data.draw(st.lists(st.integers(0, n), max_size=3))) for n in lengths]
    whole, cut = run.steps([lengths]), run.steps(chunks_of(lengths, cuts))
    for got, want in zip(cut, whole, strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_company_changes_no_answer(backend: str) -> None:
    together = Run(backend, torch.float64, [0, 0, 1, 0], [9, 6, 8, 7])
    want = together.steps([together.lengths.tolist()])
    for row in range(4):
        alone = [[int(n) if i == row else 0 for i, n in enumerate(together.lengths)]]
        rows = slice(together.begin[row], together.begin[row + 1])
        for got, reference in zip(together.steps(alone), want, strict=True):
            torch.testing.assert_close(got[rows], reference[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_request_that_begins_again_has_forgotten(backend: str) -> None:
    """Preempted after some tokens, and computed anew: rows of counts are not cleared, but not read either."""
    run, sequences = Run(backend, torch.float64, [0, 2], [9, 8]), Sequenced(2)
    want = run.steps([[9, 8]])
    run.steps([[4, 3], [2, 1]], sequences)
    for got, reference in zip(run.steps([[5, 1], [4, 7]], sequences), want, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-12, atol=1e-12)


def test_a_step_twice_with_the_same_rows_is_one_step() -> None:
    run = Run("cpu", torch.float64, [0], [9])
    rows = CountRows(np.array([-1], np.int32), np.array([1], np.int32))
    run.pool.set_batch(run.slots, run.lengths, rows)
    first = apply(run.pool, 0, *run.inputs[0])
    run.pool.set_batch(run.slots, run.lengths, rows)
    assert same_bits(apply(run.pool, 0, *run.inputs[0]), first)


def test_rows_of_counts_that_would_mix_sequences_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    pool = make()
    limited, plain = (load(pool, a) for a in adapters_of(torch.float32, generator)[::4])
    assert pool.limited(np.array([plain, -1, limited, 77], np.int32)).tolist() == [2]
    one: Ints = np.ones(2, np.int32)

    def step(slots: list[int], rows: tuple[list[int], list[int]] | None) -> None:
        counts = rows and CountRows(*(np.array(r, np.int32) for r in rows))
        pool.set_batch(np.array(slots, np.int32), one, counts)

    for slots, rows in (
        ([limited, plain], None),
        ([limited, limited], ([-1, -1], [3, 3])),
        ([limited, limited], ([-1, 2], [2, 4])),
        ([limited, plain], ([0, -1], [0, -1])),
        ([limited, plain], ([-2, -1], [0, -1])),
        ([limited, plain], ([16, -1], [0, -1])),
        ([limited, plain], ([-1, -1], [16, -1])),
        ([limited, plain], ([-1, -1], [-1, -1])),
    ):
        with pytest.raises(ValueError, match=r"rows? of counts"):
            step(slots, rows)
    step([limited, plain], ([-1, -7], [15, 99]))
    step([plain, -1], None)
    pool.release(limited)
    step([limited, plain], None)


def test_counts_are_in_the_bytes_of_those_adapters_only() -> None:
    pool, ranks = make(), {"q": 16, "o": 5}
    gates = {"q": TokenGate(8, "top_k", k=2), "o": TokenGate(3)}
    without = pool.bytes_for(ranks, gates)
    counted = {"q": TokenGate(8, "top_k", k=2, capacity=9), "o": TokenGate(3)}
    assert pool.bytes_for(ranks, counted) == without + 2 * 8 * 8 * 4
    assert make(max_requests=80).bytes_for(ranks, counted) == without + 2 * 80 * 8 * 4
