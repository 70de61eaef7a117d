"""A model with something else at the output of some of its layers: the references of tests."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch

Delta = Callable[[torch.Tensor], torch.Tensor]
"""What is added for the inputs [tokens, d_in]: [tokens, d_out]."""
Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""What takes the place of the outputs [tokens, d_out], the second argument, for the inputs [tokens, d_in]."""


@contextmanager
def changed(model: Any, changes: Mapping[str, Change]) -> Iterator[Any]:
    """The model, within, with other outputs of the modules that are named."""

    def hook(change: Change) -> Any:
        def replace(_module: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
            return change(args[0].flatten(0, -2), y.flatten(0, -2)).view(y.shape)

        return replace

    handles = [model.get_submodule(name).register_forward_hook(hook(change)) for name, change in changes.items()]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def hooked(model: Any, deltas: Mapping[str, Delta]) -> Iterator[Any]:
    """The model, within, with a sum at the outputs of the modules that are named, in the model's own dtype."""

    def plus(delta: Delta) -> Change:
        return lambda x, y: y + delta(x).to(y.dtype)

    with changed(model, {name: plus(delta) for name, delta in deltas.items()}):
        yield model


def hooked_logits(model: torch.nn.Module, deltas: Mapping[str, Delta], tokens: torch.Tensor) -> torch.Tensor:
    """In float64."""
    with hooked(deepcopy(model).double(), deltas) as double, torch.no_grad():
        return double(tokens).logits
