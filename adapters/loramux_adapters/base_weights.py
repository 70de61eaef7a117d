"""Weights of a base model's linear layers, read from its safetensors when a method asks for them, some rows at a time.

Float layers are read as they are. FP8 layers are multiplied by their scales, as they are stored: `weight_scale_inv`
for each block of `weight_block_size` (DeepSeek, Qwen), or `weight_scale` for each row or for all (compressed-tensors).
Any other quantisation is refused: its numbers cannot be told from the file without the code that made it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loramux_adapters.errors import AdapterUnsupportedFeature, shown

BLOCK_ELEMENTS = 1 << 22
"""Of W0 in float64 at a time: 32 MiB."""
MODEL_FILES = _INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FP8 = torch.float8_e4m3fn
_HINT = "Serve the adapter on its base model in float or FP8 safetensors, or merged into it."


class BaseWeights:
    """The checkpoint in a folder, or of a hub id in the Hugging Face cache. Nothing is read before it is asked for.

    Every method raises AdapterUnsupportedFeature, with the tensor's name as its field, for what is not there.
    """

    def __init__(self, source: str | Path, *, whose: str = "base model", hint: str = _HINT) -> None:
        self._source, self._whose, self._hint = str(source), whose, hint

    @property
    def names(self) -> Collection[str]:
        """Of all tensors, as the files have them."""
        return self._files.keys()

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor of any kind as it is stored, some rows at a time."""
        with self._opened(name) as file:
            tensor = file.get_slice(name)
            shape = tensor.get_shape()
            if not shape:
                yield file.get_tensor(name)
                return
            step = max(1, BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
            for begin in range(0, max(1, shape[0]), step):
                yield tensor[begin : begin + step]

    def row_blocks(self, module: str, widths: tuple[int, int], transposed: bool = False) -> Iterator[torch.Tensor]:
        """W0 of a module with `widths` (d_in, d_out): its rows in order, in blocks [n, d_in] float64.

        `transposed`: the file holds [d_in, d_out].
        """
        name = f"{module}.weight"
        d_in, d_out = widths
        scales = self._scales(module, d_in, d_out)
        with self._opened(name) as file:
            weight = file.get_slice(self._key(name))
            if tuple(weight.get_shape()) != ((d_in, d_out) if transposed else (d_out, d_in)):
                raise self._refused(name, f"has shape {tuple(weight.get_shape())}, not that of its layer")
            step = max(1, BLOCK_ELEMENTS // d_in)
            for begin in range(0, d_out, step):
                rows = slice(begin, min(begin + step, d_out))
                block = weight[:, rows].T if transposed else weight[rows]
                if block.dtype != _FP8 if scales else block.dtype not in _FLOATS:
                    how = "with" if scales else "without"
                    raise self._refused(name, f"is stored as {_spelled(block.dtype)} {how} scales, which is not read")
                yield block.double() if scales is None else block.double() * scales.rows(rows)

    def bias(self, module: str, d_out: int) -> torch.Tensor:
        """The bias [d_out] of a module that has one."""
        name = f"{module}.bias"
        with self._opened(name) as file:
            bias = file.get_tensor(self._key(name))
        if bias.shape != (d_out,) or bias.dtype not in _FLOATS:
            raise self._refused(name, f"has shape {tuple(bias.shape)} and dtype {_spelled(bias.dtype)}")
        return torch.as_tensor(bias)

    def identity(self) -> str:
        """Changes when a file of the checkpoint does (by its size and time); "" if there is none."""
        digest, found = hashlib.sha256(), False
        with suppress(AdapterUnsupportedFeature, OSError):
            for path in sorted(self._folder.glob("*.safetensors")):
                about = path.stat()
                digest.update(json.dumps([path.name, about.st_size, about.st_mtime_ns]).encode())
                found = True
        return digest.hexdigest() if found else ""

    @cached_property
    def _folder(self) -> Path:
        if Path(self._source).is_dir():
            return Path(self._source)
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self._source, local_files_only=True))
        except (OSError, ValueError) as error:
            raise AdapterUnsupportedFeature(
                f"The weights of the {self._whose} {shown(self._source)} are not on this machine.",
                hint=f"The adapter cannot be lowered without them. Download them: hf download {self._source}",
                field="weight",
            ) from error

    @cached_property
    def _files(self) -> Mapping[str, str]:
        """Tensor -> its file's name."""
        try:
            if (index := self._folder / _INDEX).is_file():
                return dict(json.loads(index.read_text())["weight_map"])
            with safe_open(self._folder / _SINGLE, framework="pt") as file:
                return dict.fromkeys(file.keys(), _SINGLE)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise AdapterUnsupportedFeature(
                f"The {self._whose}'s folder has no {_SINGLE} and no {_INDEX} that can be read.",
                hint=self._hint,
                field=_SINGLE,
            ) from error

    @cached_property
    def _block(self) -> tuple[int, int] | None:
        """Rows and columns of W0 that share a scale, where the config says so."""
        try:
            config = json.loads((self._folder / "config.json").read_text())
            rows, columns = config["quantization_config"]["weight_block_size"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return int(rows), int(columns)

    def _find(self, name: str) -> str | None:
        """The name in the file: checkpoints of a bare model leave the first part of a module's name out."""
        short = name.partition(".")[2]
        return next((key for key in (name, short) if "." in key and key in self._files), None)

    def _key(self, name: str) -> str:
        if (key := self._find(name)) is None:
            raise self._refused(name, "is not in its files")
        return key

    def _opened(self, name: str) -> Any:
        path = self._folder / self._files[self._key(name)]
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise self._refused(name, f"cannot be read: {error}") from error

    def _scales(self, module: str, d_in: int, d_out: int) -> _Scales | None:
        for name, block in (
            (f"{module}.weight_scale_inv", self._block or (0, 0)),
            (f"{module}.weight_scale", (1, d_in)),
        ):
            if (key := self._find(name)) is not None:
                with self._opened(name) as file:
                    values = file.get_tensor(key)
                scales = _Scales.of(values, block, (d_out, d_in))
                if scales is None:
                    raise self._refused(name, f"has shape {tuple(values.shape)}, which fits no known quantisation")
                return scales
        return None

    def _refused(self, name: str, reason: str) -> AdapterUnsupportedFeature:
        return AdapterUnsupportedFeature(f"The {self._whose}'s {shown(name)} {reason}.", hint=self._hint, field=name)


class _Scales:
    """A factor for every block of W0 [d_out, d_in]."""

    def __init__(self, values: torch.Tensor, block: tuple[int, int], d_in: int) -> None:
        self._values, self._block, self._d_in = values, block, d_in

    @classmethod
    def of(cls, values: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]) -> _Scales | None:
        """None if they are not those of a known quantisation."""
        if values.numel() == 1:
            values, block = values.reshape(1, 1), shape
        elif values.ndim == 1:
            values = values[:, None]
        expected = tuple(-(-length // size) if size else -1 for length, size in zip(shape, block, strict=True))
        if tuple(values.shape) != expected or not values.is_floating_point():
            return None
        return cls(values.double(), block, shape[1])

    def rows(self, rows: slice) -> torch.Tensor:
        """The factors of these rows, [n, d_in] or broadcast to it."""
        index = torch.arange(rows.start, rows.stop) // self._block[0]
        return self._values[index].repeat_interleave(self._block[1], dim=1)[:, : self._d_in]


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
