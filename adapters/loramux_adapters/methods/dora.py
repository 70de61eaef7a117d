"""DoRA, weight-decomposed, as PEFT and its authors save it (arXiv 2402.09353).

    y_t = m ⊘ ‖W0 + s·B·A‖ ⊙ (W0 x_t + s·B·A·x_t) + b0        s = α/r, or α/√r with `use_rslora`

A [r, d_in], B [d_out, r], m [d_out]; ‖·‖ is the length of each row of [d_out, d_in], one per output; b0 is the base's
own bias, which is not multiplied. Names: LoRA's, and `lora_magnitude_vector` (`.weight` in a raw state dict). In the
authors' code (NVlabs/DoRA, `peft/src/peft/tuners/dora.py` read at bd3ed6f) it is `weight_m_wdecomp.weight` [d_out, 1],
and peft_type is DORA; `dora_simple` and `merge_weights` of its config do not change the equation. The modules of its
`Wdecompose_target_modules` have a magnitude and no LoRA: refused. The form has such sites, but they are not read yet.

Lowered: magnitude = m ⊘ ‖W0 + s·B·A‖ in float32, b = (magnitude ⊙ B)ᵀ in float32 because m multiplies the LoRA too,
a = A, scale = s. The lengths depend on the base, whose W0 is read for the modules of the adapter, some rows at a time,
and in float64; s·B·A is never formed:

    ‖W0 + s·B·A‖² = ‖W0‖² + Σ_r (2·W0·Aᵀ + s·B·(A·Aᵀ)) ⊙ s·B       for each row

PEFT computes them anew in every forward pass, in the dtype that the model runs in, and not through dropout. A
quantised base counts as the numbers that its file stands for (`base_weights.py`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import (
    AdapterConfigInvalid,
    AdapterError,
    AdapterNotFinite,
    AdapterUnsupportedFeature,
    shown,
)
from loramux_adapters.files import AdapterFolder
from loramux_adapters.fold import fold_outputs
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE, Variant, peft_config, variant
from loramux_adapters.peft import experts
from loramux_adapters.peft.lora_sites import FACTORS, LoraSites, read_lora_sites
from loramux_adapters.peft.sites import Part, plain_name
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.verify import verify

_MAGNITUDE = Part(PREFIX + "{module}.lora_magnitude_vector", "O")
_AUTHORS = "DORA"  # peft_type
_AUTHORS_MAGNITUDE = Part(PREFIX + "{module}.weight_m_wdecomp.weight", "O1")
_AUTHORS_FIELDS = frozenset({"dora_simple", "merge_weights"})
_VANISHED = 1e-12
"""Of ‖W0‖² + ‖s·B·A‖²: what is left of a row that the adapter cancels is rounding, and PEFT would divide by it."""


@dataclass(frozen=True)
class DoraCheckpoint:
    """`magnitude`: the template of its name."""

    lora: LoraSites
    magnitude: str


class Dora:
    """PEFT's LORA with `use_dora`, and the authors' DORA."""

    name = "dora"
    abilities = Abilities(
        (
            Layout("DoRA", "PEFT", ("LORA",), when="with `use_dora`", keys=r".+\.lora_magnitude_vector(\..+)?"),
            Layout("DoRA", "NVlabs/DoRA", (_AUTHORS,), keys=r".+\.weight_m_wdecomp(\..+)?"),
        ),
        quantised_base="as the numbers in its files; not with `--quantization`, which makes others of them",
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return variant(folder) is Variant.DORA or peft_config(folder).get("peft_type") == _AUTHORS

    def read(self, folder: AdapterFolder, base: BaseModel) -> DoraCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        if raw["peft_type"] == _AUTHORS:
            magnitude, own = _AUTHORS_MAGNITUDE, _AUTHORS_FIELDS
            _refuse_magnitudes_alone(raw)
            experts.refuse_absent(raw, (*experts.LATER_FIELDS, "lora_bias", "use_dora"))
        else:
            magnitude, own = _MAGNITUDE, frozenset({"use_dora"})
            experts.check_flag(raw, "use_dora")
        lora = read_lora_sites(folder, base, raw, own, {**FACTORS, "m": magnitude}, normalise=_plain_name)
        for module, part in lora.sites.modules.items():
            _check_magnitude(magnitude.template.format(module=module), part["m"][0])
        return DoraCheckpoint(lora, magnitude.template)

    def lower(self, checkpoint: DoraCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites, lora = {}, checkpoint.lora
        for module, part in lora.sites.modules.items():
            (a,), (b,), (m,) = part["a"], part["b"], part["m"]
            factor, scale = lora.factor(module, len(a)), lora.scale(module, len(a))
            name = checkpoint.magnitude.format(module=module)
            magnitude = m.double().flatten() / _row_norms(module, base.row_blocks(module), a, b, factor, name)
            folded = fold_outputs(b, magnitude).T.contiguous()
            sites[module] = LoweredSite(a, folded, scale, magnitude=magnitude.float())
        return LoweredAdapter(self.name, sites, lora.sites.warnings)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _plain_name(name: str, _: object) -> str:
    return plain_name(name).replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def _row_norms(
    module: str, blocks: Iterable[torch.Tensor], a: torch.Tensor, b: torch.Tensor, factor: float, magnitude: str
) -> torch.Tensor:
    """‖(W0 + factor·B·A)_j‖ for every row j, [d_out] float64, from W0 in `blocks` of rows; `magnitude` is blamed."""
    a, b = a.double(), b.double() * factor
    gram = a @ a.T
    squares, sizes, done = [], [], 0
    for rows in blocks:
        part = b[done : done + len(rows)]
        done += len(rows)
        own, delta = rows.square().sum(1), ((part @ gram) * part).sum(1)
        squares.append(own + delta + 2 * ((rows @ a.T) * part).sum(1))
        sizes.append(own + delta)
    square, size = torch.cat(squares), torch.cat(sizes)
    if bool((square <= _VANISHED * size).any()):
        raise AdapterNotFinite(
            f"At {shown(module)} the adapter cancels a row of the base's weight, or the row is zero: DoRA divides by "
            "its length.",
            hint="Use an earlier checkpoint, or make it without this module.",
            field=magnitude,
        )
    return square.sqrt()


def _refuse_magnitudes_alone(raw: Mapping[str, Any]) -> None:
    if raw.get("Wdecompose_target_modules"):
        raise AdapterUnsupportedFeature(
            "adapter_config.json: Wdecompose_target_modules names modules with a magnitude and no LoRA.",
            hint="Merge the adapter into its base model and serve the result.",
            field="Wdecompose_target_modules",
        )


def _check_magnitude(name: str, magnitude: torch.Tensor) -> None:
    """Raises for what is no length."""
    if not bool(magnitude.isfinite().all()):
        refusal: type[AdapterError] = AdapterNotFinite
        what, hint = "NaN or infinity", "Its training diverged, or the file was damaged: use an earlier checkpoint."
    elif not bool((magnitude > 0).all()):
        refusal, what = AdapterConfigInvalid, f"{float(magnitude.min()):g}"
        hint = "A magnitude is the length of a row of the weight and above 0: use an earlier checkpoint."
    else:
        return
    raise refusal(f"Tensor {shown(name)} holds {what}.", hint=hint, field=name)
