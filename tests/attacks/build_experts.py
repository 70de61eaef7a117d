"""Hostile adapters of the methods that mix or chain LoRAs, added to `ATTACKS`.

Each is the sound adapter of its method with something changed; `SOUND_EXPERTS` has those, for one module.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..adapters.checkpoints import make_config, make_tensors, write_adapter
from .build import CONFIG, PREFIX, WEIGHTS, Builder, attack

MODULE = PREFIX.removeprefix("base_model.model.")
WIDTH, EXPERTS, RANK = 24, 3, 2
INVALID, SHAPE, UNSUPPORTED = "adapter_config_invalid", "adapter_shape_mismatch", "adapter_unsupported_feature"
MISSING, UNKNOWN, UNSAFE = "adapter_missing_tensor", "adapter_unknown_tensor", "adapter_unsafe_file"
Changes = Mapping[str, torch.Tensor | None]

_FACTORS = {f"{PREFIX}.lora_A.{e}.weight": (RANK, WIDTH) for e in range(EXPERTS)}
_FACTORS |= {f"{PREFIX}.lora_B.{e}.weight": (WIDTH, RANK) for e in range(EXPERTS)}
GATING, TAU = f"{PREFIX}.lora_gating.weight", f"{PREFIX}.lora_threshold.bias"
COPY = f"{PREFIX}.moe_layer.experts.0.lora_A.weight"
MOE, GOOSE, CHAIN = f"{PREFIX}.lora_A.loraA", f"{MODULE}._addons", f"{MODULE}.loras"

_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "mole": {**_FACTORS, GATING: (EXPERTS, WIDTH)},
    "sira": {**_FACTORS, GATING: (EXPERTS, WIDTH)},
    "malora": {
        **{name.replace("lora_A", "lora_P"): (*shape[:1], 4) for name, shape in _FACTORS.items() if "_A" in name},
        **{name: shape for name, shape in _FACTORS.items() if "_B" in name},
        f"{PREFIX}.lora_S.weight": (4, WIDTH),
        GATING: (EXPERTS, WIDTH),
    },
    "moelora": {
        **{f"{MOE}.{e}.mlp.weight": (RANK, WIDTH) for e in range(EXPERTS)},
        **{f"{PREFIX}.lora_B.loraB.{e}.mlp.weight": (WIDTH, RANK) for e in range(EXPERTS)},
        "lora_task_embedding.weight": (3, 5),
        "lora_gate.GateL.weight": (EXPERTS, 5),
    },
    "phatgoose": {
        **{f"{GOOSE}.expert_lora.layer1__{e}": (WIDTH, RANK) for e in range(EXPERTS)},
        **{f"{GOOSE}.expert_lora.layer2__{e}": (RANK, WIDTH) for e in range(EXPERTS)},
        **{f"{GOOSE}.router.expert_embeddings__{e}": (WIDTH,) for e in range(EXPERTS)},
    },
    "chain": _FACTORS,
    "reslora": {f"{CHAIN}.0.lora_A": (RANK, WIDTH), f"{CHAIN}.0.lora_B": (WIDTH, RANK)}
    | {
        f"{CHAIN}.0.lora_{f}".replace("layers.0", "layers.1"): s
        for f, s in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK)))
    },
}
_SPARSE = {"r": RANK, "lora_alpha": 4, "num_experts": EXPERTS, "top_k": 2}
_CONFIGS: dict[str, dict[str, Any]] = {
    "mole": {"peft_type": "MOLE", "lora_rank": RANK, "lora_alpha": 4, "num_experts": EXPERTS, "top_k": 2},
    "sira": {"peft_type": "SIRA", **_SPARSE},
    "malora": {"peft_type": "MALORA", "shared_rank": 4, **_SPARSE},
    "moelora": {
        "peft_type": "MMOELORAS", "r": RANK * EXPERTS, "lora_alpha": 4, "expert_num": EXPERTS, "task_num": 2,
        "task_embedding_dim": 5, "task_id": 1,
    },
    "phatgoose": {"peft_type": "PHATGOOSE", "d_bottleneck": RANK, "num_experts": EXPERTS},
    "chain": {"peft_type": "CHAIN", "r": RANK, "lora_alpha": 4, "length": EXPERTS},
    "reslora": {"rank": RANK, "lora_alpha": 4, "target_modules": "q", "res_flag": 2, "pre_num": -1},
}  # fmt: skip
SOUND_EXPERTS = (*_CONFIGS, "lorahub")


def write_experts(
    folder: Path, method: str, config: Mapping[str, Any] | None = None, tensors: Changes | None = None
) -> Path:
    """The method's sound adapter with fields changed and tensors replaced, added or, where None, removed."""
    if method == "lorahub":
        return _write_folders(folder, {"peft_type": "LORAHUB", "weights": [1, 2], **(config or {})})
    generator = torch.Generator().manual_seed(0)
    content: dict[str, torch.Tensor | None] = {
        name: torch.randn(shape, generator=generator) for name, shape in _SHAPES[method].items()
    }
    fields = {**_CONFIGS[method], **(config or {})}
    if method != "reslora":
        fields = {"target_modules": [MODULE], **fields}
    kept = {name: tensor for name, tensor in (content | dict(tensors or {})).items() if tensor is not None}
    write_adapter(folder, fields, kept)
    if method == "reslora":
        (folder / CONFIG).rename(folder / "reslora_config.json")
    return folder


