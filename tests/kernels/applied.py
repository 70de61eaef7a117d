"""What the tests of the ops share: both ops of a site on a copy of y, equality to the bit, whole batches in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import loramux_kernels as lk
from loramux_kernels import AdapterPool, CountRows, SiteSpec
from loramux_kernels.testing import POPULARITIES, Adapter, Ints, clear_inputs, exact, load, ragged_batch, worst

BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


def apply(pool: AdapterPool, index: int, x: Tensor, y: Tensor) -> Tensor:
    """A copy of y with the site's adapters added."""
    y = y.clone()
    lk.expand(y, lk.shrink(x, pool.site_ids[index], pool.h_width(index)), pool.site_ids[index])
    return y


def clear(
    spec: SiteSpec,
    adapters: Sequence[Adapter],
    which: Ints,
    lengths: Ints,
    rows: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    mean: float = 0,
) -> tuple[Tensor, Tensor]:
    """x of that mean without selections that hang on a rounding, as a view of wider rows, and y."""
    x = torch.empty(rows, spec.d_in + 5, dtype=dtype)[:, : spec.d_in]
    draw = lambda: (mean + torch.randn(rows, spec.d_in, generator=generator)).to(dtype)  # noqa: E731
    x.copy_(clear_inputs(spec, adapters, which, lengths, draw))
    return x, torch.randn(rows, sum(spec.d_outs), generator=generator).to(dtype)


def check_against_float64(
    pool: AdapterPool,
    specs: Sequence[SiteSpec],
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    """Batches of every popularity, long and short, with base rows and padding: each row within its bound, and these to
    the bit."""
    rng = np.random.default_rng(0)
    slots = np.array([*(load(pool, a) for a in adapters), -1], np.int32)
    for popularity in POPULARITIES:
        for requests, tokens in ((1, 1), (9, 9), (16, 41)):
            which, lengths = ragged_batch(popularity, rng=rng, requests=requests, adapters=len(adapters), tokens=tokens)
            pool.set_batch(slots[which], lengths)
            base = torch.from_numpy(np.r_[np.repeat(which, lengths), [-1, -1]] < 0)
            for index, spec in enumerate(specs):
                x, y = clear(spec, adapters, which, lengths, tokens + 2, dtype, generator)
                got = apply(pool, index, x, y)
                assert worst(got, exact(spec, adapters, which, lengths, x, y)) <= 1
                assert same_bits(got[base], y[base])


class Sequenced:
    """Rows of counts of a fixed set of requests, as an engine would keep them: request i has rows 2i and 2i + 1."""

    def __init__(self, requests: int) -> None:
        self._at = np.zeros(requests, np.int32)

    def step(self, done: Sequence[int], lengths: Ints) -> CountRows:
        """For a step in which so many tokens of each request have been `done` before; those without tokens wait."""
        own = 2 * np.arange(len(self._at), dtype=np.int32)
        read, write = own + self._at, own + 1 - self._at
        self._at ^= lengths > 0
        return CountRows(np.where(np.asarray(done) > 0, read, -1).astype(np.int32), write.astype(np.int32))
