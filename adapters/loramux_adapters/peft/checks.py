"""Checks of a PEFT LoRA checkpoint against its base model, on names and shapes: before any weight is read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import (
    AdapterConfigInvalid,
    AdapterMissingTensor,
    AdapterShapeMismatch,
    AdapterUnknownTensor,
    AdapterUnsupportedFeature,
    AdapterWrongBase,
    shown,
)
from loramux_adapters.files import AdapterFolder
from loramux_adapters.peft.targets import Targets
from loramux_adapters.peft.tensors import Pair
from loramux_adapters.weights import TensorInfo

# Files that change the result and would otherwise be left unread.
_REFUSED_FILES = {
    "new_embeddings.safetensors": "Added token embeddings cannot be shared by other adapters.",
    "adapter_model.safetensors.index.json": "Save the adapter as one adapter_model.safetensors.",
    "xlora_config.json": "X-LoRA mixes the adapters of this folder, which is not served. Serve them one by one.",
}
_TOKENISER_FILES = ("tokenizer.json", "tokenizer.model", "added_tokens.json", "chat_template.jinja")


def check_folder(folder: AdapterFolder) -> None:
    """Refuse files beside the weights that would change the result."""
    for name, hint in _REFUSED_FILES.items():
        if folder.has(name):
            raise AdapterUnsupportedFeature(f"The folder holds {shown(name)}.", hint=hint, field=name)
    if folder.has("adapter_config.json") and folder.has("reslora_config.json"):
        raise AdapterUnsupportedFeature(
            "The folder holds 'reslora_config.json' and 'adapter_config.json'.",
            hint="ResLoRA links layers and PEFT does not: keep the one that is meant.",
            field="reslora_config.json",
        )


def check_modules(pairs: Mapping[str, Pair], targets: Targets, base: BaseModel, trained_on: str | None) -> None:
    """The modules with tensors, the modules the config targets and the base's linear layers must agree."""
    for module, pair in pairs.items():
        if module in base.head or module in base.embeddings:
            raise _refused_module(module, pair.a)
    for module in targets.select(base.head | base.embeddings, linear=False):
        raise _refused_module(module, "target_modules")
    unmatched = sorted(module for module in pairs if module not in base.linears)
    if unmatched:
        if len(unmatched) == len(pairs) or any(_layer_beyond(module, base) for module in unmatched):
            raise _wrong_base(base, trained_on, f"has no module {shown(unmatched[0])}", pairs[unmatched[0]].a)
        raise AdapterUnknownTensor(
            f"The base model {base.name} has no linear layer {shown(unmatched[0])} ({len(unmatched)} such).",
            hint="Check that the adapter was trained on this base model and saved with its names.",
            field=pairs[unmatched[0]].a,
        )
    targeted = targets.select(base.linears)
    if extra := sorted(pairs.keys() - targeted):
        raise AdapterUnknownTensor(
            f"There are tensors for {shown(extra[0])}, which the config does not target ({len(extra)} such).",
            hint="Correct target_modules, exclude_modules and layers_to_transform as they were in training.",
            field=pairs[extra[0]].a,
        )
    if missing := sorted(targeted - pairs.keys()):
        raise AdapterMissingTensor(
            f"The config targets {shown(missing[0])}, which has no tensors ({len(missing)} such).",
            hint="Save the adapter again; or, if these modules were not trained, name them in exclude_modules.",
            field=missing[0],
        )


@dataclass(frozen=True)
class Expected:
    """The shape that a tensor must have. `width` is the base model's number in it, if there is one."""

    name: str
    shape: tuple[int, ...]
    width: int | None = None


def check_shapes(
    pairs: Mapping[str, Pair],
    tensors: Mapping[str, TensorInfo],
    ranks: Mapping[str, int],
    base: BaseModel,
    trained_on: str | None,
) -> None:
    """A must be [r, d_in] and B [d_out, r], with r from the config and the widths from the base."""
    expected = {}
    for module, pair in pairs.items():
        rank, (d_in, d_out) = ranks[module], base.linears[module]
        expected[module] = [Expected(pair.a, (rank, d_in), d_in), Expected(pair.b, (d_out, rank), d_out)]
    check_expected(expected, tensors, base, trained_on)


