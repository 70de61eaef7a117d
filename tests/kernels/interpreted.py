"""Run the Triton kernels in Triton's interpreter and compare with float64: a process of its own, because the
interpreter is chosen by TRITON_INTERPRET=1 before Triton is imported.

Writes one line per case; exits non-zero if a result is wrong. The interpreter truncates when it stores bfloat16,
hence twice the bound there. No token of a mixture is so close to another selection of experts that float32 could
make it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import numpy as np
import torch
from applied import Sequenced, same_bits

from loramux_kernels import AdapterPool, SiteSpec, TokenGate
from loramux_kernels.ops.shrink import PLANE_ROWS
from loramux_kernels.sites import BANDS_AT, lookup
from loramux_kernels.testing import (
    POPULARITIES,
    adapter_of,
    banded,
    clear_inputs,
    exact,
    load,
    mixed,
    ragged_batch,
    random_adapter,
    with_outputs,
    worst,
    worst_trace,
)

SPECS = (
    SiteSpec("qkv", ("q", "k", "v"), 256, (96, 48, 48)),
    SiteSpec("odd", ("o",), 67, (129,)),
)
RANKS = (
    {"q": 1, "k": 4, "v": 8, "o": 12},
    {"q": 24, "o": 64},
    {"k": 33, "v": 40},
    {"q": 16, "k": 16, "v": 16, "o": 4},
)
PLAIN: tuple[dict[str, TokenGate], ...] = ({}, {}, {}, {})
# Gates by module for the adapters of RANKS, the last of which stays plain.
MIXED: tuple[dict[str, TokenGate], ...] = (
    {
        "q": TokenGate(1),
        "v": TokenGate(3, "top_k", k=2, renormalise=False),
        "o": TokenGate(16, "top_p", p=0.7, temperature=0.5),
    },
    {
        "q": TokenGate(8, "threshold", threshold=0.15),
        "o": TokenGate(5, "top_k", k=3, absolute=True, one=True, layer_norm_eps=1e-5),
    },
    {
        "k": TokenGate(6, "adaptive", threshold=0.2, bias=0.3),
        "v": TokenGate(7, eps=1e-3, groups=(0b0011011, 0b1000000, 0b1111111), layer_norm_eps=0.1),
    },
    {},
)
# Routers that all read LayerNorm(x), so that x may have any mean.
NORMED: tuple[dict[str, TokenGate], ...] = (
    {
        "q": TokenGate(1, layer_norm_eps=1e-5),
        "k": TokenGate(4, "top_k", k=2, eps=1e-6, layer_norm_eps=1e-5),
        "o": TokenGate(6, "top_k", k=2, layer_norm_eps=0.2),
    },
    {"q": TokenGate(16, "top_k", k=3, layer_norm_eps=1e-5), "o": TokenGate(5, "top_k", k=2, layer_norm_eps=1e-5)},
    {},
    {"v": TokenGate(3, "adaptive", threshold=0.4, layer_norm_eps=1e-5)},
)
# Modules with a mag and with a bias, of the same adapters; the last has neither. "q" of the third has no rank.
OUTPUTS = (("ko", "qk"), ("q", "vo"), ("qo", "qk"), ("", ""))
NO_OUTPUTS = (("", ""),) * 4
MAX_RANK = 64


def pool_of(
    sites: Sequence[SiteSpec], dtype: torch.dtype, *, slots: int, requests: int, tokens: int = 320
) -> AdapterPool:
    return AdapterPool(
        sites,
        capacity_bytes=1 << 20,
        slots=slots,
        max_rank=MAX_RANK,
        max_tokens=tokens,
        max_requests=requests,
        dtype=dtype,
        device="cpu",
        backend="triton",
    )


def check(
    dtype: torch.dtype,
    tokens: int,
    gates: tuple[dict[str, TokenGate], ...],
    outputs: tuple[tuple[str, str], ...],
    popularity: str,
    rng: np.random.Generator,
    mean: float = 0,
) -> bool:
    pool = pool_of(SPECS, dtype, slots=6, requests=24)
    gen = torch.Generator().manual_seed(int(rng.integers(1 << 30)))
    kinds = zip(RANKS, gates, outputs, strict=True)
    adapters = [adapter_of(SPECS, ranks, rules, *both, dtype, gen) for ranks, rules, both in kinds]
    hole = load(pool, adapters[0])
    loaded = [load(pool, a) for a in adapters]
    adapters.append({m: w._replace(a=w.a.flip(1)) for m, w in adapters[1].items()})
    loaded.append(load(pool, adapters[-1], borrowed="o", lender=loaded[1]))
    slots = np.array([*loaded, -1], dtype=np.int32)
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
    padded = tokens + 3
    good, inputs = True, {}
    pool.trace(True)
    for spec, site_id in zip(SPECS, pool.site_ids, strict=True):
        site, width = lookup(site_id), sum(spec.d_outs)
        draw = lambda s=spec: (mean + torch.randn(padded, s.d_in, generator=gen)).to(dtype)  # noqa: E731
        x = torch.empty(padded, spec.d_in + 16, dtype=dtype)[:, : spec.d_in]
        x.copy_(clear_inputs(spec, adapters, which, lengths, draw))
        inputs[spec.name] = x
        y = torch.randn(padded, width, generator=gen).to(dtype)
        before = y.clone()
        h = torch.full((padded + PLANE_ROWS, site.width), float("nan"))
        site.backend.shrink(site, x, h)
        site.backend.expand(site, y, h)
        error = worst(y, exact(spec, adapters, which, lengths, x, before))
        base = torch.from_numpy(np.r_[np.repeat(which, lengths), [-1] * 3] < 0)
        ok = error <= (2 if dtype == torch.bfloat16 else 1) and same_bits(y[base], before[base])
        good &= ok
        kind = " mixed" * any(gates) + " outputs" * (outputs is OUTPUTS) + f" of mean {mean:g}" * (mean != 0)
        case = f"{dtype} {spec.name} T={tokens} {popularity}{kind}"
        sys.stdout.write(f"{'OK' if ok else 'FAIL'} {case} error {error:.2f}\n")
    by_slot = dict(zip(slots.tolist(), adapters, strict=False))
    error = worst_trace(pool.take_trace(), SPECS, by_slot, inputs)
    sys.stdout.write(f"{'OK' if error <= 1 else 'FAIL'} trace T={tokens} error {error:.2f}\n")
    return good and error <= 1


def check_ties(rule: TokenGate) -> bool:
    """Equal scores, and the selections that hang on them exactly."""
    spec, gen = SPECS[1], torch.Generator().manual_seed(0)
    w = mixed(random_adapter(SPECS, {"o": 40}, torch.float32, gen), {"o": rule}, gen)["o"]
    adapter = {"o": w._replace(router=torch.zeros(rule.logits, spec.d_in))}
    pool = pool_of([spec], torch.float32, slots=1, requests=1, tokens=8)
    which, lengths = np.array([load(pool, adapter)], np.int32), np.array([5], np.int32)
    pool.set_batch(which, lengths)
    x, y = torch.randn(5, spec.d_in, generator=gen), torch.randn(5, sum(spec.d_outs), generator=gen)
    before, site = y.clone(), lookup(pool.site_ids[0])
    h = torch.full((5 + PLANE_ROWS, site.width), float("nan"))
    site.backend.shrink(site, x, h)
    site.backend.expand(site, y, h)
    error = worst(y, exact(spec, [adapter], which, lengths, x, before))
    sys.stdout.write(f"{'OK' if error <= 1 else 'FAIL'} equal scores, {rule} error {error:.2f}\n")
    return error <= 1


def check_capacity(dtype: torch.dtype, lengths: list[int], steps: list[list[int]], generator: torch.Generator) -> bool:
    """Sequences of two adapters with a capacity, one without and the base, in steps that cut them into chunks."""
    spec = SiteSpec("pair", ("q", "k"), 64, (96, 48))
    gates = (
        {
            "q": TokenGate(4, "top_k", k=2, capacity=9),
            "k": TokenGate(7, "threshold", threshold=0.15, one=True, capacity=20, groups=(0b0011011, 0b1111111)),
        },
        {"k": TokenGate(16, "top_k", k=5, capacity=40, layer_norm_eps=1e-5)},
        {"q": TokenGate(3, "adaptive", threshold=0.3)},
    )
    made = [random_adapter([spec], {"q": 12, "k": 20}, dtype, generator) for _ in gates]
    adapters = [mixed(a, rules, generator) for a, rules in zip(made, gates, strict=True)]
    pool = pool_of([spec], dtype, slots=4, requests=8)
    slots = np.array([*(load(pool, a) for a in adapters), -1], np.int32)
    which, counts = np.array([0, 1, -1, 0, 2, 0], np.int32), np.array(lengths, np.int32)
    draw = lambda: torch.randn(sum(lengths), spec.d_in, generator=generator).to(dtype)  # noqa: E731
    x = clear_inputs(spec, adapters, which, counts, draw)
    y = torch.randn(sum(lengths), 144, generator=generator).to(dtype)
    before, site, sequences = y.clone(), lookup(pool.site_ids[0]), Sequenced(len(lengths))
    begin, done = np.cumsum([0, *lengths[:-1]]), np.zeros(len(lengths), int)
    for step in steps:
        rows = np.concatenate([np.arange(b + d, b + d + n) for b, d, n in zip(begin, done, step, strict=True)])
        taken: np.ndarray = np.array(step, np.int32)
        pool.set_batch(slots[which], taken, sequences.step(done, taken))
        part, h = y[rows], torch.full((len(rows) + PLANE_ROWS, site.width), float("nan"))
        site.backend.shrink(site, x[rows].contiguous(), h)
        site.backend.expand(site, part, h)
        y[rows], done = part, done + taken
    error = worst(y, exact(spec, adapters, which, counts, x, before))
    ok = error <= (2 if dtype == torch.bfloat16 else 1)
    sys.stdout.write(f"{'OK' if ok else 'FAIL'} capacity, {dtype} in {len(steps)} steps, error {error:.2f}\n")
    return ok


LENGTHS = [60, 23, 5, 40, 9, 130]
CHUNKS = (
    [LENGTHS],
    [[40, 20, 5, 1, 0, 18], [0, 0, 0, 30, 8, 100], [19, 2, 0, 0, 0, 11], [1, 1, 0, 9, 1, 1]],
    [[17, 3, 1, 20, 4, 31], [43, 20, 4, 20, 5, 99]],
)


def check_bands(dtype: torch.dtype, tokens: int, rng: np.random.Generator) -> bool:
    """Packed block-diagonal adapters of two and four bands beside a plain one and a mixture."""
    spec, gen = SiteSpec("pair", ("q", "k"), 512, (512, 1024)), torch.Generator().manual_seed(tokens)
    ranks = ({"q": 8, "k": 40}, {"q": 36, "k": 4}, {"q": 12, "k": 5}, {"k": 16})
    plain = [random_adapter([spec], of, dtype, gen) for of in ranks]
    adapters = [
        with_outputs(banded(plain[0], {"q": 2, "k": 2}), "k", "q", gen),
        banded(plain[1], {"q": 4, "k": 4}),
        plain[2],
        mixed(plain[3], {"k": TokenGate(3, "top_k", k=2)}, gen),
    ]
    pool = pool_of([spec], dtype, slots=4, requests=8)
    slots = np.array([*(load(pool, a) for a in adapters), -1], np.int32)
    which, lengths = ragged_batch("uniform", rng=rng, requests=8, adapters=4, tokens=tokens)
    pool.set_batch(slots[which], lengths)
    x = clear_inputs(spec, adapters, which, lengths, lambda: torch.randn(tokens, 512, generator=gen).to(dtype))
    y = torch.randn(tokens, 1536, generator=gen).to(dtype)
    before, site = y.clone(), lookup(pool.site_ids[0])
    h = torch.full((tokens + PLANE_ROWS, site.width), float("nan"))
    site.backend.shrink(site, x, h)
    site.backend.expand(site, y, h)
    error = worst(y, exact(spec, adapters, which, lengths, x, before))
    packed = [site.table[slot, BANDS_AT].item() for slot in slots[:-1]] == [2, 4, 1, 1]
    ok = packed and error <= (2 if dtype == torch.bfloat16 else 1)
    sys.stdout.write(f"{'OK' if ok else 'FAIL'} bands, {dtype} T={tokens}, error {error:.2f}\n")
    return ok


TIES = (
    TokenGate(8, "top_k", k=2),
    TokenGate(8, "top_p", p=0.5),
    TokenGate(16, "top_k", k=5, groups=tuple(1 << e for e in reversed(range(16)))),
    TokenGate(10, "threshold", threshold=0.1),
    TokenGate(4, "threshold", threshold=2.0),
    TokenGate(4, "adaptive", threshold=0.5),
    TokenGate(15, "adaptive", threshold=0.5, bias=-2.0),
)

if __name__ == "__main__":
    rng = np.random.default_rng(0)
    # One length at least of every class in triton/config.py.
    cases = [(torch.float32, t) for t in (1, 13, 40, 100, 260)] + [(torch.bfloat16, t) for t in (40, 260)]
    good = [check_ties(rule) for rule in TIES]
    for gates, outputs in ((PLAIN, NO_OUTPUTS), (MIXED, NO_OUTPUTS), (MIXED, OUTPUTS)):
        some = cases if outputs is NO_OUTPUTS else cases[1::2]
        good += [check(d, t, gates, outputs, p, rng) for (d, t), p in zip(some, itertools.cycle(POPULARITIES))]
    normed = [(torch.float32, 13), (torch.float32, 260), (torch.bfloat16, 40)]
    good += [check(dtype, tokens, NORMED, NO_OUTPUTS, "uniform", rng, 30.0) for dtype, tokens in normed]
    some = [(torch.float32, 13), (torch.float32, 100), (torch.float32, 260), (torch.bfloat16, 40)]
    good += [check_bands(dtype, tokens, rng) for dtype, tokens in some]
    generator = torch.Generator().manual_seed(5)
    good += [check_capacity(torch.float32, LENGTHS, steps, generator) for steps in CHUNKS]
    good.append(check_capacity(torch.bfloat16, LENGTHS, CHUNKS[1], generator))
    sys.exit(not all(good))
