"""The native format: one safetensors file that holds a lowered adapter (specified in adapters/README.md).

The tensors are those of `LoweredAdapter.tensors`; everything else is JSON in `__metadata__["loramux"]`. Reading gives
back exactly what was written, and refuses by name what it does not know.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loramux_adapters.description import Fields, invalid, without_defaults
from loramux_adapters.errors import (
    AdapterMissingTensor,
    AdapterShapeMismatch,
    AdapterUnknownTensor,
    AdapterUnsupportedFeature,
    shown,
)
from loramux_adapters.files import parse_json
from loramux_adapters.gate import (
    GATE_TENSORS,
    Capacity,
    CapacityScope,
    Gate,
    GateKind,
    GateSource,
    GateValue,
    Norm,
    Pooling,
    PostMap,
    PreMap,
    Select,
)
from loramux_adapters.lowered import (
    OPTIONAL_TENSORS,
    Carry,
    CarryKind,
    FfnMixture,
    LoweredAdapter,
    LoweredSite,
)
from loramux_adapters.variance import SHAPES, Variance, VarianceForm, VarianceKind

FORMAT = "loramux"
VERSION = 1
SUFFIX = ".safetensors"
METADATA_KEY = "loramux"
# These hold indices and are int32; all others are float32, bfloat16 or float16.
INDEX_TENSORS = frozenset({"expert", "arow", "expert_map"})
MAX_HIDDEN = 8

_NAME = re.compile(r"[A-Za-z0-9._/-]{1,200}")
_GATE_ENUMS: dict[str, Any] = {
    "kind": GateKind,
    "source": GateSource,
    "pool": Pooling,
    "pre": PreMap,
    "post": PostMap,
    "select": Select,
    "norm": Norm,
    "value": GateValue,
}
_GATE_NUMBERS = ("pre_eps", "temperature", "p", "threshold", "tau_max", "eps")
_GATE_DEFAULTS = {field.name: field.default for field in fields(Gate)}


@dataclass(frozen=True)
class NativeFile:
    """What a file says: the adapter, the base model it was made for, and its digest if it names one."""

    adapter: LoweredAdapter
    base: str
    digest: str | None


def describe(adapter: LoweredAdapter) -> dict[str, Any]:
    """The JSON description of what the adapter computes; one adapter has one description."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "method": adapter.method,
        "sites": {module: _describe_site(site) for module, site in sorted(adapter.sites.items())},
        "gates": {name: _describe_gate(gate) for name, gate in sorted(adapter.gates.items())},
        "ffn": {
            layer: without_defaults(vars(mixture), {"gate_proj": None})
            for layer, mixture in sorted(adapter.ffn.items())
        },
    }


