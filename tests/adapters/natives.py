"""Lowered adapters with every field of the form, drawn at random or one field at a time."""

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from loramux_adapters import BaseModel, Carry, FfnMixture, Gate, LoweredAdapter, LoweredSite, Variance
from loramux_adapters.gate import (
    Capacity,
    GateKind,
    GateSource,
    GateValue,
    Norm,
    Pooling,
    PostMap,
    PreMap,
    Select,
)
from loramux_adapters.lowered import CarryKind
from loramux_adapters.variance import SHAPES, STANDARD_DEVIATIONS, VarianceForm, VarianceKind

from .checkpoints import BASE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Q, UP, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"))


def make_site(module: str = Q, rank: int = 4, base: BaseModel = BASE, seed: int = 0, **fields: Any) -> LoweredSite:
    generator = torch.Generator().manual_seed(seed)
    d_in, d_out = base.linears[module]
    return LoweredSite(
        torch.randn(rank, d_in, generator=generator),
        torch.randn(rank, d_out, generator=generator),
        torch.rand(rank, generator=generator) + 0.5,
        **fields,
    )


def make_gate(experts: int = 2, width: int = 24, seed: int = 1, **fields: Any) -> Gate:
    return Gate(torch.randn(experts, width, generator=torch.Generator().manual_seed(seed)), **fields)


def make_mixture(**changes: Any) -> LoweredAdapter:
    """Two experts of ranks 1 and 3 at one site, three of one rank at another, and a plain site."""
    sites = {
        Q: make_site(gate="q", expert=torch.tensor([0, 1, 1, 1], dtype=torch.int32)),
        DOWN: make_site(DOWN, 3, gate="down", expert=torch.arange(3, dtype=torch.int32)),
        UP: make_site(UP, 2),
    }
    gates = {"q": make_gate(select=Select.TOP_K, k=1), "down": make_gate(3, 40)}
    return LoweredAdapter("mola", sites, gates=gates, **changes)


def same(one: Any, other: Any) -> bool:
    """Equal in every field, tensors in dtype, shape and every bit."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
        )
    if is_dataclass(one):
        return type(one) is type(other) and all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@st.composite
def tensors(draw: st.DrawFn, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    values = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-4, 2))
    return values.to(draw(st.sampled_from(DTYPES)))


def indices(limit: int, length: int) -> st.SearchStrategy[torch.Tensor]:
    return st.lists(st.integers(0, limit - 1), min_size=length, max_size=length).map(
        lambda values: torch.tensor(values, dtype=torch.int32)
    )


@st.composite
def gates(draw: st.DrawFn, width: int) -> Gate:
    """A gate of any kind; one that reads the site's input has this width."""
    experts = draw(st.integers(1, 6))
    kind, source = draw(
        st.sampled_from(
            [
                (GateKind.TOKEN, GateSource.SITE_INPUT),
                (GateKind.TOKEN, GateSource.FFN_INPUT),
                (GateKind.PROMPT, GateSource.LAYER_INPUT),
                (GateKind.TASK, GateSource.NONE),
                (GateKind.TWO_PASS, GateSource.BASE_HIDDEN),
            ]
        )
    )
    table, free = kind is GateKind.TASK, source is not GateSource.SITE_INPUT
    width = draw(st.integers(1, 9)) if free else width
    values: dict[str, Any] = {"kind": kind, "source": source, "post": draw(st.sampled_from(PostMap))}
    hidden = []
    for _ in range(0 if table else draw(st.integers(0, 2))):
        before, after = hidden[-1][0].shape[0] if hidden else width, draw(st.integers(1, 4))
        hidden.append((draw(tensors(after, before)), draw(tensors(after))))
    reads = hidden[-1][0].shape[0] if hidden else width
    weights = draw(tensors(draw(st.integers(1, 4)), experts) if table else tensors(experts, reads))
    if table:
        values["task"] = draw(st.none() | st.integers(0, len(weights) - 1))
    if source is GateSource.LAYER_INPUT:
        values["pool"] = draw(st.sampled_from(Pooling))
        if values["pool"] is Pooling.ATTENTION:
            values["pool_weight"] = draw(tensors(width))
    if not table:
        values["bias"] = draw(st.none() | tensors(experts))
        values["pre"] = draw(st.sampled_from(PreMap))
        if values["pre"] is PreMap.RATIONAL:
            values["rational"] = draw(tensors(12))
    values["select"] = draw(st.sampled_from([s for s in Select if not (table and s is Select.ADAPTIVE)]))
    match values["select"]:
        case Select.TOP_K:
            values["k"] = draw(st.integers(1, experts))
        case Select.TOP_P:
            values["p"] = draw(st.floats(2**-126, 1))
        case Select.THRESHOLD:
            values["threshold"] = draw(st.floats(-1, 1))
        case Select.ADAPTIVE:
            values |= {"adaptive_weight": draw(tensors(width)), "adaptive_bias": draw(tensors(1))}
            values["tau_max"] = draw(st.floats(1e-3, 1))
    values["norm"] = draw(st.sampled_from(Norm))
    if values["norm"] is Norm.RENORM:
        values["eps"] = draw(st.sampled_from([0.0, 1e-6]))
    if draw(st.booleans()):
        groups = draw(st.lists(st.integers(0, experts), min_size=experts, max_size=experts))
        order = list(dict.fromkeys(groups))
        values["expert_map"] = torch.tensor([order.index(group) for group in groups], dtype=torch.int32)
    return Gate(
        weights,
        hidden=tuple(hidden),
        temperature=draw(st.floats(1e-3, 1e3)),
        pre_eps=draw(st.sampled_from([1e-5, 1e-6])),
        value=draw(st.sampled_from(GateValue)),
        capacity=draw(st.none() | st.integers(1, 99).map(Capacity)),
        **values,
    )


