"""ABMLL: a posterior over ΔW itself, learned over many tasks and adapted to one (arXiv 2508.14285).

    θ: μ_θ = s·B_μ A_μ   σ_θ = B_σ A_σ + c        shared by all tasks
    φ: μ_φ, σ_φ likewise                            of one task, beginning at θ

Four LoRA pairs per layer. Adapting to a task of n texts, and learning θ from many:

    φ = argmin E_{ΔW ~ N(μ_φ, σ_φ²)} [−log p(support | ΔW)] + β·KL( q_φ ‖ q_θ )/n
    θ ← θ − η·∇ { E_{q_φ} [−log p(query | ΔW)] + β·KL( q_φ ‖ q_θ )/n + γ·KL( q_θ ‖ N(0, σ_0²) )/n }

The gradient is of first order: what φ owes to θ is taken to be the identity. Both divergences are over all d_out·d_in
weights of a layer, far more than there are ranks, so β and γ are small. A draw in training is the one that is served
(`posterior/families.py`): σ ⊙ ε with ε = q^-½ Σ_k u_k v_kᵀ of random signs, which is never formed.

No code of the authors is public; what the paper leaves open is said in `methods/abmll.py`, whose format this writes.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from loramux_adapters.gate import Gate
from loramux_adapters.lowered import LoweredSite
from loramux_adapters.posterior.families import SKETCHES
from loramux_adapters.train import normal
from loramux_adapters.train.adapter import TrainableAdapter
from loramux_adapters.train.blob import per_sequence, signs
from loramux_adapters.train.fit import Loss, Options, fit
from loramux_adapters.train.site import Shape, Site
from loramux_adapters.variance import Variance, VarianceKind


class Sketch(NamedTuple):
    """inputs [G, q, d_in], outputs [G, q, d_out]: the signs v and u of G groups."""

    inputs: torch.Tensor
    outputs: torch.Tensor


class HierarchicalSite(Site):
    """A site with std_a [V, d_in] and std_b [V, d_out]: σ = std_bᵀ·std_a + offset, [d_out, d_in]; V = `std_rank`.

    It begins with σ = offset everywhere. Mixtures are refused: ΔW of several experts is no one matrix.
    """

    method = "abmll"

    def __init__(
        self,
        d_in: int,
        d_out: int,
        shape: Shape,
        generator: torch.Generator,
        offset: float = 0.005,
        std_rank: int = 2,
    ) -> None:
        if shape.experts > 1:
            raise ValueError("ABMLL has a posterior over one ΔW per layer: give a shape with one expert")
        super().__init__(d_in, d_out, shape, generator)
        bound = d_in**-0.5
        self.std_a = torch.nn.Parameter(torch.empty(std_rank, d_in).uniform_(-bound, bound, generator=generator))
        self.std_b = torch.nn.Parameter(torch.zeros(std_rank, d_out))
        self.offset = offset
        self.sketch: Sketch | None = None

    def redraw(self, groups: int, generator: torch.Generator) -> None:
        parts = [
            signs(groups * SKETCHES, width, generator).view(groups, SKETCHES, width).to(self.a.dtype)
            for width in (self.a.shape[1], self.b.shape[1])
        ]
        self.sketch = Sketch(*parts)

    def settle(self) -> None:
        self.sketch = None

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        y = super().delta(x)
        if self.sketch is None:
            return y
        inputs, outputs = (per_sequence(part, len(x)) for part in self.sketch)  # [N, 1, q, d]
        flipped = x.unsqueeze(2) * inputs  # [N, T, q, d_in]
        deviation = (flipped @ self.std_a.T) @ self.std_b + self.offset * flipped.sum(-1, keepdim=True)
        drawn: torch.Tensor = (deviation * outputs).sum(2) / SKETCHES**0.5
        return y + drawn

    @property
    def mean(self) -> torch.Tensor:
        """μ [d_out, d_in]"""
        return self.scale * self.b.T @ self.a

    @property
    def std(self) -> torch.Tensor:
        """σ [d_out, d_in]; its sign is of no importance."""
        return self.std_b.T @ self.std_a + self.offset

    def lowered(self, module: str) -> tuple[LoweredSite, Gate | None]:
        site, gate = super().lowered(module)
        tensors = {
            "std_a": self.std_a.detach().clone(),
            "std_b": self.std_b.detach().clone(),
            "offset": torch.tensor([self.offset]),
        }
        return replace(site, variance=Variance(VarianceKind.HIERARCHICAL, tensors)), gate

    def layout(self) -> dict[str, torch.Tensor]:
        deviations = {"lora_A_sigma.weight": self.std_a.detach(), "lora_B_sigma.weight": self.std_b.detach().T}
        return super().layout() | deviations

    def config(self) -> dict[str, object]:
        return {"peft_type": "ABMLL", "sigma_rank": len(self.std_a), "sigma_offset": self.offset}


@dataclass(frozen=True)
class Task:
    """texts: how many it has; support, query: −log p of the next batch to adapt to, and to judge by."""

    texts: int
    support: Loss
    query: Loss


@dataclass(frozen=True)
class Weights:
    """β, γ and σ_0, in the equations above."""

    beta: float = 1e-5
    gamma: float = 1e-7
    prior: float = 0.05


Hierarchical = TrainableAdapter[HierarchicalSite]


def adapt(model: Any, shared: Hierarchical, loss: Loss, texts: int, options: Options, weights: Weights) -> Hierarchical:
    """φ of a task: a new adapter, trained from `shared`, which is θ and stays as it is."""
    own = copy.deepcopy(shared)
    with torch.no_grad():
        targets = {module: (site.mean, site.std) for module, site in shared.sites.items()}

    def penalty(step: int) -> torch.Tensor:
        parts = [normal.kl(site.mean, site.std, *targets[module]) for module, site in own.sites.items()]
        return torch.stack(parts).sum() * (weights.beta / texts)

    fit(model, own, loss, options, penalty)
    return own


def meta_fit(
    model: Any, shared: Hierarchical, tasks: Sequence[Task], options: Options, inner: Options, weights: Weights
) -> list[float]:
    """Learn θ, in place: `options.steps` tasks, each adapted to with `inner`. The losses of their queries."""
    choice = random.Random(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    theta = list(shared.parameters())
    optimizer = torch.optim.Adam(theta, lr=options.learning_rate)
    losses = []
    for step in range(options.steps):
        task = choice.choice(tasks)
        own = adapt(model, shared, task.support, task.texts, replace(inner, seed=inner.seed + step), weights)
        own.redraw(inner.draws, generator)
        with own.attached(model):
            loss = task.query()
        losses.append(float(loss.detach()))
        cost = loss + _divergences(own, shared, weights) / task.texts
        gradients = torch.autograd.grad(cost, [*own.parameters(), *theta], allow_unused=True)
        for parameter, moved, direct in zip(theta, gradients[: len(theta)], gradients[len(theta) :], strict=True):
            parameter.grad = sum((part for part in (moved, direct) if part is not None), torch.zeros_like(parameter))
        torch.nn.utils.clip_grad_norm_(theta, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _divergences(own: Hierarchical, shared: Hierarchical, weights: Weights) -> torch.Tensor:
    parts = []
    for module, site in own.sites.items():
        mean, std = shared.sites[module].mean, shared.sites[module].std
        parts.append(weights.beta * normal.kl(site.mean, site.std, mean, std))
        parts.append(weights.gamma * normal.kl(mean, std, 0.0, weights.prior))
    return torch.stack(parts).sum()
