"""Kinds of adapters that are recognised and refused, with the reason.

X-LoRA (arXiv 2402.07148): the gate reads the last hidden state of a first pass of the base model. Files of the authors
(EricLBuehler/xlora) and of PEFT: `xlora_config.json`, or `peft_type: XLORA`.
MiLoRA (arXiv 2410.18035): in every layer a router over its modules, which reads the pooled prompt before any of it is
computed there. It has no public format; `peft_type` MILORA or MIDORA. (Minor-component MiLoRA is an initialisation: a
plain LoRA after conversion.)
mttl (microsoft/mttl): its Arrow mixes A and B before it multiplies them, (Σ g_e B_e)(Σ g_e A_e) x_t, unless
`lora_merge_after` is set. Files: `mttl_config.json`, `mttl_weights.bin`.
"""

from dataclasses import dataclass
from typing import NoReturn

from loramux_adapters.abilities import Abilities
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterUnsupportedFeature
from loramux_adapters.files import AdapterFolder
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.verify import verify


@dataclass
class Recognised:
    """A kind of adapter by its peft_type or a file that only it has, and why it is not read."""

    name: str
    abilities: Abilities
    reason: str
    hint: str
    types: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def detect(self, folder: AdapterFolder) -> bool:
        return bool(self._mark(folder))

    def read(self, folder: AdapterFolder, base: BaseModel) -> NoReturn:
        raise AdapterUnsupportedFeature(f"{self.reason}.", hint=self.hint, field=self._mark(folder))

    def lower(self, checkpoint: NoReturn, base: BaseModel) -> LoweredAdapter:
        raise AssertionError("read() never returns")

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)

    def _mark(self, folder: AdapterFolder) -> str:
        """What gives it away: "peft_type" or a file's name; "" if nothing does. A PEFT config decides alone."""
        if folder.only is not None:
            return ""
        if folder.has(CONFIG_FILE):
            return "peft_type" if peft_config(folder).get("peft_type") in self.types else ""
        return next((name for name in self.files if folder.has(name)), "")


XLORA = Recognised(
    "xlora",
    Abilities(read="recognised: xlora_config.json or peft_type XLORA", serve=False, router="token"),
    "X-LoRA's gate reads the last hidden state of a first pass of the base model, which is not run",
    "Serve its LoRAs one by one, or train a mixture whose routers read their site's input (MoLA, HydraLoRA).",
    types=("XLORA",),
    files=("xlora_config.json",),
)
MILORA = Recognised(
    "milora",
    Abilities(read="recognised: peft_type MILORA or MIDORA", serve=False, router="prompt"),
    "MiLoRA's routers need the whole prompt at a layer before any of it is computed there, which is not run",
    "Write it in the native format with gates of kind prompt to keep it; train a token mixture to serve it.",
    types=("MILORA", "MIDORA"),
)
MTTL = Recognised(
    "mttl",
    Abilities(read="recognised: mttl_config.json or mttl_weights.bin", serve=False, router="token"),
    "mttl mixes A and B before it multiplies them, which is bilinear in the gate and not a sum over experts",
    "Convert its experts to PEFT LoRAs and compose them with Arrow (loramux_adapters.compose), which mixes after: "
    "another function unless lora_merge_after was set.",
    files=("mttl_config.json", "mttl_weights.bin"),
)
