"""Mixtures of experts through shrink and expand, on the CPU and the reference, against float64 expert by expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import loramux_kernels as lk
from loramux_kernels import MAX_EXPERTS, AdapterPool, SiteSpec, TokenGate
from loramux_kernels.sites import MOMENT_COLUMNS, lookup
from loramux_kernels.testing import (
    Weights,
    exact,
    load,
    mixed,
    ragged_batch,
    random_adapter,
    worst,
)

from .applied import apply, check_against_float64, clear, same_bits

QKV = SiteSpec("qkv", ("q", "k", "v"), 96, (160, 33, 32))
ODD = SiteSpec("odd", ("o",), 259, (129,))
SPECS = (QKV, ODD)
# Gates differ per slice and per site; the second adapter has plain modules beside mixtures, the third is plain.
ADAPTERS: tuple[tuple[Mapping[str, int], Mapping[str, TokenGate]], ...] = (
    (
        {"q": 16, "k": 40, "v": 3, "o": 33},
        {
            "q": TokenGate(8, "top_k", k=2),
            "k": TokenGate(16, "top_p", p=0.6, temperature=0.5),
            "v": TokenGate(1),
            "o": TokenGate(5, "threshold", threshold=0.21, renormalise=False),
        },
    ),
    (
        {"q": 7, "k": 5, "v": 64, "o": 12},
        {"v": TokenGate(3, "top_k", k=1, renormalise=False, absolute=True), "o": TokenGate(4, "top_k", k=2, one=True)},
    ),
    ({"q": 24, "v": 8, "o": 64}, {}),
    ({"k": 64, "o": 64}, {"k": TokenGate(2, eps=1e-6), "o": TokenGate(16, "top_k", k=5, temperature=2.0)}),
    ({"o": 9}, {"o": TokenGate(7, "threshold", threshold=0.15, absolute=True)}),
    # A threshold per token: a row of the router more.
    (
        {"q": 30, "k": 7, "o": 20},
        {
            "q": TokenGate(15, "adaptive", threshold=1 / 15, bias=-0.5),
            "k": TokenGate(1, "adaptive", threshold=0.9),
            "o": TokenGate(4, "adaptive", threshold=0.6, renormalise=False, groups=(0b0011, 0b0110, 0b1000)),
        },
    ),
    # Experts that share rows, in as many groups as there may be, with members in several or none.
    (
        {"q": 20, "v": 6, "o": 30},
        {
            "q": TokenGate(8, "top_k", k=2, groups=(0b00010011, 0b11101100)),
            "v": TokenGate(16, "top_k", k=3, groups=tuple(1 << e | 1 << (e + 5) % 16 for e in range(16))),
            "o": TokenGate(3, groups=(0b111, 0b100)),
        },
    ),
    # Routers that read LayerNorm(x), beside one that reads x.
    (
        {"q": 12, "k": 9, "v": 8, "o": 24},
        {
            "q": TokenGate(6, "top_k", k=2, eps=1e-6, layer_norm_eps=1e-5),
            "k": TokenGate(3, "adaptive", threshold=0.4, layer_norm_eps=0.5),
            "v": TokenGate(4, "top_k", k=2),
            "o": TokenGate(16, "top_k", k=3, layer_norm_eps=1e-5, absolute=True, groups=(0x00FF, 0xFF00)),
        },
    ),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
BACKENDS = ("cpu", "reference")


pytestmark = pytest.mark.usefixtures("poison")


def make(
    dtype: torch.dtype = torch.float32,
    backend: str = "cpu",
    specs: tuple[SiteSpec, ...] = SPECS,
    max_rank: int = 64,
) -> AdapterPool:
    return AdapterPool(
        specs,
        capacity_bytes=24 << 20,
        slots=10,
        max_rank=max_rank,
        max_tokens=80,
        max_requests=16,
        dtype=dtype,
        device="cpu",
        backend=backend,
    )


def adapters_of(dtype: torch.dtype, generator: torch.Generator) -> list[dict[str, Weights]]:
    return [mixed(random_adapter(SPECS, ranks, dtype, generator), gates, generator) for ranks, gates in ADAPTERS]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_mixture_and_base_rows_against_float64(dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    check_against_float64(make(dtype, backend), SPECS, adapters_of(dtype, generator), dtype, generator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("experts", range(1, MAX_EXPERTS + 1))
def test_every_number_of_experts_with_unequal_ranks(experts: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(experts)
    pool = make(backend=backend, specs=(ODD,), max_rank=64 * MAX_EXPERTS)
    ranks = torch.randint(1, 65, (experts,), generator=generator)
    ranks[-1], ranks[0] = 64, 1
    expert = torch.arange(experts).repeat_interleave(ranks)
    which, lengths = np.array([0, -1, 0], np.int32), np.array([4, 1, 3], np.int32)
    rules = (
        TokenGate(experts, "top_k", k=2),
        TokenGate(experts, "top_p", p=0.7, renormalise=False),
        TokenGate(experts, "threshold", threshold=0.9 / experts, one=True),
        TokenGate(experts, absolute=True, temperature=0.7),
        *([TokenGate(experts, "adaptive", threshold=1 / experts, bias=0.2)] if experts < MAX_EXPERTS else []),
    )
    for rule in rules:
        plain = random_adapter((ODD,), {"o": expert.numel()}, torch.float32, generator)
        w = mixed(plain, {"o": rule}, generator)["o"]._replace(expert=expert)
        x, y = clear(ODD, [{"o": w}], which, lengths, 8, torch.float32, generator)
        shuffled = torch.randperm(expert.numel(), generator=generator)
        other = w._replace(a=w.a[shuffled], b=w.b[shuffled], scale=w.scale[shuffled], expert=expert[shuffled].int())
        for adapter in ({"o": w}, {"o": other}):
            slot = load(pool, adapter)
            pool.set_batch(np.where(which < 0, -1, slot).astype(np.int32), lengths)
            assert worst(apply(pool, 0, x, y), exact(ODD, [{"o": w}], which, lengths, x, y)) <= 1
            pool.release(slot)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routers_that_read_layer_norm_where_the_mean_is_large(dtype: torch.dtype, backend: str) -> None:
    """Thirty deviations from zero, and router rows that sum to nothing, or do not: of the first, what rounding left
    counts, of the others nearly all that they sum up is the mean's."""
    generator = torch.Generator().manual_seed(8)
    rule = TokenGate(5, "top_k", k=2, layer_norm_eps=1e-5)
    pool, adapters, slots = make(dtype, backend, specs=(ODD,)), [], []
    for rank, shift in ((12, 0.0), (33, 0.05)):
        router = torch.randn(5, ODD.d_in, generator=generator, dtype=torch.float64) * ODD.d_in**-0.5
        router += shift - router.mean(1, keepdim=True)
        w = mixed(random_adapter((ODD,), {"o": rank}, dtype, generator), {"o": rule}, generator)["o"]
        slots.append(load(pool, {"o": w._replace(router=router)}))
        adapters.append({"o": w._replace(router=router.to(dtype))})
    which, lengths = np.array([0, -1, 1, 0], np.int32), np.array([5, 2, 7, 1], np.int32)
    for mean in (-30.0, 30.0):
        x, y = clear(ODD, adapters, which, lengths, 15, dtype, generator, mean=mean)
        pool.set_batch(np.array([*slots, -1], np.int32)[which], lengths)
        got = apply(pool, 0, x, y)
        assert worst(got, exact(ODD, adapters, which, lengths, x, y)) <= 1
        assert same_bits(got[5:7], y[5:7])


