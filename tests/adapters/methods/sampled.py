"""What the tests of Bayesian methods share: logits of the mean and of draws, from each method's formula in float64.

The formula gets the same random numbers as a draw, from `posterior.reference`, which shares no code with ours.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loramux_adapters import LoweredAdapter, draw, lower, prepare

from ..checkpoints import write_adapter
from ..form import logits
from ..hooks import hooked_logits
from ..layouts.draw import targeted
from ..posterior.reference import Reference

DIGEST, SEED = "0123456789abcdef", 5
Weight = Callable[[str, Reference | None], Any]
"""ΔW [d_out, d_in] of a module: of the mean, or of the draw with these numbers."""


def assert_sampled(
    folder: Path, config: Any, tensors: dict[str, torch.Tensor], tiny: Any, weight: Weight, samples: int = 2
) -> LoweredAdapter:
    """The lowered adapter has the formula's logits: its mean, which is what `prepare` serves, and its draws."""
    adapter = lower(write_adapter(folder / "adapter", config, tensors), tiny.base)
    assert prepare(folder / "adapter", tiny.base, folder / "cache").summary.posterior == adapter.posterior
    modules = targeted(config, tiny.base)
    assert sorted(adapter.sites) == sorted(modules)
    moved = []
    for numbers in (None, *(Reference(DIGEST, SEED, sample) for sample in range(samples))):
        deltas = {}
        for module in modules:
            matrix = torch.as_tensor(np.asarray(weight(module, numbers)), dtype=torch.float64)
            deltas[module] = lambda x, matrix=matrix: x @ matrix.T
        expected = hooked_logits(tiny.model, deltas, tiny.tokens)
        result = adapter.mean if numbers is None else draw(adapter, digest=DIGEST, seed=SEED, sample=numbers.key[2])
        found = logits(tiny.model, result, tiny.tokens)
        assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
        moved.append(expected)
    for i, one in enumerate(moved):
        for other in moved[:i]:
            assert (one - other).abs().max() > 1e-3 * one.abs().max(), "all of them are different models"
    return adapter


def matrix(tensors: dict[str, torch.Tensor], name: str) -> np.ndarray:
    return tensors[name].double().numpy()