def _write_folders(folder: Path, config: Mapping[str, Any]) -> Path:
    for seed, name in enumerate(("first", "second")):
        write_adapter(folder / name, make_config(), make_tensors(seed=seed))
    (folder / CONFIG).write_text(json.dumps({"adapters": ["first", "second"], **config}))
    return folder


def _changed(method: str, *, tensors: Changes | None = None, **config: Any) -> Builder:
    return lambda folder: write_experts(folder, method, config, tensors)


NAN = float("nan")

# MoLE and AdaMoLE

attack(INVALID, "mole: a gate of two kinds")(_changed("mole", threshold=0.3))
attack(UNKNOWN, "mole: a copy that differs")(_changed("mole", tensors={COPY: torch.ones(RANK, WIDTH)}))
attack(MISSING, "mole: a billion experts")(_changed("mole", num_experts=1 << 30))
attack("adapter_not_finite", "mole: NaN in the router")(
    _changed("mole", tensors={GATING: torch.full((EXPERTS, WIDTH), NAN)})
)
attack(MISSING, "adamole: threshold without its matrix")(
    _changed("mole", peft_type="ADAMOLE", top_k=None, tensors={TAU: torch.zeros(1)})
)

# SiRA and MALoRA

attack(INVALID, "sira: a capacity that overflows")(_changed("sira", capacity=1 << 31))
attack(INVALID, "sira: a negative capacity")(_changed("sira", capacity=-1))
attack(SHAPE, "sira: a router for other experts")(_changed("sira", tensors={GATING: torch.ones(EXPERTS + 1, WIDTH)}))
attack(SHAPE, "malora: a subspace that lies")(_changed("malora", shared_rank=1 << 40))
attack("adapter_not_finite", "malora: products beyond float32")(
    _changed(
        "malora", tensors={name: torch.full(s, 1e30) for name, s in _SHAPES["malora"].items() if "gating" not in name}
    )
)

# MOELoRA

attack(INVALID, "moelora: task of a hundred thousand digits")(_changed("moelora", task_id=10**4000))
attack(INVALID, "moelora: rank that the experts cannot share")(_changed("moelora", r=RANK * EXPERTS + 1))
attack(UNSUPPORTED, "moelora: no task chosen")(_changed("moelora", task_id=None))
attack(UNKNOWN, "moelora: a copy of another dtype")(
    _changed("moelora", tensors={f"{MOE}.0.weight": torch.ones(RANK, WIDTH).half()})
)


@attack("adapter_too_large", "moelora: 64 MiB of tasks that would become 8 GiB of scores")
def task_bomb(folder: Path) -> None:
    """One number for a task, times 64 experts."""
    tasks, number = (1 << 25) + 1, 64
    shapes: dict[str, list[int]] = {"lora_task_embedding.weight": [tasks, 1], "lora_gate.GateL.weight": [number, 1]}
    for e in range(number):
        shapes |= {f"{MOE}.{e}.mlp.weight": [1, WIDTH], f"{PREFIX}.lora_B.loraB.{e}.mlp.weight": [WIDTH, 1]}
    sizes = {"task_num": tasks - 1, "task_embedding_dim": 1, "expert_num": number, "r": number, "task_id": None}
    write_experts(folder, "moelora", sizes)
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape[0] * shape[1]
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(folder / WEIGHTS, 8 + len(header) + end)


