"""Hostile and broken native files, added to `ATTACKS`; test_attacks.py runs them like all others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loramux_adapters import write_native

from ..adapters.natives import Q, make_mixture
from .build import Builder, attack

NAME = "mixture.safetensors"
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


def write_mixture(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_native(folder / NAME, make_mixture(), "tiny")


def changed(change: Change) -> Builder:
    """A sound file whose description and tensors are changed; everything else about it stays sound."""

    def build(folder: Path) -> None:
        path = write_mixture(folder)
        with safe_open(path, "pt") as file:
            description = json.loads(file.metadata()["loramux"])
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        change(description, tensors)
        save_file(tensors, path, metadata={"loramux": json.dumps(description)})

    return build


def _described(text: str) -> Builder:
    """A sound set of tensors with this text for a description."""

    def build(folder: Path) -> None:
        path = write_mixture(folder)
        save_file({key: tensor.clone() for key, tensor in load_file(path).items()}, path, metadata={"loramux": text})

    return build


def _bytes(change: Callable[[bytes], bytes]) -> Builder:
    def build(folder: Path) -> None:
        path = write_mixture(folder)
        path.write_bytes(change(path.read_bytes()))

    return build


def _header(change: Callable[[dict[str, Any]], object]) -> Builder:
    """A sound file whose header is changed, with its length."""

    def spoil(whole: bytes) -> bytes:
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]

    return _bytes(spoil)


def _gate(**changes: Any) -> Builder:
    return changed(lambda description, tensors: description["gates"]["q"].update(changes))


def _tensor(**changes: torch.Tensor) -> Builder:
    """`A`, `B`, `scale`, `expert`: those of the first site; `weights`: its gate's."""
    names = {part: f"gate:q.{part}" if part == "weights" else f"{Q}.{part}" for part in changes}
    return changed(lambda description, tensors: tensors.update({names[part]: changes[part] for part in changes}))


