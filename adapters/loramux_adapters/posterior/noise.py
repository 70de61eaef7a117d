"""The random numbers of one draw of an adapter's weights.

Each is a function of (seed, the adapter's digest, module, sample), which make the generator's key, and of its place in
the tensor that it is for, the counter: (column // 4, row, plane, stream), of whose four words column % 4 is the one. So
a draw is the same after an eviction or a restart, whichever modules were drawn before, and in whatever pieces.
"""

import hashlib
import json
from collections.abc import Callable
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

from loramux_adapters.posterior.normal import standard_normal
from loramux_adapters.posterior.philox import Words, philox

WHOLE_ADAPTER = ""
"""Stands for the module in what is drawn once for all of them."""

_Law = Callable[[Words], npt.NDArray[np.float64]]
_PIECE = 1 << 16  # numbers made at a time, to stay in the cache
_SIGN_BIT = np.uint64(1 << 31)


class Stream(IntEnum):
    """What a number is for: different streams are independent. The values are part of what a draw is."""

    A = 0
    B = 1
    SCALE = 2
    DEVIATIONS = 3
    INPUTS = 4
    SKETCH_OUT = 5
    SKETCH_IN = 6


class Noise:
    """The numbers of one sample of one adapter."""

    def __init__(self, digest: str, seed: int, sample: int) -> None:
        self.sample = sample
        self._name = ("loramux draw", seed, digest, sample)

    def normals(self, module: str, stream: Stream, rows: range, columns: range) -> torch.Tensor:
        """Independent standard normals, [rows, columns] float32, at these places of the tensor."""
        return self._matrix(module, stream, 0, rows, columns, standard_normal)

    def signs(self, module: str, stream: Stream, plane: int, columns: range) -> torch.Tensor:
        """Independent signs, 1 or -1 with equal chances (Rademacher), [columns] float32."""
        return self._matrix(
            module, stream, plane, range(1), columns, lambda words: np.where(words < _SIGN_BIT, 1.0, -1.0)
        )[0]

    def kept(self, module: str, rate: float, columns: range) -> torch.Tensor:
        """Which inputs dropout keeps, each with probability 1 − rate: 1 or 0, [columns] float32."""
        dropped = np.uint64(round(rate * 2**32))
        return self._matrix(
            module, Stream.INPUTS, 0, range(1), columns, lambda words: (words >= dropped).astype(np.float64)
        )[0]

    def _matrix(
        self,
        module: str,
        stream: Stream,
        plane: int,
        rows: range,
        columns: range,
        law: _Law,
    ) -> torch.Tensor:
        key = self._key(module)
        result = np.empty((len(rows), len(columns)), dtype=np.float32)
        first = columns.start // 4
        blocks = np.arange(first, -(-columns.stop // 4), dtype=np.uint64)[None, :]
        inside = slice(columns.start - 4 * first, columns.stop - 4 * first)
        height = max(1, _PIECE // max(1, len(columns)))
        for top in range(0, len(rows), height):
            part = np.asarray(rows[top : top + height], dtype=np.uint64)[:, None]
            counter = (blocks, part, np.full((1, 1), plane, np.uint64), np.full((1, 1), stream.value, np.uint64))
            words = np.stack(philox(counter, key), axis=-1).reshape(len(part), -1)
            result[top : top + height] = law(words[:, inside])
        return torch.from_numpy(result)

    def _key(self, module: str) -> tuple[int, int]:
        digest = hashlib.sha256(json.dumps([*self._name, module]).encode()).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