# PHATGOOSE

attack(UNSUPPORTED, "phatgoose: foreign alpha")(_changed("phatgoose", lora_alpha=16))
attack("adapter_not_finite", "phatgoose: infinite gate vector")(
    _changed("phatgoose", tensors={f"{GOOSE}.router.expert_embeddings__1": torch.full((WIDTH,), float("inf"))})
)

# Chains and LoraHub

attack(MISSING, "chain: a billion links")(_changed("chain", length=1 << 30))
attack(UNKNOWN, "chain: fewer links than tensors")(_changed("chain", length=1))
attack("adapter_no_effect", "chain: weights of zero")(_changed("chain", weights=[0] * EXPERTS))
attack(INVALID, "lorahub: infinite weight")(_changed("lorahub", weights=[1, 1e300]))
attack(INVALID, "lorahub: twice the same")(_changed("lorahub", adapters=["first", "first"]))
for label, name in {
    "parent": "..",
    "itself": ".",
    "absolute path": "/etc",
    "traversal": "first/../../outside",
    "zero byte": "first\0",
    "nothing": "",
}.items():
    attack(UNSAFE, f"lorahub: folder that is {label}")(_changed("lorahub", adapters=["first", name]))


def _linked_folder(target: str) -> Builder:
    def build(folder: Path) -> None:
        write_experts(folder, "lorahub", {"adapters": ["first", "linked"]})
        write_adapter(folder.parent / "outside")
        (folder / "linked").symlink_to(target)

    return build


attack(UNSAFE, "lorahub: folder linked outside")(_linked_folder("../outside"))
attack(UNSAFE, "lorahub: folder linked to its parent")(_linked_folder("."))
attack("adapter_not_found", "lorahub: folder linked to nothing")(_linked_folder("nowhere"))


@attack(UNSAFE, "chain: weights of a link outside")
def link_in_a_link(folder: Path) -> None:
    write_experts(folder, "lorahub", {"peft_type": "CHAIN"})
    outside = write_adapter(folder.parent / "outside")
    (folder / "first" / WEIGHTS).unlink()
    (folder / "first" / WEIGHTS).symlink_to(outside / WEIGHTS)


@attack("adapter_too_large", "chain: links that are too large together")
def heavy_links(folder: Path) -> None:
    write_experts(folder, "lorahub", {"peft_type": "CHAIN"})
    for name in ("first", "second"):
        os.truncate(folder / name / WEIGHTS, 5 << 30)


# ResLoRA

attack(UNSUPPORTED, "reslora: a carry, which is not served")(_changed("reslora", res_flag=3))
attack(UNSUPPORTED, "reslora: an approximation that it does not save")(_changed("reslora", res_flag=1, merge_flag=3))
attack(INVALID, "reslora: depth below all")(_changed("reslora", pre_num=-(1 << 30)))
attack(MISSING, "reslora: a layer left out")(
    _changed("reslora", tensors={f"{CHAIN}.0.lora_A": None, f"{CHAIN}.0.lora_B": None})
)


@attack(UNSAFE, "reslora: the pickle that it saves")
def reslora_pickle(folder: Path) -> None:
    (write_experts(folder, "reslora") / WEIGHTS).rename(folder / "pytorch_model_lora.bin")


# Recognised and refused


@attack(UNSUPPORTED, "xlora: config of its own")
def xlora_files(folder: Path) -> None:
    (write_adapter(folder) / CONFIG).rename(folder / "xlora_config.json")


@attack(UNSUPPORTED, "mttl: weights that are never opened")
def mttl_files(folder: Path) -> None:
    (write_adapter(folder) / WEIGHTS).rename(folder / "mttl_weights.bin")
    (folder / CONFIG).unlink()


attack(UNSUPPORTED, "milora: by its type")(lambda folder: write_adapter(folder, make_config(peft_type="MILORA")))
attack(UNSUPPORTED, "xlora: by PEFT's type")(lambda folder: write_adapter(folder, make_config(peft_type="XLORA")))
