"""The generator against the vectors that its authors published (Random123 1.09, `tests/kat_vectors`)."""

import numpy as np
import pytest

from loramux_adapters.posterior.philox import philox

# counter, key, and what philox4x32 gives after 10 rounds
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    found = philox([np.array([word], dtype=np.uint64) for word in words(counter)], tuple(words(key)))
    assert [int(word[0]) for word in found] == words(expected)


def test_counters_are_broadcast():
    """Every counter of a whole array gives what it gives alone."""
    rows, columns = np.arange(3, dtype=np.uint64)[:, None], np.arange(5, dtype=np.uint64)[None, :]
    one = np.ones((1, 1), np.uint64)
    whole = philox((columns, rows, one, one), (7, 8))
    for i in range(3):
        for j in range(5):
            alone = philox((columns[:, j : j + 1], rows[i : i + 1], one, one), (7, 8))
            assert [int(word[i, j]) for word in whole] == [int(word[0, 0]) for word in alone]
