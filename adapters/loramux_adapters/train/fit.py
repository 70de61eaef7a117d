"""The loop that every recipe shares.

    minimise   loss + penalty(step)

loss: mean over a batch of −log p(answer | prompt), under weights that are drawn anew in every step; penalty: what the
posterior costs, per text. Adam, with a linear warm-up and a linear decay to nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from loramux_adapters.train.adapter import TrainableAdapter

Loss = Callable[[], torch.Tensor]
"""−log p of the next batch, a scalar; it calls the model, which the adapter is attached to."""
Penalty = Callable[[int], torch.Tensor]
"""Nats per text at a step."""

MAX_NORM = 1.0


@dataclass(frozen=True)
class Options:
    """draws: of the weights in a step; the batch's sequences are divided among them."""

    steps: int
    learning_rate: float = 1e-3
    warm_up: int = 10
    draws: int = 1
    seed: int = 0


def fit(
    model: Any, adapter: TrainableAdapter[Any], loss: Loss, options: Options, penalty: Penalty | None = None
) -> list[float]:
    """Train the adapter in place, and leave it at its mean; the losses, without penalties.

    `model`: a transformers model (or a part of one) with the adapter's layers. What of it requires no gradient stays
    as it is.
    """
    parameters = list(adapter.parameters())
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, options))
    generator = torch.Generator().manual_seed(options.seed)
    losses = []
    adapter.train()
    with adapter.attached(model):
        for step in range(options.steps):
            adapter.redraw(options.draws, generator)
            value = loss()
            losses.append(float(value.detach()))
            torch.autograd.backward(value if penalty is None else value + penalty(step))
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    adapter.settle()
    adapter.eval()
    return losses


def _rate(step: int, options: Options) -> float:
    warm_up = min(options.warm_up, options.steps // 2)
    return min((step + 1) / (warm_up + 1), (options.steps - step) / max(1, options.steps - warm_up))
