"""The one form that every adapter is served in (see adapters/README.md)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch

from loramux_adapters.gate import Gate
from loramux_adapters.variance import Variance


class CarryKind(StrEnum):
    """What a site adds to its own shrink result (ResLoRA, arXiv 2402.18039)."""

    PREV_U = "prev_u"  # a'·x' of the `depth` sites before it: the source, the source's source and so on
    AHEAD_ROWS = "ahead_rows"  # this site's own a, applied to the source's input


@dataclass(frozen=True)
class Carry:
    """u = a·x + carry, from the site `source`, which runs earlier in the same forward pass."""

    source: str
    kind: CarryKind
    depth: int = 1


@dataclass(frozen=True)
class FfnMixture:
    """A whole feed-forward block per expert (MixLoRA, arXiv 2404.15159), which is not a sum over linear layers:

        y = W_down Σ_e g_e a_e + Σ_e g_e Δdown_e a_e      a_e = act((W_gate + Δgate_e) x) ⊙ (W_up + Δup_e) x

    The Δ are the sites named here, by expert; they name the same gate, which in them chooses instead of multiplying.
    Without `gate_proj`, a_e = act((W_up + Δup_e) x). The activation is the base model's own.
    """

    gate: str
    up_proj: str
    down_proj: str
    gate_proj: str | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(module for module in (self.gate_proj, self.up_proj, self.down_proj) if module is not None)


# eq=False: comparing tensors gives no single truth value; these compare by identity.
@dataclass(frozen=True, eq=False)
class LoweredSite:
    """One linear layer's share of an adapter:

        u   = a · x_t + carry
        y_t = magnitude ⊙ (W0 x_t) + Σ_j scale[j] · g[expert[j]](x_t) · u[arow[j]] · b[j] + base bias + bias

    a          [R_a, d_in]   in the checkpoint's dtype
    b          [R, d_out]    B transposed, so that one rank is one contiguous row of both; R may be 0 if the site has a
                             magnitude or a bias
    scale      [R]           float32
    gate       which of the adapter's gates gives g; None: g = 1
    expert     [R] int32     whose rank it is, an index of g or g' (`gate.py`); None: all are expert 0's
    arow       [R] int32     which row of a it reads (experts may share rows); None: its own, R_a = R
    magnitude  [d_out], or [E', d_out]: one per expert, gated like the ranks (DoRA; b holds its share already); positive
    bias       [d_out]
    carry      rank-space input from an earlier site
    variance   the posterior of which a, b and scale are the mean
    bands      n: a and b are block-diagonal, the i-th R/n of the ranks are zero but in the i-th d_in/n of the inputs
               and the i-th d_out/n of the outputs. Says nothing new; a pool can leave the zeros out for it
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor
    gate: str | None = None
    expert: torch.Tensor | None = None
    arow: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    carry: Carry | None = None
    variance: Variance | None = None
    bands: int = 1

    @property
    def rank(self) -> int:
        return self.b.shape[0]

    @property
    def expanded_a(self) -> torch.Tensor:
        """a with one row per rank: [R, d_in]."""
        return self.a if self.arow is None else self.a[self.arow.long()]

    def shifts(self, biased: bool) -> bool:
        """Whether a constant is added to magnitude ⊙ (all that the base layer computes); `biased`: with a bias of its
        own, which the magnitude must not change."""
        return self.bias is not None or (biased and self.magnitude is not None)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The site's tensors by their short names in a native file; those that are None left out."""
        named = {"A": self.a, "B": self.b, "scale": self.scale}
        for name in OPTIONAL_TENSORS:
            if (tensor := getattr(self, name)) is not None:
                named[name] = tensor
        if self.variance is not None:
            named |= {f"variance.{name}": tensor for name, tensor in self.variance.tensors.items()}
        return named


OPTIONAL_TENSORS = ("expert", "arow", "magnitude", "bias")


@dataclass(frozen=True, eq=False)
class LoweredAdapter:
    """An adapter ready to be copied into a pool: module name -> site, and what the user should know.

    gates  by an id of the adapter's own; sites and feed-forward mixtures name them
    ffn    feed-forward blocks that are mixtures as a whole, by the block's module name
    """

    method: str
    sites: Mapping[str, LoweredSite]
    warnings: tuple[str, ...] = ()
    gates: Mapping[str, Gate] = field(default_factory=dict)
    ffn: Mapping[str, FfnMixture] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of any site: what a pool must have room for."""
        return max((site.rank for site in self.sites.values()), default=0)

    @property
    def ranks(self) -> dict[str, int]:
        return {module: site.rank for module, site in self.sites.items()}

    @property
    def experts(self) -> int:
        """The largest number of experts of any gate; 1 without gates."""
        return max((gate.experts for gate in self.gates.values()), default=1)

    @property
    def bayesian(self) -> bool:
        return any(site.variance is not None for site in self.sites.values())

    @property
    def posterior(self) -> str | None:
        """The kinds of its sites' posteriors, joined by "+"; None for an adapter that is not Bayesian."""
        kinds = {site.variance.kind.value for site in self.sites.values() if site.variance is not None}
        return "+".join(sorted(kinds)) or None

    @property
    def mean(self) -> "LoweredAdapter":
        """The adapter without its posterior: what answers ordinary requests."""
        return replace(self, sites={module: replace(site, variance=None) for module, site in self.sites.items()})

    @property
    def limited(self) -> bool:
        """Whether an expert takes a limited number of tokens of a sequence: then a token's output depends on earlier
        ones in a way that the KV cache does not hold, and a cached prefix is of no use."""
        return any(gate.capacity is not None for gate in self.gates.values())

    @property
    def dtype(self) -> str:
        """The dtype of A and B, e.g. "bfloat16"; "mixed" if they differ."""
        names = {str(t.dtype).removeprefix("torch.") for s in self.sites.values() for t in (s.a, s.b)}
        return names.pop() if len(names) == 1 else "mixed"

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by its name in a native file."""
        named: dict[str, torch.Tensor] = {}
        for module, site in sorted(self.sites.items()):
            named |= {f"{module}.{part}": tensor for part, tensor in site.tensors().items()}
        for name, gate in sorted(self.gates.items()):
            named |= {f"gate:{name}.{part}": tensor for part, tensor in gate.tensors().items()}
        return named

    def nbytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of all tensors, with A and B stored as `dtype` (default: as they are)."""
        factors = {id(factor) for site in self.sites.values() for factor in (site.a, site.b)}
        return sum(
            tensor.numel() * (dtype if dtype is not None and id(tensor) in factors else tensor.dtype).itemsize
            for tensor in self.tensors().values()
        )
