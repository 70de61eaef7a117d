"""Read GGUF version 3: header, key/values, tensor descriptions, and the tensors as float32.

Layout (little endian): `GGUF`, u32 version, u64 tensor count, u64 key count; then the key/values; then per tensor
its name, u32 rank, u64 sizes (fastest first), u32 type, u64 offset; then, at the next multiple of
`general.alignment`, the data. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Only the types below are decoded. A block holds 32 weights of one row:

    F32    w = x
    Q4_1   w_i = d · q_i + m    d, m float16; then 16 bytes, low nibbles q_0..q_15, high nibbles q_16..q_31
    Q8_0   w_i = d · q_i        d float16; then 32 int8

Every length in the file is checked against the file's own size before anything is allocated.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

VERSION = 3
MAX_DIMENSIONS = 4
BLOCK = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class GGUFError(ValueError):
    """The file is not a GGUF file we can read; the message names the field or tensor."""


@dataclass(frozen=True)
class TensorType:
    """A block: `weights` weights in `size` bytes; `decode` turns blocks (N, size) into float32 (N, weights)."""

    name: str
    weights: int
    size: int
    decode: Callable[[npt.NDArray[np.uint8]], FloatArray]


def _half(columns: npt.NDArray[np.uint8]) -> FloatArray:
    halves: npt.NDArray[np.float16] = np.ascontiguousarray(columns).view("<f2")
    return halves.astype(np.float32)


def _decode_f32(blocks: npt.NDArray[np.uint8]) -> FloatArray:
    singles: FloatArray = np.ascontiguousarray(blocks).view("<f4")
    return singles.astype(np.float32)


def _decode_q4_1(blocks: npt.NDArray[np.uint8]) -> FloatArray:
    step, low = _half(blocks[:, 0:2]), _half(blocks[:, 2:4])
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    weights: FloatArray = nibbles.astype(np.float32) * step + low
    return weights


def _decode_q8_0(blocks: npt.NDArray[np.uint8]) -> FloatArray:
    levels: npt.NDArray[np.int8] = np.ascontiguousarray(blocks[:, 2:]).view(np.int8)
    weights: FloatArray = levels.astype(np.float32) * _half(blocks[:, 0:2])
    return weights


TENSOR_TYPES = {
    0: TensorType("F32", 1, 4, _decode_f32),
    3: TensorType("Q4_1", BLOCK, 20, _decode_q4_1),
    8: TensorType("Q8_0", BLOCK, 34, _decode_q8_0),
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: shape slowest axis first, place of its data counted from the start of the file, in bytes."""

    shape: tuple[int, ...]
    type: TensorType
    start: int


class _Cursor:
    """Reads forward through the bytes and refuses to pass their end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, size: int, what: str) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise GGUFError(f"{what} needs {size} bytes at {self.position}, but the file ends at {len(self.data)}")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.scalar("Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise GGUFError(f"{what} is not UTF-8 text") from error

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise GGUFError(f"{what} has unknown value type {kind}")
        return self.scalar(_SCALARS[kind], what)

    def array(self, what: str) -> list[Any]:
        kind, count = self.scalar("I", what), self.scalar("Q", what)
        if kind in _SCALARS:
            code = _SCALARS[kind]
            # Sized by hand first: a count of 2^60 must not become a format string.
            raw = self.take(count * struct.calcsize("<" + code), what)
            return list(struct.unpack(f"<{count}{code}", raw))
        if kind == _STRING:
            return [self.string(what) for _ in range(count)]
        raise GGUFError(f"{what} is an array of value type {kind}, which is not supported")


class GGUF:
    """A parsed GGUF file held in memory: `keys` (name → value) and `tensors` (name → description).

    Raises:
        GGUFError: the bytes are not GGUF version 3, are cut short, contradict themselves or hold an unknown type.
    """

    def __init__(self, data: bytes) -> None:
        cursor = _Cursor(data)
        if cursor.take(4, "the magic") != b"GGUF":
            raise GGUFError("not a GGUF file: it does not begin with 'GGUF'")
        if (version := cursor.scalar("I", "the version")) != VERSION:
            raise GGUFError(f"GGUF version {version} is not supported, only {VERSION}")
        tensor_count, key_count = cursor.scalar("Q", "the tensor count"), cursor.scalar("Q", "the key count")
        self._data = data
        self.keys = self._read_keys(cursor, key_count)
        self.tensors = self._read_tensors(cursor, tensor_count)

    def tensor(self, name: str) -> FloatArray:
        """The tensor, decoded to a fresh float32 array of its shape."""
        info = self.tensors[name]
        count = math.prod(info.shape)
        raw = np.frombuffer(self._data, np.uint8, count // info.type.weights * info.type.size, info.start)
        return info.type.decode(raw.reshape(-1, info.type.size)).reshape(info.shape)

    @staticmethod
    def _read_keys(cursor: _Cursor, count: int) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        for index in range(count):
            name = cursor.string(f"the name of key {index}")
            if name in keys:
                raise GGUFError(f"key {name!r} appears twice")
            keys[name] = cursor.value(cursor.scalar("I", f"the type of key {name!r}"), f"key {name!r}")
        return keys

    def _read_tensors(self, cursor: _Cursor, count: int) -> dict[str, TensorInfo]:
        relative: dict[str, TensorInfo] = {}
        for index in range(count):
            name = cursor.string(f"the name of tensor {index}")
            if name in relative:
                raise GGUFError(f"tensor {name!r} appears twice")
            relative[name] = _read_tensor(cursor, f"tensor {name!r}")
        alignment = self.keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise GGUFError(f"general.alignment is {alignment!r}, not a positive number")
        base = -(-cursor.position // alignment) * alignment
        tensors = {n: TensorInfo(t.shape, t.type, base + t.start) for n, t in relative.items()}
        for name, info in tensors.items():
            end = info.start + math.prod(info.shape) // info.type.weights * info.type.size
            if end > len(self._data):
                raise GGUFError(f"tensor {name!r} ends at byte {end}, but the file ends at {len(self._data)}")
        return tensors


def _read_tensor(cursor: _Cursor, what: str) -> TensorInfo:
    rank = cursor.scalar("I", what)
    if not 1 <= rank <= MAX_DIMENSIONS:
        raise GGUFError(f"{what} has {rank} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
    sizes = [cursor.scalar("Q", what) for _ in range(rank)]
    code, offset = cursor.scalar("I", what), cursor.scalar("Q", what)
    if code not in TENSOR_TYPES:
        known = ", ".join(f"{number} ({kind.name})" for number, kind in TENSOR_TYPES.items())
        raise GGUFError(f"{what} has type {code}; supported are {known}")
    if 0 in sizes or sizes[0] % TENSOR_TYPES[code].weights:
        raise GGUFError(f"{what} has sizes {sizes}, which {TENSOR_TYPES[code].name} blocks cannot fill")
    return TensorInfo(tuple(reversed(sizes)), TENSOR_TYPES[code], offset)
