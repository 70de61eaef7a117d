"""What tests and benchmarks share: ragged batches as traffic makes them, adapters, and how wrong a result may be.

An error bound is elementwise and follows from the arithmetic. For y' = y + Σ_r B_ro s_r h_r with h_r = Σ_i A_ri x_i

    |y' − exact| ≤ u_y |exact| + u_h Σ_r |B_ro s_r h_r| + u_sum Σ_r |B_ro s_r| Σ_i |A_ri x_i|

and for y' = mag_o y + Σ… + bias_o another u_sum (|mag_o y| + |bias_o|).

u_y: the one rounding of y; u_h: the rounding of s ⊙ h to the weights' dtype before the second product, which tensor
cores need; u_sum: the order and precision of the sums. In a mixture s_r is s_r g_e, and an error δ = u_sum Σ_i |W_ei
x_i| / temperature of the logits makes one of at most 4 δ g_e of the gate (softmax 2 δ, its renormalisation again);
where a threshold τ of the token is taken off p, of 2 δ p_e + δ τ before they are normalised (`gate_error`). Logits of
LayerNorm(x) have the errors of its two moments besides (`router_logits`).
That holds while the same experts are selected, by the token and, where there is a capacity, by those before it: tests
keep to inputs whose `margin` is far above δ.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loramux_kernels.gates import TokenGate
from loramux_kernels.pool import AdapterPool
from loramux_kernels.sites import SiteSpec
from loramux_kernels.trace import TRACE_TOKENS, Traced

Ints = npt.NDArray[np.int32]


class Tolerance(NamedTuple):
    """Relative errors of the three terms of the bound."""

    y: float
    h: float
    sum: float


TOLERANCE = {
    torch.float64: Tolerance(2**-53, 2**-53, 2**-50),
    torch.float32: Tolerance(2**-24, 2**-24, 2**-21),
    torch.float16: Tolerance(2**-11, 2**-11, 2**-20),
    torch.bfloat16: Tolerance(2**-8, 2**-8, 2**-20),
}
"""y and h: half a unit in the last place of the dtype. Sums of float32 and narrower products are float32."""

MARGIN = 1e-4
"""Far above the error of float32 logits and probabilities, which is about 1e-6 for logits of order one."""
GATE_ROUNDING = 4
"""Relative error of exp, quotients and sums in a gate, in units of the sums' own."""


class Weights(NamedTuple):
    """One module of an adapter: `a_RI`, `b_RO` (B transposed), float32 `scale_R`; of a mixture also its gate,
    `router_EI`, a row per logit, and integer `expert_R`; where it has them, float32 `mag_O` and `bias_O`; and how many
    bands A and B have, outside of which they are zero."""

    a: Tensor
    b: Tensor
    scale: Tensor
    gate: TokenGate | None = None
    router: Tensor | None = None
    expert: Tensor | None = None
    mag: Tensor | None = None
    bias: Tensor | None = None
    bands: int = 1


Adapter = Mapping[str, Weights]


