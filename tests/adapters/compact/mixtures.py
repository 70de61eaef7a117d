"""Mixtures for the tests of compaction, and what they compute written as dense matrices."""

from collections.abc import Sequence

import torch

from loramux_adapters import LoweredAdapter, LoweredSite
from loramux_adapters.gate import Gate, Select
from loramux_adapters.mixture import token_site

from ..checkpoints import BASE

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


class Draw:
    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)


def random_site(
    ranks: Sequence[int], d_in: int, d_out: int, seed: int = 0, gate: str = "g", dtype: torch.dtype = torch.float32
) -> LoweredSite:
    draw = Draw(seed)
    a, b = [draw(r, d_in).to(dtype) for r in ranks], [draw(d_out, r).to(dtype) for r in ranks]
    return token_site(a, b, [torch.full((r,), 0.5 + i) for i, r in enumerate(ranks)], gate)


def mixture(ranks: Sequence[int], *, seed: int = 0, k: int = 2, dtype: torch.dtype = torch.float32) -> LoweredAdapter:
    """Experts of these ranks at two sites of BASE with routers of their own."""
    sites, gates = {}, {}
    for i, module in enumerate((Q, DOWN)):
        d_in, d_out = BASE.linears[module]
        sites[module] = random_site(ranks, d_in, d_out, seed + i, gate=f"g{i}", dtype=dtype)
        gates[f"g{i}"] = Gate(Draw(seed + 10 + i)(len(ranks), d_in), select=Select.TOP_K, k=k)
    return LoweredAdapter("mola", sites, gates=gates)


def dense(site: LoweredSite | None, indices: Sequence[int], like: LoweredSite) -> torch.Tensor:
    """Σ of the rank rows that take one of these weights, as ΔW [d_out, d_in] in float64."""
    if site is None:
        return torch.zeros(like.b.shape[1], like.a.shape[1], dtype=torch.float64)
    a, b, scale = site.expanded_a.double(), site.b.double(), site.scale.double()
    expert = torch.zeros(site.rank) if site.expert is None else site.expert
    mine = torch.isin(expert, torch.tensor(indices).to(expert.dtype))
    return (b[mine] * scale[mine, None]).T @ a[mine]


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest of that rank (Eckart-Young)."""
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ vh[:rank]
