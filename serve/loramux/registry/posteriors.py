"""What the draws of prepared adapters are made with: `loramux_adapters`, for one server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loramux_adapters import Artefact, Posterior, posterior_of, prepare_draw


class Posteriors:
    """Implements `protocols.Posteriors`.

    `max_rank`: the largest rank that is served. `draw_bytes`: see there; only who knows the engine can tell.
    """

    def __init__(self, cache: Path, *, max_rank: int, draw_bytes: Callable[[Artefact], int]) -> None:
        self._cache = cache
        self.max_rank = max_rank
        self.draw_bytes = draw_bytes

    def describe(self, artefact: Artefact) -> Posterior | None:
        return posterior_of(artefact)

    def draw(self, artefact: Artefact, *, seed: int, sample: int) -> Artefact:
        return prepare_draw(artefact, self._cache, seed=seed, sample=sample)
