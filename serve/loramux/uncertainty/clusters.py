"""Answers that say the same, by their text: case, punctuation and spaces aside."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_NOT_A_WORD = re.compile(r"[^\w]+")


def clusters(texts: Sequence[str]) -> list[int]:
    """Which cluster each text is in, numbered in the order in which they first appear."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(_normal(text), len(numbers)) for text in texts]


def agreement(found: Sequence[int]) -> dict[str, float]:
    """Scores of answers in clusters of sizes n_c, S answers in all:

    agreement = max_c n_c / S    semantic_entropy = −Σ_c n_c/S · log(n_c/S), nats    clusters: how many
    """
    shares = [count / len(found) for count in Counter(found).values()]
    entropy = -sum(share * math.log(share) for share in shares)
    return {"agreement": max(shares), "semantic_entropy": max(entropy, 0.0), "clusters": float(len(shares))}


def _normal(text: str) -> str:
    return _NOT_A_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
