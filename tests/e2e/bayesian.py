"""Bayesian adapters for the end-to-end tests, written as native files, and their draws on Hugging Face's model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loramux_adapters import BaseModel, Gate, LoweredAdapter, LoweredSite, Variance, write_native
from loramux_adapters.gate import Norm, Select
from loramux_adapters.native import digest_of
from loramux_adapters.variance import VarianceKind

from ..adapters import hooks

EXPERTS = 3
_SITES = ("q_proj", "v_proj", "down_proj")


def make(
    base: BaseModel, *, sigma: float, mixture: bool = False, dense: bool = False, seed: int = 0, rank: int = 8
) -> LoweredAdapter:
    """A ~ N(M, σ²) at three kinds of linears of every third layer; of a mixture, every expert is drawn.

    With `dense`, ΔW + S ⊙ z instead, as ABMLL: S = σ times a product of rank 2 and a constant.
    """
    generator = torch.Generator().manual_seed(seed)
    sites, gates = {}, {}
    for module, (d_in, d_out) in sorted(base.linears.items()):
        layer = int(module.split(".")[2])
        if layer % 3 or not module.endswith(_SITES):
            continue
        options: dict[str, Any] = {}
        if mixture:
            weights = torch.randn(EXPERTS, d_in, generator=generator) * 0.02
            gates[module] = Gate(weights, select=Select.TOP_K, k=2, norm=Norm.RENORM)
            options = {"gate": module, "expert": torch.arange(rank, dtype=torch.int32) % EXPERTS}
        # As training leaves them: σ differs from element to element.
        deviation = torch.full((rank, d_in), sigma) * (0.5 + torch.rand(rank, d_in, generator=generator))
        variance = Variance(VarianceKind.DIAGONAL_A, {"sigma_a": deviation})
        if dense:
            std_a, std_b = torch.rand(2, d_in, generator=generator), torch.rand(2, d_out, generator=generator)
            tensors = {"std_a": std_a, "std_b": sigma * std_b, "offset": torch.tensor([sigma])}
            variance = Variance(VarianceKind.HIERARCHICAL, tensors)
        sites[module] = LoweredSite(
            torch.randn(rank, d_in, generator=generator) * 0.05,
            torch.randn(rank, d_out, generator=generator) * 0.05,
            torch.full((rank,), 2.0),
            variance=variance,
            **options,
        )
    return LoweredAdapter("test", sites, gates=gates)


def write(adapter: LoweredAdapter, base: BaseModel, path: Path) -> Path:
    write_native(path, adapter, base.name, digest_of(adapter))
    return path


def hooked(model: Any, adapter: LoweredAdapter) -> AbstractContextManager[Any]:
    """The model with a draw: y += Σ_j B[:, j] s_j g_expert(j)(x) (A x)_j, from the formula, in the model's dtype."""
    deltas = {name: partial(_delta, site, adapter.gates.get(site.gate or "")) for name, site in adapter.sites.items()}
    return hooks.hooked(model, deltas)


def log_probabilities(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """log p(· | prompt, answer so far) of every token of the answer: [n, vocabulary] float64."""
    with torch.inference_mode():
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        logits = model(ids, logits_to_keep=len(answer)).logits[0]
    return torch.log_softmax(logits.double(), -1)


def _delta(site: LoweredSite, gate: Gate | None, x: torch.Tensor) -> torch.Tensor:
    u = x @ site.expanded_a.to(x.dtype).T * site.scale.to(x.dtype)
    if gate is not None:
        assert site.expert is not None
        p = torch.softmax(x @ gate.weights.to(x.dtype).T, -1)
        kept = torch.zeros_like(p).scatter(-1, p.topk(2, -1).indices, 1.0) * p
        u = u * (kept / kept.sum(-1, keepdim=True))[..., site.expert.long()]
    return u @ site.b.to(x.dtype)