def digest_of(adapter: LoweredAdapter) -> str:
    """sha256 over the description and, in order of their names, each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(f"{json.dumps(describe(adapter), sort_keys=True)}\n".encode())
    for name, tensor in sorted(adapter.tensors().items()):
        digest.update(f"{json.dumps([name, str(tensor.dtype), list(tensor.shape)])}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_native(path: Path, adapter: LoweredAdapter, base_name: str, digest: str | None = None) -> Path:
    """Write the file so that its final name never shows a partial one. Raises OSError when the disk does."""
    description = describe(adapter) | {"base": base_name, "warnings": list(adapter.warnings)}
    if digest is not None:
        description["digest"] = digest
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:16]}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        # allow_nan: a scalar that is no JSON number must not reach a file that nobody could read.
        text = json.dumps(description, allow_nan=False)
        save_file(_unshared(adapter.tensors()), temporary, metadata={METADATA_KEY: text})
        _sync(temporary)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep a server that runs as another user out
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync(path.parent)  # or the new name would not survive a power cut
    return path


def read_native(text: str, names: Collection[str], read: Callable[[str], torch.Tensor], file: str) -> NativeFile:
    """The adapter that the description `text` and the tensors `names`, read by `read`, make up.

    Checks the description's fields, that exactly its tensors are there, and each site's rank; the rest is
    `loramux_adapters.verify`. With tensors on the meta device nothing but names, types and shapes is looked at.
    """
    with Fields(parse_json(text.encode("utf-8", "surrogatepass"), file)) as top:
        _check_format(top)
        base, warnings = top.text("base"), top.names("warnings")
        digest = top.text("digest", None)
        method = _name(top, "method")
        tensors = _Tensors(names, read)
        sites = {module: _read_site(module, entry, tensors) for module, entry in top.table("sites").items()}
        gates = {name: _read_gate(name, entry, tensors) for name, entry in top.table("gates").items()}
        ffn = {layer: _read_ffn(entry) for layer, entry in top.table("ffn").items()}
    tensors.check_all_taken()
    return NativeFile(LoweredAdapter(method, sites, warnings, gates, ffn), base, digest)


class _Tensors:
    """Hands out the file's tensors by name, each once."""

    def __init__(self, names: Collection[str], read: Callable[[str], torch.Tensor]) -> None:
        self._left = set(names)
        self._read = read

    def take(self, name: str) -> torch.Tensor:
        if name not in self._left:
            raise AdapterMissingTensor(
                f"The description needs the tensor {shown(name)}, which is not in the file.",
                hint="Write the file again with it, or correct the description.",
                field=name,
            )
        self._left.remove(name)
        tensor = self._read(name)
        is_index = name.rpartition(".")[2] in INDEX_TENSORS
        if (tensor.dtype == torch.int32) != is_index:
            raise AdapterUnsupportedFeature(
                f"Tensor {shown(name)} has dtype {str(tensor.dtype).removeprefix('torch.')}.",
                hint="Save indices in int32 and everything else in float32, bfloat16 or float16.",
                field=name,
            )
        return tensor

    def check_all_taken(self) -> None:
        if self._left:
            raise AdapterUnknownTensor(
                f"The description does not mention the tensor {shown(min(self._left))} ({len(self._left)} such).",
                hint="Remove it, or describe it.",
                field=min(self._left),
            )


def has_capacity(text: str) -> bool:
    """Whether some gate of a description that `write_native` made has a capacity. Raises ValueError if it is none."""
    gates: dict[str, dict[str, Any]] = json.loads(text).get("gates", {})
    return any("capacity" in gate for gate in gates.values())


def _check_format(top: Fields) -> None:
    name, version = top.text("format"), top.integer("version")
    if name != FORMAT or version != VERSION:
        raise AdapterUnsupportedFeature(
            f"The file has format {shown(name)}, version {version}; this reads {FORMAT} {VERSION}.",
            hint="Update loramux, or write the adapter again.",
            field="version" if name == FORMAT else "format",
        )


def _describe_site(site: LoweredSite) -> dict[str, Any]:
    described: dict[str, Any] = {"rank": site.rank}
    if site.gate is not None:
        described["gate"] = site.gate
    if site.bands != 1:
        described["bands"] = site.bands
    if optional := [name for name in OPTIONAL_TENSORS if getattr(site, name) is not None]:
        described["tensors"] = optional
    if (carry := site.carry) is not None:
        described["carry"] = {"source": carry.source, "kind": carry.kind.value, "depth": carry.depth}
    if (variance := site.variance) is not None:
        values = {"kind": variance.kind.value, "rate": variance.rate, "form": variance.form.value}
        described["variance"] = without_defaults(values, {"rate": None, "form": VarianceForm.LINEAR.value})
    return described


def _read_site(module: str, entry: Fields, tensors: _Tensors) -> LoweredSite:
    with entry:
        rank, bands = entry.integer("rank"), entry.integer("bands", 1)
        optional = _optional(entry, OPTIONAL_TENSORS)
        gate = entry.text("gate", None)
        carry = _read_carry(entry)
        variance = _read_variance(module, entry, tensors)
    values: dict[str, Any] = {name: tensors.take(f"{module}.{name}") for name in optional}
    a, b, scale = (tensors.take(f"{module}.{part}") for part in ("A", "B", "scale"))
    site = LoweredSite(a, b, scale, gate=gate, carry=carry, variance=variance, bands=bands, **values)
    if site.b.ndim != 2 or rank != site.rank:
        raise AdapterShapeMismatch(
            f"{shown(module)} has rank {rank} in the description, but B has shape {tuple(site.b.shape)}.",
            hint="B is [rank, d_out]: correct the rank, or write the tensor as the format says.",
            field=f"{module}.B",
        )
    return site


