"""How much of each expert a token gets: g [E'] from scores of E experts.

    v = pre(source)                      what the router reads, [d_src]
    v = relu(W v + c) for (W, c) in hidden    usually none
    l = post(weights · v + bias) / T     scores, float32, [E]
    p = softmax(l)                       over all experts
    S = select(l or p)                   ties go to the lowest expert; S may be empty: then g = 0
    g = p on S, 0 elsewhere              ADAPTIVE: p − τ(v) on S
                                         norm: as they are, or divided by their sum + eps; value `one`: 1 on S
    g[e] = 0 where `capacity` earlier tokens of the sequence have e in their S; the other g stay as they are
    g'[e'] = Σ_{e: expert_map[e] = e'} g[e]

softmax → top-k → renormalise equals top-k → softmax, so one normaliser serves MoLA, MixLoRA, MoLE and Arrow.
Sources: MoLA arXiv 2402.08562, HydraLoRA 2404.19245, Arrow 2405.11157, AdaMoLE 2405.00361, X-LoRA 2402.07148.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch


class GateKind(StrEnum):
    """When the decision is made."""

    TOKEN = "token"  # for every token on its own
    PROMPT = "prompt"  # once per request, from its prompt
    TASK = "task"  # looked up by a task id that the request names
    TWO_PASS = "two_pass"  # from a first pass of the base model


class GateSource(StrEnum):
    """What the router reads."""

    SITE_INPUT = "site_input"
    FFN_INPUT = "ffn_input"
    LAYER_INPUT = "layer_input"  # pooled over the prompt, see `pool`
    BASE_HIDDEN = "base_hidden"  # last hidden state of the base model's pass
    NONE = "none"  # task tables


class Pooling(StrEnum):
    """How LAYER_INPUT becomes one vector per prompt."""

    ATTENTION = "attention"
    MEAN = "mean"
    LAST = "last"
    MAX = "max"


class PreMap(StrEnum):
    NONE = "none"
    LAYER_NORM = "layer_norm"  # no affine part (PHATGOOSE)
    RATIONAL = "rational"  # learned rational activation (MiLoRA)


class PostMap(StrEnum):
    NONE = "none"
    ABS = "abs"  # |score| (Arrow)


class Select(StrEnum):
    """Which experts stay."""

    ALL = "all"
    TOP_K = "top_k"
    TOP_P = "top_p"  # most probable first, up to and including the one that reaches p
    THRESHOLD = "threshold"  # p ≥ threshold
    ADAPTIVE = "adaptive"  # p ≥ τ(v) with a learned τ (AdaMoLE)


class Norm(StrEnum):
    SOFTMAX = "softmax"  # probabilities over all experts, unchanged by the selection
    RENORM = "renorm"  # those of the selected experts, divided by their sum + eps
    NONE = "none"  # the scores themselves


class GateValue(StrEnum):
    PROBABILITY = "probability"
    ONE = "one"


class CapacityScope(StrEnum):
    SEQUENCE = "sequence"  # never the batch: an answer must not depend on strangers


@dataclass(frozen=True)
class Capacity:
    """At most `tokens` tokens per scored expert in one sequence, for each site: the first that select it, by position.

    So what a token gets depends on those before it, and the KV cache of a prefix does not tell how it was reached.
    """

    tokens: int
    scope: CapacityScope = CapacityScope.SEQUENCE


@dataclass(frozen=True, eq=False)
class Gate:
    """One router and what is done with its scores. Equations in the module's docstring.

    weights          [E, d_src], [E, width of the last hidden layer], or for a task table the scores [tasks, E]
    task             task table: whose scores count where a request names no task
    bias             [E]
    hidden           pairs of W [h, width before] and c [h]: a router that is an MLP (X-LoRA)
    pool             LAYER_INPUT only; ATTENTION needs `pool_weight` [d_src]
    pre_eps          LAYER_NORM: added to the variance
    rational         RATIONAL: coefficients n [7] and m [5], as one [12]: Σ n_j v^j / (1 + |Σ m_i v^i|), i from 1
    k, p, threshold  for TOP_K, TOP_P and THRESHOLD
    adaptive_weight, adaptive_bias, tau_max
                     ADAPTIVE: τ(v) = tau_max · σ(adaptive_weight [d_src] · v + adaptive_bias [1])
    eps              RENORM: added to the sum
    expert_map       [E] int32; groups are numbered in the order of their first expert, so that every grouping has
                     one map, and the only map that keeps E experts is the identity. With it g'[E' + e] = g[e] too: a
                     scored expert may have rows of its own beside its group's

    Tensors are float32, bfloat16 or float16 as they are stored; scores are float32 whatever that is.
    """

    weights: torch.Tensor
    kind: GateKind = GateKind.TOKEN
    source: GateSource = GateSource.SITE_INPUT
    bias: torch.Tensor | None = None
    hidden: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    pool: Pooling | None = None
    pool_weight: torch.Tensor | None = None
    pre: PreMap = PreMap.NONE
    pre_eps: float = 1e-5
    rational: torch.Tensor | None = None
    post: PostMap = PostMap.NONE
    temperature: float = 1.0
    select: Select = Select.ALL
    k: int | None = None
    p: float | None = None
    threshold: float | None = None
    adaptive_weight: torch.Tensor | None = None
    adaptive_bias: torch.Tensor | None = None
    tau_max: float | None = None
    norm: Norm = Norm.RENORM
    eps: float = 0.0
    value: GateValue = GateValue.PROBABILITY
    expert_map: torch.Tensor | None = None
    capacity: Capacity | None = None
    task: int | None = None

    @property
    def scored(self) -> int:
        """E: experts the router scores."""
        return self.weights.shape[-1] if self.kind is GateKind.TASK else self.weights.shape[0]

    @property
    def experts(self) -> int:
        """E': experts that have weights."""
        return self.scored if self.expert_map is None else int(self.expert_map.max()) + 1

    @property
    def weights_given(self) -> int:
        """How many weights a token gets: what an index in a site's `expert` may name."""
        return self.experts if self.expert_map is None else self.experts + self.scored

    @property
    def tasks(self) -> int:
        """How many tasks a request may choose from; 0 if none decides."""
        return self.weights.shape[0] if self.kind is GateKind.TASK else 0

    @property
    def width(self) -> int | None:
        """d_src: how wide what the router reads is; None for a task table."""
        if self.kind is GateKind.TASK:
            return None
        return (self.hidden[0][0] if self.hidden else self.weights).shape[-1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The gate's tensors by their short names in a native file; those that are None left out."""
        named = {name: getattr(self, name) for name in GATE_TENSORS}
        for i, (weight, bias) in enumerate(self.hidden):
            named |= {f"hidden.{i}.weight": weight, f"hidden.{i}.bias": bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


GATE_TENSORS = ("weights", "bias", "pool_weight", "rational", "adaptive_weight", "adaptive_bias", "expert_map")
