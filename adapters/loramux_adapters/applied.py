"""An adapter applied to a transformers model by hooks, to measure what it computes without a server.

A site's equation is `lowered.py`'s, in float32; the gate is the data plane's own (`loramux_kernels.cpu.gate`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import layer_norm

from loramux_adapters.gate import Gate
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.tasks import at_task
from loramux_adapters.token_gates import router_rows, row_owners, token_gate
from loramux_kernels.cpu.gate import gate as weigh

Observer = Callable[[str, torch.Tensor], object]
"""Called with a site's name and its input x [tokens, d_in], before the site's layer returns."""


class AppliedSite:
    """One site in float32. The adapter passed `check_servable`, and none of its gates has a capacity: that counts the
    tokens of a sequence, of which a call brings any."""

    def __init__(self, site: LoweredSite, gate: Gate | None) -> None:
        self._a = site.expanded_a.float()
        self._b = site.b.float() * site.scale[:, None].float()
        self._rule = None if gate is None else token_gate(gate, site)
        self._router = None if gate is None else router_rows(gate).float()
        self._owner = None if gate is None else row_owners(gate, site).long()

    def shrunk(self, x: torch.Tensor) -> torch.Tensor:
        """u [tokens, R]"""
        return x.float() @ self._a.T

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """What the experts are compared by: |l| or l, [tokens, E]."""
        assert self._rule is not None
        logits = self._logits(x)[:, : self._rule.experts]
        return logits.abs() if self._rule.absolute else logits

    def expert_weights(self, x: torch.Tensor) -> torch.Tensor:
        """g [tokens, E] of the scored experts, before a map sums them up."""
        assert self._rule is not None
        return weigh(self._rule.router, self._logits(x))

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        """What the rank rows add, [tokens, d_out]."""
        u = self.shrunk(x)
        if self._rule is not None:
            assert self._owner is not None
            u = u * weigh(self._rule, self._logits(x))[:, self._owner]
        return u @ self._b

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        assert self._router is not None
        x = x.float()
        if self._rule is not None and (eps := self._rule.layer_norm_eps) is not None:
            x = layer_norm(x, x.shape[1:], eps=eps)
        return x @ self._router.T


@contextmanager
def applied(model: Any, adapter: LoweredAdapter, observe: Observer | None = None) -> Iterator[None]:
    """Within, `model` (a float32 transformers model of the adapter's base) computes with the adapter."""
    adapter = at_task(adapter)
    handles = [
        model.get_submodule(name).register_forward_hook(_hook(name, site, adapter, observe))
        for name, site in adapter.sites.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, site: LoweredSite, adapter: LoweredAdapter, observe: Observer | None) -> Callable[..., Any]:
    ready = AppliedSite(site, None if site.gate is None else adapter.gates[site.gate])

    def add(module: Any, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        x = args[0].flatten(0, -2)
        if observe is not None:
            observe(name, x)
        if site.magnitude is not None:
            own = getattr(module, "bias", None)
            own = 0 if own is None else own
            y = site.magnitude.float() * (y - own) + own
        if site.bias is not None:
            y = y + site.bias.float()
        return y + ready.delta(x).view(y.shape)

    return add