def test_only_routers_that_read_layer_norm_have_sums() -> None:
    pool, ranks = make(), {"q": 16, "o": 5}
    reading_x = pool.bytes_for(ranks, {"q": TokenGate(8), "o": TokenGate(3)})
    assert pool.bytes_for(ranks, {"q": TokenGate(8, layer_norm_eps=1e-5), "o": TokenGate(3)}) == reading_x + 128


def test_the_bound_notices_a_wrong_expert() -> None:
    """Guards the other tests: the smallest mistakes a gate could make are far outside of the bound."""
    top_2, adaptive = TokenGate(4, "top_k", k=2), TokenGate(4, "adaptive", threshold=0.25, bias=0.1)
    check_mistakes(top_2, TokenGate(4, "top_k", k=3), TokenGate(4, "top_k", k=2, eps=1e-3))
    check_mistakes(adaptive, replace(adaptive, bias=0.11), replace(adaptive, renormalise=False))
    normed = replace(top_2, layer_norm_eps=1e-5)
    check_mistakes(normed, top_2, replace(normed, layer_norm_eps=1e-2))


def check_mistakes(rule: TokenGate, *other_rules: TokenGate) -> None:
    generator = torch.Generator().manual_seed(0)
    which, lengths = np.array([0], np.int32), np.array([5], np.int32)
    w = mixed(random_adapter((ODD,), {"o": 64}, torch.float32, generator), {"o": rule}, generator)["o"]
    x, y = clear(ODD, [{"o": w}], which, lengths, 5, torch.float32, generator)
    want = exact(ODD, [{"o": w}], which, lengths, x, y)
    assert w.expert is not None and w.router is not None
    moved = w.expert.clone()
    moved[0] = (moved[0] + 1) % 4
    for wrong in (
        w._replace(expert=moved),
        *(w._replace(gate=other) for other in other_rules),
        w._replace(router=w.router.roll(1, 0)),
    ):
        pool = make(specs=(ODD,))
        pool.set_batch(np.array([load(pool, {"o": wrong})], np.int32), lengths)
        assert worst(apply(pool, 0, x, y), want) > 10


