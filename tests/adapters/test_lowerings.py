"""The identities by which different methods are one form, for random shapes, each against a loop over experts.

Every adapter passes through the native file, as one that is served does.
"""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters import BaseModel, LoweredAdapter, LoweredSite, lower
from loramux_adapters.gate import Gate, GateValue, Norm, PostMap, Select
from loramux_adapters.mixture import token_site
from loramux_adapters.native import write_native
from loramux_kernels import TokenGate
from loramux_kernels.reference.gate import gate as kernel_gate

from .form import gate_values, site_delta
from .mixture_reference import expert_weights, mixture_delta

TOKENS = 6
GATE = "router"
PROPERTY = settings(max_examples=40, deadline=None)

widths = st.integers(1, 40)
seeds = st.integers(0, 10_000)
expert_ranks = st.lists(st.integers(1, 12), min_size=1, max_size=16)


class Draw:
    """Random tensors of one seed, float32."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)


def stored(factory, site, gate=None):
    """The adapter with this one site, as it comes back from its file; every check on the way passes."""
    d_in, d_out = site.a.shape[1], site.b.shape[1]
    gates = {} if gate is None else {GATE: gate}
    path = factory.mktemp("native") / "adapter.safetensors"
    write_native(path, LoweredAdapter("mixture", {"site": site}, gates=gates), "tiny")
    return lower(path, BaseModel("tiny", {"site": (d_in, d_out)}))


def delta(factory, x, site, gate=None):
    adapter = stored(factory, site, gate)
    return site_delta(adapter.sites["site"], adapter.gates, x)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * max(1.0, float(expected.abs().max())))


def experts_of(draw, ranks, d_in, d_out):
    a = [draw(rank, d_in) for rank in ranks]
    b = [draw(d_out, rank) for rank in ranks]
    scales = draw(len(ranks)).tolist()
    return a, b, scales


def rows(ranks, scales):
    return [torch.full((rank,), scale) for rank, scale in zip(ranks, scales, strict=True)]


@PROPERTY
@given(ranks=expert_ranks, d_in=widths, d_out=widths, k=st.none() | st.integers(1, 16), seed=seeds)
def test_stacked_experts_with_a_gate_in_rank_space_are_the_sum_over_experts(
    tmp_path_factory, ranks, d_in, d_out, k, seed
):
    draw = Draw(seed)
    a, b, scales = experts_of(draw, ranks, d_in, d_out)
    router, x = draw(len(ranks), d_in), draw(TOKENS, d_in)
    k = None if k is None else min(k, len(ranks))
    gate = Gate(router, select=Select.ALL if k is None else Select.TOP_K, k=k)
    site = token_site(a, b, rows(ranks, scales), GATE)
    assert (site.rank, site.a.shape) == (sum(ranks), (sum(ranks), d_in))
    assert_equal(delta(tmp_path_factory, x, site, gate), mixture_delta(x, router, a, b, scales, k))


@PROPERTY
@given(experts=st.integers(1, 16), rank=st.integers(1, 12), d_in=widths, d_out=widths, seed=seeds)
def test_a_shared_a_is_stored_once_and_means_one_copy_per_expert(tmp_path_factory, experts, rank, d_in, d_out, seed):
    draw = Draw(seed)
    a, router, x = draw(rank, d_in), draw(experts, d_in), draw(TOKENS, d_in)
    _, b, scales = experts_of(draw, [rank] * experts, d_in, d_out)
    gate = Gate(router, select=Select.ALL, norm=Norm.SOFTMAX)
    shared = token_site([a], b, rows([rank] * experts, scales), GATE)
    copied = token_site([a] * experts, b, rows([rank] * experts, scales), GATE)
    assert len(shared.a) == rank and shared.expanded_a.equal(copied.a)
    expected = mixture_delta(x, router, [a] * experts, b, scales)
    assert_equal(delta(tmp_path_factory, x, shared, gate), expected)
    assert_equal(delta(tmp_path_factory, x, copied, gate), expected)


@PROPERTY
@given(
    experts=st.integers(1, 16), d_in=widths, temperature=st.sampled_from([0.25, 1.0, 3.0]), seed=seeds, data=st.data()
)
def test_softmax_top_k_renormalised_is_top_k_then_softmax(experts, d_in, temperature, seed, data):
    draw, k = Draw(seed), data.draw(st.integers(1, experts))
    router, x = draw(experts, d_in), draw(TOKENS, d_in)
    found = gate_values(Gate(router, select=Select.TOP_K, k=k, temperature=temperature), x)
    scores = x.double() @ router.double().T / temperature
    best, chosen = scores.topk(k, dim=1)
    expected = torch.zeros_like(scores).scatter(1, chosen, best.softmax(dim=1))
    assert_equal(found, expected)
    # Without the division the weights are those of all experts: less than one together unless all are chosen.
    kept = gate_values(Gate(router, select=Select.TOP_K, k=k, temperature=temperature, norm=Norm.SOFTMAX), x)
    assert_equal(kept, scores.softmax(dim=1) * (found > 0))


@PROPERTY
@given(experts=st.integers(2, 16), d_in=widths, seed=seeds, data=st.data())
def test_of_equal_scores_the_lowest_experts_are_taken(experts, d_in, seed, data):
    draw, k = Draw(seed), data.draw(st.integers(1, experts - 1))
    # Whole numbers, so that equal rows and rows that differ alike give scores that are equal to the last bit.
    kinds = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=experts, max_size=experts)))
    router = (draw(3, d_in) * 2).round()[kinds]
    x = (draw(TOKENS, d_in) * 2).round()
    found = gate_values(Gate(router, select=Select.TOP_K, k=k), x)
    for token, weights in zip(x, found, strict=True):
        scores = (router @ token).tolist()
        assert_equal(weights, torch.tensor(expert_weights(scores, k), dtype=torch.float64))
        taken = [e for e in range(experts) if weights[e] > 0]
        for e in range(experts):
            better = [other for other in range(experts) if (scores[other], -other) > (scores[e], -e)]
            # A weight may round to zero beside a far better one.
            assert e not in taken or len(better) < k


@PROPERTY
@given(ranks=expert_ranks, experts=st.integers(1, 16), d_in=widths, d_out=widths, seed=seeds, data=st.data())
def test_an_expert_map_is_experts_tied_to_each_other(tmp_path_factory, ranks, experts, d_in, d_out, seed, data):
    draw, k = Draw(seed), data.draw(st.integers(1, experts))
    choice = data.draw(st.lists(st.integers(0, len(ranks) - 1), min_size=experts, max_size=experts))
    # Groups are numbered in the order of their first expert.
    number = {group: i for i, group in enumerate(dict.fromkeys(choice))}
    groups = [number[group] for group in choice]
    ranks = [ranks[group] for group in number]
    a, b, scales = experts_of(draw, ranks, d_in, d_out)
    router, x = draw(experts, d_in), draw(TOKENS, d_in)
    gate = Gate(router, select=Select.TOP_K, k=k, expert_map=torch.tensor(groups, dtype=torch.int32))
    tied = mixture_delta(x, router, [a[g] for g in groups], [b[g] for g in groups], [scales[g] for g in groups], k)
    assert_equal(delta(tmp_path_factory, x, token_site(a, b, rows(ranks, scales), GATE), gate), tied)


@PROPERTY
@given(ranks=expert_ranks, d_in=widths, d_out=widths, seed=seeds, data=st.data())
def test_rows_of_its_own_beside_its_groups_are_one_longer_expert(tmp_path_factory, ranks, d_in, d_out, seed, data):
    """Expert e computes what its group shares and what is its own; the router never hears of either."""
    draw, experts = Draw(seed), len(ranks)
    map_ = [0, *(1 for _ in range(experts - 1))]
    shared = experts_of(draw, [data.draw(st.integers(1, 4)) for _ in set(map_)], d_in, d_out)
    own = experts_of(draw, ranks, d_in, d_out)
    router, x, k = draw(experts, d_in), draw(TOKENS, d_in), data.draw(st.integers(1, experts))
    a, b, scales = ([*ours, *theirs] for ours, theirs in zip(shared, own, strict=True))
    site = token_site(a, b, rows([part.shape[1] for part in b], scales), GATE)
    gate = Gate(router, select=Select.TOP_K, k=k, expert_map=torch.tensor(map_, dtype=torch.int32))
    expected = mixture_delta(x, router, *([part[g] for g in map_] for part in shared), k)
    expected = expected + mixture_delta(x, router, *own, k)
    assert_equal(delta(tmp_path_factory, x, site, gate), expected)


@PROPERTY
@given(ranks=expert_ranks, d_in=widths, d_out=widths, seed=seeds)
def test_loras_that_add_up_are_one_of_the_summed_rank(tmp_path_factory, ranks, d_in, d_out, seed):
    """Boosting and chains of LoRAs (XGBLoRA, RAC-LoRA, COLA): every gate is one."""
    draw = Draw(seed)
    a, b, scales = experts_of(draw, ranks, d_in, d_out)
    x = draw(TOKENS, d_in)
    site = LoweredSite(torch.cat(a), torch.cat([part.T for part in b]), torch.cat(rows(ranks, scales)))
    parts = zip(a, b, scales, strict=True)
    expected = sum(scale * (x.double() @ down.double().T) @ up.double().T for down, up, scale in parts)
    assert_equal(delta(tmp_path_factory, x, site), expected)


@PROPERTY
@given(ranks=expert_ranks, width=st.integers(1, 12), d_out=widths, seed=seeds)
def test_loras_side_by_side_are_a_block_diagonal_one(tmp_path_factory, ranks, width, d_out, seed):
    """MELoRA: LoRA i reads the i-th slice of x and writes the i-th slice of y."""
    draw, n = Draw(seed), len(ranks)
    a, b, scales = experts_of(draw, ranks, width, d_out)
    x = draw(TOKENS, n * width)
    site = LoweredSite(torch.block_diag(*a), torch.block_diag(*(part.T for part in b)), torch.cat(rows(ranks, scales)))
    slices = x.double().split(width, dim=1)
    parts = zip(slices, a, b, scales, strict=True)
    expected = torch.cat([scale * (part @ down.double().T) @ up.double().T for part, down, up, scale in parts], dim=1)
    assert_equal(delta(tmp_path_factory, x, site), expected)


@PROPERTY
@given(ranks=expert_ranks, d_in=widths, d_out=widths, shared=st.integers(1, 12), seed=seeds)
def test_factors_of_a_shared_projection_fold_into_either_side(tmp_path_factory, ranks, d_in, d_out, shared, seed):
    """MALoRA, A_e = P_e · S: fold P_e into A, or into B over the one S that all experts share."""
    draw, n = Draw(seed), len(ranks)
    s, router, x = draw(shared, d_in), draw(n, d_in), draw(TOKENS, d_in)
    p = [draw(rank, shared).double() for rank in ranks]
    _, b, scales = experts_of(draw, ranks, d_in, d_out)
    left = [part @ s.double() for part in p]
    right = [up.double() @ part for up, part in zip(b, p, strict=True)]
    expected = mixture_delta(x, router, left, b, scales)
    gates = {GATE: Gate(router)}
    # In float64, which files do not hold: the products are no float32 numbers.
    folded_a = token_site(left, [up.double() for up in b], rows(ranks, scales), GATE)
    folded_b = token_site([s.double()], right, rows([shared] * n, scales), GATE)
    assert_equal(site_delta(folded_a, gates, x), expected)
    assert_equal(site_delta(folded_b, gates, x), expected)


@PROPERTY
@given(
    experts=st.integers(1, 16),
    d_in=widths,
    top_k=st.booleans(),
    norm=st.sampled_from([Norm.SOFTMAX, Norm.RENORM]),
    value=st.sampled_from(GateValue),
    post=st.sampled_from(PostMap),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    eps=st.sampled_from([0.0, 0.125]),
    seed=seeds,
    data=st.data(),
)
def test_the_kernels_define_the_same_gate(experts, d_in, top_k, norm, value, post, temperature, eps, seed, data):
    draw, k = Draw(seed), data.draw(st.integers(1, experts))
    router, x = draw(experts, d_in), draw(TOKENS, d_in)
    select = Select.TOP_K if top_k else Select.ALL
    gate = Gate(
        router,
        select=select,
        k=k if top_k else None,
        norm=norm,
        value=value,
        post=post,
        temperature=temperature,
        eps=eps,
    )
    rule = TokenGate(
        experts,
        select=select.value,
        k=k,
        renormalise=norm is Norm.RENORM,
        eps=eps,
        temperature=temperature,
        absolute=post is PostMap.ABS,
        one=value is GateValue.ONE,
    )
    found = gate_values(gate, x)
    for token, weights in zip(x.double(), found, strict=True):
        assert_equal(weights, kernel_gate(rule, router.double() @ token))
    if norm is Norm.RENORM and eps == 0 and value is GateValue.PROBABILITY:
        assert all(math.isclose(total, 1.0, rel_tol=1e-12) for total in found.sum(dim=1).tolist())
