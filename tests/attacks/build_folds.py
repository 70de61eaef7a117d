"""Hostile adapters of the methods that fold into the plain form, added to `ATTACKS`.

Each is the sound adapter of its method with something changed; `SOUND` has those, for one module.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..adapters.checkpoints import write_adapter
from .build import CONFIG, PREFIX, WEIGHTS, Builder, attack

MODULE = PREFIX.removeprefix("base_model.model.")
WIDTH = 24  # of q_proj, both ways
FLAGS = [True, False, True, True]

_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "adalora": {f"{PREFIX}.lora_A": (3, WIDTH), f"{PREFIX}.lora_E": (3, 1), f"{PREFIX}.lora_B": (WIDTH, 3)},
    "vera": {
        f"{PREFIX}.vera_lambda_b": (WIDTH,),
        f"{PREFIX}.vera_lambda_d": (4,),
        "base_model.vera_A": (4, WIDTH),
        "base_model.vera_B": (WIDTH, 4),
    },
    "dora_dynamic": {
        f"model.{MODULE}.lora_a_linear.weight": (4, WIDTH),
        f"model.{MODULE}.lora_scaler": (4,),
        f"model.{MODULE}.lora_b_linear.weight": (WIDTH, 4),
    },
    "melora": {
        **{f"{PREFIX}.lora_A.{i}.weight": (2, WIDTH // 2) for i in range(2)},
        **{f"{PREFIX}.lora_B.{i}.weight": (WIDTH // 2, 2) for i in range(2)},
    },
    "multilora": {
        f"{MODULE}.lora_A": (2, 4, WIDTH),
        f"{MODULE}.lora_B": (2, WIDTH, 4),
        f"{MODULE}.lora_scaling": (2, WIDTH),
    },
    "lora_bias": {
        f"{PREFIX}.lora_A.weight": (4, WIDTH),
        f"{PREFIX}.lora_B.weight": (WIDTH, 4),
        f"{PREFIX}.lora_B.bias": (WIDTH,),
    },
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "adalora": {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 8, "rank_pattern": {f"{MODULE}.lora_E": FLAGS}},
    "vera": {"peft_type": "VERA", "r": 4},
    "dora_dynamic": {"peft_type": "ADAPTIVE_LORA", "adaptive_lora_start_rank": 4, "lora_alpha": 8},
    "melora": {"peft_type": "MELORA", "r": [2, 2], "lora_alpha": [8, 8]},
    "multilora": {"peft_type": "MULTILORA", "r": 4, "lora_alpha": 8, "lora_num": 2},
    "lora_bias": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_bias": True},
}
SOUND = tuple(_CONFIGS)


def write_sound(
    folder: Path,
    method: str,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor | None] | None = None,
) -> Path:
    """The method's sound adapter with fields changed and tensors replaced, added or, where None, removed."""
    content = {name: torch.ones(shape) for name, shape in _SHAPES[method].items()} | dict(tensors or {})
    fields = {"target_modules": [MODULE], "bias": "none", **_CONFIGS[method], **(config or {})}
    return write_adapter(folder, fields, {name: tensor for name, tensor in content.items() if tensor is not None})


def _changed(method: str, *, tensors: Mapping[str, torch.Tensor | None] | None = None, **config: Any) -> Builder:
    return lambda folder: write_sound(folder, method, config, tensors)


NAN = float("nan")
INVALID, SHAPE, UNSUPPORTED = "adapter_config_invalid", "adapter_shape_mismatch", "adapter_unsupported_feature"

# AdaLoRA

SCALES = f"{PREFIX}.lora_E"
PATTERN = f"{MODULE}.lora_E"
attack(SHAPE, "adalora: pruning that the tensors do not show")(_changed("adalora", rank_pattern=None))
attack(SHAPE, "adalora: giant initial rank")(_changed("adalora", init_r=1 << 70, rank_pattern=None))
attack(INVALID, "adalora: more flags than ranks")(_changed("adalora", rank_pattern={PATTERN: FLAGS * 20_000}))
attack(INVALID, "adalora: numbers for flags")(_changed("adalora", rank_pattern={PATTERN: [1, 0, 1, 1]}))
attack(INVALID, "adalora: path for a module")(
    _changed("adalora", rank_pattern={PATTERN: FLAGS, "../../etc.lora_E": FLAGS})
)
attack("adapter_not_finite", "adalora: NaN for a singular value")(
    _changed("adalora", tensors={SCALES: torch.full((3, 1), NAN)})
)
attack("adapter_missing_tensor", "adalora: no singular values")(_changed("adalora", tensors={SCALES: None}))

# VeRA

OUTPUTS, RANKS = f"{PREFIX}.vera_lambda_b", f"{PREFIX}.vera_lambda_d"
PROJECTIONS: dict[str, torch.Tensor | None] = {"base_model.vera_A": None, "base_model.vera_B": None}
attack("adapter_missing_tensor", "vera: projections that are not there")(_changed("vera", tensors=PROJECTIONS))
attack("adapter_unknown_tensor", "vera: projections that would be ignored")(_changed("vera", save_projection=False))
attack(SHAPE, "vera: giant rank in the config")(_changed("vera", r=1 << 40, save_projection=False, tensors=PROJECTIONS))
attack(INVALID, "vera: seed of 100 000 bits")(
    _changed("vera", save_projection=False, projection_prng_key=1 << 10_000, tensors=PROJECTIONS)
)
attack("adapter_not_finite", "vera: infinite output")(
    _changed("vera", tensors={OUTPUTS: torch.full((WIDTH,), float("inf"))})
)


