"""A draw as an artefact of its own, which the server loads like any other version."""

from pathlib import Path

from loramux_adapters.artefact import Artefact, open_artefact
from loramux_adapters.posterior.draw import draw
from loramux_adapters.prepare import keep


def prepare_draw(artefact: Artefact, cache: Path, *, seed: int, sample: int) -> Artefact:
    """Keep one draw of a prepared Bayesian adapter in `cache`, as `prepare` keeps an adapter: by its own content.

    An intact file of that content is reused. Raises what `draw` raises, AdapterUnsupportedFeature for what the data
    plane cannot run, AdapterCorrupt or AdapterNotFound for an artefact that is damaged or lost, and OSError for the
    cache.
    """
    adapter = draw(open_artefact(artefact.path), digest=artefact.digest, seed=seed, sample=sample)
    return keep(adapter, artefact.summary.base, cache)
