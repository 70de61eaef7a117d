"""ΔW as two factors: its norm, a weighted sum, and the nearest matrix of a lower rank, without forming it.

With Aᵀ = Q·R and Bᵀ = P·U (thin QR), ΔW = Bᵀ·A = P·(U·Rᵀ)·Qᵀ: all of its singular values, and so its Frobenius norm,
are those of U·Rᵀ, which is as small as the rank. Everything is float64; results are as exact as that, because no two
large squares are subtracted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Singular values this far below the largest are rounding of the factors.
_NOISE = 1e-14


@dataclass(frozen=True, eq=False)
class Factors:
    """ΔW [d_out, d_in] = bᵀ · a with a [r, d_in] and b [r, d_out] in float64; scales are in b."""

    a: torch.Tensor
    b: torch.Tensor

    def times(self, factor: float) -> "Factors":
        return Factors(self.a, self.b * factor)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rank rows as an adapter stores them: a [r, d_in], b [r, d_out], scale [r] float32."""

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor

    @property
    def rank(self) -> int:
        return self.b.shape[0]

    @property
    def factors(self) -> Factors:
        return Factors(self.a.double(), self.b.double() * self.scale.double()[:, None])


def total(parts: Sequence[Factors]) -> Factors:
    """Their sum: ranks add up."""
    return Factors(torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts]))


def norm(factors: Factors) -> float:
    """‖ΔW‖_F"""
    _, _, core = _thin(factors)
    return float(torch.linalg.vector_norm(core))


def distance(one: Factors, other: Factors) -> float:
    """‖ΔW₁ − ΔW₂‖_F"""
    return norm(total([one, other.times(-1)]))


def nearest(factors: Factors, like: Rows, *, rank: int | None = None, bound: float = 0.0) -> Rows | None:
    """The best approximation of ΔW by at most `rank` singular components or, without a rank, by the fewest whose
    stored values are within `bound` of it; None if no number of them is.

    Stored in the dtypes of `like`: rows of A and B are singular vectors, scales the singular values.
    """
    q, p, core = _thin(factors)
    u, values, vh = torch.linalg.svd(core)
    most = int((values > _NOISE * values[:1]).sum())
    # What is left out by keeping the first r, for r = 0 … most.
    tails = torch.cat([values.square().flip(0).cumsum(0).flip(0).sqrt(), values.new_zeros(1)])
    keep = min(rank, most) if rank is not None else next((r for r in range(most + 1) if tails[r] <= bound), most)
    while True:
        rows = Rows(
            (vh[:keep] @ q.T).to(like.a.dtype), (p @ u[:, :keep]).T.to(like.b.dtype), values[:keep].to(like.scale.dtype)
        )
        if rank is not None or distance(rows.factors, factors) <= bound:
            return rows
        # Rounding to the stored dtype took the rest of the bound.
        if keep == most:
            return None
        keep += 1


def _thin(factors: Factors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, r = torch.linalg.qr(factors.a.T)
    p, u = torch.linalg.qr(factors.b.T)
    return q, p, u @ r.T
