"""What an adapter is checked against: the names and widths of a base model's linear layers.

Its weights are read only by methods whose lowering depends on them, and only then (`base_weights.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loramux_adapters.base_weights import BaseWeights
from loramux_adapters.errors import AdapterUnsupportedFeature

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
    biased      names of the linear layers that have a bias
    transposed  names of those that keep their weight as [d_in, d_out] (GPT-2's Conv1D)
    weights     where their numbers are, if they are at hand and are what is served
    """

    name: str
    linears: Mapping[str, tuple[int, int]]
    embeddings: frozenset[str] = frozenset()
    head: frozenset[str] = frozenset({"lm_head"})
    num_layers: int | None = None
    biased: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()
    weights: BaseWeights | None = None

    def row_blocks(self, module: str) -> Iterator[torch.Tensor]:
        """W0 of a linear layer: its rows in order, in blocks [n, d_in] float64. Raises AdapterUnsupportedFeature."""
        yield from self.stored(f"{module}.weight").row_blocks(module, self.linears[module], module in self.transposed)

    def bias(self, module: str) -> torch.Tensor | None:
        """The bias [d_out] of a linear layer, if it has one. Raises AdapterUnsupportedFeature."""
        if module not in self.biased:
            return None
        return self.stored(f"{module}.bias").bias(module, self.linears[module][1])

    def stored(self, name: str) -> BaseWeights:
        """The checkpoint. Raises AdapterUnsupportedFeature with this tensor's name if there is none."""
        if self.weights is None:
            raise AdapterUnsupportedFeature(
                f"What the adapter computes depends on the weights of {self.name}, which are not at hand.",
                hint="Give the base model's folder, and no --quantization: what it makes of them is in no file.",
                field=name,
            )
        return self.weights

    @classmethod
    def from_pretrained(cls, source: str | Path | PretrainedConfig, name: str | None = None) -> BaseModel:
        """Build the model that `config.json` describes on the meta device (no memory) and list its layers.

        `source` is a local folder or a loaded config; nothing is downloaded and no code from the folder runs. The
        weights are those of the folder, or of the folder or hub id that the config was loaded from. `name` defaults to
        the folder's name. Raises OSError or ValueError when transformers cannot read the config.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

        if isinstance(source, PretrainedConfig):
            config, place = source, str(source.name_or_path or "")
            name = name or Path(config.name_or_path or "").name or config.model_type
        else:
            folder, place = Path(source), str(source)
            if not (folder / "config.json").is_file():
                raise FileNotFoundError(f"no config.json in {folder}: give the folder of the base model")
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            name = name or _folder_name(folder.resolve())
        auto: Any = AutoModelForCausalLM
        with torch.device("meta"):
            # Eager attention needs no optional package, and the attention code does not matter here.
            model = auto.from_config(config, trust_remote_code=False, attn_implementation="eager")
        layers = getattr(config.get_text_config(), "num_hidden_layers", None)
        return cls.from_module(model, name, layers, BaseWeights(place) if place else None)

    @classmethod
    def from_module(
        cls, model: Any, name: str, num_layers: int | None = None, weights: BaseWeights | None = None
    ) -> BaseModel:
        """List the layers of a model that exists already, on any device."""
        from transformers.pytorch_utils import Conv1D

        output: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        linears: dict[str, tuple[int, int]] = {}
        embeddings, biased, transposed, head = set(), set(), set(), {"lm_head"}
        for path, module in model.named_modules():
            if module is output or path in head:
                head.add(path)
            elif isinstance(module, torch.nn.Linear):
                linears[path] = (module.in_features, module.out_features)
            elif isinstance(module, Conv1D):
                # GPT-2 keeps this weight as [d_in, d_out], the transpose of nn.Linear.
                d_in, d_out = module.weight.shape
                linears[path] = (d_in, d_out)
                transposed.add(path)
            elif isinstance(module, torch.nn.Embedding):
                embeddings.add(path)
            if path in linears and module.bias is not None:
                biased.add(path)
        return cls(
            name,
            linears,
            embeddings=frozenset(embeddings),
            head=frozenset(head),
            num_layers=num_layers,
            biased=frozenset(biased),
            transposed=frozenset(transposed),
            weights=weights,
        )


def _folder_name(folder: Path) -> str:
    """The name: in the Hugging Face cache models--<owner>--<name>/snapshots/<revision>, else the folder's."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name