def test_order_and_chunks_of_a_batch_change_no_answer() -> None:
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
    adapters = adapters_of(torch.float32, generator)
    pool = make()
    slots = np.array([*(load(pool, a) for a in adapters), -1], np.int32)
    which, lengths = ragged_batch("uniform", rng=rng, requests=14, adapters=len(adapters), tokens=40)
    ends = np.cumsum(lengths)
    for index, spec in enumerate(SPECS):
        x, y = clear(spec, adapters, which, lengths, 40, torch.float32, generator)
        pool.set_batch(slots[which], lengths)
        want, bound = apply(pool, index, x, y), exact(spec, adapters, which, lengths, x, y).bound
        for _ in range(5):
            order = rng.permutation(14).astype(np.int32)
            shuffled = torch.from_numpy(np.concatenate([np.arange(ends[i] - lengths[i], ends[i]) for i in order]))
            pool.set_batch(slots[which[order]], lengths[order])
            got = apply(pool, index, x[shuffled], y[shuffled])
            assert ((got - want[shuffled]).abs() <= 2 * bound[shuffled]).all()
        for cut in (1, 17, 39):
            head = np.minimum(ends, cut) - np.minimum(ends - lengths, cut)
            for part, rows in ((head, slice(0, cut)), (lengths - head, slice(cut, 40))):
                pool.set_batch(slots[which], part.astype(np.int32))
                assert ((apply(pool, index, x[rows], y[rows]) - want[rows]).abs() <= 2 * bound[rows]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_rows_have_the_bits_of_a_pool_without_mixtures(backend: str) -> None:
    generator, rng = torch.Generator().manual_seed(2), np.random.default_rng(2)
    adapters = adapters_of(torch.float32, generator)
    plain = random_adapter(SPECS, {"q": 24, "v": 8, "o": 64}, torch.float32, generator)
    mixing, alone = make(backend=backend), make(backend=backend)
    slots = np.array([*(load(mixing, a) for a in adapters), load(mixing, plain), -1], np.int32)
    slot = load(alone, plain)
    which = rng.permutation([*range(-1, len(adapters)), *[len(adapters)] * 4]).astype(np.int32)
    lengths = np.full(len(which), 5, np.int32)
    mine = which == len(adapters)
    rows = torch.from_numpy(np.repeat(mine, lengths))
    for index, spec in enumerate(SPECS):
        x = torch.randn(lengths.sum(), spec.d_in, generator=generator)
        y = torch.randn(lengths.sum(), sum(spec.d_outs), generator=generator)
        mixing.set_batch(slots[which], lengths)
        alone.set_batch(np.where(mine, slot, -1).astype(np.int32), lengths)
        assert same_bits(apply(mixing, index, x, y)[rows], apply(alone, index, x, y)[rows])


class _Launches(TorchDispatchMode):
    """Names of the operations that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_plain_batch_launches_what_it_launches_without_mixtures() -> None:
    generator = torch.Generator().manual_seed(2)
    plain = random_adapter(SPECS, {"q": 24, "v": 8, "o": 64}, torch.float32, generator)
    launched = []
    for mixtures, trace in ((False, False), (True, False), (True, True)):
        pool = make()
        if mixtures:
            for adapter in adapters_of(torch.float32, generator):
                load(pool, adapter)
        pool.trace(trace)
        pool.set_batch(np.array([load(pool, plain), -1], np.int32), np.array([5, 2], np.int32))
        for index, spec in enumerate(SPECS):
            x, y = torch.randn(7, spec.d_in), torch.randn(7, sum(spec.d_outs))
            h = torch.zeros(7, pool.h_width(index))
            site = lookup(pool.site_ids[index])
            with _Launches() as seen:
                site.backend.shrink(site, x, h)
                site.backend.expand(site, y, h)
            launched.append(seen.names)
    assert launched[0] and launched[:2] * 3 == launched


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_go_to_the_lowest_experts(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    adapter = mixed(
        random_adapter((ODD,), {"o": 40}, torch.float32, generator), {"o": TokenGate(8, "top_k", k=2)}, generator
    )
    w = adapter["o"]._replace(router=torch.zeros(8, ODD.d_in))
    assert w.expert is not None
    pool = make(backend=backend, specs=(ODD,))
    pool.set_batch(np.array([load(pool, {"o": w})], np.int32), np.array([6], np.int32))
    first = w.expert < 2
    halves = Weights(w.a[first], w.b[first], w.scale[first] / 2)
    x, y = torch.randn(6, ODD.d_in, generator=generator), torch.randn(6, 129, generator=generator)
    want = exact(ODD, [{"o": halves}], np.array([0], np.int32), np.array([6], np.int32), x, y)
    assert worst(apply(pool, 0, x, y), want) <= 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("one", [False, True])
def test_a_token_that_selects_no_expert_gets_nothing(backend: str, one: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    rule = TokenGate(4, "threshold", threshold=1.5, one=one)
    pool = make(backend=backend, specs=(ODD,))
    adapter = mixed(random_adapter((ODD,), {"o": 40}, torch.float32, generator), {"o": rule}, generator)
    pool.set_batch(np.array([load(pool, adapter)], np.int32), np.array([6], np.int32))
    x, y = torch.randn(6, ODD.d_in, generator=generator), torch.randn(6, 129, generator=generator)
    assert torch.equal(apply(pool, 0, x, y), y)


def test_bytes_are_the_weights_routers_and_experts_plus_less_than_a_line_per_array() -> None:
    pool, gates = make(), {"q": TokenGate(8), "o": TokenGate(2, "adaptive", threshold=0.5)}
    ranks = {"q": 16, "k": 4, "o": 5}
    exactly = 4 * ((20 + 8) * 96 + 20 + 20 + 16 * 160 + 4 * 33) + 4 * ((5 + 3) * 259 + 5 + 5 + 5 * 129)
    needed = pool.bytes_for(ranks, gates)
    assert exactly <= needed < exactly + 9 * 128
    assert pool.bytes_for(ranks) < needed
    slot = pool.reserve(ranks, gates)
    assert pool.used_bytes == needed
    pool.release(slot)
    assert pool.used_bytes == 0


def test_h_has_room_for_the_logits_of_every_slice() -> None:
    pool = make(max_rank=8)
    gates = {m: TokenGate(MAX_EXPERTS) for m in "qkv"}
    generator = torch.Generator().manual_seed(5)
    adapter = mixed(random_adapter((QKV,), {m: 8 for m in "qkv"}, torch.float32, generator), gates, generator)
    held = lookup(pool.site_ids[0]).slots
    slot = load(pool, adapter)
    weights = held[slot]
    assert weights is not None and weights.a.shape[0] == 3 * (8 + MAX_EXPERTS)
    assert pool.h_width(0) == weights.a.shape[0] + MOMENT_COLUMNS
    assert pool.overhead_bytes >= 64 * 3 * (8 + MAX_EXPERTS) * 4


def test_wrong_routers_and_experts_are_refused_before_anything_is_copied() -> None:
    generator = torch.Generator().manual_seed(6)
    gates = {"o": TokenGate(4)}
    adapter = mixed(random_adapter((ODD,), {"o": 9}, torch.float32, generator), gates, generator)
    a, b, scale, _, router, expert, *_ = adapter["o"]
    assert router is not None and expert is not None
    pool = make(specs=(ODD,))
    gated, plain = pool.reserve({"o": 9}, gates), pool.reserve({"o": 9})
    bad: tuple[tuple[type[Exception], Tensor | None, Tensor | None], ...] = (
        (lk.WrongShape, router[:3], expert),
        (lk.WrongShape, router[:, 1:], expert),
        (lk.WrongShape, router, expert[1:]),
        (ValueError, router, expert.index_fill(0, torch.tensor(8), 4)),
        (ValueError, router, expert.index_fill(0, torch.tensor(0), -1)),
        (ValueError, router, expert.float()),
        (ValueError, None, expert),
        (ValueError, router, None),
    )

    def refuse() -> None:
        for error, wrong_router, wrong_expert in bad:
            with pytest.raises(error, match=r'module "?o'):
                pool.write(gated, "o", a + 1, b + 1, scale + 1, router=wrong_router, expert=wrong_expert)
        with pytest.raises(ValueError, match="reserved: False"):
            pool.write(plain, "o", a, b, scale, router=router, expert=expert)

    refuse()
    for slot in (gated, plain):
        with pytest.raises(lk.NotWritten):
            pool.publish(slot)
    written = pool.write(gated, "o", a, b, scale, router=router, expert=expert)
    assert written == 4 * (a.numel() + b.numel() + router.numel() + 9 + 9)
    refuse()
    pool.publish(gated)
    held = lookup(pool.site_ids[0]).slots[gated]
    assert held is not None and held.live[0].gate is not None
    for got, want in (
        (held.a, torch.cat([a, router])),
        (held.scale, scale),
        (held.live[0].b, b),
        (held.live[0].gate.expert, expert),
    ):
        assert (got == want).all()


@pytest.mark.parametrize(
    ("ranks", "gates", "error"),
    [
        ({"q": 4}, {"nope": TokenGate(2)}, lk.UnknownModule),
        ({"q": 4}, {"k": TokenGate(2)}, ValueError),
        ({"q": 4, "k": 0}, {"k": TokenGate(2)}, ValueError),
    ],
)
def test_a_gate_without_rank_is_refused(
    ranks: Mapping[str, int], gates: Mapping[str, TokenGate], error: type[Exception]
) -> None:
    pool = make()
    with pytest.raises(error):
        pool.reserve(ranks, gates)
    assert pool.used_bytes == 0 and pool.free_slots == pool.slots
