"""y_T,slice j ← mag_O ⊙ y_T,slice j + (gate(l)_T,expert(R) ⊙ scale_R ⊙ h_TR)[:, rows of slice j] @ B_RO + bias_O, per
token with its adapter's weights.

T tokens · R rank rows · O outputs of slice j. The gate, where there is one, weights each expert's rank rows by the
slice's logits l_TE, the columns of h behind the rank rows (`gates.py`); elsewhere it is one. mag is one and bias zero
where the adapter has none. All of it is float32 (float64 for float64 weights), and y is rounded once. Rows of base
tokens are not touched, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loramux_kernels.ops.library import register
from loramux_kernels.sites import lookup


def _run(h: Tensor, y: Tensor, site: Tensor, x: Tensor | None = None) -> None:
    bound = lookup(site)
    if bound.plan.active:
        if y.dim() != 2 or y.shape[1] != sum(bound.spec.d_outs) or y.stride(1) != 1 or y.dtype != bound.dtype:
            raise ValueError(f"site {bound.spec.name}: y is {tuple(y.shape)} {y.dtype}")
        if h.shape[1] != bound.width or h.shape[0] < y.shape[0]:
            raise ValueError(f"site {bound.spec.name}: h is {tuple(h.shape)} for {y.shape[0]} tokens")
        bound.backend.expand(bound, y, h)


def _fake(h: Tensor, y: Tensor, site: Tensor, x: Tensor | None = None) -> None:
    return None


# h comes first: TorchInductor moves what an op needs to right before it, the last argument nearest. With y first it
# would put the base linear before the shrink, and nothing would run beside it.
register("expand(Tensor h, Tensor(a!) y, Tensor site, Tensor? x=None) -> ()", _run, _fake)


def expand(y: Tensor, h: Tensor, site: Tensor, x: Tensor | None = None) -> None:
    """Apply the adapters to y [..., O] in place, from the h of `shrink` for the same site and step.

    `x`, what was given to `shrink`, is not read: it is named where a compiler manages memory, because the shrink may
    still run beside the base linear when that no longer needs x.
    """
    torch.ops.loramux.expand(h, y if y.dim() == 2 else y.view(-1, y.shape[-1]), site, x)
