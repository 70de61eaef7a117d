"""A lowered adapter beside the formula of its layout: `delta(config, tensors, module, x)` is what it adds there."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loramux_adapters import BaseModel, LoweredAdapter, lower
from loramux_adapters.native import digest_of

from ..checkpoints import BASE, write_adapter
from ..form import logits, site_delta
from ..hooks import hooked_logits
from ..layouts.draw import Tensors, targeted

Formula = Callable[[Any, Tensors, str, torch.Tensor], torch.Tensor]
EXACT = 1e-9
"""Nothing is rounded but by float64."""
ROUNDED = 1e-6
"""A factor or a scale was rounded to float32."""


def assert_logits(
    tiny: Any,
    adapter: LoweredAdapter,
    delta: Formula,
    config: Mapping[str, Any],
    tensors: Tensors,
    tolerance: float = ROUNDED,
) -> None:
    """The logits of a `Reference` model with the adapter are the formula's.

    tolerance  as a share of what the formula changes
    """
    deltas = {module: partial(delta, config, tensors, module) for module in targeted(config, tiny.base)}
    expected = hooked_logits(tiny.model, deltas, tiny.tokens)
    moved = (expected - tiny.base_logits()).abs().max()
    assert deltas and moved > 1e-3
    assert (logits(tiny.model, adapter, tiny.tokens) - expected).abs().max() < tolerance * moved


def assert_sites(
    adapter: LoweredAdapter,
    delta: Formula,
    config: Mapping[str, Any],
    tensors: Tensors,
    tolerance: float = ROUNDED,
    seed: int = 1,
) -> None:
    """Every site adds what the formula does.

    tolerance  as a share of the largest number of that
    """
    for module, site in adapter.sites.items():
        x = torch.randn(20, site.a.shape[1], generator=torch.Generator().manual_seed(seed))
        expected = delta(config, tensors, module, x)
        difference = (site_delta(site, adapter.gates, x) - expected).abs().max()
        assert difference <= tolerance * expected.abs().max(), module


def assert_one_adapter(folder: Path, *spellings: tuple[Mapping[str, Any], Tensors], base: BaseModel = BASE) -> None:
    """Configs and tensors that all mean the same, down to the last bit."""
    digests = {
        digest_of(lower(write_adapter(folder / str(i), config, tensors), base))
        for i, (config, tensors) in enumerate(spellings)
    }
    assert len(digests) == 1
