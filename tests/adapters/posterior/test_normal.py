"""Normal numbers against two other implementations of the quantile, and the same bits everywhere."""

import hashlib
from statistics import NormalDist

import numpy as np
import torch

from loramux_adapters.posterior.normal import standard_normal

ENDS = np.arange(5000)
SPREAD = np.arange(0, 2**32, 104_729)
EDGES = np.array([[0.075], [0.925]]) * 2**32 + np.arange(-3, 4)  # where one formula ends and the other begins
WORDS = np.concatenate([ENDS, 2**32 - 1 - ENDS, SPREAD, EDGES.ravel()]).astype(np.uint64)


def test_it_is_the_quantile_of_the_word():
    found, p = standard_normal(WORDS), (WORDS.astype(np.float64) + 0.5) * 2.0**-32
    for expected in (torch.special.ndtri(torch.from_numpy(p)).numpy(), [NormalDist().inv_cdf(x) for x in p]):
        np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-15)


def test_it_is_symmetric_and_bounded():
    found = standard_normal(WORDS)
    np.testing.assert_array_equal(found, -standard_normal(2**32 - 1 - WORDS))
    assert 6 < np.abs(found).max() < 6.4


def test_its_bits_are_always_these():
    """Written down on an x86 with AVX-512: another machine, or another numpy, must agree."""
    bits = standard_normal(WORDS).astype("<f8").tobytes()
    assert hashlib.sha256(bits).hexdigest() == "78f40ff4a274a60af19b810335afd27624be2134e7b3feaa1e1e913a7abbe66e"
