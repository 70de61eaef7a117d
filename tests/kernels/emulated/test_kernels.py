"""The CUDA kernels on the CPU, unchanged: against float64, and by bits where nothing may change them.

Every launch runs its threads in another order, on memory that ends at the edge, with shared memory and scratch full of
NaN; machine.hpp tells what fails there.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from loramux_kernels import MAX_EXPERTS, AdapterPool, SiteSpec, TokenGate
from loramux_kernels.cuda.scratch import Scratch, scratch
from loramux_kernels.ops.shrink import PLANE_ROWS
from loramux_kernels.plan import SMALL_STEP
from loramux_kernels.sites import Site, lookup
from loramux_kernels.testing import (
    Ints,
    Weights,
    adapter_of,
    clear_inputs,
    exact,
    load,
    mixed,
    ragged_batch,
    random_adapter,
    worst,
    worst_trace,
)

from ..applied import same_bits
from . import guarded
from .driver import Emulator

# No size is a multiple of what a warp takes at a time; the inputs of LONG come in two pieces.
QKV = SiteSpec("qkv", ("q", "k", "v"), 72, (136, 40, 8))
LONG = SiteSpec("long", ("o",), 2056, (72,))
SPECS = (QKV, LONG)
RANKS = (
    {"q": 1, "k": 4, "v": 8, "o": 12},
    {"q": 24, "o": 64},
    {"k": 256, "v": 1},
    {"q": 128, "k": 12, "v": 64, "o": 4},
    {"q": 64, "k": 33, "v": 24, "o": 40},
)
# Modules with a mag and with a bias, of the same adapters; "k" of the second has no rank.
OUTPUTS = (("qo", "v"), ("k", "ko"), ("", ""), ("kv", "q"), ("q", ""))
PLAIN: tuple[dict[str, TokenGate], ...] = ({}, {}, {}, {}, {})
MIXED: tuple[dict[str, TokenGate], ...] = (
    {"k": TokenGate(1), "v": TokenGate(3, "top_k", k=2, renormalise=False), "o": TokenGate(16, "top_p", p=0.7)},
    {},
    {"k": TokenGate(16, "top_k", k=3, temperature=0.5)},
    {
        "q": TokenGate(8, "top_k", k=2),
        "k": TokenGate(4, "top_k", k=2, eps=1e-6, layer_norm_eps=1e-5),
        "v": TokenGate(6, "threshold", threshold=0.22),
        "o": TokenGate(3, "threshold", threshold=1.5),
    },
    {
        "q": TokenGate(5, "top_k", k=3, absolute=True, one=True),
        "k": TokenGate(7, eps=1e-3, groups=(0b1000001, 0b0111110, 0b1111111)),
        "o": TokenGate(15, "adaptive", threshold=0.07, bias=0.5, layer_norm_eps=1e-5),
    },
)
DTYPES = (torch.bfloat16, torch.float16)
DECODE, PREFILL = 41, SMALL_STEP + 14
PADDING, BESIDE = 3, 16
"""Rows behind a step's tokens; columns beside x and y, as fused layers have them."""
pytestmark = pytest.mark.usefixtures("emulator")


def make(
    specs: tuple[SiteSpec, ...] = SPECS, dtype: torch.dtype = torch.bfloat16, capacity_bytes: int = 1 << 21
) -> AdapterPool:
    with guarded.Guarded():
        pool = AdapterPool(
            specs,
            capacity_bytes=capacity_bytes,
            slots=7,
            max_rank=256,
            max_tokens=512,
            max_requests=24,
            dtype=dtype,
            device="cpu",
            backend="cuda",
        )
        pool.warmup()
    return pool


def adapters_of(
    gates: tuple[dict[str, TokenGate], ...], dtype: torch.dtype, generator: torch.Generator
) -> list[dict[str, Weights]]:
    kinds = zip(RANKS, gates, OUTPUTS, strict=True)
    return [adapter_of(SPECS, ranks, rules, *both, dtype, generator) for ranks, rules, both in kinds]


def room(site: Site) -> Scratch:
    return scratch(site.plan, site.weights.device)


