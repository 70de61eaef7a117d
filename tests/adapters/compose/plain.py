"""Plain adapters to compose."""

import torch

from loramux_adapters import LoweredAdapter, LoweredSite

from ..checkpoints import BASE

MODULES = sorted(BASE.linears)[:3]


def plain(seed: int, modules=MODULES, rank=3, dtype=torch.float32, shared=False, biased=False) -> LoweredAdapter:
    """A random adapter; `shared`: all ranks read one row of a."""
    random = torch.Generator().manual_seed(seed)
    sites = {}
    for module in modules:
        d_in, d_out = BASE.linears[module]
        sites[module] = LoweredSite(
            a=torch.randn(1 if shared else rank, d_in, generator=random).to(dtype),
            b=torch.randn(rank, d_out, generator=random).to(dtype),
            scale=torch.rand(rank, generator=random),
            arow=torch.zeros(rank, dtype=torch.int32) if shared else None,
            bias=torch.randn(d_out, generator=random) if biased else None,
        )
    return LoweredAdapter("lora", sites)
