"""LoRA with biases: on B, PEFT's `lora_bias`, or trained in place of the base's own, its `bias: "lora_only"` or "all"
(LoRA: arXiv 2106.09685).

    y_t = W0 x_t + s · (B · A · x_t + β) + b        s = α/r, or α/√r with `use_rslora`

A [r, d_in], B [d_out, r]; β [d_out] with `lora_bias`, else 0: `lora_B.bias` beside PEFT's other names. b is the base's
own bias b0, or what was trained in its place: `base_layer.bias`, before PEFT had base layers `bias`. Lowered: a, b and
scale are the plain ones, bias = s·β + (b − b0) in float32. b0 is read from the base's files, and only where a b is
there. A file without one, as older PEFT writes it, means the base's own to PEFT, and is warned of. With "all"
PEFT trains every bias of the model: those outside of the adapted layers are refused.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from typing import Any

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterConfigInvalid, AdapterUnknownTensor, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.fold import scales
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE, Variant, variant
from loramux_adapters.peft import experts
from loramux_adapters.peft.lora_sites import FACTORS, LoraSites, read_lora_sites
from loramux_adapters.peft.sites import Part, Sites, plain_name
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.verify import verify

_TRAINED = PREFIX + "{module}.base_layer.bias"
_BETA = {"beta": Part(PREFIX + "{module}.lora_B.bias", "O")}
_BIAS = {"bias": Part(_TRAINED, "O", optional=True)}


class LoraBias:
    """PEFT's LORA with `lora_bias`, with trained biases, or with both."""

    name = "lora_bias"
    abilities = Abilities(
        (
            Layout(
                "LoRA with biases",
                "PEFT",
                ("LORA",),
                when="with `lora_bias`, or with `bias` `lora_only` or `all`",
                keys=r".+\.lora_B\.bias",
            ),
        ),
        quantised_base="yes, but trained biases need the files of the base that is served",
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return variant(folder) is Variant.BIAS

    def read(self, folder: AdapterFolder, base: BaseModel) -> LoraSites:
        raw = folder.read_json(CONFIG_FILE)
        layout = {**FACTORS, **(_BETA if _has_beta(raw) else {}), **(_BIAS if _has_trained(raw) else {})}
        lora = read_lora_sites(folder, base, raw, {"lora_bias", "bias"}, layout, normalise=_plain_name)
        for module, part in lora.sites.modules.items():
            if "bias" in part and module not in base.biased:
                raise _no_bias(_TRAINED.format(module=module), module)
        if not _has_trained(raw):
            return lora
        warnings = (*lora.sites.warnings, *_untrained(raw, lora.sites, base))
        return replace(lora, sites=replace(lora.sites, warnings=warnings))

    def lower(self, checkpoint: LoraSites, base: BaseModel) -> LoweredAdapter:
        sites = {}
        for module, part in checkpoint.sites.modules.items():
            (a,), (b,) = part["a"], part["b"]
            alpha, factor = checkpoint.alphas[module], checkpoint.factor(module, len(a))
            bias = scales(module, part["beta"][0], alpha, factor) if "beta" in part else None
            if "bias" in part and (own := base.bias(module)) is not None:
                change = part["bias"][0].double() - own.double()
                bias = (change if bias is None else change + bias).float()
            sites[module] = LoweredSite(a, b.T.contiguous(), checkpoint.scale(module, len(a)), bias=bias)
        return LoweredAdapter(self.name, sites, checkpoint.sites.warnings)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _has_beta(raw: Mapping[str, Any]) -> bool:
    if raw.get("lora_bias"):
        experts.check_flag(raw, "lora_bias")
    return bool(raw.get("lora_bias"))


def _has_trained(raw: Mapping[str, Any]) -> bool:
    value = raw.get("bias", "none")
    if value in ("none", None):
        return False
    if value in ("lora_only", "all"):
        return True
    raise AdapterConfigInvalid(
        f'adapter_config.json: bias must be "none", "lora_only" or "all", not {shown(value)}.',
        hint="Correct the field as it was in training.",
        field="bias",
    )


def _untrained(raw: Mapping[str, Any], sites: Sites, base: BaseModel) -> Iterator[str]:
    """A warning, if biases that the config says were trained are not in the file."""
    modules = [module for module, part in sites.modules.items() if module in base.biased and "bias" not in part]
    if modules:
        yield (
            f"bias is {shown(raw['bias'])}, but the file has no bias for {shown(modules[0])} ({len(modules)} such): "
            "the base's own are used, as PEFT does."
        )


def _plain_name(name: str, adapted: Container[str]) -> str:
    """PEFT's spelling, and the bias of an adapted layer like one of a layer that is wrapped."""
    plain = plain_name(name)
    own = plain.endswith(".bias") and plain.removeprefix(PREFIX).removesuffix(".bias") in adapted
    return f"{plain.removesuffix('.bias')}.base_layer.bias" if own else plain


def _no_bias(name: str, module: str) -> AdapterUnknownTensor:
    return AdapterUnknownTensor(
        f"Tensor {shown(name)} is there, but {shown(module)} of the base has no bias that it could replace.",
        hint="Serve the adapter on the base model that it was trained on.",
        field=name,
    )
