"""Packed block-diagonal adapters in the CUDA kernels, beside plain ones and mixtures, short and long."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loramux_kernels import SiteSpec, TokenGate
from loramux_kernels.sites import BANDS_AT, lookup
from loramux_kernels.testing import banded, exact, load, mixed, random_adapter, with_outputs, worst

from ..applied import same_bits
from .driver import Emulator
from .test_kernels import DECODE, DTYPES, PADDING, PREFILL, apply, inputs, make

# The inputs come in two pieces, the second of which is shorter; three rank rows of a band are no whole block.
SPEC = SiteSpec("pair", ("q", "k"), 2560, (512, 512))
RANKS = ({"q": 6, "k": 40}, {"q": 72, "k": 4}, {"q": 12, "k": 5}, {"k": 16})
BANDS = ({"q": 2, "k": 2}, {"q": 4, "k": 4}, {}, {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [DECODE, PREFILL])
def test_against_float64(tokens: int, dtype: torch.dtype, emulator: Emulator) -> None:
    generator = torch.Generator().manual_seed(tokens)
    plain = [random_adapter((SPEC,), ranks, dtype, generator) for ranks in RANKS]
    adapters = [banded(adapter, bands) for adapter, bands in zip(plain, BANDS, strict=True)]
    adapters[1] = with_outputs(adapters[1], "k", "q", generator)
    adapters[3] = mixed(adapters[3], {"k": TokenGate(3, "top_k", k=2)}, generator)
    pool = make((SPEC,), dtype, 1 << 22)
    slots = np.array([*(load(pool, a) for a in adapters), -1], np.int32)
    site = lookup(pool.site_ids[0])
    assert [site.table[slot, BANDS_AT].item() for slot in slots[:-1]] == [2, 4, 1, 1]
    which = np.array([3, 0, -1, 1, 2, 0], np.int32)
    lengths = np.full(which.size, tokens // which.size, np.int32)
    x, y = inputs(SPEC, adapters, which, lengths, dtype, generator)
    pool.set_batch(slots[which], lengths)
    got = apply(pool, 0, x, y)
    assert worst(got, exact(SPEC, adapters, which, lengths, x, y)) <= 1
    base = torch.from_numpy(np.r_[np.repeat(which, lengths), [-1] * PADDING] < 0)
    assert same_bits(got[base], y[base])
    for blocks in (1, 3) if tokens == DECODE else (8, 24):
        emulator.blocks = blocks
        assert same_bits(apply(pool, 0, x, y), got)
