"""Adapters in training on the tiny model, with numbers that training could have left in them."""

from functools import partial
from typing import Any

import torch

from loramux_adapters import BaseModel
from loramux_adapters.train import BlobSite, HierarchicalSite, Shape, Site, TrainableAdapter

from ..compact.tiny import make_model

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
KINDS = {
    "lora": (Site, Shape(2, 4.0)),
    "mixture": (Site, Shape(2, 4.0, experts=3)),
    "blob": (partial(BlobSite, sigma=0.1), Shape(2, 4.0)),
    "blob-mixture": (partial(BlobSite, sigma=0.1), Shape(2, 4.0, experts=3, top_k=2)),
    "abmll": (partial(HierarchicalSite, offset=0.05), Shape(2, 4.0)),
}
BAYESIAN = ("blob", "blob-mixture", "abmll")


def make_base() -> Any:
    """The tiny model, with an output head that lets a probability be near 1."""
    model = make_model().requires_grad_(False)
    model.lm_head.weight *= 20
    return model


def make(kind: str, model: Any, *, moved: bool = True, seed: int = 0) -> TrainableAdapter[Any]:
    """`moved`: B, and what else begins at zero, is not; routers decide for something."""
    make_site, shape = KINDS[kind]
    adapter = TrainableAdapter.create(BaseModel.from_module(model, "tiny"), MODULES, make_site, shape, seed)
    if moved:
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if name.endswith((".b", ".std_b", ".router")):
                    size = 0.02 if name.endswith("std_b") else 1.0
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return adapter
