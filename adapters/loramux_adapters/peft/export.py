"""A lowered adapter as a PEFT LoRA, for whatever reads those: two files, adapter_config.json and its tensors."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loramux_adapters.compose.plain import check_plain
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.peft.tensors import PREFIX, WEIGHTS_FILE

_HINT = "A PEFT LoRA is one A and one B per layer. Write a native file instead (FILE.safetensors)."


def write_peft(folder: Path, adapter: LoweredAdapter, base_name: str) -> None:
    """Write the adapter into `folder`, which is made if it is not there.

    A [rank, d_in] and B [d_out, rank] are as they are, with α = s·rank, where the ranks of a site have one scale s.
    Where they differ they are multiplied into B, in float32. Raises AdapterUnsupportedFeature for what is no plain
    LoRA, and OSError when the disk does.
    """
    check_plain(adapter.method, adapter, _HINT)
    tensors: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    for module, site in sorted(adapter.sites.items()):
        b, alphas[module] = _scaled_b(site)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = site.expanded_a.contiguous().clone()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / WEIGHTS_FILE
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors' 0600 would keep a server that runs as another user out
    (folder / "adapter_config.json").write_text(json.dumps(_config(adapter, alphas, base_name), indent=2) + "\n")


def _config(adapter: LoweredAdapter, alphas: dict[str, float], base_name: str) -> dict[str, Any]:
    first = min(adapter.sites)
    rank, alpha = adapter.ranks[first], alphas[first]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: own for module, own in sorted(adapter.ranks.items()) if own != rank},
        "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
        "target_modules": sorted(adapter.sites),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _scaled_b(site: LoweredSite) -> tuple[torch.Tensor, float]:
    """B [d_out, rank] and α, of which α/rank is exactly the scale: a product of 24 and at most 29 bits."""
    if bool((site.scale == site.scale[0]).all()):
        return site.b.T, float(site.scale[0]) * site.rank
    return (site.b.double() * site.scale.double()[:, None]).float().T, float(site.rank)
