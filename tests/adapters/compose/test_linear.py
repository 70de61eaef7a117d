"""Weighted sums: the same function as Σ w_i ΔW_i, and what is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters import (
    AdapterNotFinite,
    AdapterUnsupportedFeature,
    Carry,
)
from loramux_adapters.compose.arrow import arrow
from loramux_adapters.compose.linear import linear
from loramux_adapters.lowered import CarryKind
from loramux_adapters.native import digest_of

from ..checkpoints import BASE
from ..form import site_delta
from .plain import MODULES, plain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
parts = st.lists(
    st.tuples(
        st.builds(
            plain,
            st.integers(0, 10**6),
            st.lists(st.sampled_from(MODULES), min_size=1, unique=True),
            st.integers(1, 4),
            st.sampled_from(DTYPES),
            st.booleans(),
            st.booleans(),
        ),
        st.floats(-100, 100).filter(lambda w: abs(w) > 1e-6),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(parts)
def test_the_sum_is_the_weighted_sum_of_all(adapters):
    composed = linear([("p", adapter, weight) for adapter, weight in adapters], base=BASE)
    assert composed.sites.keys() == {module for adapter, _ in adapters for module in adapter.sites}
    for module, site in composed.sites.items():
        x = torch.randn(3, BASE.linears[module][0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        touching = [(adapter.sites[module], weight) for adapter, weight in adapters if module in adapter.sites]
        terms = [weight * _effect(one, x) for one, weight in touching]
        size = sum(term.abs() for term in terms) + 1
        # A scale times a weight is rounded once to float32; the sums of a term of many ranks may cancel.
        assert ((_effect(site, x) - sum(terms)).abs() <= 1e-4 * size).all()
        assert site.rank == sum(one.rank for one, _ in touching)


def test_with_weights_that_are_powers_of_two_nothing_is_rounded():
    one, two = plain(1, dtype=torch.bfloat16), plain(2, rank=2, dtype=torch.bfloat16)
    composed = linear([("one", one, 0.5), ("two", two, -4.0)], base=BASE)
    for module, site in composed.sites.items():
        first, second = (adapter.sites[module] for adapter in (one, two))
        assert torch.equal(_matrix(site), torch.cat([0.5 * _ranks(first), -4.0 * _ranks(second)]).sum(0))
        assert site.a.dtype == torch.bfloat16


def test_names_of_the_parts_are_not_in_the_result():
    one, two = plain(1), plain(2)
    digests = {digest_of(linear([(n, one, 0.5), ("x", two, 1.0)], base=BASE)) for n in ("a", "b")}
    assert len(digests) == 1
    assert digest_of(linear([("a", one, 0.25), ("x", two, 1.0)], base=BASE)) not in digests


def _with(**fields):
    adapter = plain(1)
    module = MODULES[0]
    return replace(adapter, sites={**adapter.sites, module: replace(adapter.sites[module], **fields)})


@pytest.mark.parametrize(
    ("adapter", "field"),
    [
        (_with(magnitude=torch.ones(BASE.linears[MODULES[0]][1])), "magnitude"),
        (_with(carry=Carry(MODULES[1], CarryKind.PREV_U)), "carry"),
        (arrow([("a", plain(1)), ("b", plain(2))], base=BASE, top_k=1), "gates"),
    ],
    ids=["dora", "reslora", "mixture"],
)
def test_what_is_no_matrix_per_layer_is_refused_by_name(adapter, field):
    with pytest.raises(AdapterUnsupportedFeature, match=f"'odd'.*{field}") as refused:
        linear([("fine", plain(3), 1.0), ("odd", adapter, 1.0)], base=BASE)
    assert refused.value.field == "odd" and refused.value.hint


def test_a_scale_that_overflows_is_refused():
    with pytest.raises(AdapterNotFinite):
        linear([("a", _with(scale=torch.full((3,), 3e38)), 100.0)], base=BASE)


def _effect(site, x):
    return site_delta(site, {}, x) + (0 if site.bias is None else site.bias.double())


def _ranks(site):
    """Each rank's matrix, in float64."""
    return torch.einsum("r,ro,ri->roi", site.scale.double(), site.b.double(), site.expanded_a.double())


def _matrix(site):
    return _ranks(site).sum(0)
