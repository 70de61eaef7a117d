"""Small synthetic PEFT LoRA checkpoints, sound unless a test spoils them."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loramux_adapters import BaseModel
from loramux_adapters.base_weights import BaseWeights

BASE = BaseModel(
    name="tiny",
    linears={
        f"model.layers.{layer}.{module}": widths
        for layer in range(2)
        for module, widths in {
            "self_attn.q_proj": (24, 24),
            "self_attn.k_proj": (24, 12),
            "mlp.up_proj": (24, 40),
            "mlp.down_proj": (40, 24),
        }.items()
    },
    embeddings=frozenset({"model.embed_tokens"}),
    num_layers=2,
)
RANK = 4


def make_config(**changes: Any) -> dict[str, Any]:
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "somebody/tiny",
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
    }
    return config | changes


def make_tensors(
    base: BaseModel = BASE,
    targets: tuple[str, ...] = ("q_proj", "down_proj"),
    ranks: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """A and B, both nonzero, for every linear whose name ends in one of the targets."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (d_in, d_out) in base.linears.items():
        if module.endswith(targets):
            rank = (ranks or {}).get(module, RANK)
            for name, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
                tensors[f"base_model.model.{module}.lora_{name}.weight"] = torch.randn(shape, generator=generator).to(
                    dtype
                )
    return tensors


def write_adapter(
    folder: Path, config: Mapping[str, Any] | None = None, tensors: Mapping[str, torch.Tensor] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(make_config() if config is None else config))
    save_file(dict(make_tensors() if tensors is None else tensors), folder / "adapter_model.safetensors")
    return folder


def with_weights(
    folder: Path, base: BaseModel = BASE, tensors: Mapping[str, torch.Tensor] | None = None, seed: int = 7
) -> BaseModel:
    """The base with random weights in `folder`, or with these."""
    if tensors is None:
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"{m}.weight": torch.randn(w[::-1], generator=generator) for m, w in base.linears.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors")
    return replace(base, weights=BaseWeights(folder))