def _optional(gate: str, name: str, tensor: torch.Tensor) -> Builder:
    def change(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        description["gates"][gate]["tensors"] = [name]
        tensors[f"gate:{gate}.{name}"] = tensor

    return changed(change)


def _ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# What the description claims

for label, rank in {"above": 5, "below": 3, "zero": 0, "negative": -4}.items():
    attack("adapter_shape_mismatch", f"native: rank {label}")(
        changed(lambda description, tensors, rank=rank: description["sites"][Q].update(rank=rank))
    )
attack("adapter_config_invalid", "native: giant rank")(changed(lambda d, t: d["sites"][Q].update(rank=1 << 70)))
attack("adapter_config_invalid", "native: rank true")(changed(lambda d, t: d["sites"][Q].update(rank=True)))
attack("adapter_config_invalid", "native: gate that is missing")(changed(lambda d, t: d["sites"][Q].update(gate="x")))
attack("adapter_config_invalid", "native: negative capacity")(_gate(capacity={"tokens": -1}))
attack("adapter_config_invalid", "native: capacity over the batch")(_gate(capacity={"tokens": 1, "scope": "batch"}))
attack("adapter_config_invalid", "native: k above E")(_gate(k=3))
attack("adapter_config_invalid", "native: p without top_p")(_gate(p=0.5))
attack("adapter_config_invalid", "native: temperature 0")(_gate(temperature=0))
attack("adapter_config_invalid", "native: a million hidden layers")(_gate(hidden=1_000_000))
attack("adapter_config_invalid", "native: unknown choice")(_gate(norm="batch"))
attack("adapter_config_invalid", "native: terminal escape")(changed(lambda d, t: d.update(warnings=["\x1b]0;x\x07"])))
attack("adapter_config_invalid", "native: lone surrogate")(changed(lambda d, t: d.update(base="\ud800")))
attack("adapter_config_invalid", "native: carry in a circle")(
    changed(lambda d, t: d["sites"][Q].update(carry={"source": Q, "kind": "prev_u"}))
)
attack("adapter_unsupported_feature", "native: unknown field")(_gate(jitter=0.1))
attack("adapter_unsupported_feature", "native: unknown version")(changed(lambda d, t: d.update(version=2)))
attack("adapter_unsupported_feature", "native: unknown format")(changed(lambda d, t: d.update(format="loramux2")))
attack("adapter_corrupt", "native: digest of something else")(changed(lambda d, t: d.update(digest="0" * 64)))
attack("adapter_corrupt", "native: not JSON")(_described("{"))
attack("adapter_corrupt", "native: empty description")(_described(""))
attack("adapter_corrupt", "native: list for a description")(_described("[]"))
attack("adapter_corrupt", "native: repeated keys")(_described('{"format": "loramux", "version": 1, "version": 1}'))
attack("adapter_corrupt", "native: deep nesting")(_described('{"sites":' * 100_000))
attack("adapter_corrupt", "native: NaN in the description")(_described('{"format": "loramux", "version": NaN}'))
attack("adapter_corrupt", "native: integer of a million digits")(_described('{"version": ' + "9" * 1_000_000 + "}"))
attack("adapter_config_invalid", "native: number that becomes infinity")(
    _described('{"format": "loramux", "version": 1, "base": "b", "method": "m", "gates": {"g": {"eps": 1e999}}}')
)
attack("adapter_missing_tensor", "native: sites without end")(
    _described(
        json.dumps(
            {"format": "loramux", "version": 1, "method": "m", "base": "b"}
            | {"sites": {f"m{i}": {"rank": 1} for i in range(100_000)}}
        )
    )
)

# What the tensors claim

attack("adapter_shape_mismatch", "native: wrong router width")(_tensor(weights=torch.ones(2, 23)))
attack("adapter_shape_mismatch", "native: router of one axis")(_tensor(weights=torch.ones(48)))
attack("adapter_shape_mismatch", "native: router without experts")(_tensor(weights=torch.ones(0, 24)))
attack("adapter_shape_mismatch", "native: one site of another width")(_tensor(B=torch.ones(4, 25)))
attack("adapter_shape_mismatch", "native: A of another rank")(_tensor(A=torch.ones(5, 24)))
attack("adapter_shape_mismatch", "native: scale of another rank")(_tensor(scale=torch.ones(5)))
attack("adapter_shape_mismatch", "native: empty posterior")(
    changed(
        lambda d, t: (
            d["sites"][Q].update(variance={"kind": "diagonal_a"}),
            t.update({f"{Q}.variance.sigma_a": torch.ones(0, 24)}),
        )
    )
)
attack("adapter_not_finite", "native: NaN in a router")(_tensor(weights=torch.full((2, 24), float("nan"))))
attack("adapter_not_finite", "native: infinite scale")(_tensor(scale=torch.full((4,), float("inf"))))
attack("adapter_config_invalid", "native: expert beyond the gate's")(_tensor(expert=_ints(0, 1, 2, 1)))
attack("adapter_config_invalid", "native: expert below 0")(_tensor(expert=_ints(0, 1, -(1 << 31), 1)))
attack("adapter_config_invalid", "native: cyclic expert map")(_optional("down", "expert_map", _ints(1, 2, 0)))
attack("adapter_config_invalid", "native: expert map out of range")(_optional("down", "expert_map", _ints(0, 1, 9)))
attack("adapter_config_invalid", "native: expert map that skips")(_optional("down", "expert_map", _ints(0, 2, 2)))
attack("adapter_unsupported_feature", "native: expert ids in float")(_tensor(expert=torch.zeros(4)))
attack("adapter_unsupported_feature", "native: expert ids in int64")(_tensor(expert=torch.zeros(4, dtype=torch.int64)))
attack("adapter_unsupported_feature", "native: router in float64")(_tensor(weights=torch.ones(2, 24).double()))
attack("adapter_unknown_tensor", "native: tensor beside")(changed(lambda d, t: t.update(payload=torch.ones(1))))
attack("adapter_missing_tensor", "native: no scale")(changed(lambda d, t: t.pop(f"{Q}.scale")))
attack("adapter_unknown_tensor", "native: gate that nobody uses")(
    changed(lambda d, t: (d["gates"].update(idle={}), t.update({"gate:idle.weights": torch.ones(2, 24)})))
)
attack("adapter_no_effect", "native: zero scales")(
    changed(lambda d, t: t.update({key: torch.zeros_like(v) for key, v in t.items() if key.endswith(".scale")}))
)


def _moved(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Every site becomes a module of another architecture."""
    for module in list(description["sites"]):
        other = module.replace("model.layers", "transformer.h")
        description["sites"][other] = description["sites"].pop(module)
        for key in [key for key in tensors if key.startswith(f"{module}.")]:
            tensors[key.replace(module, other)] = tensors.pop(key)


attack("adapter_wrong_base", "native: other names")(changed(_moved))

# The file


def _overlap(header: dict[str, Any]) -> None:
    header[f"{Q}.B"]["data_offsets"] = header[f"{Q}.A"]["data_offsets"]


attack("adapter_corrupt", "native: overlapping tensors")(_header(_overlap))
attack("adapter_corrupt", "native: truncated")(_bytes(lambda whole: whole[:-1]))
attack("adapter_corrupt", "native: bytes after the end")(_bytes(lambda whole: whole + b"\0"))
attack("adapter_corrupt", "native: empty file")(_bytes(lambda whole: b""))


@attack("adapter_unsafe_file", "native: link out of the folder")
def _link(folder: Path) -> None:
    outside = write_mixture(folder.parent / "outside")
    folder.mkdir()
    (folder / NAME).symlink_to(outside)


@attack("adapter_not_found", "native: two files")
def _two(folder: Path) -> None:
    """Neither is the adapter more than the other."""
    whole = write_mixture(folder).read_bytes()
    (folder / f"other-{NAME}").write_bytes(whole)