def apply(pool: AdapterPool, index: int, x: Tensor, y: Tensor) -> Tensor:
    """A copy of y with the site's adapters added, whose surroundings are checked."""
    site, (tokens, width) = lookup(pool.site_ids[index]), y.shape
    given, out = (guarded.empty((tokens, t.shape[1] + BESIDE), t.dtype)[:, : t.shape[1]] for t in (x, y))
    given.copy_(x)
    out.copy_(y)
    h = guarded.empty((tokens + PLANE_ROWS, site.width), torch.float32)
    for left in (room(site).handoff, room(site).left):
        left.fill_(255)
    site.backend.shrink(site, given, h)
    site.backend.expand(site, out, h)
    assert same_bits(given, x)
    beside = out.as_strided((tokens, BESIDE), out.stride(), width)
    assert beside.isnan().all()
    assert not room(site).finished.any()
    return out.clone()


def inputs(
    spec: SiteSpec,
    adapters: list[dict[str, Weights]],
    which: Ints,
    lengths: Ints,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    mean: float = 0,
) -> tuple[Tensor, Tensor]:
    """x of that mean without selections that hang on a rounding, and y, with padding."""
    rows = int(lengths.sum()) + PADDING
    draw = lambda: (mean + torch.randn(rows, spec.d_in, generator=generator)).to(dtype)  # noqa: E731
    x = clear_inputs(spec, adapters, which, lengths, draw)
    return x, torch.randn(rows, sum(spec.d_outs), generator=generator).to(dtype)


