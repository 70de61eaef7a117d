"""Hostile and broken adapters. Each builder writes one to a folder; `ATTACKS` has the code that must refuse it."""

import io
import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..adapters.checkpoints import make_config, make_tensors, write_adapter

Builder = Callable[[Path], object]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"

ATTACKS: dict[str, tuple[Builder, str]] = {}


def attack(code: str, name: str | None = None) -> Callable[[Builder], Builder]:
    def register(build: Builder) -> Builder:
        ATTACKS[name or build.__name__] = (build, code)
        return build

    return register


def _raw_config(text: str | bytes) -> Builder:
    def build(folder: Path) -> None:
        write_adapter(folder)
        (folder / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())

    return build


def _with_config(**changes: Any) -> Builder:
    return lambda folder: write_adapter(folder, make_config(**changes))


def _raw_weights(content: bytes) -> Builder:
    def build(folder: Path) -> None:
        write_adapter(folder)
        (folder / WEIGHTS).write_bytes(content)

    return build


def _header(text: str, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


def _entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _entries(entries: Mapping[str, Any], data: int = 0) -> Builder:
    return _raw_weights(_header(json.dumps(entries), bytes(data)))


def _with_tensors(**changes: torch.Tensor | None) -> Builder:
    """Sound tensors, some replaced, added (full name) or removed (None). `A`, `B`: those of layer 0, q_proj."""

    def build(folder: Path) -> None:
        tensors = make_tensors()
        for name, tensor in changes.items():
            key = f"{PREFIX}.lora_{name}.weight" if name in ("A", "B") else name
            if tensor is None:
                del tensors[key]
            else:
                tensors[key] = tensor
        write_adapter(folder, None, tensors)

    return build


def _link(name: str, target: str) -> Builder:
    def build(folder: Path) -> None:
        write_adapter(folder)
        outside = write_adapter(folder.parent / "outside")
        (folder / name).unlink()
        (folder / name).symlink_to(target.format(outside=outside))

    return build


def _beside(name: str) -> Builder:
    def build(folder: Path) -> None:
        write_adapter(folder)
        (folder / name).write_bytes(b"{}")

    return build


# Files


@attack("adapter_not_found")
def missing_folder(folder: Path) -> None:
    pass


@attack("adapter_not_found")
def empty_folder(folder: Path) -> None:
    folder.mkdir()


@attack("adapter_not_found")
def file_instead_of_folder(folder: Path) -> None:
    folder.write_bytes(b"{}")


@attack("adapter_not_found")
def config_without_weights(folder: Path) -> None:
    (write_adapter(folder) / WEIGHTS).unlink()


@attack("adapter_not_found")
def weights_without_config(folder: Path) -> None:
    (write_adapter(folder) / CONFIG).unlink()


@attack("adapter_unsafe_file")
def only_a_pickle(folder: Path) -> None:
    (write_adapter(folder) / WEIGHTS).rename(folder / "adapter_model.bin")


class Touch:
    """Pickled, this creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@attack("adapter_unsafe_file")
def pickle_named_safetensors(folder: Path) -> None:
    (write_adapter(folder) / WEIGHTS).write_bytes(pickle.dumps(Touch(folder / "executed")))


@attack("adapter_unsafe_file")
def torch_archive_named_safetensors(folder: Path) -> None:
    archive = io.BytesIO()
    torch.save(make_tensors(), archive)
    (write_adapter(folder) / WEIGHTS).write_bytes(archive.getvalue())


@attack("adapter_unsafe_file")
def named_pipe(folder: Path) -> None:
    (write_adapter(folder) / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


@attack("adapter_unsafe_file")
def folder_named_weights(folder: Path) -> None:
    (write_adapter(folder) / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


@attack("adapter_too_large")
def sparse_giant(folder: Path) -> None:
    os.truncate(write_adapter(folder) / WEIGHTS, 9 << 30)


attack("adapter_unsafe_file", "config links outside")(_link(CONFIG, "{outside}/" + CONFIG))
attack("adapter_unsafe_file", "weights link outside")(_link(WEIGHTS, "{outside}/" + WEIGHTS))
attack("adapter_unsafe_file", "weights link outside, relative")(_link(WEIGHTS, "../outside/" + WEIGHTS))
attack("adapter_unsafe_file", "link to a device")(_link(WEIGHTS, "/dev/zero"))
attack("adapter_unsafe_file", "link to nothing")(_link(WEIGHTS, "nothing"))
attack("adapter_unsafe_file", "link to itself")(_link(WEIGHTS, WEIGHTS))
attack("adapter_unsupported_feature", "added embeddings")(_beside("new_embeddings.safetensors"))
attack("adapter_unsupported_feature", "shards")(_beside("adapter_model.safetensors.index.json"))

# The config's JSON

attack("adapter_corrupt", "config: repeated key")(_raw_config(json.dumps(make_config())[:-1] + ', "r": 4}'))
attack("adapter_corrupt", "config: repeated nested key")(
    _raw_config(json.dumps(make_config())[:-1] + ', "rank_pattern": {"a": 1, "a": 2}}')
)
attack("adapter_corrupt", "config: deep nesting")(_raw_config('{"r": ' + "[" * 400_000 + "]" * 400_000 + "}"))
attack("adapter_corrupt", "config: NaN")(_raw_config(json.dumps(make_config(lora_alpha=float("nan")))))
attack("adapter_corrupt", "config: number of 100 000 digits")(
    _raw_config(json.dumps(make_config())[:-1] + ', "x": ' + "9" * 100_000 + "}")
)
attack("adapter_corrupt", "config: not UTF-8")(_raw_config(b'{"r": "\xff"}'))
attack("adapter_corrupt", "config: a list")(_raw_config("[]"))
attack("adapter_corrupt", "config: empty")(_raw_config(""))
attack("adapter_corrupt", "config: truncated")(_raw_config(json.dumps(make_config())[:-9]))
attack("adapter_too_large", "config: two megabytes")(_raw_config(json.dumps(make_config(revision="x" * (2 << 20)))))
attack("adapter_config_invalid", "config: infinite number")(
    _raw_config(json.dumps(make_config()).replace("8", "1e400"))
)
attack("adapter_config_invalid", "config: scale below float32")(_with_config(lora_alpha=1e-60))
attack("adapter_config_invalid", "config: rank true")(_with_config(r=True))
attack("adapter_config_invalid", "config: rank 0")(_with_config(r=0))
attack("adapter_config_invalid", "config: rank -4")(_with_config(r=-4))
attack("adapter_config_invalid", "config: pattern that never ends")(_with_config(target_modules=r"(.|..)*(?<=\d)"))
attack("adapter_config_invalid", "config: pattern of 30 000 brackets")(_with_config(target_modules="(" * 30_000))
attack("adapter_unsupported_feature", "config: unknown field")(_with_config(**{"evil\x1b[2J\n": 1}))
attack("adapter_unsupported_feature", "config: unknown method")(_with_config(peft_type="LOHA"))
attack("adapter_unsupported_feature", "config: method of 500 000 letters")(_with_config(peft_type="x" * 500_000))
attack("adapter_unsupported_feature", "config: method that is no string")(_with_config(peft_type={"LORA": []}))

# The safetensors header

attack("adapter_corrupt", "weights: empty file")(_raw_weights(b""))
attack("adapter_corrupt", "weights: seven bytes")(_raw_weights(bytes(7)))
attack("adapter_corrupt", "weights: text")(_raw_weights(b"version https://git-lfs.github.com/spec/v1\n"))
attack("adapter_corrupt", "weights: header of 2^63 bytes")(_raw_weights((1 << 63).to_bytes(8, "little") + b"{}"))
attack("adapter_corrupt", "weights: header past the end")(_raw_weights((99).to_bytes(8, "little") + b"{}"))
attack("adapter_corrupt", "weights: truncated data")(_raw_weights(save(make_tensors())[:-1]))
attack("adapter_corrupt", "weights: truncated header")(_raw_weights(save(make_tensors())[:100]))
attack("adapter_corrupt", "weights: trailing bytes")(_raw_weights(save(make_tensors()) + b"\0"))
attack("adapter_corrupt", "weights: deep nesting")(
    _raw_weights(_header('{"a":' + "[" * 1_000_000 + "]" * 1_000_000 + "}"))
)
attack("adapter_corrupt", "weights: 300 000 lists")(_raw_weights(_header('{"a":[' + "[]," * 300_000 + "[]]}")))
attack("adapter_corrupt", "weights: one of 100 000 names repeated")(
    _raw_weights(_header("{" + ",".join(f'"{n}":0' for n in [*range(100_000), 99_999]) + "}"))
)
attack("adapter_corrupt", "weights: repeated name")(
    _raw_weights(_header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', bytes(4)))
)
attack("adapter_corrupt", "weights: overlap")(_entries({"a": _entry([2], [0, 8]), "b": _entry([2], [4, 12])}, 12))
attack("adapter_corrupt", "weights: twice the same bytes")(
    _entries({"a": _entry([2], [0, 8]), "b": _entry([2], [0, 8])}, 8)
)
attack("adapter_corrupt", "weights: hole")(_entries({"a": _entry([1], [0, 4]), "b": _entry([1], [8, 12])}, 12))
attack("adapter_corrupt", "weights: negative offset")(_entries({"a": _entry([1], [-4, 0])}, 4))
attack("adapter_corrupt", "weights: negative size")(_entries({"a": _entry([-1], [4, 0])}, 4))
attack("adapter_corrupt", "weights: two negative sizes")(_entries({"a": _entry([-1, -1], [0, 4])}, 4))
attack("adapter_corrupt", "weights: shape over its bytes")(_entries({"a": _entry([1 << 40, 1 << 40], [0, 4])}, 4))
attack("adapter_corrupt", "weights: product that wraps to 0")(_entries({"a": _entry([1 << 32, 1 << 32], [0, 0])}))
attack("adapter_corrupt", "weights: a hundred thousand axes")(_entries({"a": _entry([1 << 61] * 100_000, [0, 4])}, 4))
attack("adapter_corrupt", "weights: fractional shape")(_entries({"a": _entry([1.0], [0, 4])}, 4))
attack("adapter_corrupt", "weights: shape true")(_entries({"a": _entry([True], [0, 4])}, 4))
attack("adapter_corrupt", "weights: three offsets")(_entries({"a": _entry([1], [0, 4, 4])}, 4))
attack("adapter_corrupt", "weights: extra key in an entry")(_entries({"a": _entry([1], [0, 4]) | {"x": 1}}, 4))
attack("adapter_corrupt", "weights: metadata of numbers")(_entries({"__metadata__": {"a": 1}}))
attack("adapter_corrupt", "weights: metadata list")(_entries({"__metadata__": []}))
attack("adapter_unsupported_feature", "weights: unknown dtype")(_entries({"a": _entry([1], [0, 4], "F31")}, 4))
for dtype in (torch.float64, torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64):
    attack("adapter_unsupported_feature", f"weights: {dtype}")(_with_tensors(A=torch.ones(4, 24).to(dtype)))


@attack("adapter_too_large")
def header_over_the_limit(folder: Path) -> None:
    _raw_weights(_header("{" + " " * (9 << 20) + "}"))(folder)


# What the tensors claim

NAN, INF = torch.ones(4, 24), torch.ones(24, 4)
NAN[2, 17], INF[11, 1] = float("nan"), -float("inf")
attack("adapter_not_finite", "NaN in A")(_with_tensors(A=NAN))
attack("adapter_not_finite", "infinity in B")(_with_tensors(B=INF))
attack("adapter_not_finite", "NaN in bfloat16")(_with_tensors(A=NAN.bfloat16()))
attack("adapter_shape_mismatch", "rank above the config's")(_with_config(r=2))
attack("adapter_shape_mismatch", "rank below the config's")(_with_config(r=64))
attack("adapter_shape_mismatch", "giant rank in the config")(_with_config(r=1 << 70))
attack("adapter_shape_mismatch", "rank_pattern that lies")(_with_config(rank_pattern={"q_proj": 3}))
attack("adapter_shape_mismatch", "A and B of other ranks")(_with_tensors(B=torch.ones(24, 3)))
attack("adapter_shape_mismatch", "A transposed")(_with_tensors(A=torch.ones(24, 4)))
attack("adapter_shape_mismatch", "one wrong width")(_with_tensors(B=torch.ones(25, 4)))
attack("adapter_shape_mismatch", "flat shard")(_with_tensors(A=torch.ones(96)))
attack("adapter_shape_mismatch", "empty shard")(_with_tensors(A=torch.ones(0)))
attack("adapter_shape_mismatch", "empty matrix")(_with_tensors(A=torch.ones(0, 24)))
attack("adapter_shape_mismatch", "three axes")(_with_tensors(A=torch.ones(1, 4, 24)))
attack("adapter_missing_tensor", "A without B")(_with_tensors(B=None))
attack("adapter_missing_tensor", "B without A")(_with_tensors(A=None))
attack("adapter_missing_tensor", "targeted module without tensors")(
    _with_config(target_modules=["q_proj", "down_proj", "up_proj"])
)
attack("adapter_missing_tensor", "no tensors")(lambda folder: write_adapter(folder, None, {}))
attack("adapter_unknown_tensor", "module that is not targeted")(_with_config(target_modules=["q_proj"]))
attack("adapter_unknown_tensor", "module that is excluded")(_with_config(exclude_modules=["down_proj"]))
attack("adapter_unknown_tensor", "layer that is not targeted")(_with_config(layers_to_transform=[0]))
attack("adapter_unknown_tensor", "foreign tensor")(_with_tensors(**{f"{PREFIX}.lora_C.weight": torch.ones(1)}))
attack("adapter_unknown_tensor", "empty name")(_with_tensors(**{"": torch.ones(1)}))
attack("adapter_unknown_tensor", "two claims to one place")(
    _with_tensors(**{f"{PREFIX.removeprefix('base_model.model.')}.lora_A.weight": torch.ones(4, 24)})
)
for label, module in {
    "path traversal": "../../../etc/passwd",
    "terminal escape": "\x1b]0;owned\x07\n",
    "line break": "model.layers.0.self_attn.q_proj\n",
    "module of a list": "model.layers.0.self_attn",
    "long name": "x" * 100_000,
}.items():
    pair = {f"{module}.lora_A.weight": torch.ones(4, 24), f"{module}.lora_B.weight": torch.ones(24, 4)}
    attack("adapter_unknown_tensor", f"name: {label}")(_with_tensors(**pair))
attack("adapter_unsupported_feature", "tensors of two adapters")(
    _with_tensors(**{f"{PREFIX}.lora_A.other.weight": torch.ones(4, 24)})
)
for label, name in {
    "DoRA": f"{PREFIX}.lora_magnitude_vector",
    "bias of B": f"{PREFIX}.lora_B.bias",
    "bias of the base": f"{PREFIX}.base_layer.bias",
    "embedding LoRA": "base_model.model.model.embed_tokens.lora_embedding_A",
    "saved module": "base_model.model.score.modules_to_save.weight",
    "embedding table": "base_model.model.model.embed_tokens.weight",
    "AdaLoRA": f"{PREFIX}.lora_E",
    "trained tokens": "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
}.items():
    attack("adapter_unsupported_feature", f"tensor of {label}")(_with_tensors(**{name: torch.ones(24)}))
attack("adapter_unsupported_feature", "LoRA on the head")(
    _with_tensors(**{f"lm_head.lora_{f}.weight": torch.ones(4, 4) for f in "AB"})
)
attack("adapter_unsupported_feature", "head targeted")(_with_config(target_modules=["q_proj", "down_proj", "lm_head"]))
attack("adapter_unsupported_feature", "embeddings targeted")(_with_config(target_modules=".*"))


def _renamed(old: str, new: str) -> Builder:
    return lambda folder: write_adapter(folder, None, {k.replace(old, new): v for k, v in make_tensors().items()})


@attack("adapter_wrong_base")
def other_widths(folder: Path) -> None:
    tensors = {key: torch.ones([n if n == 4 else 2 * n for n in t.shape]) for key, t in make_tensors().items()}
    write_adapter(folder, None, tensors)


attack("adapter_wrong_base", "other names")(_renamed("model.layers", "transformer.h"))
attack("adapter_wrong_base", "more layers")(_renamed("layers.1.", "layers.2."))


@attack("adapter_no_effect")
def never_trained(folder: Path) -> None:
    tensors = {key: t * ("lora_A" in key) for key, t in make_tensors().items()}
    write_adapter(folder, None, tensors)


@attack("adapter_no_effect")
def zero_a(folder: Path) -> None:
    write_adapter(folder, None, {key: t * ("lora_B" in key) for key, t in make_tensors().items()})


@attack("adapter_no_effect")
def ranks_that_never_meet(folder: Path) -> None:
    """A is zero in the ranks where B is not."""
    tensors = make_tensors()
    for key, tensor in tensors.items():
        (tensor[:2] if "lora_A" in key else tensor[:, 2:]).zero_()
    write_adapter(folder, None, tensors)


attack("adapter_no_effect", "alpha 0")(_with_config(lora_alpha=0))
