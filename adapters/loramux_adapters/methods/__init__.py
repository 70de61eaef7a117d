"""The adapter methods that can be served. Each is one file that ends in an object of the `Method` protocol."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from loramux_adapters.abilities import Abilities
from loramux_adapters.base_model import BaseModel
from loramux_adapters.files import AdapterFolder
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.methods.abmll import Abmll
from loramux_adapters.methods.adalora import AdaLora
from loramux_adapters.methods.blob import Blob
from loramux_adapters.methods.chain import Chain
from loramux_adapters.methods.dora import Dora
from loramux_adapters.methods.dora_dynamic import DoraDynamic
from loramux_adapters.methods.ensemble import Ensemble
from loramux_adapters.methods.hydralora import HydraLora
from loramux_adapters.methods.ivon import Ivon
from loramux_adapters.methods.lora import Lora
from loramux_adapters.methods.lora_bias import LoraBias
from loramux_adapters.methods.lorahub import LoraHub
from loramux_adapters.methods.malora import Malora
from loramux_adapters.methods.mcdropout import McDropout
from loramux_adapters.methods.melora import Melora
from loramux_adapters.methods.moe_peft import MoePeft
from loramux_adapters.methods.moelora import MoeLora
from loramux_adapters.methods.mola import Mola
from loramux_adapters.methods.mole import Mole
from loramux_adapters.methods.monteclora import MonteClora
from loramux_adapters.methods.multilora import MultiLora
from loramux_adapters.methods.native import Native
from loramux_adapters.methods.phatgoose import Phatgoose
from loramux_adapters.methods.recognised import MILORA, MIXLORA, MTTL, XLORA
from loramux_adapters.methods.reslora import ResLora
from loramux_adapters.methods.scalabl import Scalabl
from loramux_adapters.methods.sira import Sira
from loramux_adapters.methods.swag import Swag
from loramux_adapters.methods.vera import Vera

Checkpoint = TypeVar("Checkpoint")


class Method(Protocol[Checkpoint]):
    """One kind of checkpoint: recognised, read whole, then lowered to the one form."""

    name: str
    abilities: Abilities

    def detect(self, folder: AdapterFolder) -> bool:
        """Whether the folder holds this kind, decided from its file names, config and headers alone."""

    def read(self, folder: AdapterFolder, base: BaseModel) -> Checkpoint:
        """Read and check everything in the folder; refuse before reading weights that cannot fit the base."""

    def lower(self, checkpoint: Checkpoint, base: BaseModel) -> LoweredAdapter:
        """The same adapter in the one form, exactly."""

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        """The checks on the result, at least those of `loramux_adapters.verify`."""


METHODS: Sequence[Method[Any]] = (
    Native(),
    Lora(),
    Abmll(),
    AdaLora(),
    Blob(),
    Chain(),
    Dora(),
    DoraDynamic(),
    Ensemble(),
    HydraLora(),
    Ivon(),
    LoraBias(),
    LoraHub(),
    Malora(),
    McDropout(),
    Melora(),
    MILORA,
    MIXLORA,
    MoeLora(),
    MoePeft(),
    Mola(),
    Mole(),
    MonteClora(),
    MTTL,
    MultiLora(),
    Phatgoose(),
    ResLora(),
    Scalabl(),
    Sira(),
    Swag(),
    Vera(),
    XLORA,
)
