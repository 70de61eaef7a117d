"""Adapters made of several PEFT LoRAs, each in a folder of its own inside the adapter's.

Their adapter_config.json names the folders in order, `"adapters": ["first", "second"]`, and gives them `weights`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterConfigInvalid, AdapterTooLarge, AdapterUnsupportedFeature, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.methods.lora import Lora
from loramux_adapters.peft.config import refuse_unknown
from loramux_adapters.peft.tensors import WEIGHTS_FILE

MAX_ADAPTERS = 1024
_FIELDS = frozenset(
    {
        "peft_type", "adapters", "weights", "base_model_name_or_path", "task_type", "inference_mode", "peft_version",
        "revision",
    }
)  # fmt: skip


def read_loras(folder: AdapterFolder, raw: Mapping[str, Any], base: BaseModel) -> dict[str, LoweredAdapter]:
    """The LoRAs that the config `raw` names, by folder, in its order; checked and lowered on their own.

    Raises AdapterConfigInvalid, AdapterTooLarge if they are too large together, and what reading a LoRA raises.
    """
    refuse_unknown(raw, _FIELDS)
    folders = {name: folder.subfolder(name) for name in _names(raw)}
    _check_size(folder, folders)
    return {name: _read(name, part, base) for name, part in folders.items()}


def read_weights(raw: Mapping[str, Any], count: int, default: float | None = None) -> tuple[float, ...]:
    """The config's `weights`, one for each adapter; all `default` if there is one and they are absent."""
    value = raw.get("weights")
    if value is None and default is not None:
        return (default,) * count
    if isinstance(value, list) and len(value) == count and all(map(_is_weight, value)):
        return tuple(map(float, value))
    raise AdapterConfigInvalid(
        f"adapter_config.json: weights is {shown(value)}, not a list of {count} numbers.",
        hint="Give a weight for each adapter, in their order.",
        field="weights",
    )


def name_warnings(parts: Mapping[str, LoweredAdapter]) -> tuple[str, ...]:
    return tuple(f"{name}: {warning}" for name, part in parts.items() for warning in part.warnings)


def _names(raw: Mapping[str, Any]) -> Sequence[str]:
    names = raw.get("adapters")
    if (
        isinstance(names, list)
        and 0 < len(names) <= MAX_ADAPTERS
        and all(isinstance(name, str) for name in names)
        and len(set(names)) == len(names)
    ):
        return names
    raise AdapterConfigInvalid(
        f"adapter_config.json: adapters is {shown(names)}, not a list of 1 to {MAX_ADAPTERS} different names.",
        hint="Name the folders of the LoRAs, which lie beside this file, in their order.",
        field="adapters",
    )


def _check_size(folder: AdapterFolder, parts: Mapping[str, AdapterFolder]) -> None:
    total = 0
    for name, part in parts.items():
        with part.open(WEIGHTS_FILE) as file:
            total += file.seek(0, 2)
        if total > folder.max_bytes:
            raise AdapterTooLarge(
                f"The adapters up to {shown(name)} have {total} bytes together; the limit is {folder.max_bytes}.",
                hint="Merge some of them, or raise the limit.",
                field=name,
            )


def _read(name: str, part: AdapterFolder, base: BaseModel) -> LoweredAdapter:
    method = Lora()
    if not method.detect(part):
        raise AdapterUnsupportedFeature(
            f"The adapter {shown(name)} is not a plain LoRA.",
            hint="Only LoRAs as PEFT saves them (peft_type LORA) can be put together here.",
            field=name,
        )
    adapter = method.lower(method.read(part, base), base)
    method.verify(adapter, base)
    return adapter


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e6
