"""Reading a safetensors file that may be hostile.

The header is checked before any tensor is read. Tensors are read into memory of our own rather than mapped: a file
that shrinks while it is mapped kills the process, and what was checked must be what is kept.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import torch

from loramux_adapters.errors import AdapterCorrupt, AdapterTooLarge, AdapterUnsupportedFeature, shown
from loramux_adapters.files import AdapterFolder, parse_json, unsafe_pickle

# 23 000 tensors with 150-byte names need 3.6 MB: room for adapters of large mixture models.
MAX_HEADER_BYTES = 8 << 20
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The native format keeps indices as tensors too.
NATIVE_DTYPES = DTYPES | {"I32": torch.int32}
# Widths in bytes of all the dtypes that the format names; we must know them to check the offsets.
_WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the header. `begin` counts bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class WeightsFile:
    """An open safetensors file whose header is consistent with its size. Iterate `tensors`, then `read` by name."""

    def __init__(self, file: BufferedReader, name: str, size: int, dtypes: Mapping[str, torch.dtype] = DTYPES) -> None:
        self.name = name
        self.metadata: Mapping[str, str] = {}
        self._dtypes = dtypes
        self._file = file
        self.tensors = self._read_header(size)

    def read(self, tensor: str) -> torch.Tensor:
        """The tensor in its own dtype. Raises AdapterUnsupportedFeature unless that is one of the file's dtypes."""
        info = self.tensors[tensor]
        dtype = self.check_dtype(tensor)
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        buffer = bytearray(info.nbytes)
        self._file.seek(info.begin)
        if self._file.readinto(buffer) != info.nbytes:
            raise self._corrupt("it shrank while it was read")
        return torch.frombuffer(buffer, dtype=dtype).reshape(info.shape)

    def outline(self, tensor: str) -> torch.Tensor:
        """A tensor of that shape and dtype on the meta device: nothing is read, no memory is taken."""
        return torch.empty(self.tensors[tensor].shape, dtype=self.check_dtype(tensor), device="meta")

    def check_dtype(self, tensor: str) -> torch.dtype:
        dtype = self.tensors[tensor].dtype
        if dtype not in self._dtypes:
            raise AdapterUnsupportedFeature(
                f"Tensor {shown(tensor)} has dtype {shown(dtype)}.",
                hint="Save the adapter in float32, bfloat16 or float16.",
                field=tensor,
            )
        return self._dtypes[dtype]

    def _read_header(self, size: int) -> Mapping[str, TensorInfo]:
        prefix = self._file.read(9)
        length = int.from_bytes(prefix[:8], "little")
        if len(prefix) < 9 or prefix[8:] != b"{":
            if prefix[:4] == b"PK\x03\x04" or prefix[:1] == b"\x80":
                raise unsafe_pickle(self.name)
            raise self._corrupt("it does not begin with a safetensors header")
        if length > size - 8:
            raise self._corrupt(f"it promises a header of {length} bytes in a file of {size}")
        if length > MAX_HEADER_BYTES:
            raise AdapterTooLarge(
                f"The header of {shown(self.name)} has {length} bytes; the limit is {MAX_HEADER_BYTES}.",
                hint="No adapter needs so many tensors: check where this file comes from.",
                field=self.name,
            )
        header = parse_json(prefix[8:] + self._file.read(length - 1), self.name)
        self.metadata = self._checked_metadata(header.pop("__metadata__", {}))
        tensors = {name: self._entry(name, entry, 8 + length) for name, entry in header.items()}
        self._check_layout(tensors, 8 + length, size)
        return tensors

    def _checked_metadata(self, metadata: Any) -> Mapping[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._corrupt("its metadata is not a map of strings")
        return metadata

    def _entry(self, name: str, entry: Any, start: int) -> TensorInfo:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._corrupt(f"the entry of {shown(name)} is malformed")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or not _is_naturals(shape) or not _is_naturals(offsets) or len(offsets) != 2:
            raise self._corrupt(f"the entry of {shown(name)} is malformed")
        if dtype not in _WIDTHS:
            raise AdapterUnsupportedFeature(
                f"Tensor {shown(name)} has dtype {shown(dtype)}.",
                hint="Save the adapter in float32, bfloat16 or float16.",
                field=name,
            )
        nbytes = math.prod(shape) * _WIDTHS[dtype]
        if offsets[1] - offsets[0] != nbytes:
            raise self._corrupt(f"{shown(name)} has shape {shape} but {offsets[1] - offsets[0]} bytes")
        return TensorInfo(dtype, tuple(shape), start + offsets[0], nbytes)

    def _check_layout(self, tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
        """Tensors must tile the rest of the file: no hole, no overlap, nothing after the last one."""
        position = start
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
            if info.begin != position:
                raise self._corrupt(f"{shown(name)} overlaps another tensor or leaves a hole")
            position += info.nbytes
        if position != size:
            raise self._corrupt(f"its tensors end at byte {position} and the file at {size}")

    def _corrupt(self, reason: str) -> AdapterCorrupt:
        return AdapterCorrupt(
            f"{shown(self.name)} is not a sound safetensors file: {reason}.",
            hint="Copy it again from its origin; if the origin is the same, save the adapter again.",
            field=self.name,
        )


@contextmanager
def open_weights(folder: AdapterFolder, name: str, dtypes: Mapping[str, torch.dtype] = DTYPES) -> Iterator[WeightsFile]:
    """Open and check a safetensors file of the folder, whose tensors may have these dtypes."""
    with folder.open(name) as file:
        size = file.seek(0, 2)
        file.seek(0)
        yield WeightsFile(file, name, size, dtypes)


def _is_naturals(value: Any) -> bool:
    # Bounded in length and size: a product of ten thousand huge numbers would cost minutes.
    return isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
