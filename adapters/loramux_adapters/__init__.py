"""What an adapter is: reading it safely, checking it against a base model, lowering it to the one form we serve.

The usual path is three calls:

    base = BaseModel.from_pretrained("path/to/base")
    artefact = prepare(Path("path/to/adapter"), base, cache=Path("cache"))   # raises AdapterError
    adapter = open_artefact(artefact.path)
"""

from loramux_adapters.artefact import AdapterSummary, Artefact, open_artefact
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import (
    AdapterConfigInvalid,
    AdapterCorrupt,
    AdapterError,
    AdapterMissingTensor,
    AdapterNoEffect,
    AdapterNotFinite,
    AdapterNotFound,
    AdapterShapeMismatch,
    AdapterTooLarge,
    AdapterUnknownTensor,
    AdapterUnsafeFile,
    AdapterUnsupportedFeature,
    AdapterWrongBase,
)
from loramux_adapters.gate import Gate
from loramux_adapters.lowered import Carry, FfnMixture, LoweredAdapter, LoweredSite
from loramux_adapters.native import write_native
from loramux_adapters.posterior import Posterior, draw, is_bayesian, posterior_of, prepare_draw
from loramux_adapters.prepare import lower, prepare
from loramux_adapters.serving import check_servable, unserved
from loramux_adapters.variance import Variance

__all__ = [
    "AdapterConfigInvalid",
    "AdapterCorrupt",
    "AdapterError",
    "AdapterMissingTensor",
    "AdapterNoEffect",
    "AdapterNotFinite",
    "AdapterNotFound",
    "AdapterShapeMismatch",
    "AdapterSummary",
    "AdapterTooLarge",
    "AdapterUnknownTensor",
    "AdapterUnsafeFile",
    "AdapterUnsupportedFeature",
    "AdapterWrongBase",
    "Artefact",
    "BaseModel",
    "Carry",
    "FfnMixture",
    "Gate",
    "LoweredAdapter",
    "LoweredSite",
    "Posterior",
    "Variance",
    "check_servable",
    "draw",
    "is_bayesian",
    "lower",
    "open_artefact",
    "posterior_of",
    "prepare",
    "prepare_draw",
    "unserved",
    "write_native",
]
