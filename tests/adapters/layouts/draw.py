"""What the generators share: the modules that a config targets, and random tensors of given shapes."""

from collections.abc import Mapping
from typing import Any

import torch

from loramux_adapters import BaseModel

Shapes = Mapping[str, tuple[int, ...]]
Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model."


def given(**fields: Any) -> dict[str, Any]:
    """A config without the fields that are `...`."""
    return {name: value for name, value in fields.items() if value is not ...}


def targeted(config: Mapping[str, Any], base: BaseModel) -> list[str]:
    """The modules whose name ends in one of the config's target_modules."""
    return [module for module in base.linears if module.endswith(tuple(config["target_modules"]))]


def draw(shapes: Shapes, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """Normal numbers, so large that a product with the last axis neither grows nor shrinks."""
    generator = torch.Generator().manual_seed(seed)
    return {n: (torch.randn(s, generator=generator) / s[-1] ** 0.5).to(dtype) for n, s in shapes.items()}
