"""The laws that are trained with: divergences against numerical integrals, draws against their moments."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from loramux_adapters.train import normal

from ..compact.tiny import CONFIG, make_model
from . import recipes

DRAWS = 4000


@pytest.mark.parametrize(
    ("mean", "std", "to_mean", "to_std"), [(0.3, 0.1, 0.0, 0.2), (-1.0, 2.0, 0.5, 0.7), (0.0, -0.4, 0.0, 0.4)]
)
def test_divergence_is_the_integral(mean: float, std: float, to_mean: float, to_std: float) -> None:
    x = np.linspace(mean - 12 * abs(std), mean + 12 * abs(std), 200_001)

    def log_density(at: float, deviation: float) -> Any:
        return -0.5 * ((x - at) / deviation) ** 2 - math.log(abs(deviation) * math.sqrt(2 * math.pi))

    p, q = log_density(mean, std), log_density(to_mean, to_std)
    wanted = np.trapezoid(np.exp(p) * (p - q), x)
    parts = (torch.full((2, 3), number, dtype=torch.float64) for number in (mean, std, to_mean, to_std))
    assert float(normal.kl(*parts)) == pytest.approx(6 * wanted, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", recipes.BAYESIAN)
def test_moments_of_draws(kind: str) -> None:
    """Mean and variance of outputs over draws, and the covariance of two tokens of a sequence; sequences of two groups
    are uncorrelated, and those of one see the same weights."""
    site = recipes.make(kind, make_model()).sites[recipes.MODULES[0]].double()
    width = CONFIG.hidden_size
    x = torch.randn(1, 2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    batch = x.repeat(4, 1, 1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        site.settle()
        mean = site.delta(x)[0]
        found = []
        for _ in range(DRAWS):
            site.redraw(2, generator)
            y = site.delta(batch)
            torch.testing.assert_close(y[0], y[1])
            torch.testing.assert_close(y[2], y[3])
            found.append(y[[0, 2]] - mean)
        drawn = torch.stack(found)  # [draws, group, token, d_out]
        wanted = _covariance(site, x[0])  # [token, token, d_out]
    error = 6 / DRAWS**0.5  # six standard errors, of numbers with a few times a normal's fourth moment at most
    deviation = wanted.diagonal(dim1=0, dim2=1).T.sqrt()  # [token, d_out]
    assert (drawn.mean((0, 1)).abs() <= error * deviation).all()
    covariance = torch.einsum("sgto,sguo->tuo", drawn, drawn) / (2 * DRAWS)
    scale = deviation[:, None] * deviation[None]
    assert ((covariance - wanted).abs() <= 2 * error * scale).all()
    between = torch.einsum("sto,sto->to", drawn[:, 0], drawn[:, 1]) / DRAWS
    assert (between.abs() <= 2 * error * deviation**2).all()


def _covariance(site: Any, x: torch.Tensor) -> torch.Tensor:
    """Cov over draws of tokens t and u at every output, [T, T, d_out], from the law of the weights."""
    if hasattr(site, "rho"):
        factors = site.b.repeat(len(x), 1, 1) * site.scale  # [T, R, d_out]
        if site.router is not None:
            p = torch.softmax(x @ site.router.T, -1)
            p = p * (p >= p.topk(site.shape.top_k, -1).values[:, -1:])
            p = p / p.sum(-1, keepdim=True)
            factors = factors * p.repeat_interleave(site.shape.rank, 1)[:, :, None]
        rows = torch.einsum("ti,ui,ri->tur", x, x, site.rho**4)
        return torch.einsum("tur,tro,uro->tuo", rows, factors, factors)
    std = site.std_b.T @ site.std_a + site.offset
    return torch.einsum("ti,ui,oi->tuo", x, x, std**2)
