"""Adapters by name: their states, their versions, and who uses them. Knows neither HTTP nor vLLM.

registry    what the rest of the server calls        catalogue   names, and what a model name means
entry       states, versions, adapters               changes     put, delete, roll back, pin
reader      source to artefact                       residency   artefact to device: leases, eviction
store       what outlives the server                 startup     what there is at the start
compositions  sums and mixtures that requests ask for
draws       draws from posteriors                made        what both have in common
posteriors  what draws are made with
"""

from loramux.registry.changes import Condition
from loramux.registry.compositions import Held, Share
from loramux.registry.entry import Adapter, State, Version
from loramux.registry.posteriors import Posteriors
from loramux.registry.protocols import Compose, DataPlane, Observer, Prepare
from loramux.registry.reader import read_source
from loramux.registry.registry import AdapterRegistry
from loramux.registry.startup import Given
from loramux.registry.store import Store

__all__ = [
    "Adapter",
    "AdapterRegistry",
    "Compose",
    "Condition",
    "DataPlane",
    "Draw",
    "Given",
    "Held",
    "Observer",
    "Posteriors",
    "Prepare",
    "Share",
    "State",
    "Store",
    "Version",
    "read_source",
]
