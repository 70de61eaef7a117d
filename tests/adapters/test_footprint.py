"""Bytes that are told are those that a pool takes."""

from dataclasses import replace

import pytest
import torch

from loramux_adapters import BaseModel, Gate, LoweredAdapter
from loramux_adapters.footprint import draw_pool_bytes, pool_bytes, site_specs
from loramux_adapters.gate import Capacity, Select
from loramux_adapters.posterior import draw
from loramux_adapters.token_gates import reservation
from loramux_adapters.variance import VarianceKind
from loramux_kernels import AdapterPool

from .checkpoints import BASE
from .natives import DOWN, UP, Q, make_gate, make_mixture, make_site
from .posterior.posteriors import make_bayesian

ADAPTIVE = Gate(
    torch.ones(2, 24),
    select=Select.ADAPTIVE,
    tau_max=0.5,
    adaptive_weight=torch.ones(24),
    adaptive_bias=torch.zeros(1),
)
MERGED = make_gate(5, expert_map=torch.tensor([0, 1, 0, 1, 1], dtype=torch.int32))
TWO = torch.tensor([0, 1, 1, 1], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "adapter",
    [
        LoweredAdapter("lora", {Q: make_site(), DOWN: make_site(DOWN, 3)}),
        LoweredAdapter("dora", {UP: make_site(UP, magnitude=torch.ones(40), bias=torch.ones(40))}),
        LoweredAdapter("dora", {Q: make_site(magnitude=torch.ones(24))}),
        LoweredAdapter("melora", {Q: make_site(bands=2)}),
        make_mixture(),
        LoweredAdapter("adamole", {Q: make_site(gate="q", expert=TWO)}, gates={"q": ADAPTIVE}),
        LoweredAdapter("mola/compact", {Q: make_site(gate="q", expert=TWO)}, gates={"q": MERGED}),
        LoweredAdapter("sira", {Q: make_site(gate="q", expert=TWO)}, gates={"q": make_gate(5, capacity=Capacity(9))}),
    ],
    ids=[
        "plain", "magnitude and bias", "magnitude", "bands", "mixture", "threshold of the token's own",
        "merged experts", "capacity",
    ],
)  # fmt: skip
def test_bytes_are_what_a_pool_takes(adapter: LoweredAdapter, dtype: torch.dtype) -> None:
    base = replace(BASE, biased=frozenset({Q}))
    pool = AdapterPool(
        site_specs(base), capacity_bytes=1 << 20, slots=1, max_rank=16, max_tokens=8, max_requests=70,
        dtype=dtype, device="cpu",
    )  # fmt: skip
    pool.reserve(**reservation(adapter, base.biased))
    assert pool_bytes(adapter, base, dtype, max_requests=70) == pool.used_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", VarianceKind)
def test_bytes_of_a_draw_are_what_it_takes_beside_its_mean(kind: VarianceKind, dtype: torch.dtype) -> None:
    adapter = make_bayesian(kind, magnitude=torch.ones(24))
    drawn = draw(adapter, digest="d", seed=0, sample=0)
    base = replace(BASE, biased=frozenset({Q}))
    pool = AdapterPool(
        site_specs(base), capacity_bytes=1 << 20, slots=2, max_rank=64, max_tokens=8, max_requests=70,
        dtype=dtype, device="cpu",
    )  # fmt: skip
    lender = load(pool, adapter, base)
    before = pool.used_bytes
    same = {m for m, site in drawn.sites.items() if torch.equal(site.b, adapter.sites[m].b)}
    pool.reserve(**reservation(drawn, base.biased), borrowed=same, lender=lender)
    assert draw_pool_bytes(adapter, base, dtype, max_requests=70) == pool.used_bytes - before
    assert before == pool_bytes(adapter, base, dtype, max_requests=70)


def load(pool: AdapterPool, adapter: LoweredAdapter, base: BaseModel) -> int:
    slot = pool.reserve(**reservation(adapter, base.biased))
    for module, site in adapter.sites.items():
        bias = torch.zeros(site.b.shape[1]) if site.shifts(module in base.biased) else None
        pool.write(slot, module, site.expanded_a, site.b, site.scale, mag=site.magnitude, bias=bias)
    pool.publish(slot)
    return slot


def test_linears_are_fused_as_engines_fuse_them() -> None:
    names = [spec.modules for spec in site_specs(BASE)]
    # BASE has no v_proj and no gate_proj, so nothing can be fused.
    assert all(len(modules) == 1 for modules in names) and len(names) == len(BASE.linears)
    whole = replace(
        BASE,
        linears={
            "l.q_proj": (8, 8), "l.k_proj": (8, 4), "l.v_proj": (8, 4), "l.o_proj": (8, 8),
            "l.gate_proj": (8, 6), "l.up_proj": (9, 6), "fc": (8, 2),
        },
    )  # fmt: skip
    assert [(s.modules, s.d_outs) for s in site_specs(whole)] == [
        (("l.q_proj", "l.k_proj", "l.v_proj"), (8, 4, 4)),
        (("l.o_proj",), (8,)),
        (("l.gate_proj",), (6,)),
        (("l.up_proj",), (6,)),
        (("fc",), (2,)),
    ]