@pytest.mark.parametrize("gates", [PLAIN, MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("popularity", "tokens"),
    [("identical", 1), ("identical", 100), ("uniform", DECODE), ("zipf", DECODE), ("distinct", PREFILL)],
)
def test_against_float64(
    dtype: torch.dtype, gates: tuple[dict[str, TokenGate], ...], popularity: str, tokens: int
) -> None:
    generator, rng = torch.Generator().manual_seed(tokens), np.random.default_rng(tokens)
    adapters = adapters_of(gates, dtype, generator)
    roomy = make(dtype=dtype)
    for adapter in (adapters[0], *adapters):
        load(roomy, adapter)
    # The last adapter ends where memory does.
    pool = make(dtype=dtype, capacity_bytes=roomy.used_bytes)
    hole = load(pool, adapters[0])
    slots = np.array([*(load(pool, a) for a in adapters), -1], np.int32)
    pool.release(hole)
    which, lengths = ragged_batch(
        popularity,
        rng=rng,
        requests=min(tokens, 24),
        adapters=len(adapters),
        tokens=tokens,
        base_share=0.2 if tokens > 1 else 0.0,
    )
    pool.set_batch(slots[which], lengths)
    pool.trace(True)
    base = torch.from_numpy(np.r_[np.repeat(which, lengths), [-1] * PADDING] < 0)
    given = {}
    for index, spec in enumerate(SPECS):
        x, y = inputs(spec, adapters, which, lengths, dtype, generator)
        given[spec.name] = x
        got = apply(pool, index, x, y)
        assert worst(got, exact(spec, adapters, which, lengths, x, y)) <= 1
        assert same_bits(got[base], y[base])
    by_slot = dict(zip(slots.tolist(), adapters, strict=False))
    assert worst_trace(pool.take_trace(), SPECS, by_slot, given) <= 1


@pytest.mark.parametrize("tokens", [DECODE, PREFILL])
def test_a_row_has_its_bits_whatever_else_is_in_the_step_and_whoever_runs_first(
    tokens: int, emulator: Emulator
) -> None:
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
    adapters = adapters_of(MIXED, torch.bfloat16, generator)
    pool = make()
    slots = np.array([*(load(pool, a) for a in adapters), -1], np.int32)
    # Every adapter, twice the last one, and a base row among them; then each alone, in other rows.
    which = np.array([4, 0, -1, 1, 2, 3, 4], np.int32)
    lengths = np.full(which.size, tokens // which.size, np.int32)
    of_token = np.repeat(which, lengths)
    for index, spec in enumerate(SPECS):
        x, y = inputs(spec, adapters, which, lengths, torch.bfloat16, generator)
        pool.set_batch(slots[which], lengths)
        want = apply(pool, index, x, y)
        assert worst(want, exact(spec, adapters, which, lengths, x, y)) <= 1
        # Also with fewer blocks, or clusters of eight, than there are tiles.
        for blocks in (None, 1, 3) if tokens == DECODE else (None, 8, 24):
            emulator.blocks = blocks
            assert same_bits(apply(pool, index, x, y), want)
        emulator.blocks = None
        for adapter in range(len(adapters)):
            rows = torch.from_numpy(rng.permutation(np.flatnonzero(of_token == adapter)))
            # Padded to the other step's length: what a step's length decides is the kernel, and never the sums.
            padded = torch.cat([rows, torch.zeros(len(x) - len(rows), dtype=torch.int64)])
            pool.set_batch(slots[[adapter]], np.array([len(rows)], np.int32))
            assert same_bits(apply(pool, index, x[padded], y[padded])[: len(rows)], want[rows])


@pytest.mark.parametrize("tokens", [DECODE, PREFILL])
def test_b_may_be_that_of_another_slot(tokens: int) -> None:
    pool, generator = make(), torch.Generator().manual_seed(3)
    mean = adapters_of(MIXED, torch.bfloat16, generator)[4]
    draw = {m: w._replace(a=w.a.flip(1)) for m, w in mean.items()}
    lender = load(pool, mean)
    slots = [load(pool, draw, "qo", lender), load(pool, draw)]
    pool.release(lender)
    for index, spec in enumerate(SPECS):
        x, y = inputs(spec, [draw], np.array([0], np.int32), np.array([tokens], np.int32), torch.bfloat16, generator)
        borrowed, own = (_of_one(pool, slot, tokens, index, x, y) for slot in slots)
        assert same_bits(borrowed, own) and not same_bits(own, y)


def _of_one(pool: AdapterPool, slot: int, tokens: int, index: int, x: Tensor, y: Tensor) -> Tensor:
    pool.set_batch(np.array([slot], np.int32), np.array([tokens], np.int32))
    return apply(pool, index, x, y)


@pytest.mark.parametrize("tokens", [5, SMALL_STEP, PREFILL])
def test_a_step_without_adapters_changes_nothing(tokens: int, emulator: Emulator) -> None:
    """As when a captured graph is replayed: the kernels run, over an empty plan, also after one that was not."""
    pool, generator = make(), torch.Generator().manual_seed(2)
    slot = load(pool, random_adapter(SPECS, RANKS[0], torch.bfloat16, generator))
    x, y = torch.randn(tokens, QKV.d_in).bfloat16(), torch.randn(tokens, sum(QKV.d_outs)).bfloat16()
    pool.set_batch(np.array([slot], np.int32), np.array([tokens], np.int32))
    assert not same_bits(apply(pool, 0, x, y), y)
    pool.set_idle(True)
    emulator.launches.clear()
    assert same_bits(apply(pool, 0, x, y), y)
    assert emulator.launches == ["shrink_bfloat16", "expand_bfloat16"]


@pytest.mark.parametrize("tokens", [20, PREFILL])
def test_as_many_slices_rank_rows_and_experts_as_there_can_be(tokens: int) -> None:
    spec = SiteSpec("full", ("a", "b", "c", "d"), 40, (72, 8, 24, 16))
    generator = torch.Generator().manual_seed(3)
    rules = {
        "a": TokenGate(MAX_EXPERTS, "top_k", k=2),
        "b": TokenGate(MAX_EXPERTS, "top_p", p=0.5),
        "c": TokenGate(MAX_EXPERTS, "threshold", threshold=0.1),
        "d": TokenGate(MAX_EXPERTS),
    }
    adapter = mixed(random_adapter((spec,), dict.fromkeys("abcd", 256), torch.bfloat16, generator), rules, generator)
    pool = make((spec,))
    which, lengths = np.array([0], np.int32), np.array([tokens], np.int32)
    pool.set_batch(np.array([load(pool, adapter)], np.int32), lengths)
    x, y = inputs(spec, [adapter], which, lengths, torch.bfloat16, generator)
    assert worst(apply(pool, 0, x, y), exact(spec, [adapter], which, lengths, x, y)) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [DECODE, PREFILL])
def test_routers_that_read_layer_norm_where_the_mean_is_large(
    tokens: int, dtype: torch.dtype, emulator: Emulator
) -> None:
    """In any number of blocks: who takes the mean and the variance of a token depends on it, what they are does not."""
    generator, rng = torch.Generator().manual_seed(tokens), np.random.default_rng(tokens)
    gates = (
        {"q": TokenGate(8, "top_k", k=2, layer_norm_eps=1e-5), "v": TokenGate(3, layer_norm_eps=0.3)},
        {"o": TokenGate(16, "top_k", k=3, layer_norm_eps=1e-5)},
    )
    adapters = [
        adapter_of(SPECS, ranks, rules, "", "", dtype, generator)
        for ranks, rules in zip((RANKS[3], RANKS[1]), gates, strict=True)
    ]
    pool = make(dtype=dtype)
    slots = np.array([*(load(pool, a) for a in adapters), -1], np.int32)
    which, lengths = ragged_batch("uniform", rng=rng, requests=9, adapters=2, tokens=tokens)
    pool.set_batch(slots[which], lengths)
    base = torch.from_numpy(np.r_[np.repeat(which, lengths), [-1] * PADDING] < 0)
    for index, spec in enumerate(SPECS):
        x, y = inputs(spec, adapters, which, lengths, dtype, generator, mean=20.0)
        got = apply(pool, index, x, y)
        assert worst(got, exact(spec, adapters, which, lengths, x, y)) <= 1
        assert same_bits(got[base], y[base])
        for blocks in (1, 3) if tokens == DECODE else (8, 24):
            emulator.blocks = blocks
            assert same_bits(apply(pool, index, x, y), got)
        emulator.blocks = None


@pytest.mark.parametrize("experts", range(1, MAX_EXPERTS + 1))
def test_every_number_of_experts(experts: int) -> None:
    spec, generator = SiteSpec("o", ("o",), 40, (72,)), torch.Generator().manual_seed(experts)
    plain = random_adapter((spec,), {"o": 40}, torch.float16, generator)
    rules = (
        TokenGate(experts, "top_k", k=min(experts, 2)),
        TokenGate(experts, "top_p", p=0.7, renormalise=False),
        TokenGate(experts, "threshold", threshold=0.9 / experts, one=True),
        TokenGate(experts, absolute=True, temperature=0.7),
        TokenGate(min(experts, MAX_EXPERTS - 1), "adaptive", threshold=0.5 / experts),
    )
    adapters = [mixed(plain, {"o": rule}, generator) for rule in rules]
    pool = make((spec,), torch.float16)
    slots = np.array([load(pool, adapter) for adapter in adapters], np.int32)
    which, lengths = np.arange(5, dtype=np.int32), np.array([3, 1, 2, 9, 2], np.int32)
    pool.set_batch(slots, lengths)
    x, y = inputs(spec, adapters, which, lengths, torch.float16, generator)
    assert worst(apply(pool, 0, x, y), exact(spec, adapters, which, lengths, x, y)) <= 1


@pytest.mark.parametrize(
    "rule",
    [
        TokenGate(8, "top_k", k=2),
        TokenGate(8, "top_p", p=0.5),
        TokenGate(10, "threshold", threshold=0.1),
        TokenGate(4, "threshold", threshold=2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [5, PREFILL])
def test_equal_scores(rule: TokenGate, tokens: int) -> None:
    """Selections that hang on equal scores exactly: the lowest experts, all that reach a threshold, none."""
    spec, generator = SiteSpec("o", ("o",), 40, (72,)), torch.Generator().manual_seed(0)
    w = mixed(random_adapter((spec,), {"o": 40}, torch.bfloat16, generator), {"o": rule}, generator)["o"]
    adapter = {"o": w._replace(router=torch.zeros(rule.experts, spec.d_in).bfloat16())}
    pool = make((spec,))
    which, lengths = np.array([0], np.int32), np.array([tokens], np.int32)
    pool.set_batch(np.array([load(pool, adapter)], np.int32), lengths)
    x = torch.randn(tokens, spec.d_in, generator=generator).bfloat16()
    y = torch.randn(tokens, 72, generator=generator).bfloat16()
    assert worst(apply(pool, 0, x, y), exact(spec, [adapter], which, lengths, x, y)) <= 1
