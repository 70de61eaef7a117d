"""Smaller adapters: experts of a mixture merged, factors cut to a lower rank; with the error that it makes.

The steps, in order, and what they need:
    texts        the files that are read          applied (one level up)   an adapter on a transformers model
    statistics   what routers do with calibration texts, or did with served traffic
    grouping     which experts are merged: where it loses least, or by MC-SMoE's rule (arXiv 2310.01334)
    factors      the algebra: ΔW as two factors, its norm, its nearest of a lower rank, never ΔW itself
    merging      one site: groups merged, what each member keeps of its own, the rest cut
    adapter      all sites, and the routers' maps from experts to groups
    report       bytes and errors                 measure, quality         outputs and answers, before and after
"""

from loramux_adapters.compact.adapter import Compacted, compact
from loramux_adapters.compact.options import Options
from loramux_adapters.compact.statistics import RouterStatistics

__all__ = ["Compacted", "Options", "RouterStatistics", "compact"]
