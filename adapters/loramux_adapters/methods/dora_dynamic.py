"""DoRA with dynamic rank distribution: LoRA as a sum of rank-one parts, of which the weakest were pruned (arXiv
2405.17357; not the weight-decomposed DoRA).

    y_t = W0 x_t + α/r_start · B · diag(c) · A · x_t

A [r_start, d_in], c [r_start], B [d_out, r_start]; c is 0 where a part was pruned. Lowered: a = A, b = Bᵀ, scale =
α·c/r_start in float32, without the pruned ranks, so that every site has its own rank; none at all is no site.

Read in MIkumikumi0116/DoRA at 235e21f (`Adaptive_Lora_Linear`): α is divided by `adaptive_lora_start_rank`, whatever
is left. Its checkpoint is the whole model, with a pickle beside it, prune_state_dict.pt, whose `finally_mask_dict`
says what was pruned at last; training sets c to 0 there after every step, so that c in a checkpoint should be 0 there
already. The code has no format for an adapter alone. Ours is an adapter_config.json with `peft_type:
"ADAPTIVE_LORA"`, PEFT's fields for LoRA (`target_modules` as in PEFT) and `adaptive_lora_start_rank` instead of `r`,
and these tensors of the checkpoint: `<module>.lora_a_linear.weight`, `<module>.lora_scaler`,
`<module>.lora_b_linear.weight`, with or without the wrapper's `model.` in front; and, if there is one, the mask as
`finally_mask_dict.<module>` [r_start], 1 where pruned. The hint of the refusals has the command that extracts them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterConfigInvalid, AdapterUnsafeFile, AdapterUnsupportedFeature, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.fold import scales
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.peft import experts
from loramux_adapters.peft.sites import Part, Sites, read_sites
from loramux_adapters.verify import verify

_LAYOUT = {
    "a": Part("{module}.lora_a_linear.weight", "RI"),
    "c": Part("{module}.lora_scaler", "R"),
    "b": Part("{module}.lora_b_linear.weight", "OR"),
    "mask": Part("{module}.finally_mask", "R", optional=True),
}
_RANK = "adaptive_lora_start_rank"
# All but the rank plan the training.
_OWN_FIELDS = frozenset(
    {
        _RANK, "adaptive_lora_end_avg_rank", "adaptive_lora_start_prune_step_ratio",
        "adaptive_lora_end_prune_step_ratio", "adaptive_lora_prune_interval_step", "adaptive_lora_sensitivity_beta",
        "adaptive_lora_eps", "regularization_loss_alpha",
    }
)  # fmt: skip
_ABSENT = ("r", *experts.LATER_FIELDS)
_RANK_HINT = "Give the rank before pruning, as it was in training."
_PICKLE = "prune_state_dict.pt"
_MASK = "finally_mask_dict."
_OURS = re.compile(r"(?P<module>.+)\.(?:lora_a_linear\.weight|lora_scaler|lora_b_linear\.weight)")
_EXTRACT = (
    'python -c "import torch; from safetensors.torch import load_file, save_file; '
    "w = {k: v for k, v in load_file('model.safetensors').items() if '.lora_' in k}; "
    f"m = torch.load('{_PICKLE}', map_location='cpu', weights_only=True)['finally_mask_dict']; "
    f"save_file(w | {{'{_MASK}' + k: v.float() for k, v in m.items()}}, 'adapter_model.safetensors')\""
)


@dataclass(frozen=True)
class DoraDynamicCheckpoint:
    sites: Sites
    start_rank: int
    alpha: float
    warnings: tuple[str, ...]


class DoraDynamic:
    """The tensors of the authors' code, in the folder that this module defines."""

    name = "dora_dynamic"
    abilities = Abilities(
        (
            Layout(
                "DoRA with dynamic rank",
                "MIkumikumi0116/DoRA",
                ("ADAPTIVE_LORA",),
                when="(our config beside its tensors)",
                keys=r".+\.(lora_scaler|lora_[ab]_linear\.weight)|finally_mask_dict\..+",
            ),
        )
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> DoraDynamicCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        start_rank = experts.count(raw, _RANK, _RANK_HINT)
        config = experts.parse_shared_fields(raw, _OWN_FIELDS, start_rank, _ABSENT)
        sites = read_sites(folder, base, config, _LAYOUT, {"R": start_rank}, count=1, normalise=_normaliser(base))
        masked = [module for module, part in sites.modules.items() if "mask" in part]
        if not masked and folder.has(_PICKLE):
            raise AdapterUnsafeFile(
                f"{_PICKLE} says what was pruned, but it is a pickle: loading one can run any code.",
                hint=f"Put its mask with the tensors, in its folder and where you trust it: {_EXTRACT}",
                field=_PICKLE,
            )
        warnings = sites.warnings
        if len(masked) < len(sites.modules):
            open_sites = len(sites.modules) - len(masked)
            warnings += (f"{open_sites} modules have no mask: of their ranks, those are pruned whose scaler is 0.",)
        return DoraDynamicCheckpoint(sites, start_rank, config.lora_alpha, warnings)

    def lower(self, checkpoint: DoraDynamicCheckpoint, base: BaseModel) -> LoweredAdapter:
        alpha, sites = checkpoint.alpha, {}
        for module, part in checkpoint.sites.modules.items():
            (a,), (c,), (b,) = part["a"], part["c"], part["b"]
            kept = c != 0
            if "mask" in part:
                kept &= ~_pruned(module, part["mask"][0])
            # 0 · NaN is NaN in training too: what is not finite stays, to be refused.
            kept |= ~(a.isfinite().all(dim=1) & b.isfinite().all(dim=0))
            if not kept.any():
                continue
            scale = scales(module, c[kept], alpha, alpha / checkpoint.start_rank)
            sites[module] = LoweredSite(a[kept], b.T[kept].contiguous(), scale)
        return LoweredAdapter(self.name, sites, checkpoint.warnings)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _pruned(module: str, mask: torch.Tensor) -> torch.Tensor:
    if bool(((mask != 0) & (mask != 1)).any()):
        raise AdapterConfigInvalid(
            f"The mask of {shown(module)} holds numbers that are not 0 or 1.",
            hint=f"Extract it again: {_EXTRACT}",
            field=f"{_MASK}{module}",
        )
    return mask == 1


def _normaliser(base: BaseModel) -> Callable[[str], str]:
    def normalise(name: str) -> str:
        """Without the wrapper's prefix, and masks spelled like the other tensors."""
        if name.startswith(_MASK):
            return name.removeprefix(_MASK) + ".finally_mask"
        match = _OURS.fullmatch(name)
        if match is None and "lora_" not in name:
            raise AdapterUnsupportedFeature(
                f"Tensor {shown(name)} is a weight of the whole model.",
                hint=f"Extract the adapter's tensors from the checkpoint, in its folder: {_EXTRACT}",
                field=name,
            )
        wrapped = match is not None and match["module"] not in base.linears
        return name.removeprefix("model.") if wrapped else name

    return normalise
