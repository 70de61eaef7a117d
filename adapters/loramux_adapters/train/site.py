"""One linear layer's share of an adapter in training: the one form (`lowered.py`), differentiable.

    y_nt = W0 x_nt + Σ_j B[j] · s · g_expert(j)(x_nt) · (A x_nt)_j        n: sequence, t: token, j: rank

The gate is the data plane's own (`loramux_kernels.cpu.gate`), so what is learned is what is served.
"""

from dataclasses import dataclass

import torch

from loramux_adapters.gate import Gate, Norm, Select
from loramux_adapters.lowered import LoweredSite
from loramux_adapters.token_gates import token_gate
from loramux_kernels.cpu.gate import gate as weigh

_ROUTER_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """rank: of each expert; alpha: α, the scale is α/rank; experts: more than one have a router; top_k: how many of
    them a token goes to, weighted by their share of the softmax, None: to all."""

    rank: int = 8
    alpha: float = 16.0
    experts: int = 1
    top_k: int | None = None


class Site(torch.nn.Module):
    """A LoRA, or E of them with a router, without a posterior.

    a [R, d_in] and b [R, d_out] hold all experts' ranks, R = E·rank; router [E, d_in]. All float32 unless converted.
    `layout` names the tensors as PEFT does, for `save_peft`; `config` is what the method adds to PEFT's config.
    """

    method = "lora"

    def __init__(self, d_in: int, d_out: int, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        ranks = shape.rank * shape.experts
        bound = d_in**-0.5  # PEFT's: uniform, B = 0, so that training begins at the base model
        self.a = torch.nn.Parameter(torch.empty(ranks, d_in).uniform_(-bound, bound, generator=generator))
        self.b = torch.nn.Parameter(torch.zeros(ranks, d_out))
        self.router: torch.nn.Parameter | None = None
        if shape.experts > 1:
            weights = torch.randn(shape.experts, d_in, generator=generator) * _ROUTER_STD
            self.router = torch.nn.Parameter(weights)

    @property
    def scale(self) -> float:
        return self.shape.alpha / self.shape.rank

    def redraw(self, groups: int, generator: torch.Generator) -> None:
        """Draw the weights anew for what follows: `groups` draws, each for as many sequences of the batch."""

    def settle(self) -> None:
        """Use the mean in what follows."""

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        """What the site adds to its layer's output: [N, T, d_out] of inputs x [N, T, d_in]."""
        u = self.shrunk(x) * self.scale
        if self.router is not None:
            rule = token_gate(self._gate(), self._plain())
            weights = weigh(rule, (x @ self.router.T).flatten(0, -2))
            u = u * weights[:, self._owners().long()].view_as(u)
        return u @ self.b

    def shrunk(self, x: torch.Tensor) -> torch.Tensor:
        """A x, [N, T, R]."""
        return x @ self.a.T

    def lowered(self, module: str) -> tuple[LoweredSite, Gate | None]:
        """The site as it is served, and its gate, which has the module's name."""
        site = self._plain()
        if self.router is None:
            return site, None
        return LoweredSite(site.a, site.b, site.scale, gate=module, expert=self._owners()), self._gate()

    def layout(self) -> dict[str, torch.Tensor]:
        """The tensors of a site without experts, by what follows the module's name in PEFT's files."""
        return {"lora_A.weight": self.a.detach(), "lora_B.weight": self.b.detach().T}

    def config(self) -> dict[str, object]:
        return {"peft_type": "LORA"}

    def _plain(self) -> LoweredSite:
        scale = torch.full((len(self.b),), self.scale)
        return LoweredSite(self.a.detach().clone(), self.b.detach().clone(), scale)

    def _gate(self) -> Gate:
        assert self.router is not None
        top_k = self.shape.top_k
        select = Select.ALL if top_k is None else Select.TOP_K
        return Gate(self.router.detach().clone(), select=select, k=top_k, norm=Norm.RENORM)

    def _owners(self) -> torch.Tensor:
        return torch.arange(self.shape.experts, dtype=torch.int32).repeat_interleave(self.shape.rank)
