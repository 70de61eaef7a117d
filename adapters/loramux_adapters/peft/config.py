"""adapter_config.json of a PEFT LoRA: every key is used, known to be harmless, or refused by name."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from loramux_adapters.errors import AdapterConfigInvalid, AdapterUnsupportedFeature, shown


@dataclass(frozen=True)
class LoraConfig:
    """The fields that decide what a plain LoRA computes. Δ = s·B·A with s = α/r, or α/√r with `use_rslora`."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: frozenset[int]
    layers_pattern: tuple[str, ...]
    base_model: str | None

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


# Training only, descriptive, or settled by a field that we do check.
_HARMLESS = frozenset(
    {
        "auto_mapping", "inference_mode", "lora_dropout", "peft_type", "peft_version", "revision", "runtime_config",
        "task_type",
        # PEFT itself sets fan_in_fan_out right for each layer; A and B have the same layout either way.
        "fan_in_fan_out",
        # Read only together with `megatron_config`, `use_qalora` or the matching `init_lora_weights`.
        "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        # Concerns embeddings, heads and saved modules, which are refused when present.
        "ensure_weight_tying",
    }
)  # fmt: skip

_USED = frozenset(
    {
        "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
        "layers_to_transform", "layers_pattern", "base_model_name_or_path", "bias", "init_lora_weights",
    }
)  # fmt: skip

_MERGE = "Merge the adapter into its base model and serve the result as a base model."
_RETRAIN = "Train the adapter again without it, or merge it into its base model and serve the result."
# What a field that changes the computation means for the user. Absent, null, false or empty is accepted.
_REFUSED = {
    "alora_invocation_tokens": f"Activated LoRA switches on within a prompt, which is not served yet. {_RETRAIN}",
    "arrow_config": "Arrow routing over several adapters is not served from this field. Serve them one by one.",
    "kasa_config": f"KaSA changes the base model's weights. {_MERGE}",
    "layer_replication": f"The adapter belongs to a model with repeated layers. {_MERGE}",
    "lora_bias": f"A bias on B is known for plain LoRA only. {_RETRAIN}",
    "megatron_config": "Convert the adapter to Hugging Face module names and a config without this field.",
    "modules_to_save": f"Whole modules trained beside LoRA cannot be shared by other adapters. {_MERGE}",
    "monteclora_config": f"MonteCLoRA is known for plain LoRA only. {_RETRAIN}",
    "bayes_eps": "BLoB is known for plain LoRA only.",
    "target_parameters": f"LoRA on bare parameters (fused expert weights) is not served yet. {_RETRAIN}",
    "trainable_token_indices": f"Trained token embeddings cannot be shared by other adapters. {_MERGE}",
    "use_bdlora": "Block-diagonal LoRA is not served yet. Save it with dense factors and use_bdlora=null.",
    "use_dora": f"DoRA is known for plain LoRA only, without lora_bias. {_RETRAIN}",
    "use_qalora": f"QALoRA pools the inputs of a quantised base, which is not served. {_RETRAIN}",
    "velora_config": "VeLoRA stores training state with the weights. Remove it, and its `lora_velora` tensors.",
}

# Initialisations that leave the base weights as they are, so Δ = s·B·A holds on the original base.
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
# These take a part out of the base weights first. PEFT's own conversion restores an ordinary LoRA.
_MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga")


def parse_config(raw: Mapping[str, Any]) -> LoraConfig:
    """Check every key of the config. Raises AdapterConfigInvalid or AdapterUnsupportedFeature naming the field."""
    refuse_unknown(raw, _USED | _HARMLESS)
    if raw.get("bias", "none") not in ("none", None):
        raise _unsupported("bias", raw["bias"], f"Trained biases are known for plain LoRA only. {_MERGE}")
    _check_init(raw.get("init_lora_weights", True))
    target, layers, pattern = _target(raw), _layers(raw), _names(raw, "layers_pattern")
    if isinstance(target, str) and layers:
        raise _invalid(
            "layers_to_transform", raw["layers_to_transform"], "cannot be combined with a target_modules pattern"
        )
    if pattern and raw.get("layers_to_transform") is None:
        raise _invalid("layers_pattern", raw["layers_pattern"], "needs layers_to_transform")
    base = raw.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise _invalid("base_model_name_or_path", base, "must be a string")
    return LoraConfig(
        r=_rank("r", _required(raw, "r")),
        lora_alpha=_number("lora_alpha", _required(raw, "lora_alpha")),
        use_rslora=_flag(raw, "use_rslora"),
        rank_pattern={key: _rank("rank_pattern", v) for key, v in _pattern(raw, "rank_pattern").items()},
        alpha_pattern={key: _number("alpha_pattern", v) for key, v in _pattern(raw, "alpha_pattern").items()},
        target_modules=target,
        exclude_modules=_names_or_pattern(raw, "exclude_modules"),
        layers_to_transform=layers,
        layers_pattern=pattern,
        base_model=base or None,
    )


