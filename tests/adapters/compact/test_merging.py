"""One site: what is merged and cut, against dense matrices in float64."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters import LoweredSite
from loramux_adapters.compact.merging import CompactedSite, compact_site
from loramux_adapters.compact.options import Options
from loramux_adapters.mixture import token_site

from .mixtures import Draw, best, dense, random_site

PROPERTY = settings(max_examples=25, deadline=None)
widths, seeds = st.integers(1, 24), st.integers(0, 1000)
expert_ranks = st.lists(st.integers(1, 6), min_size=2, max_size=8)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def effective(result: CompactedSite, like: LoweredSite, groups: Sequence[int], expert: int) -> torch.Tensor:
    """The new ΔW of a scored expert: its group's rows and its own."""
    return dense(result.site, [groups[expert], max(groups) + 1 + expert], like)


def numbered(values: Sequence[int]) -> list[int]:
    order = list(dict.fromkeys(values))
    return [order.index(value) for value in values]


@st.composite
def sites(draw: st.DrawFn) -> tuple[LoweredSite, list[int], list[float]]:
    """A site, groups of its experts with fewer groups than experts, and usage."""
    ranks = draw(expert_ranks)
    site = random_site(ranks, draw(widths), draw(widths), draw(seeds), dtype=draw(DTYPES))
    groups = draw(st.lists(st.integers(0, len(ranks) - 2), min_size=len(ranks), max_size=len(ranks)))
    usage = draw(st.lists(st.floats(0, 1), min_size=len(ranks), max_size=len(ranks)))
    return site, numbered(groups), usage


@PROPERTY
@given(drawn=sites())
def test_what_saves_nothing_changes_nothing(drawn: tuple[LoweredSite, list[int], list[float]]) -> None:
    site, _, usage = drawn
    for options in (Options(rank=6), Options(experts=8), Options(error=1e-9)):
        result = compact_site(site, options, None, usage)
        assert result.site is site and not any(result.distances)


@PROPERTY
@given(drawn=sites(), identity=st.booleans())
def test_equal_experts_merge_exactly(drawn: tuple[LoweredSite, list[int], list[float]], identity: bool) -> None:
    """Bit for bit: every member keeps its output, whatever it is weighted with."""
    first, groups, usage = drawn
    ranks = [2 + g for g in sorted(set(groups))]
    draw, d_in, d_out = Draw(1), first.a.shape[1], first.b.shape[1]
    a, b = [draw(r, d_in) for r in ranks], [draw(d_out, r) for r in ranks]
    site = token_site([a[g] for g in groups], [b[g] for g in groups], [torch.ones(ranks[g]) for g in groups], "g")
    result = compact_site(site, Options(experts=1), groups, usage)
    assert result.site is not None and result.site.rank == sum(ranks)
    assert result.distances == (0.0,) * len(groups)
    for e, g in enumerate(groups):
        assert torch.equal(effective(result, site, groups, e), b[g].double() @ a[g].double())


@PROPERTY
@given(drawn=sites(), seed=seeds)
def test_the_same_expert_in_other_factors_is_the_same_expert(
    drawn: tuple[LoweredSite, list[int], list[float]], seed: int
) -> None:
    """(B T⁻¹)(T A): averaging A and B would give another matrix altogether."""
    site, _, usage = drawn
    draw = Draw(seed)
    a, b = draw(3, site.a.shape[1]), draw(site.b.shape[1], 3)
    turn = torch.linalg.qr(draw(3, 3).double())[0]
    turned = [(turn @ a.double()).float(), a], [(b.double() @ turn.T).float(), b]
    pair = token_site(*turned, [torch.ones(3)] * 2, "g")
    result = compact_site(pair, Options(experts=1), [0, 0], usage[:2])
    assert result.site is not None and result.site.rank <= 3
    assert max(result.distances) <= 1e-5 * max(result.norms)


@PROPERTY
@given(drawn=sites(), rank=st.none() | st.integers(1, 4))
def test_groups_are_no_further_than_the_cut_mean_of_their_members(
    drawn: tuple[LoweredSite, list[int], list[float]], rank: int | None
) -> None:
    site, groups, usage = drawn
    result = compact_site(site, Options(experts=1, rank=rank), groups, usage)
    assert result.site is not None
    experts = [dense(site, [e], site) for e in range(len(groups))]
    for number in set(groups):
        members = [e for e, g in enumerate(groups) if g == number]
        ranks = [int((site.expert == e).sum()) for e in members]
        weights = [usage[e] for e in members]
        weights = weights if sum(weights) > 0 else [1.0] * len(members)
        mean = sum(w * experts[e] for w, e in zip(weights, members, strict=True)) / sum(weights)
        largest = max(ranks) if rank is None else min(rank, *[max(ranks)])
        ideal = best(mean, largest)
        loss = sum(
            w * float((effective(result, site, groups, e) - experts[e]).norm()) ** 2
            for w, e in zip(weights, members, strict=True)
        )
        wanted = sum(w * float((ideal - experts[e]).norm()) ** 2 for w, e in zip(weights, members, strict=True))
        # Rows are rounded to the site's dtype.
        size = sum(w * float(experts[e].norm()) ** 2 for w, e in zip(weights, members, strict=True))
        assert loss <= wanted + 0.02 * size
        assert int((result.site.expert == number).sum()) <= largest