def random_adapter(
    specs: Sequence[SiteSpec], ranks: Mapping[str, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Weights]:
    """Normal weights for the modules in `ranks`, scaled so that A x and B h are of order one for x of order one."""
    sizes = {m: (s.d_in, d) for s in specs for m, d in zip(s.modules, s.d_outs, strict=True)}
    device = generator.device
    adapter = {}
    for module, rank in ranks.items():
        d_in, d_out = sizes[module]
        a = torch.randn(rank, d_in, generator=generator, device=device) * d_in**-0.5
        b = torch.randn(rank, d_out, generator=generator, device=device) * max(rank, 1) ** -0.5
        scale = torch.rand(rank, generator=generator, device=device) + 0.5
        adapter[module] = Weights(a.to(dtype), b.to(dtype), scale)
    return adapter


def mixed(adapter: Adapter, gates: Mapping[str, TokenGate], generator: torch.Generator) -> dict[str, Weights]:
    """The adapter with its modules in `gates` made mixtures: rank rows dealt to experts at random, unequally and in
    any order, and a router whose logits are of order one for x of order one."""
    made = dict(adapter)
    device = generator.device
    for module, gate in gates.items():
        w = made[module]
        router = torch.randn(gate.logits, w.a.shape[1], generator=generator, device=device) * w.a.shape[1] ** -0.5
        expert = torch.randint(gate.weights, (w.a.shape[0],), generator=generator, device=device)
        made[module] = w._replace(gate=gate, router=router.to(w.a.dtype), expert=expert)
    return made


def banded(adapter: Adapter, bands: Mapping[str, int]) -> dict[str, Weights]:
    """The adapter with zeros outside of the blocks of the modules in `bands`, which divide their ranks and sizes."""
    made = dict(adapter)
    for module, n in bands.items():
        w = made[module]
        a, b = w.a.clone(), w.b.clone()
        for factor in (a, b):
            blocks = factor.view(n, factor.shape[0] // n, n, factor.shape[1] // n)
            for i in range(n):
                blocks[i, :, :i] = 0
                blocks[i, :, i + 1 :] = 0
        made[module] = w._replace(a=a, b=b, bands=n)
    return made


def with_outputs(
    adapter: Adapter, mag: Collection[str], bias: Collection[str], generator: torch.Generator
) -> dict[str, Weights]:
    """The adapter with multipliers of order one for the modules in `mag`, and biases likewise."""
    made = dict(adapter)
    for module, w in adapter.items():
        d_out, device = w.b.shape[1], generator.device
        if module in mag:
            w = w._replace(mag=torch.rand(d_out, generator=generator, device=device) + 0.5)
        if module in bias:
            w = w._replace(bias=torch.randn(d_out, generator=generator, device=device))
        made[module] = w
    return made


def adapter_of(
    specs: Sequence[SiteSpec],
    ranks: Mapping[str, int],
    gates: Mapping[str, TokenGate],
    mag: Collection[str],
    bias: Collection[str],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> dict[str, Weights]:
    """A random adapter with these gates and outputs; a module that has only outputs needs no rank."""
    unranked = dict.fromkeys([*mag, *bias], 0)
    adapter = random_adapter(specs, unranked | dict(ranks), dtype, generator)
    return with_outputs(mixed(adapter, gates, generator), mag, bias, generator)


def load(pool: AdapterPool, adapter: Adapter, borrowed: Collection[str] = (), lender: int | None = None) -> int:
    """Reserve, write and publish; the slot. Modules in `borrowed` have the lender's B."""
    gates = {module: w.gate for module, w in adapter.items() if w.gate is not None}
    mag, bias = ({m for m, w in adapter.items() if getattr(w, name) is not None} for name in ("mag", "bias"))
    ranks, bands = {module: w.a.shape[0] for module, w in adapter.items()}, {m: w.bands for m, w in adapter.items()}
    slot = pool.reserve(ranks, gates, mag=mag, bias=bias, borrowed=borrowed, bands=bands, lender=lender)
    for module, w in adapter.items():
        b = None if module in borrowed else w.b
        pool.write(slot, module, w.a, b, w.scale, router=w.router, expert=w.expert, mag=w.mag, bias=w.bias)
    pool.publish(slot)
    return slot


POPULARITIES = ("distinct", "uniform", "zipf", "identical")


def ragged_batch(
    popularity: str,
    *,
    rng: np.random.Generator,
    requests: int,
    adapters: int,
    tokens: int,
    base_share: float = 0.2,
) -> tuple[Ints, Ints]:
    """Adapter (−1: base model) and length of each request; lengths add up to `tokens` and some may be zero.

    distinct: another adapter per request, as far as there are · uniform: all equally likely · zipf: the n-th with
    weight 1/n · identical: one adapter.
    """
    if popularity == "distinct":
        which = rng.permutation(requests) % adapters
    elif popularity == "identical":
        which = np.full(requests, rng.integers(adapters))
    elif popularity in ("uniform", "zipf"):
        weight = 1.0 / np.arange(1, adapters + 1) ** (popularity == "zipf")
        which = rng.choice(adapters, requests, p=weight / weight.sum())
    else:
        raise ValueError(f'no popularity "{popularity}"; there are {", ".join(POPULARITIES)}')
    which = np.where(rng.random(requests) < base_share, -1, which)
    lengths = rng.multinomial(tokens, rng.dirichlet(np.ones(requests)))
    return which.astype(np.int32), lengths.astype(np.int32)


class Gates(NamedTuple):
    """`g_TE` in float64, and `margin_T`: how far each token is from another selection."""

    g: Tensor
    margin: Tensor


def exact_gates(gate: TokenGate, logits: Tensor, taken: Tensor | None = None) -> Gates:
    """The gate of float64 logits, a row per token, by sorting: `g_TE`, or `g_TG` with groups.

    `taken_TE`: for a gate with a capacity, whether the expert has room for the token.
    A margin is a distance between scores or between probabilities.
    """
    scores = logits[:, : gate.experts]
    scores = (scores.abs() if gate.absolute else scores) / gate.temperature
    p, order = torch.softmax(scores, 1).sort(dim=1, descending=True, stable=True)
    before = p.cumsum(1) - p
    place = torch.arange(gate.experts, device=p.device)
    keep = torch.ones_like(p, dtype=torch.bool)
    margin = torch.full_like(p[:, 0], torch.inf)
    if gate.select == "top_k":
        keep = (place < gate.k).expand_as(p)
    elif gate.select == "top_p":
        keep = before < gate.p
        # The first expert is in whatever the rounding.
        margin = (before - gate.p).abs().amin(1)
    elif gate.select == "threshold":
        keep = p >= gate.threshold
        margin = (p - gate.threshold).abs().amin(1)
    elif gate.adaptive:
        tau = _own_threshold(gate, logits)
        keep, margin = p >= tau, (p - tau).abs().amin(1)
        p = p - tau
    if gate.select in ("top_k", "top_p") and gate.experts > 1:
        ranked = scores.gather(1, order)
        gap = torch.where(keep[:, :-1] & ~keep[:, 1:], ranked[:, :-1] - ranked[:, 1:], torch.inf)
        margin = torch.minimum(margin, gap.amin(1))
    value = p * keep
    if gate.renormalise:
        total = value.sum(1, keepdim=True)
        value = torch.where(total > 0, value / (total + gate.eps), 0)
    if gate.one:
        value = keep.to(p.dtype)
    g = torch.zeros_like(p).scatter(1, order, value)
    if taken is not None:
        g = g * taken
    return Gates(_by_group(gate, g), margin)


def room(gate: TokenGate, logits: Tensor, sequence: Ints) -> Tensor:
    """`r_TE`: whether an expert has taken fewer than `capacity` of the earlier tokens of the token's sequence.

    `sequence_T`: which one each token belongs to; all begin here.
    """
    selected = exact_gates(replace(gate.router, one=True), logits).g > 0
    free = torch.empty_like(selected)
    taken: dict[int, Tensor] = {}
    for t, number in enumerate(sequence.tolist()):
        before = taken.get(number, torch.zeros(gate.experts, dtype=torch.int64, device=logits.device))
        free[t] = before < gate.capacity
        taken[number] = before + (selected[t] & free[t])
    return free


def gate_error(gate: TokenGate, logits: Tensor, delta: Tensor, tolerance: Tolerance) -> Tensor:
    """How far off g may be, elementwise and to first order, where float64 `logits` are off by up to `delta` [T, 1].

    Softmax makes 2 δ p of an error δ of the scores, and σ at most δ τ of one of the threshold's logit.
    """
    g = exact_gates(gate.router, logits).g
    rounding = GATE_ROUNDING * tolerance.sum
    if not gate.adaptive:
        return _by_group(gate, (4 * delta / gate.temperature + rounding) * g)
    if gate.one:
        return _by_group(gate, 0 * g)
    tau, own = _own_threshold(gate, logits), logits[:, gate.experts :]
    p = g + tau if not gate.renormalise else exact_gates(replace(gate.router, renormalise=False), logits).g + tau
    own_delta = delta + tolerance.sum * (own.abs() + abs(gate.bias))
    error = (g > 0) * ((2 * delta / gate.temperature + rounding) * p + (own_delta + rounding) * tau.abs())
    if gate.renormalise:
        total = ((p - tau) * (g > 0)).sum(1, keepdim=True) + gate.eps
        error = torch.where(total > 0, (error + g * error.sum(1, keepdim=True)) / total, 0) + rounding * g
    return _by_group(gate, error)


def rounded_scores(gate: TokenGate, logits: Tensor) -> Tensor:
    """δ [T, 1] of float32 logits that are exact: 4 u max|l|, for the roundings of 1 / temperature, of the quotient, and
    of the distance to the largest, which is up to twice as long."""
    return 4 * TOLERANCE[torch.float32].y * logits[:, : gate.experts].abs().amax(1, keepdim=True)


def _own_threshold(gate: TokenGate, logits: Tensor) -> Tensor:
    """τ [T, 1] of an adaptive gate."""
    return gate.threshold * torch.sigmoid(logits[:, gate.experts :] + gate.bias)


def _by_group(gate: TokenGate, g: Tensor) -> Tensor:
    if not gate.groups:
        return g
    member = [[group >> e & 1 for group in gate.groups] for e in range(gate.experts)]
    return g @ torch.tensor(member, dtype=torch.float64, device=g.device)


class Exact(NamedTuple):
    """float64 result, the elementwise error that its dtype's tolerance allows, and `margin_T` of the gates."""

    y: Tensor
    bound: Tensor
    margin: Tensor


def exact(spec: SiteSpec, adapters: Sequence[Adapter], which: Ints, lengths: Ints, x: Tensor, y: Tensor) -> Exact:
    """The site's result in float64 from the adapters' own tensors: no pool, no plan, no kernel of this package.

    Each request is a whole sequence. Rows of x and y beyond the lengths' sum are padding; their bound and that of base
    rows is zero.
    """
    tolerance = TOLERANCE[y.dtype]
    out, bound = y.double(), torch.zeros(y.shape, dtype=torch.float64, device=y.device)
    margin = torch.full(y.shape[:1], torch.inf, dtype=torch.float64, device=y.device)
    of_token, sequence = np.repeat(which, lengths), np.repeat(np.arange(len(which), dtype=np.int32), lengths)
    for index in np.unique(of_token[of_token >= 0]).tolist():
        rows = torch.from_numpy(np.flatnonzero(of_token == index)).to(y.device)
        xs, column = x[rows].double(), 0
        for module, d_out in zip(spec.modules, spec.d_outs, strict=True):
            cols, column = slice(column, column + d_out), column + d_out
            if module not in adapters[index]:
                continue
            w = adapters[index][module]
            a, b, scale = (t.to(y.device).double() for t in w[:3])
            total, error = out[rows, cols], bound[rows, cols]
            if w.mag is not None:
                total = total * w.mag.to(y.device).double()
                error += tolerance.sum * total.abs()
            if w.bias is not None:
                bias = w.bias.to(y.device).double()
                total, error = total + bias, error + tolerance.sum * bias.abs()
            expert, gates, wrong = _experts(w, xs, sequence[of_token == index], tolerance)
            for e in range(gates.g.shape[1]):
                mine, g = expert == e, gates.g[:, e : e + 1]
                h = xs @ a[mine].t() * scale[mine]
                sums = xs.abs() @ a[mine].abs().t() * scale[mine].abs()
                total += g * (h @ b[mine])
                error += (tolerance.h * g + wrong[:, e : e + 1]) * (h.abs() @ b[mine].abs())
                error += tolerance.sum * g * (sums @ b[mine].abs())
            out[rows, cols], bound[rows, cols] = total, error + tolerance.y * total.abs()
            margin[rows] = torch.minimum(margin[rows], gates.margin)
    return Exact(out, bound, margin)


def router_logits(gate: TokenGate, router: Tensor, x: Tensor, tolerance: Tolerance) -> tuple[Tensor, Tensor]:
    """float64 `l_TE` of a float64 `router_EI` and tokens `x_TI`, and how far off each may be.

    Of LayerNorm(x): the mean is off by up to m = u_sum Σ_i |x_i| / I, which Σ_i W_ei takes along, and the variance v by
    u_sum v + m², as squares around a wrong mean are larger by its error's.
    """
    u, sums = tolerance.sum, x.abs() @ router.abs().t()
    if gate.layer_norm_eps is None:
        return x @ router.t(), u * sums
    off = u * x.abs().mean(1, keepdim=True)
    variance = x.var(1, keepdim=True, correction=0) + gate.layer_norm_eps
    logits = torch.nn.functional.layer_norm(x, x.shape[1:], eps=gate.layer_norm_eps) @ router.t()
    # W x and mean(x) Σ W are as large as these sums, whatever is left of their difference.
    error = (2 * u * sums + off * router.sum(1).abs()) / variance.sqrt()
    return logits, error + logits.abs() * (2 * u + off**2 / variance)


def _experts(w: Weights, x: Tensor, sequence: Ints, tolerance: Tolerance) -> tuple[Tensor, Gates, Tensor]:
    """Expert of each rank row, the gates of tokens `x_TI`, and the errors `g` may have."""
    if w.gate is None or w.router is None or w.expert is None:
        one = x.new_ones(x.shape[0], 1)
        return torch.zeros(w.a.shape[0], device=x.device), Gates(one, x.new_full(x.shape[:1], torch.inf)), 0 * one
    router = w.router.to(x.device).double()
    logits, error = router_logits(w.gate, router, x, tolerance)
    delta = error.amax(1, keepdim=True)
    taken = room(w.gate, logits, sequence) if w.gate.capacity else None
    return w.expert.to(x.device), exact_gates(w.gate, logits, taken), gate_error(w.gate, logits, delta, tolerance)


def clear_inputs(
    spec: SiteSpec, adapters: Sequence[Adapter], which: Ints, lengths: Ints, draw: Callable[[], Tensor]
) -> Tensor:
    """x from `draw`, its rows drawn anew until no token's selection of experts hangs on a rounding."""
    x = draw()
    y = x.new_zeros(x.shape[0], sum(spec.d_outs))
    for _ in range(100):
        unclear = exact(spec, adapters, which, lengths, x, y).margin < MARGIN
        if not unclear.any():
            return x
        x = torch.where(unclear[:, None], draw(), x)
    raise AssertionError(f"no inputs with clear selections for site {spec.name}")


def worst(got: Tensor, want: Exact) -> float:
    """Largest error in units of its bound: correct is at most 1. NaN, or a change without a bound: infinity."""
    error = (got.double() - want.y).abs()
    ratio = torch.where(want.bound > 0, error / want.bound.clamp(min=1e-300), error * torch.inf)
    # 0 · inf: a row that must not change and did not.
    ratio = torch.where(error == 0, torch.zeros_like(ratio), ratio)
    return float(ratio.nan_to_num(nan=torch.inf).max()) if ratio.numel() else 0.0


def worst_trace(
    traced: Traced, specs: Sequence[SiteSpec], adapters: Mapping[int, Adapter], x: Mapping[str, Tensor]
) -> float:
    """Largest error of traced logits in units of the bound, over the modules whose site has its input in `x`.

    `adapters` by slot; `x_TI` by site. Infinite where rows or rules are not the adapter's own.
    """
    modules = [(spec, module) for spec in specs for module in spec.modules]
    error = 0.0
    for routed in traced:
        if not routed.rows.size or routed.rows.max() >= TRACE_TOKENS:
            return float("inf")
        for gate, logits in zip(routed.gates, routed.logits, strict=True):
            spec, module = modules[gate]
            w = adapters[routed.slot][module]
            if w.router is None or w.gate is None or w.gate.router != routed.rule:
                return float("inf")
            if spec.name not in x:
                continue
            rows, router = x[spec.name][torch.from_numpy(routed.rows)].double().cpu(), w.router.double().cpu()
            want, bound = router_logits(w.gate, router, rows, TOLERANCE[w.router.dtype])
            # The trace is float32, whatever the sums were.
            bound += TOLERANCE[torch.float32].y * want.abs()
            error = max(error, float(((logits.double() - want).abs() / bound).max()))
    return error
