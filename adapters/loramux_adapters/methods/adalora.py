"""AdaLoRA as PEFT saves it: a singular value decomposition whose ranks were spread over the modules (arXiv
2303.10512).

    y_t = W0 x_t + s/(init_r + 1e-5) · B · diag(E) · A · x_t

A [r, d_in], E [r, 1], B [d_out, r]. Lowered: a = A, b = Bᵀ, scale = s·E/(init_r + 1e-5), rounded once to float32.

What PEFT does (0.21, `tuners/adalora`), and others may not expect:

* The divisor stays `init_r` when ranks are pruned; it is not in the file. The field `r` is not read at all.
* `rank_pattern` says which of the init_r ranks are left, `<module>.lora_E` -> a list of true and false; those that
  are not are no longer in the tensors. A module may have none left: it is not adapted.
* s = lora_alpha if that is above 0, else the number of ranks left, as in the model that PEFT loads. (While it was
  trained, s was init_r.)
* `use_rslora` and `alpha_pattern` are accepted by its config and never read; they are refused here.

Names: `base_model.model.<module>.lora_A`, `.lora_E`, `.lora_B`, without `.weight`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterConfigInvalid, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.fold import scales
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.peft import experts
from loramux_adapters.peft.sites import Part, Sites, read_sites
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.verify import verify

_LAYOUT = {
    "a": Part(PREFIX + "{module}.lora_A", "RI"),
    "e": Part(PREFIX + "{module}.lora_E", "R1"),
    "b": Part(PREFIX + "{module}.lora_B", "OR"),
}
# All but init_r and rank_pattern plan the training; r is PEFT's for LoRA, which AdaLoRA does not read.
_OWN_FIELDS = frozenset(
    {
        "init_r", "rank_pattern", "r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
        "total_step",
    }
)  # fmt: skip
_NOT_READ = ("alpha_pattern", "use_rslora")
_RANK_HINT = "Give the initial rank as it was in training."
_PATTERN_HINT = "Save the adapter again: PEFT writes a list of init_r flags for <module>.lora_E."
_EPSILON = 1e-5


@dataclass(frozen=True)
class AdaLoraCheckpoint:
    sites: Sites
    init_r: int
    alpha: float


class AdaLora:
    """PEFT's ADALORA."""

    name = "adalora"
    abilities = Abilities((Layout("AdaLoRA", "PEFT", ("ADALORA",), keys=r".+\.lora_E(\.[^.]+)?"),))

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> AdaLoraCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        init_r = experts.count(raw, "init_r", _RANK_HINT)
        config = experts.parse_shared_fields(raw, _OWN_FIELDS, init_r, _NOT_READ)
        left = _ranks_left(raw, init_r)
        sites = read_sites(folder, base, config, _LAYOUT, lambda module, _: {"R": left.get(module, init_r)}, count=1)
        if unknown := sorted(left.keys() - sites.modules.keys()):
            raise _invalid(f"has a key for {shown(unknown[0])}, which is not adapted")
        return AdaLoraCheckpoint(sites, init_r, config.lora_alpha)

    def lower(self, checkpoint: AdaLoraCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites = {}
        for module, part in checkpoint.sites.modules.items():
            (a,), (e,), (b,) = part["a"], part["e"], part["b"]
            if len(a) == 0:
                continue
            alpha = checkpoint.alpha if checkpoint.alpha > 0 else float(len(a))
            scale = scales(module, e[:, 0], alpha, alpha / (checkpoint.init_r + _EPSILON))
            sites[module] = LoweredSite(a, b.T.contiguous(), scale)
        return LoweredAdapter(self.name, sites, checkpoint.sites.warnings)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _ranks_left(raw: Mapping[str, Any], init_r: int) -> Mapping[str, int]:
    """Module -> how many ranks `rank_pattern` leaves it."""
    pattern = raw.get("rank_pattern")
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise _invalid(f"must be an object from <module>.lora_E to a list of flags, not {shown(pattern)}")
    left = {}
    for key, flags in pattern.items():
        module, _, name = key.removesuffix(".default").rpartition(".")
        if name != "lora_E" or module in left:
            raise _invalid(f"has the key {shown(key)}")
        if not isinstance(flags, list) or len(flags) != init_r or not all(isinstance(flag, bool) for flag in flags):
            raise _invalid(f"must have {init_r} times true or false for {shown(key)}")
        left[module] = sum(flags)
    return left


def _invalid(what: str) -> AdapterConfigInvalid:
    return AdapterConfigInvalid(f"adapter_config.json: rank_pattern {what}.", hint=_PATTERN_HINT, field="rank_pattern")