def _read_carry(site: Fields) -> Carry | None:
    if (entry := site.nested("carry")) is None:
        return None
    with entry:
        return Carry(entry.text("source"), entry.choice("kind", CarryKind), entry.integer("depth", 1))


def _read_variance(module: str, site: Fields, tensors: _Tensors) -> Variance | None:
    if (entry := site.nested("variance")) is None:
        return None
    with entry:
        kind = entry.choice("kind", VarianceKind)
        rate, form = entry.number("rate", None), entry.choice("form", VarianceForm, VarianceForm.LINEAR)
    return Variance(kind, {name: tensors.take(f"{module}.variance.{name}") for name in SHAPES[kind]}, rate, form)


def _describe_gate(gate: Gate) -> dict[str, Any]:
    # StrEnum is a str to json, but its plain value keeps equal descriptions equal to one that was read.
    values: dict[str, Any] = {name: getattr(gate, name) for name in _GATE_ENUMS}
    values |= {name: None if (v := getattr(gate, name)) is None else float(v) for name in _GATE_NUMBERS}
    described = without_defaults(values | {"k": gate.k, "task": gate.task}, _GATE_DEFAULTS)
    if gate.hidden:
        described["hidden"] = len(gate.hidden)
    if gate.capacity is not None:
        described["capacity"] = {"tokens": gate.capacity.tokens, "scope": gate.capacity.scope.value}
    if optional := [name for name in GATE_TENSORS[1:] if getattr(gate, name) is not None]:
        described["tensors"] = optional
    return described


def _read_gate(name: str, entry: Fields, tensors: _Tensors) -> Gate:
    if not _NAME.fullmatch(name):
        raise invalid(entry.where, name, "must be a name of letters, digits and . _ / -")
    values: dict[str, Any] = {}
    with entry:
        for field, kind in _GATE_ENUMS.items():
            values[field] = entry.choice(field, kind, _GATE_DEFAULTS[field])
        for field in _GATE_NUMBERS:
            values[field] = entry.number(field, _GATE_DEFAULTS[field])
        values["k"], values["task"] = entry.integer("k", None), entry.integer("task", None)
        hidden = entry.integer("hidden", 0)
        if not 0 <= hidden <= MAX_HIDDEN:
            raise invalid(entry.place("hidden"), hidden, f"must be the number of hidden layers, 0 to {MAX_HIDDEN}")
        if (capacity := entry.nested("capacity")) is not None:
            with capacity:
                scope = capacity.choice("scope", CapacityScope, CapacityScope.SEQUENCE)
                values["capacity"] = Capacity(capacity.integer("tokens"), scope)
        optional = _optional(entry, GATE_TENSORS[1:])
    for field in ("weights", *optional):
        values[field] = tensors.take(f"gate:{name}.{field}")
    values["hidden"] = tuple(
        (tensors.take(f"gate:{name}.hidden.{i}.weight"), tensors.take(f"gate:{name}.hidden.{i}.bias"))
        for i in range(hidden)
    )
    return Gate(**values)


def _read_ffn(entry: Fields) -> FfnMixture:
    with entry:
        return FfnMixture(
            entry.text("gate"), entry.text("up_proj"), entry.text("down_proj"), entry.text("gate_proj", None)
        )


def _optional(entry: Fields, known: Collection[str]) -> tuple[str, ...]:
    names = entry.names("tensors")
    for name in names:
        if name not in known:
            raise invalid(entry.place("tensors"), name, f"may name {', '.join(known)}")
    return names


def _name(entry: Fields, field: str) -> str:
    name: str = entry.text(field)
    if not _NAME.fullmatch(name):
        raise invalid(entry.place(field), name, "must be a name of letters, digits and . _ / -")
    return name


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous, and no two in one storage, which safetensors refuses to write."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        result[name] = tensor if whole and pointer not in seen else tensor.contiguous().clone()
        seen.add(pointer)
    return result


def _sync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