@attack("adapter_too_large", "vera: 64 MiB that would become 8 GiB")
def vera_bomb(folder: Path) -> None:
    """A rank for which one vector of zeros stands, as a hole in the file."""
    module, rank = "model.layers.0.mlp.up_proj", (1 << 25) + 1
    write_sound(folder, "vera", {"r": rank, "target_modules": [module], "save_projection": False})
    ends = [80, 80 + 2 * rank]
    header = json.dumps(
        {
            f"{module}.vera_lambda_b": {"dtype": "BF16", "shape": [40], "data_offsets": [0, ends[0]]},
            f"{module}.vera_lambda_d": {"dtype": "BF16", "shape": [rank], "data_offsets": ends},
        }
    ).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(folder / WEIGHTS, 8 + len(header) + ends[1])


# DoRA with dynamic rank

SCALER = f"model.{MODULE}.lora_scaler"
MASK = f"finally_mask_dict.{MODULE}"
attack(INVALID, "dora_dynamic: mask of fractions")(
    _changed("dora_dynamic", tensors={MASK: torch.tensor([0, 1, 0.5, 0])})
)
attack(SHAPE, "dora_dynamic: mask of another rank")(_changed("dora_dynamic", tensors={MASK: torch.zeros(3)}))
attack("adapter_not_finite", "dora_dynamic: NaN in what is pruned")(
    _changed(
        "dora_dynamic",
        tensors={
            f"model.{MODULE}.lora_a_linear.weight": torch.full((4, WIDTH), NAN),
            SCALER: torch.tensor([0.0, 0, 0, 1]),
        },
    )
)
attack("adapter_no_effect", "dora_dynamic: everything pruned")(_changed("dora_dynamic", tensors={MASK: torch.ones(4)}))


@attack("adapter_unsafe_file", "dora_dynamic: mask in a pickle")
def pruned_by_a_pickle(folder: Path) -> None:
    (write_sound(folder, "dora_dynamic") / "prune_state_dict.pt").write_bytes(b"\x80\x04")


# MELoRA

attack(INVALID, "melora: a hundred thousand parts")(_changed("melora", r=[1] * 100_000, lora_alpha=[1] * 100_000))
attack(INVALID, "melora: parts that do not divide")(_changed("melora", r=[2] * 5, lora_alpha=[8] * 5))
attack(INVALID, "melora: part of rank 0")(_changed("melora", r=[2, 0]))
attack(INVALID, "melora: an alpha too few")(_changed("melora", lora_alpha=[8]))
attack("adapter_wrong_base", "melora: part as wide as the layer")(
    _changed("melora", tensors={f"{PREFIX}.lora_A.0.weight": torch.ones(2, WIDTH)})
)

# MultiLoRA

attack(SHAPE, "multilora: number that lies")(_changed("multilora", lora_num=1 << 60))
attack(SHAPE, "multilora: scaling for other outputs")(
    _changed("multilora", tensors={f"{MODULE}.lora_scaling": torch.ones(WIDTH, 2)})
)
attack("adapter_not_finite", "multilora: products beyond float32")(
    _changed(
        "multilora",
        tensors={
            f"{MODULE}.lora_scaling": torch.full((2, WIDTH), 1e30),
            f"{MODULE}.lora_B": torch.full((2, WIDTH, 4), 1e30),
        },
    )
)

# LoRA with a bias

BIAS = f"{PREFIX}.lora_B.bias"
attack("adapter_missing_tensor", "lora_bias: no bias")(_changed("lora_bias", tensors={BIAS: None}))
attack("adapter_wrong_base", "lora_bias: bias of another width")(
    _changed("lora_bias", tensors={BIAS: torch.ones(WIDTH + 1)})
)
attack("adapter_not_finite", "lora_bias: NaN in the bias")(
    _changed("lora_bias", tensors={BIAS: torch.full((WIDTH,), NAN)})
)
attack("adapter_unknown_tensor", "lora_bias: bias in place of none")(
    _changed("lora_bias", bias="lora_only", tensors={f"{PREFIX}.base_layer.bias": torch.ones(WIDTH)})
)
attack(UNSUPPORTED, "lora_bias: bias of a norm")(
    _changed("lora_bias", bias="all", tensors={"base_model.model.model.norm.bias": torch.ones(WIDTH)})
)
attack(INVALID, "lora_bias: bias of no kind")(_changed("lora_bias", bias={"all": "of them"}))


@attack("adapter_config_invalid", "lora_bias: no flag")
def bias_of_nothing(folder: Path) -> None:
    path = write_sound(folder, "lora_bias") / CONFIG
    path.write_text(path.read_text().replace('"lora_bias": true', '"lora_bias": "false"'))


# DoRA. The base of these tests has no weights.

LENGTHS = f"{PREFIX}.lora_magnitude_vector"


def _dora(lengths: torch.Tensor | None, **config: Any) -> Builder:
    tensors: dict[str, torch.Tensor | None] = {BIAS: None, LENGTHS: lengths}
    return _changed("lora_bias", tensors=tensors, lora_bias=False, **{"use_dora": True, **config})


attack("adapter_missing_tensor", "dora: no magnitude")(_dora(None))
attack("adapter_wrong_base", "dora: magnitude of another width")(_dora(torch.ones(WIDTH + 1)))
attack(INVALID, "dora: magnitude of zero")(_dora(torch.zeros(WIDTH)))
attack(INVALID, "dora: negative magnitude")(_dora(torch.full((WIDTH,), -1.0)))
attack("adapter_not_finite", "dora: NaN for a magnitude")(_dora(torch.full((WIDTH,), NAN)))
attack(INVALID, "dora: no flag")(_dora(torch.ones(WIDTH), use_dora="false"))
attack(UNSUPPORTED, "dora: base without weights")(_dora(torch.ones(WIDTH)))
attack(UNSUPPORTED, "dora: magnitude without the flag")(_dora(torch.ones(WIDTH), use_dora=False))
