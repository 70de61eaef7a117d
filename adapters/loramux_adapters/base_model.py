"""What an adapter is checked against: the names and widths of a base model's linear layers, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class BaseModel:
    """Linear layers of a base model.

    name        how the base model is called in messages and warnings
    linears     module name -> (d_in, d_out), the output head left out
    embeddings  names of the embedding tables
    head        names of the output projection (`lm_head`), which no adapter may target
    num_layers  number of transformer layers, where the config says so
    """

    name: str
    linears: Mapping[str, tuple[int, int]]
    embeddings: frozenset[str] = frozenset()
    head: frozenset[str] = frozenset({"lm_head"})
    num_layers: int | None = None

    @classmethod
    def from_pretrained(cls, source: str | Path | PretrainedConfig, name: str | None = None) -> BaseModel:
        """Build the model that `config.json` describes on the meta device (no memory) and list its layers.

        `source` is a local folder or a loaded config; nothing is downloaded and no code from the folder runs.
        `name` defaults to the folder's name. Raises OSError or ValueError when transformers cannot read the config.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

        if isinstance(source, PretrainedConfig):
            config = source
            name = name or Path(config.name_or_path or "").name or config.model_type
        else:
            folder = Path(source)
            if not (folder / "config.json").is_file():
                raise FileNotFoundError(f"no config.json in {folder}: give the folder of the base model")
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            name = name or _folder_name(folder.resolve())
        auto: Any = AutoModelForCausalLM
        with torch.device("meta"):
            # Eager attention needs no optional package, and the attention code does not matter here.
            model = auto.from_config(config, trust_remote_code=False, attn_implementation="eager")
        return cls.from_module(model, name, getattr(config.get_text_config(), "num_hidden_layers", None))

    @classmethod
    def from_module(cls, model: Any, name: str, num_layers: int | None = None) -> BaseModel:
        """List the layers of a model that exists already, on any device."""
        from transformers.pytorch_utils import Conv1D

        output: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        linears: dict[str, tuple[int, int]] = {}
        embeddings, head = set(), {"lm_head"}
        for path, module in model.named_modules():
            if module is output or path in head:
                head.add(path)
            elif isinstance(module, torch.nn.Linear):
                linears[path] = (module.in_features, module.out_features)
            elif isinstance(module, Conv1D):
                # GPT-2 keeps this weight as [d_in, d_out], the transpose of nn.Linear.
                d_in, d_out = module.weight.shape
                linears[path] = (d_in, d_out)
            elif isinstance(module, torch.nn.Embedding):
                embeddings.add(path)
        return cls(name, linears, frozenset(embeddings), frozenset(head), num_layers)


def _folder_name(folder: Path) -> str:
    """The name: in the Hugging Face cache models--<owner>--<name>/snapshots/<revision>, else the folder's."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name
