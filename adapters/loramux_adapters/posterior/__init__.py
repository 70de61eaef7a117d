"""Draws of the weights of Bayesian adapters, each an adapter of its own.

artefact = prepare(Path("path/to/adapter"), base, cache)     # serves its mean
if is_bayesian(artefact):
    first = prepare_draw(artefact, cache, seed=0, sample=0)  # the same whenever it is asked for
"""

from loramux_adapters.posterior.describe import Posterior, is_bayesian, posterior_of
from loramux_adapters.posterior.draw import draw
from loramux_adapters.posterior.prepare import prepare_draw

__all__ = ["Posterior", "draw", "is_bayesian", "posterior_of", "prepare_draw"]