def refuse_unknown(raw: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises AdapterUnsupportedFeature for a field that is not known, unless it is null, false or empty."""
    for field, value in raw.items():
        if field not in known:
            _refuse_unless_empty(field, value)


def _refuse_unless_empty(field: str, value: Any) -> None:
    if value is None or value is False or value in ("", [], {}):
        return
    hint = _REFUSED.get(field, "This field is not known: remove it if it is certain that it changes nothing.")
    raise _unsupported(field, value, hint)


def _check_init(value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    name = value.lower() if isinstance(value, str) else ""
    if name in _PLAIN_INITS:
        return
    if name.startswith(_MUTATING_INITS):
        hint = (
            "It moved a part of the base model's weights into A and B, so they fit only the changed base. Save the "
            "adapter again with save_pretrained(path, path_initial_model_for_weight_conversion=INITIAL_ADAPTER)."
        )
    elif name == "loftq":
        hint = (
            "The adapter corrects one quantised copy of the base model. Serve it merged into that copy, or set the "
            "field to true if the base model served here is that copy."
        )
    else:
        hint = "This initialisation is not known: set it to true if the adapter fits the unchanged base model."
    raise _unsupported("init_lora_weights", value, hint)


def _target(raw: Mapping[str, Any]) -> tuple[str, ...] | str:
    target = _names_or_pattern(raw, "target_modules")
    if not target:
        raise _invalid("target_modules", raw.get("target_modules"), "must name the modules to adapt")
    return target


def _layers(raw: Mapping[str, Any]) -> frozenset[int]:
    value = raw.get("layers_to_transform")
    layers = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(layer) is int and layer >= 0 for layer in layers):
        raise _invalid("layers_to_transform", value, "must be a layer number or a list of them")
    return frozenset(layers)


def _names_or_pattern(raw: Mapping[str, Any], field: str) -> tuple[str, ...] | str:
    value = raw.get(field)
    return value if isinstance(value, str) else _names(raw, field)


def _names(raw: Mapping[str, Any], field: str) -> tuple[str, ...]:
    value = raw.get(field)
    names = value if isinstance(value, list) else [] if value in (None, "") else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise _invalid(field, value, "must be a list of names")
    return tuple(names)


def _pattern(raw: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    value = raw.get(field) or {}
    if not isinstance(value, dict):
        raise _invalid(field, value, "must be an object from module pattern to number")
    return value


def _required(raw: Mapping[str, Any], field: str) -> Any:
    if field not in raw:
        raise _invalid(field, None, "is missing")
    return raw[field]


def _rank(field: str, value: Any) -> int:
    if type(value) is not int or value <= 0:
        raise _invalid(field, value, "must be a whole number above 0")
    return value


def _number(field: str, value: Any) -> float:
    if type(value) not in (int, float) or abs(value) > 1e30:
        raise _invalid(field, value, "must be a number of sensible size")
    return float(value)


def _flag(raw: Mapping[str, Any], field: str) -> bool:
    value = raw.get(field)
    if value is not None and not isinstance(value, bool):
        raise _invalid(field, value, "must be true or false")
    return bool(value)


def _invalid(field: str, value: Any, reason: str) -> AdapterConfigInvalid:
    return AdapterConfigInvalid(
        f"adapter_config.json: {field} {reason}, not {shown(value)}.",
        hint="Correct the field as it was in training, or save the adapter again.",
        field=field,
    )


def _unsupported(field: str, value: Any, hint: str) -> AdapterUnsupportedFeature:
    return AdapterUnsupportedFeature(f"adapter_config.json: {shown(field)} is {shown(value)}.", hint=hint, field=field)