def check_expected(
    expected: Mapping[str, Sequence[Expected]],
    tensors: Mapping[str, TensorInfo],
    base: BaseModel,
    trained_on: str | None,
) -> None:
    """Every tensor has its shape. It is another base model's adapter if no module's tensors have this base's widths."""
    wrong = [part for parts in expected.values() for part in parts if tensors[part.name].shape != part.shape]
    if not wrong:
        return
    name, shape = wrong[0].name, tensors[wrong[0].name].shape
    if all(any(_has_other_width(part, tensors) for part in parts) for parts in expected.values()):
        raise _wrong_base(base, trained_on, f"needs {wrong[0].shape} for {shown(name)}, which has {shape}", name)
    hint = "The rank comes from the config (r, rank_pattern), the widths from the base: correct what does not fit."
    if shape == wrong[0].shape[::-1]:
        hint = "It looks transposed: store it as it is expected here."
    elif len(shape) != len(wrong[0].shape) or 0 in shape:
        hint = "It looks like a shard: gather the parameters before saving (DeepSpeed ZeRO-3, FSDP)."
    raise AdapterShapeMismatch(f"{shown(name)} has shape {shape}, not {wrong[0].shape}.", hint=hint, field=name)


def rank_scale(module: str, rank: int, alpha: float, scale: float) -> torch.Tensor:
    """The scale of each rank, [rank] float32. Raises AdapterConfigInvalid if rounding turns it into zero."""
    scales = torch.full((rank,), scale, dtype=torch.float32)
    if alpha != 0 and float(scales[0]) == 0:
        raise AdapterConfigInvalid(
            f"The scale of {shown(module)} is too small for float32.",
            hint="Check lora_alpha and alpha_pattern.",
            field="lora_alpha",
        )
    return scales


def collect_warnings(
    folder: AdapterFolder, trained_on: str | None, targets: Targets, base: BaseModel
) -> tuple[str, ...]:
    """What does not stop the adapter from being applied exactly, but may surprise."""
    warnings = []
    if trained_on and _short(trained_on) != _short(base.name):
        warnings.append(f"The adapter names {shown(trained_on)} as its base model; it was checked on {base.name}.")
    for field, key in targets.unused_patterns():
        warnings.append(f"{field} has the key {shown(key)}, which is the first match of no module.")
    if module := targets.ambiguous.get("alpha_pattern"):
        # PEFT sorts the keys when it saves, so the order that training used is lost. (Ranks show in the tensors.)
        warnings.append(f"Keys of alpha_pattern disagree on {shown(module)}: as in PEFT, the file's first one counts.")
    if present := [name for name in _TOKENISER_FILES if folder.has(name)]:
        warnings.append(f"The base model's tokeniser and chat template are used, not {', '.join(present)}.")
    return tuple(warnings)


def _has_other_width(part: Expected, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether no axis has the base's width, though it is no shard: no wrong rank can explain that."""
    shape = tensors[part.name].shape
    whole = len(shape) == len(part.shape) and 0 not in shape
    return part.width is not None and whole and part.width not in shape


def _layer_beyond(module: str, base: BaseModel) -> bool:
    layer = re.search(r"\.(\d{1,6})\.", module)
    return base.num_layers is not None and layer is not None and int(layer[1]) >= base.num_layers


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()


def _wrong_base(base: BaseModel, trained_on: str | None, reason: str, field: str) -> AdapterWrongBase:
    other = shown(trained_on) if trained_on else "another model (the config does not name it)"
    return AdapterWrongBase(
        f"The adapter was trained on {other}; the base model {base.name} {reason}.",
        hint=f"Serve it on its own base model, or train it on {base.name}.",
        field=field,
    )


def _refused_module(module: str, field: str) -> AdapterUnsupportedFeature:
    return AdapterUnsupportedFeature(
        f"The adapter targets {shown(module)}, an embedding table or the output head.",
        hint="Merge the adapter into its base model and serve the result, or train it without this module.",
        field=field,
    )
