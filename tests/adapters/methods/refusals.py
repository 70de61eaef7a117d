"""What the tables of wrong variants share: spoiling a sound checkpoint, and the refusal that must follow."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters import AdapterError, lower

from ..checkpoints import BASE, write_adapter

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
) -> None:
    if spoil is not None:
        spoil(tensors)
    with pytest.raises(AdapterError) as refusal:
        lower(write_adapter(folder, config, tensors), BASE)
    assert refusal.value.code == code
    assert field is None or refusal.value.field == field
