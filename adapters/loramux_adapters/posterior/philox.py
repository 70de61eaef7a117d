"""Philox 4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

Four random words are a function of a counter of four words and a key of two. There is no state, so any part of a
matrix can be made alone, in any order, and comes out the same.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
"""Values below 2³², in 64 bits because products of two of them are needed."""

_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Sequence[Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Four words for each counter. The counter's four arrays are broadcast against each other."""
    c0, c1, c2, c3 = counter
    for step in range(_ROUNDS):
        k0, k1 = (np.uint64((word + step * add) & 0xFFFFFFFF) for word, add in zip(key, _KEY_STEPS, strict=True))
        left, right = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (right >> _HALF) ^ c1 ^ k0, right & _LOW, (left >> _HALF) ^ c3 ^ k1, left & _LOW
    return c0, c1, c2, c3
