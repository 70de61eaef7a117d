from __future__ import annotations

import math

import pytest

from loramux.uncertainty.clusters import agreement, clusters


def test_the_same_in_other_words_is_not_the_same_and_in_other_letters_it_is() -> None:
    texts = ["Paris", "paris.", " PARIS!\n", "It is Paris", "Ｐａｒｉｓ", "Lyon", "", "…"]
    assert clusters(texts) == [0, 0, 0, 1, 0, 2, 3, 3]


def test_agreement() -> None:
    found = agreement([0, 0, 1, 2])
    assert found["agreement"] == 0.5 and found["clusters"] == 3
    assert found["semantic_entropy"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))
    assert agreement([0, 0]) == {"agreement": 1, "semantic_entropy": 0, "clusters": 1}
