"""A base model's layers for commands that need no more of it, or an error that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loramux.bases import prepare_base
from loramux.console import note
from loramux.errors import ConfigError
from loramux_adapters import BaseModel


def load_base(name: str) -> BaseModel:
    """The layers of a base model, by folder or name. Raises ConfigError when there is no such model here."""
    return read_layers(prepare_base(name, progress=note), Path(name).name if Path(name).is_dir() else name)


def load_runnable(name: str) -> tuple[Any, Any]:
    """A base model in float32 and its tokeniser, to run texts through. Raises ConfigError if it cannot be run here."""
    from loramux_adapters.compact.measure import load_model

    try:
        return load_model(prepare_base(name, progress=note))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The base model {name} cannot be run here: {error}.", hint="Give a folder with its weights and tokeniser."
        ) from error


def read_layers(place: str | Path, name: str) -> BaseModel:
    """The layers of the model at `place`, a folder or a hub id. Raises ConfigError.

    Of a hub id only the config is fetched (or found in the Hugging Face cache), which vLLM does next anyway.
    """
    from transformers import AutoConfig

    try:
        if Path(place).is_dir():
            return BaseModel.from_pretrained(place, name=name)
        config = AutoConfig.from_pretrained(str(place), trust_remote_code=False)
        return BaseModel.from_pretrained(config, name=name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The base model {name} cannot be read: {error}.", hint="Give its folder, or its name on the hub."
        ) from error
