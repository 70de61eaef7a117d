"""Gates with a capacity in the CUDA kernels: sequences cut anywhere, over tiles and steps, short and long."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loramux_kernels import SiteSpec, TokenGate
from loramux_kernels.plan import SMALL_STEP
from loramux_kernels.testing import Ints, exact, load, mixed, random_adapter, worst

from ..applied import Sequenced, same_bits
from .driver import Emulator
from .test_kernels import PADDING, apply, inputs, make

SPEC = SiteSpec("pair", ("q", "k"), 40, (72, 24))
GATES = (
    {
        "q": TokenGate(4, "top_k", k=2, capacity=9),
        "k": TokenGate(7, "threshold", threshold=0.15, one=True, capacity=30, groups=(0b0011011, 0b1111111)),
    },
    {"k": TokenGate(16, "top_k", k=5, capacity=40, layer_norm_eps=1e-5)},
    {"q": TokenGate(3, "adaptive", threshold=0.3), "k": TokenGate(1, capacity=17)},
    {},
)
WHICH: Ints = np.array([0, 1, -1, 0, 2, 3, 0], np.int32)
LENGTHS = [60, 23, 5, 33, 40, 9, 100]
# One long step; tiles of 16 that sequences share and go on over; and some of each.
STEPS = {
    "whole": [LENGTHS],
    "short": [[40, 20, 5, 1, 30, 2, 18], [0, 1, 0, 30, 8, 7, 70], [19, 1, 0, 0, 1, 0, 11], [1, 1, 0, 2, 1, 0, 1]],
    "both": [[59, 23, 5, 33, 39, 9, 99], [1, 0, 0, 0, 1, 0, 1]],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_against_float64(steps: list[list[int]], dtype: torch.dtype, emulator: Emulator) -> None:
    """Also with fewer blocks than tiles, and the same bits then."""
    assert sum(LENGTHS) > SMALL_STEP and np.sum(steps, 0).tolist() == LENGTHS
    generator = torch.Generator().manual_seed(4)
    adapters = [
        mixed(random_adapter((SPEC,), {"q": 12, "k": 40}, dtype, generator), gates, generator) for gates in GATES
    ]
    pool = make((SPEC,), dtype)
    slots = np.array([*(load(pool, a) for a in adapters), -1], np.int32)
    lengths: Ints = np.array(LENGTHS, np.int32)
    x, y = inputs(SPEC, adapters, WHICH, lengths, dtype, generator)
    want = exact(SPEC, adapters, WHICH, lengths, x, y)
    begin = np.cumsum([0, *LENGTHS[:-1]])
    results = []
    for blocks in (None, 8):
        emulator.blocks = blocks
        got, sequences, done = y.clone(), Sequenced(len(WHICH)), np.zeros(len(WHICH), int)
        for step in steps:
            rows = np.concatenate([np.arange(b + d, b + d + n) for b, d, n in zip(begin, done, step, strict=True)])
            padded = torch.from_numpy(np.r_[rows, np.arange(len(x) - PADDING, len(x))])
            taken: Ints = np.array(step, np.int32)
            pool.set_batch(slots[WHICH], taken, sequences.step(done, taken))
            got[padded] = apply(pool, 0, x[padded], y[padded])
            done += taken
        assert worst(got, want) <= 1
        results.append(got)
    assert same_bits(*results)
    base = np.repeat(WHICH, lengths) < 0
    assert same_bits(results[0][: len(base)][base], y[: len(base)][base])
