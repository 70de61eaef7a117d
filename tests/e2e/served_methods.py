"""An adapter of every method that is served, for the real base, and what it computes by its paper's formula.

The files are those of `tests/adapters/layouts`, with each code base's own names, and so are the formulas: plain torch
in float64, nothing of loramux. A method that PEFT has is in PEFT_ROWS: PEFT writes its file and is its reference.

Adapters are mild, so that rounding decides no token and no route: alpha makes a product of the factors' random numbers
a few percent of what the layer itself puts out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file

from loramux_adapters import BaseModel, draw, lower, write_native

from ..adapters.checkpoints import write_adapter
from ..adapters.hooks import Delta
from ..adapters.layouts import (
    abmll,
    blob,
    chain,
    dora_dynamic,
    folders,
    hydralora,
    ivon,
    lora,
    malora,
    mcdropout,
    melora,
    moe_peft,
    moelora,
    mola,
    mole,
    multilora,
    native,
    phatgoose,
    reslora,
    scalabl,
    sira,
    swag,
)
from ..adapters.layouts.draw import PREFIX, targeted
from ..adapters.posterior.reference import Reference
from . import peft_adapters

LAYERS = 30
# MoLA's schedule of 2, 4, 6 and 8 experts, more of them in deeper layers; HILO's ranks grow with the depth, too.
EXPERTS = [2 + 2 * (4 * layer // LAYERS) for layer in range(LAYERS)]
RANKS = [2 + layer // 8 for layer in range(LAYERS)]

# Folder -> its path and what it adds to the output of each linear.
Make = Callable[[Path, BaseModel, int], tuple[Path, Mapping[str, Delta]]]


@dataclass(frozen=True)
class Row:
    """method: which of METHODS reads it; make: writes it."""

    method: str
    make: Make


def _row(method: str, layout: ModuleType, **config: Any) -> Row:
    fields = layout.make_config(**config)

    def make(folder: Path, base: BaseModel, seed: int) -> tuple[Path, Mapping[str, Delta]]:
        tensors = layout.make_tensors(fields, base, seed=seed)
        if layout is reslora:
            folder.mkdir()
            (folder / reslora.CONFIG_FILE).write_text(json.dumps(fields))
            save_file(tensors, folder / "adapter_model.safetensors")
            modules = [module for module in base.linears if module.endswith(reslora.targets_of(fields))]
        else:
            write_adapter(folder, fields, tensors)
            modules = targeted(fields, base)
        return folder, {module: partial(layout.delta, fields, tensors, module) for module in modules}

    return Row(method, make)


def _folders(method: str, kind: str) -> Row:
    config = folders.make_config(peft_type=kind) if kind != "ENSEMBLE" else {"peft_type": kind, "adapters": ["1", "2"]}
    part = lora.make_config(lora_alpha=0.4, target_modules=["q_proj", "up_proj"])

    def make(folder: Path, base: BaseModel, seed: int) -> tuple[Path, Mapping[str, Delta]]:
        parts = folders.make_parts(config, part, base, seed=seed)
        for name, tensors in parts.items():
            write_adapter(folder / name, part, tensors)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder, {m: partial(folders.delta, config, part, parts, m) for m in targeted(part, base)}

    return Row(method, make)


def _native(folder: Path, base: BaseModel, seed: int) -> tuple[Path, Mapping[str, Delta]]:
    modules = [module for module in base.linears if module.endswith(("k_proj", "gate_proj"))]
    tensors = native.make_tensors(modules, base, seed=seed)
    path = folder.with_suffix(".safetensors")
    save_file(tensors, path, metadata=native.make_metadata(modules))
    return path, {module: partial(native.delta, tensors, module) for module in modules}


def _draw(folder: Path, base: BaseModel, seed: int) -> tuple[Path, Mapping[str, Delta]]:
    """One weight draw of a BLoB adapter, as a file of its own: A = M + ρ² ⊙ z with numbers of the reference."""
    config = blob.make_config(lora_alpha=0.2, target_modules=["v_proj"])
    tensors = blob.make_tensors(config, base, seed=seed)
    adapter = lower(write_adapter(folder, config, tensors), base)
    path = write_native(folder.with_suffix(".safetensors"), draw(adapter, digest="d", seed=1, sample=2), base.name)
    numbers = Reference("d", 1, 2)
    for module in targeted(config, base):
        name = f"{PREFIX}{module}.lora_A.weight"
        rho = tensors[name.replace(".weight", "_rho")].double()
        noise = torch.from_numpy(numbers.normals(module, "a", *rho.shape))
        tensors[name] = tensors[name].double() + rho.square() * noise
    return path, {module: partial(blob.delta, config, tensors, module) for module in targeted(config, base)}


ROWS: dict[str, Row] = {
    "native": Row("native", _native),
    "abmll": _row("abmll", abmll, lora_alpha=0.3),
    "blob": _row("blob", blob, lora_alpha=0.4),
    "blob, a draw": Row("native", _draw),
    "chain": _folders("chain", "CHAIN"),
    "xgblora": _row("chain", chain, lora_alpha=0.2, target_modules=["v_proj", "down_proj"]),
    "dora_dynamic": _row("dora_dynamic", dora_dynamic, lora_alpha=0.6),
    "ensemble": _folders("ensemble", "ENSEMBLE"),
    "hydralora": _row("hydralora", hydralora, lora_alpha=0.4),
    "ivon": _row("ivon", ivon, lora_alpha=0.3, target_modules=["k_proj", "v_proj"]),
    "lorahub": _folders("lorahub", "LORAHUB"),
    "malora": _row("malora", malora, lora_alpha=0.4),
    "malora, shared rows": _row("malora", malora, lora_alpha=0.4, shared_rank=3, target_modules=["o_proj"]),
    "mcdropout": _row("mcdropout", mcdropout, lora_alpha=0.3, target_modules=["o_proj"]),
    "melora": _row("melora", melora, lora_alpha=[0.2, 0.4, 0.1, -0.3]),
    "melora, packed": _row("melora", melora, r=[4, 4], lora_alpha=[0.4, -0.6], target_modules=["v_proj", "gate_proj"]),
    "moelora": _row("moelora", moelora, lora_alpha=0.8, task_id=2),
    "moe_peft, mola": _row("moe_peft", moe_peft, lora_alpha=0.4, target_modules=["k_proj", "up_proj"]),
    "moe_peft, loramoe": _row("moe_peft", moe_peft, kind="LORAMOE", lora_alpha=0.4),
    "mola": _row("mola", mola, lora_alpha=0.3, r=[3] * LAYERS, number_experts=EXPERTS, top_k=[2] * LAYERS),
    "hilo": _row(
        "mola", mola, peft_type="HILO", lora_alpha=0.3, r=RANKS, number_experts=EXPERTS,
        top_k=[1 + layer // 15 for layer in range(LAYERS)], target_modules=["v_proj", "o_proj"],
    ),
    "mole, top_k": _row("mole", mole, lora_alpha=0.4, top_k=2, target_modules=["q_proj", "v_proj"]),
    "mole, threshold": _row("mole", mole, lora_alpha=0.4, threshold=0.25, target_modules=["k_proj", "o_proj"]),
    "adamole": _row("mole", mole, peft_type="ADAMOLE", lora_alpha=0.4, target_modules=["v_proj", "up_proj"]),
    "multilora": _row("multilora", multilora, lora_alpha=2),
    "phatgoose": _row("phatgoose", phatgoose, d_bottleneck=16),
    "reslora": _row("reslora", reslora, lora_alpha=0.3, pre_num=2, target_modules="q.v"),
    "scalabl": _row("scalabl", scalabl, lora_alpha=0.3),
    "sira": _row("sira", sira, lora_alpha=0.3),
    "sira, capacity": _row("sira", sira, lora_alpha=0.4, capacity=8, target_modules=["q_proj", "down_proj"]),
    "swag": _row("swag", swag, lora_alpha=0.002, n_models=3, target_modules=["q_proj", "up_proj"]),
}  # fmt: skip

# Options of PEFT's config, and the deviation of what starts as zero.
PEFT_ROWS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, 0.02),
    **peft_adapters.OTHERS,
}