@st.composite
def variances(draw: st.DrawFn, rows: int, rank: int, d_in: int, d_out: int, gated: bool = False) -> Variance:
    kind = draw(st.sampled_from([kind for kind in VarianceKind if not (gated and kind is VarianceKind.HIERARCHICAL)]))
    free = st.integers(1, 3)
    axes = {"Ra": rows, "I": d_in, "R": rank, "O": d_out, "1": 1, "K": draw(free), "S": draw(free), "V": draw(free)}
    parts = {name: draw(tensors(*(axes[axis] for axis in letters))) for name, letters in SHAPES[kind].items()}
    parts |= {name: parts[name].abs() for name in STANDARD_DEVIATIONS if name in parts}
    rate = draw(st.floats(0.01, 0.99)) if kind is VarianceKind.DROPOUT else None
    form = draw(st.sampled_from(VarianceForm)) if kind is VarianceKind.HIERARCHICAL else VarianceForm.LINEAR
    return Variance(kind, parts, rate, form)


@st.composite
def adapters(draw: st.DrawFn, base: BaseModel = BASE) -> LoweredAdapter:
    """Sound adapters: any ranks, gates, shared rows, magnitudes, biases, carries, posteriors, warnings."""
    sites: dict[str, LoweredSite] = {}
    named: dict[str, Gate] = {}
    ffn: dict[str, FfnMixture] = {}
    if draw(st.booleans()):
        named["ffn"] = make_gate(source=GateSource.FFN_INPUT)
        for module in (UP, DOWN):
            sites[module] = make_site(module, gate="ffn", base=base)
        ffn["model.layers.0.mlp"] = FfnMixture("ffn", UP, DOWN)
    free = sorted(base.linears.keys() - sites.keys())
    for module in draw(st.lists(st.sampled_from(free[1:]), min_size=1, max_size=4, unique=True)):
        d_in, d_out = base.linears[module]
        rank = draw(st.integers(1, 5))
        rows = draw(st.integers(1, rank))
        values: dict[str, Any] = {}
        if draw(st.booleans()):
            values["arow"] = torch.tensor(draw(st.permutations([i % rows for i in range(rank)])), dtype=torch.int32)
        else:
            rows = rank
        experts = given = 1
        if draw(st.booleans()):
            fitting = [name for name, gate in named.items() if gate.width in (d_in, None)]
            name = draw(st.sampled_from([*fitting, f"g{len(named)}"]))
            named.setdefault(name, draw(gates(d_in)))
            experts, given = named[name].experts, named[name].weights_given
            values["gate"] = name
            values["expert"] = draw(st.none() | indices(given, rank))
        magnitude = draw(st.none() | tensors(d_out) | tensors(experts, d_out))
        values["magnitude"] = None if magnitude is None else magnitude.abs().clamp(min=1e-3)
        values["bias"] = draw(st.none() | tensors(d_out))
        same_rows = [other for other, site in sites.items() if site.a.shape[0] == rows]
        if same_rows and draw(st.booleans()):
            values["carry"] = Carry(draw(st.sampled_from(same_rows)), CarryKind.PREV_U)
        values["variance"] = draw(
            st.none() | variances(rows, rank, d_in, d_out, bool(values.keys() & {"gate", "carry"}))
        )
        a, b = draw(tensors(rows, d_in)), draw(tensors(rank, d_out))
        if (
            rank % 2 == d_in % 2 == d_out % 2 == 0
            and not values.keys() & {"arow", "gate", "carry"}
            and values["variance"] is None
        ):
            values["bands"] = 2
            a, b = (t * torch.block_diag(*[t.new_ones(rank // 2, t.shape[1] // 2)] * 2) for t in (a, b))
        sites[module] = LoweredSite(a, b, torch.rand(rank) + 0.5, **values)
    if free and draw(st.booleans()):
        # A module that has no rank, but a bias.
        d_in, d_out = base.linears[free[0]]
        outputs = {"magnitude": torch.ones(d_out), "bias": draw(tensors(d_out))}
        sites[free[0]] = LoweredSite(torch.empty(0, d_in), torch.empty(0, d_out), torch.empty(0), **outputs)
    words = st.text(st.characters(codec="ascii", min_codepoint=32, max_codepoint=126), max_size=20)
    warnings = draw(st.lists(words, max_size=2, unique=True))
    return LoweredAdapter("mola", sites, tuple(warnings), named, ffn)
