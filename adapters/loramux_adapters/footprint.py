"""How much of the server's adapter memory an adapter takes, told without a server."""

from typing import Any

import torch

from loramux_adapters.base_model import BaseModel
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.posterior.describe import drawn_ranks, kept_b
from loramux_adapters.token_gates import reservation
from loramux_kernels import Geometry, SiteSpec
from loramux_kernels.sequences import ROWS_PER_SEQUENCE

#: Projections that engines fuse because they read the same input: the pool keeps their rank rows together.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def pool_bytes(
    adapter: LoweredAdapter, base: BaseModel, dtype: torch.dtype, max_requests: int = 0, *, tiled: bool = False
) -> int:
    """Bytes in a pool of this dtype: rank rows, routers, magnitudes, biases and tables, alignment included.

    max_requests  how many requests may run at once: the pool keeps counts for each where the adapter has a capacity
    tiled         whether it is the pool of a device that is no CPU, whose kernels pack fewer block-diagonal adapters

    The adapter passed `check_servable`.
    """
    return _bytes(reservation(adapter, base.biased), base, dtype, max_requests, tiled)


def draw_pool_bytes(
    adapter: LoweredAdapter, base: BaseModel, dtype: torch.dtype, max_requests: int = 0, *, tiled: bool = False
) -> int:
    """`pool_bytes` of a draw beside its mean, whose B it borrows where no draw changes it; at most."""
    reserved = reservation(adapter, base.biased) | {"ranks": drawn_ranks(adapter), "borrowed": kept_b(adapter)}
    return _bytes(reserved, base, dtype, max_requests, tiled)


def _bytes(reserved: dict[str, Any], base: BaseModel, dtype: torch.dtype, max_requests: int, tiled: bool) -> int:
    max_rank = max(1, *reserved["ranks"].values())
    geometry = Geometry(site_specs(base), dtype, max_rank, ROWS_PER_SEQUENCE * max_requests, tiled)
    return sum(layout.nbytes for layout in geometry.layouts(**reserved).values())


def site_specs(base: BaseModel) -> tuple[SiteSpec, ...]:
    """The base model's linears as the server's engine has them, fused where it fuses them."""
    specs, taken = [], set()
    for module, (d_in, _) in base.linears.items():
        parent, dot, leaf = module.rpartition(".")
        parts = next((tuple(f"{parent}{dot}{name}" for name in fused) for fused in FUSED if leaf in fused), (module,))
        if not all(base.linears.get(part, (0, 0))[0] == d_in for part in parts):
            parts = (module,)
        if parts not in taken:
            taken.add(parts)
            specs.append(SiteSpec(parts[0], parts, d_in, tuple(base.linears[part][1] for part in parts)))
    return tuple(specs)
