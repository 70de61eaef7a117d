"""Tensor names of a PEFT LoRA checkpoint, in every spelling PEFT and transformers have written.

PEFT itself:
    base_model.model.<module>.lora_A.weight
a raw state_dict, with the adapter's name left in:
    base_model.model.<module>.lora_A.<adapter>.weight
without the wrapper's prefix:
    <module>.lora_A.weight
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from loramux_adapters.errors import (
    AdapterError,
    AdapterMissingTensor,
    AdapterUnknownTensor,
    AdapterUnsupportedFeature,
    shown,
)

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")

_MERGE = "Merge the adapter into its base model and serve the result as a base model."
_BIAS = (
    f'If it belongs to an adapted layer, the config must say so: lora_bias, or bias "lora_only". Otherwise: {_MERGE}'
)
Place = TypeVar("Place", str, int)

# Tensors of features that are refused: what marks them -> (what it is, what to do).
_REFUSED = {
    ".lora_magnitude_vector": ("the magnitude of a DoRA adapter", "Its config must say so: use_dora."),
    ".lora_embedding_A": ("a LoRA on an embedding table", _MERGE),
    ".lora_embedding_B": ("a LoRA on an embedding table", _MERGE),
    ".trainable_tokens_delta": ("trained token embeddings", _MERGE),
    ".token_adapter": ("trained token embeddings", _MERGE),
    ".modules_to_save": ("a module trained beside LoRA", _MERGE),
    ".lora_A_rho": (
        "what σ of a BLoB adapter is made of, and nothing says how",
        "Was bayes_eps in training 0 or above, so that σ = ρ², or below 0, so that σ = log(1 + exp ρ)? Answer by "
        'adding "bayes_eps" to adapter_config.json with that value (0.05 by default).',
    ),
    ".lora_monteclora_sampler": ("a sampler's of MonteCLoRA", "Its config must say so: monteclora_config."),
    ".lora_E": ("a part of an AdaLoRA adapter", "Its config must say so: peft_type ADALORA."),
    ".lora_velora": ("training state of VeLoRA", "Remove it from the file: it plays no part in the result."),
}


@dataclass(frozen=True)
class Pair:
    """The names of one module's two factors."""

    a: str
    b: str


def pair_factors(names: Iterable[str]) -> Mapping[str, Pair]:
    """Group tensor names by module. Every name is accounted for, or refused as the error tree describes."""
    factors: dict[str, dict[str, str]] = {}
    adapters = set()
    for name in sorted(names):
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise refuse_tensor(name)
        adapters.add(match["adapter"])
        if len(adapters) > 1:
            raise AdapterUnsupportedFeature(
                f"The file mixes the tensors of several adapters: {', '.join(sorted(map(shown, adapters)))}.",
                hint="Save each adapter to its own folder.",
                field=name,
            )
        claim(factors.setdefault(match["module"].removeprefix(PREFIX), {}), match["factor"], name)
    return {module: _pair(found) for module, found in factors.items()}


def _pair(found: Mapping[str, str]) -> Pair:
    if len(found) == 2:
        return Pair(found["A"], found["B"])
    ((factor, name),) = found.items()
    other = name.replace(f".lora_{factor}.", f".lora_{'B' if factor == 'A' else 'A'}.")
    raise AdapterMissingTensor(
        f"Tensor {shown(name)} is there but {shown(other)} is not.",
        hint="Save the adapter again: half of a LoRA cannot be applied.",
        field=other,
    )


def claim(places: dict[Place, str], place: Place, name: str) -> None:
    """Put a tensor's name in its place. Raises AdapterUnknownTensor if another name has it."""
    if place in places:
        raise AdapterUnknownTensor(
            f"Tensors {shown(places[place])} and {shown(name)} claim the same place.",
            hint="Remove the one that does not belong.",
            field=name,
        )
    places[place] = name


def refuse_tensor(name: str) -> AdapterError:
    """Why a tensor whose name no rule knows is refused."""
    for mark, (what, hint) in _REFUSED.items():
        if mark in name:
            return AdapterUnsupportedFeature(f"Tensor {shown(name)} is {what}.", hint=hint, field=name)
    if name.endswith(".bias"):
        return AdapterUnsupportedFeature(f"Tensor {shown(name)} is a trained bias.", hint=_BIAS, field=name)
    if name.endswith(".weight") and "lora_" not in name:
        return AdapterUnsupportedFeature(
            f"Tensor {shown(name)} is a whole weight of the model, not a LoRA factor.",
            hint=f"If it was not trained, save again with save_embedding_layers=False. Otherwise: {_MERGE}",
            field=name,
        )
    return AdapterUnknownTensor(
        f"Tensor {shown(name)} is not part of any LoRA that is known here.",
        hint="Remove it if it plays no part in the result; ignoring it could make the answers wrong.",
        field=name,
    )
