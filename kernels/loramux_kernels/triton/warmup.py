"""Compile what the steps will need before any CUDA graph is captured."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loramux_kernels.ops.shrink import h_shape
from loramux_kernels.plan import Plan
from loramux_kernels.sites import Site
from loramux_kernels.triton.config import config
from loramux_kernels.triton.expand import expand
from loramux_kernels.triton.shrink import shrink


def warmup(sites: Sequence[Site], plan: Plan) -> None:
    """Launch each kernel once per shape of site and class of step length, over the idle plan."""
    done = set()
    for site in sites:
        device = site.weights.device
        for tokens in (1, 17, 65, 257, 769):
            if tokens > plan.max_tokens:
                break
            rows = h_shape(tokens, site.width, device)[0]
            key = (site.spec.d_in, site.spec.d_outs, config(site, tokens, rows))
            if key in done:
                continue
            done.add(key)
            x = torch.empty(tokens, site.spec.d_in, dtype=site.dtype, device=device)
            y = torch.empty(tokens, sum(site.spec.d_outs), dtype=site.dtype, device=device)
            h = torch.empty(rows, site.width, dtype=torch.float32, device=device)
            shrink(site, x, h)
            expand(site, y, h)
