"""The algebra of factors equals that of the dense matrix they stand for."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.compact.factors import Factors, Rows, distance, nearest, norm, total

from .mixtures import Draw, best

PROPERTY = settings(max_examples=25, deadline=None)
widths, ranks, seeds = st.integers(1, 24), st.integers(0, 12), st.integers(0, 1000)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def random_factors(rank: int, d_in: int, d_out: int, seed: int) -> Factors:
    draw = Draw(seed)
    return Factors(draw(rank, d_in).double(), draw(rank, d_out).double())


def dense(factors: Factors) -> torch.Tensor:
    return factors.b.T @ factors.a


def like(dtype: torch.dtype) -> Rows:
    return Rows(torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype), torch.ones(1))


@PROPERTY
@given(one=ranks, other=ranks, d_in=widths, d_out=widths, seed=seeds)
def test_norms_sums_and_distances(one: int, other: int, d_in: int, d_out: int, seed: int) -> None:
    x, y = random_factors(one, d_in, d_out, seed), random_factors(other, d_in, d_out, seed + 1)
    size = float(dense(x).norm())
    assert abs(norm(x) - size) <= 1e-12 * size
    torch.testing.assert_close(dense(total([x, y.times(-2.0)])), dense(x) - 2 * dense(y))
    apart = float((dense(x) - dense(y)).norm())
    assert abs(distance(x, y) - apart) <= 1e-12 * (apart + 1)
    assert distance(x, x) <= 1e-14 * (size + 1)


@PROPERTY
@given(rank=ranks, keep=st.integers(1, 12), d_in=widths, d_out=widths, seed=seeds)
def test_the_nearest_of_a_rank_is_that_of_the_dense_matrix(
    rank: int, keep: int, d_in: int, d_out: int, seed: int
) -> None:
    factors = random_factors(rank, d_in, d_out, seed)
    found = nearest(factors, like(torch.float32), rank=keep)
    assert found is not None and found.rank == min(rank, keep, d_in, d_out)
    size = dense(factors).norm()
    assert (dense(found.factors) - best(dense(factors), keep)).norm() <= 1e-5 * size
    # Rows are singular vectors, so that every dtype holds them well.
    assert torch.allclose(found.a.norm(dim=1), torch.ones(found.rank), atol=1e-5)
    assert torch.allclose(found.b.norm(dim=1), torch.ones(found.rank), atol=1e-5)


@PROPERTY
@given(rank=ranks, share=st.floats(1e-4, 0.999), d_in=widths, d_out=widths, seed=seeds, dtype=DTYPES)
def test_a_bound_holds_for_what_is_stored_and_fewer_components_would_break_it(
    rank: int, share: float, d_in: int, d_out: int, seed: int, dtype: torch.dtype
) -> None:
    factors = random_factors(rank, d_in, d_out, seed)
    bound = share * norm(factors)
    found = nearest(factors, like(dtype), bound=bound)
    if found is None:  # the dtype is too coarse for it
        assert dtype != torch.float32
        return
    assert (found.a.dtype, found.b.dtype, found.scale.dtype) == (dtype, dtype, torch.float32)
    assert float((dense(found.factors) - dense(factors)).norm()) <= bound * (1 + 1e-9)
    if found.rank and dtype == torch.float32:
        fewer = (best(dense(factors), found.rank - 1) - dense(factors)).norm()
        assert float(fewer) > bound * (1 - 1e-5)


def test_nothing_needs_no_rows() -> None:
    zero = Factors(torch.ones(3, 5).double(), torch.zeros(3, 4).double())
    found = nearest(zero, like(torch.bfloat16), bound=0.0)
    assert found is not None and found.rank == 0 and norm(found.factors) == 0
