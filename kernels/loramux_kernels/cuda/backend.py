"""The CUDA backend: our C++ kernels where they fit a site, Triton's elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loramux_kernels.backends import Backend
from loramux_kernels.cuda import compiler
from loramux_kernels.cuda import expand as c_expand
from loramux_kernels.cuda import shrink as c_shrink
from loramux_kernels.cuda.scratch import MAX_RANK, MAX_SLICES, scratch
from loramux_kernels.plan import Plan
from loramux_kernels.sites import Site
from loramux_kernels.triton import expand as t_expand
from loramux_kernels.triton import shrink as t_shrink
from loramux_kernels.triton import warmup as t_warmup

_VECTOR = 8
"""Elements of one 16-byte access."""


def fits(site: Site) -> bool:
    """Whether elements are two bytes, every row of A and B begins on a 16-byte boundary, and the scratch is enough."""
    sizes = (site.spec.d_in, *site.spec.d_outs)
    return (
        site.dtype in (torch.bfloat16, torch.float16)
        and all(size % _VECTOR == 0 for size in sizes)
        and len(site.spec.d_outs) <= MAX_SLICES
        and site.max_rank <= MAX_RANK
    )


def _aligned(rows: Tensor) -> Tensor:
    """The same rows on 16-byte boundaries: a copy only where a layer hands out an odd view."""
    return rows if rows.data_ptr() % 16 == 0 and rows.stride(0) % _VECTOR == 0 else rows.clone()


def _shrink(site: Site, x: Tensor, h: Tensor) -> None:
    if fits(site):
        c_shrink.shrink(site, _aligned(x), h)
    else:
        t_shrink.shrink(site, x, h)


def _expand(site: Site, y: Tensor, h: Tensor) -> None:
    if fits(site):
        rows = _aligned(y)
        c_expand.expand(site, rows, h)
        if rows is not y:
            y.copy_(rows)
    else:
        t_expand.expand(site, y, h)


def _warmup(sites: Sequence[Site], plan: Plan) -> None:
    t_warmup.warmup([site for site in sites if not fits(site)], plan)
    for site in sites:
        if fits(site):
            c_shrink.warmup(site)
            c_expand.warmup(site)


def _overhead(plan: Plan, device: torch.device) -> int:
    return scratch(plan, device).nbytes


def unusable(device: torch.device) -> str | None:
    """Why the kernels cannot run on that device, or None."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return f"the CUDA kernels need compute capability 9.0 (Hopper) or later, {device} has {major}.{minor}"
    try:
        compiler.version()
    except compiler.CompilerMissing as error:
        return str(error)
    return None


def backend(device: torch.device) -> Backend:
    """Its functions. ValueError if it cannot run on that device."""
    if device.type != "cuda":
        raise ValueError(f"the cuda backend cannot run on {device}")
    reason = unusable(device)
    if reason is not None:
        raise ValueError(reason)
    return Backend("cuda", _shrink, _expand, _warmup, _overhead)
