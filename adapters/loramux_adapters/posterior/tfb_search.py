"""How much noise a LoRA bears: TFB's search for σ_q on texts (arXiv 2412.05723).

    nll(σ) = −mean_t log( 1/S · Σ_s p_s(y_t | y_<t) )        σ_q = the largest σ with |nll(σ) − nll(0)| ≤ c · nll(0)

over the tokens y_t of anchor texts, with the same S draws of the weights' noise for every σ, so that nll changes with σ
alone. It is found by bisection between 1e-4 and 1, in logarithms; the paper's code bisects on labels that the adapter
gives itself, between 0.001 and 0.2, and takes the end that is beyond the bound, not the one within.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loramux_adapters.applied import applied
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterConfigInvalid, AdapterUnsupportedFeature
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.native import digest_of
from loramux_adapters.posterior.draw import draw
from loramux_adapters.posterior.tfb import tfb

LEAST, MOST = 1e-4, 1.0
Texts = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Options:
    """change: c, the bound on the relative change of nll; samples: S; steps: of the bisection."""

    change: float = 0.003
    samples: int = 8
    steps: int = 8

    def __post_init__(self) -> None:
        for field, sound in (
            ("change", 0 < self.change <= 1),
            ("samples", 1 <= self.samples <= 256),
            ("steps", 1 <= self.steps <= 64),
        ):
            if not sound:
                raise AdapterConfigInvalid(
                    f"{field} is {getattr(self, field)}.",
                    hint="change is above 0 and at most 1, samples 1 to 256, steps 1 to 64.",
                    field=field,
                )


@dataclass(frozen=True)
class Found:
    """σ_q, nll at 0 and at σ_q in nats per token, and all that was tried: (σ, nll)."""

    sigma_q: float
    before: float
    after: float
    tried: tuple[tuple[float, float], ...]


def search(
    model: Any,
    adapter: LoweredAdapter,
    base: BaseModel,
    texts: Texts,
    options: Options,
    on_step: Callable[[float, float], object] = lambda sigma, nll: None,
) -> Found:
    """Find σ_q for the adapter on its base, a float32 transformers model.

    Raises AdapterConfigInvalid if no text has two tokens, AdapterUnsupportedFeature for an adapter with a capacity, or
    if not even the least σ is within the bound, and what `tfb` raises.
    """
    if adapter.limited:
        raise AdapterUnsupportedFeature(
            "An expert of the adapter takes a limited number of tokens, which are counted only where it is served.",
            hint="Give σ_q.",
            field="capacity",
        )
    texts = [text for text in texts if len(text) > 1]
    if not texts:
        raise AdapterConfigInvalid(
            "There is no anchor text of two tokens or more.",
            hint="Give texts like those it is used for.",
            field="texts",
        )
    digest = digest_of(adapter)  # the noise is that of the adapter as it is, for every σ
    before = _nll(model, [adapter], texts)
    low, high, found, tried = LEAST, MOST, None, []
    for step in range(options.steps):
        sigma = LEAST if step == options.steps - 1 and found is None else math.sqrt(low * high)
        bayesian = tfb(adapter, base, sigma)
        draws = (draw(bayesian, digest=digest, seed=0, sample=sample) for sample in range(options.samples))
        nll = _nll(model, draws, texts)
        on_step(sigma, nll)
        tried.append((sigma, nll))
        if abs(nll - before) <= options.change * before:
            low, found = sigma, (sigma, nll)
        else:
            high = sigma
    if found is None:
        raise AdapterUnsupportedFeature(
            f"With σ_q = {LEAST:g} already −log P of the texts changes by more than {options.change:.2%}.",
            hint="Allow a larger change, or give σ_q.",
            field="change",
        )
    return Found(found[0], before, found[1], tuple(tried))


def _nll(model: Any, draws: Iterable[LoweredAdapter], texts: Texts) -> float:
    """Nats per token of the mean of the draws' predictions."""
    logs = []
    for one in draws:
        with applied(model, one), torch.inference_mode():
            logs.append(torch.cat([_chosen(model, ids) for ids in texts]))
    stacked = torch.stack(logs).double()
    return float(-(torch.logsumexp(stacked, dim=0) - math.log(len(logs))).mean())


def _chosen(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """log p of every token but the first."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    chosen: torch.Tensor = torch.log_softmax(logits, dim=-1).gather(1, ids[1:, None])[:, 0]
    return chosen
