"""Training of Bayesian adapters, plain ones and mixtures, in the form that they are served in.

    site         one linear layer's share, differentiable: a LoRA, or LoRAs with a router
    adapter      sites on a model; what is trained becomes a `LoweredAdapter`, or files that others read
    fit          the loop: −log p of a batch, and what a posterior costs
    normal       Kullback-Leibler divergences of normal laws
    blob         BLoB (arXiv 2406.11675): a normal posterior over A
    abmll        ABMLL (arXiv 2508.14285): a posterior over ΔW, learned over many tasks and adapted to one

The texts, and how a loss is made of them, are the caller's; `adapters/examples/bayes_run.py` has some.
"""

from loramux_adapters.train.abmll import HierarchicalSite, adapt, meta_fit
from loramux_adapters.train.adapter import TrainableAdapter
from loramux_adapters.train.blob import BlobSite
from loramux_adapters.train.fit import Options, fit
from loramux_adapters.train.site import Shape, Site

__all__ = [
    "BlobSite",
    "HierarchicalSite",
    "Options",
    "Shape",
    "Site",
    "TrainableAdapter",
    "adapt",
    "fit",
    "meta_fit",
]
