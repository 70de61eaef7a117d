"""Logits of a base model in float64 with a delta added to the output of some of its layers: the references of tests."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch

Delta = Callable[[torch.Tensor], torch.Tensor]


def hooked_logits(model: torch.nn.Module, deltas: Mapping[str, Delta], tokens: torch.Tensor) -> torch.Tensor:
    """deltas: module -> what it adds, [tokens, d_out], for its inputs [tokens, d_in]; both float64."""
    model = deepcopy(model).double()
    for name, delta in deltas.items():

        def add(_module: Any, args: Any, y: torch.Tensor, delta: Delta = delta) -> torch.Tensor:
            return y + delta(args[0].flatten(0, -2)).view(y.shape)

        model.get_submodule(name).register_forward_hook(add)
    with torch.no_grad():
        return model(tokens).logits
