"""BLoB: Bayesian LoRA by backpropagation, a normal posterior over A (arXiv 2406.11675).

    A ~ N(M, σ²)   σ = ρ ⊙ ρ        minimise   −log p(batch | A) + w·min(1, step/warm_up)·KL( N(M, σ²) ‖ N(0, σ_p²) )/n

n: training texts; w = 1 is the evidence bound, below it a posterior that is colder than Bayes' and fits better. B is a
number, not drawn: a normal A with B is a normal law of low rank over ΔW, and the prior over A is one over that.

**Flip-out**: a draw for each group of sequences costs one E ~ N(0, 1) and signs, not a matrix each:

    u = M x + (σ ⊙ E)(x ⊙ r)        r ∈ {±1}^d_in, one for each group

where E·diag(r) is again N(0, 1) in every place, and two groups' are uncorrelated. The authors (bayesian-peft
at bc6a4a7) flip outputs as well, and take new signs for every token, which is no law of weights; here all tokens of a
sequence see the same A, in training as in serving. σ = ρ² is their `bayes_eps ≥ 0`, and so is the way ρ begins: uniform
in [√σ_0/√2, √σ_0].
Of a mixture every expert's A is drawn; routers have no posterior.
"""

from typing import NamedTuple

import torch

from loramux_adapters.gate import Gate
from loramux_adapters.lowered import LoweredSite
from loramux_adapters.train import normal
from loramux_adapters.train.adapter import TrainableAdapter
from loramux_adapters.train.fit import Penalty
from loramux_adapters.train.site import Shape, Site
from loramux_adapters.variance import Variance, VarianceKind

BAYES_EPS = 0.05  # any number of 0 or more says that σ = ρ²


class Flips(NamedTuple):
    """normals [R, d_in], inputs [G, d_in]: E, and r of G groups."""

    normals: torch.Tensor
    inputs: torch.Tensor


class BlobSite(Site):
    """A site with ρ [R, d_in]; `sigma` is σ_0."""

    method = "blob"

    def __init__(self, d_in: int, d_out: int, shape: Shape, generator: torch.Generator, sigma: float = 0.0025) -> None:
        super().__init__(d_in, d_out, shape, generator)
        root = sigma**0.5
        self.rho = torch.nn.Parameter(torch.empty_like(self.a).uniform_(root / 2**0.5, root, generator=generator))
        self.flips: Flips | None = None

    @property
    def sigma(self) -> torch.Tensor:
        return self.rho.square()

    def redraw(self, groups: int, generator: torch.Generator) -> None:
        ranks, d_in = self.a.shape
        normals = torch.randn(ranks, d_in, generator=generator, dtype=self.a.dtype)
        self.flips = Flips(normals, signs(groups, d_in, generator).to(normals))

    def settle(self) -> None:
        self.flips = None

    def shrunk(self, x: torch.Tensor) -> torch.Tensor:
        u = super().shrunk(x)
        if self.flips is None:
            return u
        flipped = x * per_sequence(self.flips.inputs, len(x))
        return u + flipped @ (self.sigma * self.flips.normals).T

    def kl(self, prior: float) -> torch.Tensor:
        """KL( N(M, σ²) ‖ N(0, prior²) ) in nats."""
        return normal.kl(self.a, self.sigma, 0.0, prior)

    def lowered(self, module: str) -> tuple[LoweredSite, Gate | None]:
        site, gate = super().lowered(module)
        variance = Variance(VarianceKind.DIAGONAL_A, {"sigma_a": self.sigma.detach().clone()})
        return LoweredSite(**vars(site) | {"variance": variance}), gate

    def layout(self) -> dict[str, torch.Tensor]:
        return super().layout() | {"lora_A_rho": self.rho.detach()}

    def config(self) -> dict[str, object]:
        return super().config() | {"bayes_eps": BAYES_EPS}


def penalty(
    adapter: TrainableAdapter[BlobSite], texts: int, prior: float = 0.2, weight: float = 1.0, warm_up: int = 1
) -> Penalty:
    """What BLoB's posterior costs per text, for `fit`: σ_p = prior, w = weight, n = texts."""

    def cost(step: int) -> torch.Tensor:
        nats = torch.stack([site.kl(prior) for site in adapter.sites.values()]).sum()
        return nats * (weight * min(1.0, (step + 1) / warm_up) / texts)

    return cost


def signs(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """±1 with equal chances, [rows, columns]."""
    return torch.randint(0, 2, (rows, columns), generator=generator).float() * 2 - 1


def per_sequence(groups: torch.Tensor, sequences: int) -> torch.Tensor:
    """[G, …] as [N, 1, …]: the first N/G sequences are the first group's. N must be a multiple of G."""
    count, rest = divmod(sequences, len(groups))
    if rest:
        raise ValueError(f"a batch of {sequences} sequences cannot be divided among {len(groups)} draws")
    return groups.repeat_interleave(count, 0).unsqueeze(1)