@PROPERTY
@given(drawn=sites(), options=st.sampled_from([Options(experts=1), Options(experts=1, residual=2), Options(rank=2)]))
def test_what_is_said_is_how_far_the_stored_experts_are(
    drawn: tuple[LoweredSite, list[int], list[float]], options: Options
) -> None:
    site, groups, usage = drawn
    merged = options.experts is not None
    result = compact_site(site, options, groups if merged else None, usage)
    for e, (size, moved) in enumerate(zip(result.norms, result.distances, strict=True)):
        old = dense(site, [e], site)
        new = effective(result, site, groups, e) if merged else dense(result.site, [e], site)
        assert abs(size - float(old.norm())) <= 1e-12 * size
        assert abs(moved - float((new - old).norm())) <= 1e-9 * size


@PROPERTY
@given(drawn=sites(), error=st.floats(1e-4, 0.9), merged=st.booleans())
def test_every_expert_is_within_the_bound_and_no_rows_are_wasted(
    drawn: tuple[LoweredSite, list[int], list[float]], error: float, merged: bool
) -> None:
    site, groups, usage = drawn
    alone = compact_site(site, Options(error=error), None, usage)
    result = compact_site(site, Options(experts=1, error=error), groups, usage) if merged else alone
    for size, moved in zip(result.norms, result.distances, strict=True):
        assert moved <= error * size * (1 + 1e-9)
    assert result.site is not None and alone.site is not None
    assert result.site.rank <= alone.site.rank <= site.rank


@PROPERTY
@given(drawn=sites())
def test_a_residual_of_full_rank_brings_every_expert_back(drawn: tuple[LoweredSite, list[int], list[float]]) -> None:
    site, groups, usage = drawn
    result = compact_site(site, Options(experts=1, residual=24), groups, usage)
    for size, moved in zip(result.norms, result.distances, strict=True):
        assert moved <= (1e-5 if site.a.dtype == torch.float32 else 0.05) * size + 0.01 * max(result.norms)


def test_a_plain_site_has_one_expert_and_keeps_its_other_fields() -> None:
    site = random_site([6], 20, 12)
    plain = LoweredSite(site.a, site.b, site.scale, bias=torch.ones(12), magnitude=torch.ones(12))
    result = compact_site(plain, Options(rank=2))
    assert result.site is not None and result.site.expert is None and result.site.rank == 2
    assert result.site.bias is plain.bias and result.site.magnitude is plain.magnitude
    wanted = best(dense(plain, [0], plain), 2)
    torch.testing.assert_close(dense(result.site, [0], plain), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_shared_rows_of_a_are_followed() -> None:
    """HydraLoRA: every expert reads the same A."""
    draw = Draw()
    site = token_site([draw(4, 10)], [draw(8, 4) for _ in range(3)], [torch.ones(4)] * 3, "g")
    assert site.arow is not None
    result = compact_site(site, Options(rank=1), None, [1.0] * 3)
    assert result.site is not None and result.site.arow is None and result.site.rank == 3
    for e in range(3):
        old = dense(site, [e], site)
        assert abs(result.distances[e] - float((best(old, 1) - old).norm())) < 1e-5


@pytest.mark.parametrize("groups", [None, [0, 0]])
def test_a_site_that_adds_nothing_goes(groups: list[int] | None) -> None:
    zero = token_site([torch.ones(2, 5)] * 2, [torch.zeros(4, 2)] * 2, [torch.ones(2)] * 2, "g")
    result = compact_site(zero, Options(experts=1, error=0.1), groups, [0.5, 0.5])
    assert result.site is None and result.distances == (0.0, 0.0)
    biased = compact_site(replace(zero, bias=torch.ones(4)), Options(experts=1, error=0.1), groups, [0.5, 0.5])
    assert biased.site is not None and (biased.site.rank, biased.site.gate, biased.site.expert) == (0, None, None)


def test_a_site_without_rank_stays() -> None:
    site = LoweredSite(torch.empty(0, 5), torch.empty(0, 4), torch.empty(0), magnitude=torch.ones(4))
    assert compact_site(site, Options(rank=1)).site is site
