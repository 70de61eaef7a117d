"""Kinds of adapters that are recognised and refused, with the reason.

X-LoRA (arXiv 2402.07148): the gate reads the last hidden state of a first pass of the base model. Files of the authors
(EricLBuehler/xlora) and of PEFT: `xlora_config.json`, or `peft_type: XLORA`.
MiLoRA (arXiv 2410.18035): in every layer a router over its modules, which reads the pooled prompt before any of it is
computed there. It has no public format; `peft_type` MILORA or MIDORA. (Minor-component MiLoRA is an initialisation: a
plain LoRA after conversion.)
MixLoRA (arXiv 2404.15159): experts are whole feed-forward blocks that share the base's weights, with the activation
between their LoRAs. `peft_type` MIXLORA, of MoE-PEFT and of the mixlora package (TUDB-Labs); MixDoRA has `use_dora`.
mttl (microsoft/mttl): its Arrow mixes A and B before it multiplies them, (Σ g_e B_e)(Σ g_e A_e) x_t, unless
`lora_merge_after` is set. Files: `mttl_config.json`, `mttl_weights.bin`.
"""

from dataclasses import dataclass
from typing import NoReturn

from loramux_adapters.abilities import OURS, Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterUnsupportedFeature
from loramux_adapters.files import AdapterFolder
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.verify import verify


@dataclass
class Recognised:
    """A kind of adapter that its layouts tell apart by peft_type or a file, and why it is not read: `abilities.why`."""

    name: str
    abilities: Abilities
    hint: str

    def detect(self, folder: AdapterFolder) -> bool:
        return bool(self._mark(folder))

    def read(self, folder: AdapterFolder, base: BaseModel) -> NoReturn:
        raise AdapterUnsupportedFeature(f"{self.abilities.why}.", hint=self.hint, field=self._mark(folder))

    def lower(self, checkpoint: NoReturn, base: BaseModel) -> LoweredAdapter:
        raise AssertionError("read() never returns")

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)

    def _mark(self, folder: AdapterFolder) -> str:
        """What gives it away: "peft_type" or a file's name; "" if nothing does. A PEFT config decides alone."""
        if folder.only is not None:
            return ""
        if folder.has(CONFIG_FILE):
            return "peft_type" if peft_config(folder).get("peft_type") in self.abilities.types else ""
        files = (name for layout in self.abilities.layouts for name in layout.files)
        return next((name for name in files if folder.has(name)), "")


def _recognised(name: str, *layouts: Layout, why: str, hint: str, router: str, prefix_cache: bool = True) -> Recognised:
    can = Abilities(layouts, read=False, serve=False, router=router, prefix_cache=prefix_cache, why=why)
    return Recognised(name, can, hint)


XLORA = _recognised(
    "xlora",
    Layout("X-LoRA", "PEFT", ("XLORA",)),
    Layout("X-LoRA", "EricLBuehler/xlora", files=("xlora_config.json",)),
    why="X-LoRA's gate reads the last hidden state of a first pass of the base model, which is not run",
    hint="Serve its LoRAs one by one, or train a mixture whose routers read their site's input (MoLA, HydraLoRA).",
    router="token",
)
MILORA = _recognised(
    "milora",
    Layout("MiLoRA, MiDoRA", OURS, ("MILORA", "MIDORA")),
    why="MiLoRA's routers need the whole prompt at a layer before any of it is computed there, which is not run",
    hint="Write it in the native format with gates of kind prompt to keep it; train a token mixture to serve it.",
    router="prompt",
    prefix_cache=False,
)
MIXLORA = _recognised(
    "mixlora",
    Layout("MixLoRA, MixDoRA", "TUDB-Labs/MixLoRA and MoE-PEFT", ("MIXLORA",), keys=r"mixlora\..+"),
    why="MixLoRA's experts are whole feed-forward blocks, which needs a branch inside the block that is not run",
    hint="Gating each of the block's linear layers would be another function. Train the adapter as MOLA or LORAMOE.",
    router="token",
)
MTTL = _recognised(
    "mttl",
    Layout("Arrow and others", "microsoft/mttl", files=("mttl_config.json", "mttl_weights.bin")),
    why="mttl mixes A and B before it multiplies them, which is bilinear in the gate and not a sum over experts",
    hint="Convert its experts to PEFT LoRAs and compose them with Arrow (loramux_adapters.compose), which mixes after: "
    "another function unless lora_merge_after was set.",
    router="token",
)
