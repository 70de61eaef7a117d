"""What the tables of wrong variants share: spoiling a sound checkpoint, and the refusal that must follow."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters import AdapterError, BaseModel, lower

from ..checkpoints import BASE, write_adapter

Write = Callable[[Path, Mapping[str, Any], dict[str, torch.Tensor]], Path]
Spoil = Callable[[dict[str, torch.Tensor]], object]


def drop(*names: str) -> Spoil:
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32, value: float = 1.0) -> Spoil:
    return lambda tensors: tensors.update({name: torch.full(shape, value, dtype=dtype)})


def poison(name: str) -> Spoil:
    """One NaN."""
    return lambda tensors: tensors[name].view(-1)[0].fill_(float("nan"))


def assert_refused(
    folder: Path,
    config: Mapping[str, Any],
    tensors: dict[str, torch.Tensor],
    spoil: Spoil | None,
    code: str,
    field: str | None,
    *,
    base: BaseModel = BASE,
    write: Write = write_adapter,
) -> None:
    if spoil is not None:
        spoil(tensors)
    with pytest.raises(AdapterError) as refusal:
        lower(write(folder / "refused", config, tensors), base)
    assert refusal.value.code == code and refusal.value.hint
    assert field is None or refusal.value.field == field


def assert_pickle_refused(folder: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """With the command that converts it."""
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(AdapterError) as refusal:
        lower(folder, BASE)
    assert (refusal.value.code, refusal.value.field) == ("adapter_unsafe_file", "adapter_model.bin")
    assert "save_file" in refusal.value.hint
