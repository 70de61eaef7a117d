"""The gate of a mixture of LoRA experts: how much of each expert a token takes, from its router logits l_TE.

    l = W x;   (W x − mean(x) Σ_I W) / √(var(x) + layer_norm_eps)      with `layer_norm_eps`: W LayerNorm(x)
    p = softmax_E(|l| / temperature)                     |·| only if `absolute`
    w = p where selected, else 0;                        adaptive: p − τ where selected
    g = w;   if `renormalise`: w / (Σ_E w + eps);        if `one`: 1 where selected, else 0
    τ = threshold · σ(l_E + bias)                        only if adaptive; l_E is one more logit, behind the experts'
    g_te = 0 if `capacity` earlier tokens of t's sequence selected e                   only with `capacity`
    g_TG = Σ_{e in group} g_Te                           only with `groups`

T tokens · I inputs · E experts · G groups; mean and variance over I. The arithmetic is float32 (float64 for float64
weights) whatever the dtype of the weights.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

MAX_EXPERTS = 16
"""Experts of one module. The kernels hold a token's gate in registers, one axis of this length."""

Select = Literal["all", "top_k", "top_p", "threshold", "adaptive"]

ABSOLUTE, RENORMALISE, ONE, GROUPED, ADAPTIVE, LIMITED, LAYER_NORM = 1, 2, 4, 8, 16, 32, 64
"""Bits of the flags in `packed`."""
GROUPS_PER_WORD = 4
"""Groups are sets of experts in 16 bits each, four to an int64."""
CAPACITY_AT = 8
GROUPS_AT = 9
GATE_FIELDS = GROUPS_AT + MAX_EXPERTS // GROUPS_PER_WORD
"""Where the capacity is in `packed`, where the groups begin, and its length."""


@dataclass(frozen=True)
class TokenGate:
    """Selection and weighting of `experts` experts, per token.

    all · top_k: the `k` most probable (all if k > experts) · top_p: the most probable first, up to and including the
    one whose sum reaches `p` · threshold: those with probability of at least `threshold` · adaptive: those with
    probability of at least the token's own τ, which the router has one more row for, and `bias`. Between equal
    probabilities the lower index comes first. A token that selects none gets nothing from the adapter.

    `groups`, for experts that share rank rows: bit e of groups[i] says that group i takes the weight of expert e; an
    expert may be in several. Rank rows then belong to groups instead of experts.

    `capacity`: an expert takes no more tokens of a sequence than this, the first ones that select it; 0 means no limit.
    The weights of a token's other experts stay as they are. Counted are experts, not groups.

    `layer_norm_eps`: for a router that reads LayerNorm(x), without affine part, what that adds to the variance. None:
    it reads x. All logits are taken of the same.

    Raises ValueError naming the field.
    """

    experts: int
    select: Select = "all"
    k: int = 0
    p: float = 1.0
    threshold: float = 0.0
    bias: float = 0.0
    renormalise: bool = True
    eps: float = 0.0
    temperature: float = 1.0
    absolute: bool = False
    one: bool = False
    groups: tuple[int, ...] = ()
    capacity: int = 0
    layer_norm_eps: float | None = None

    def __post_init__(self) -> None:
        most = MAX_EXPERTS - self.adaptive
        if not 1 <= self.experts <= most:
            raise ValueError(f"experts: {self.experts}, must be 1 to {most} for {self.select}")
        if self.select not in get_args(Select):
            raise ValueError(f'select: "{self.select}", there are {", ".join(get_args(Select))}')
        if self.k < (self.select == "top_k"):
            raise ValueError(f"k: {self.k}, must be positive for top_k")
        if not 0 < _float32("p", self.p) <= 1:
            raise ValueError(f"p: {self.p}, must be above 0 and at most 1")
        if _float32("eps", self.eps) < 0:
            raise ValueError(f"eps: {self.eps}, must not be negative")
        if _float32("temperature", self.temperature) <= 0:
            raise ValueError(f"temperature: {self.temperature}, must be positive")
        if self.layer_norm_eps is not None and _float32("layer_norm_eps", self.layer_norm_eps) <= 0:
            raise ValueError(f"layer_norm_eps: {self.layer_norm_eps}, must be positive")
        _float32("threshold", self.threshold)
        _float32("bias", self.bias)
        if not 0 <= self.capacity < 1 << 31:
            raise ValueError(f"capacity: {self.capacity}, must not be negative and fit into 31 bits")
        if len(self.groups) > MAX_EXPERTS:
            raise ValueError(f"groups: {len(self.groups)}, must be at most {MAX_EXPERTS}")
        if any(not 0 < group < 1 << self.experts for group in self.groups):
            raise ValueError(f"groups: each must hold some of the experts 0 to {self.experts - 1}")

    @property
    def adaptive(self) -> bool:
        """Whether each token has a threshold of its own."""
        return self.select == "adaptive"

    @property
    def logits(self) -> int:
        """How many logits a token has, and rows the router: one per expert, and one for an adaptive threshold."""
        return self.experts + self.adaptive

    @property
    def weights(self) -> int:
        """How many weights a token gets, one per group or else per expert: what rank rows belong to."""
        return len(self.groups) or self.experts

    @property
    def router(self) -> TokenGate:
        """The gate without groups, capacity and LayerNorm: what it decides about experts, from a token's logits
        alone."""
        more = self.groups or self.capacity or self.layer_norm_eps is not None
        return replace(self, groups=(), capacity=0, layer_norm_eps=None) if more else self

    def packed(self) -> tuple[int, ...]:
        """k, flags, the bits of p, threshold, eps, temperature, bias and layer_norm_eps as float32, the capacity, and
        the groups, for the device.

        A kernel selects what passes all three selections; those that this gate does not use let everything pass.
        """
        k = self.k if self.select == "top_k" else MAX_EXPERTS
        p = self.p if self.select == "top_p" else math.inf
        threshold = self.threshold if self.select in ("threshold", "adaptive") else -math.inf
        flags = ABSOLUTE * self.absolute | RENORMALISE * self.renormalise | ONE * self.one
        flags |= GROUPED * bool(self.groups) | ADAPTIVE * self.adaptive | LIMITED * bool(self.capacity)
        flags |= LAYER_NORM * (self.layer_norm_eps is not None)
        words = struct.unpack("<4q", struct.pack("<16H", *self.groups, *[0] * (MAX_EXPERTS - len(self.groups))))
        numbers = (p, threshold, self.eps, self.temperature, self.bias, self.layer_norm_eps or 0.0)
        return k, flags, *(_bits(value) for value in numbers), self.capacity, *words


def check_experts(module: str, expert: Tensor, experts: int) -> None:
    """ValueError unless `expert` holds integers from 0 to `experts` − 1."""
    if expert.dtype == torch.bool or expert.is_floating_point() or expert.is_complex():
        raise ValueError(f"module {module}: expert has dtype {expert.dtype}, must be integers")
    low, high = int(expert.min()), int(expert.max())
    if low < 0 or high >= experts:
        raise ValueError(f"module {module}: expert {low if low < 0 else high}, there are 0 to {experts - 1}")


def _float32(name: str, value: float) -> float:
    """`value` as the float32 that the kernels will use."""
    try:
        (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    except OverflowError:
        rounded = math.inf
    if not math.isfinite(rounded):
        raise ValueError(f"{name}: {value} is not a finite float32")
    return float(rounded)


def _bits(value: float) -> int:
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return int(bits)
