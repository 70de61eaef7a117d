"""VeRA as PEFT saves it: one random A and one random B for all modules, a vector of each module's own on either side
(arXiv 2310.11454).

    y_t = W0 x_t + λ_b ⊙ (B[:d_out] · (λ_d ⊙ (A[:, :d_in] · x_t)))

A [r, widest d_in] and B [widest d_out, r] of the targeted modules, λ_d [r], λ_b [d_out]; there is no α. Lowered: a =
A[:, :d_in], scale = λ_d, b = (λ_b ⊙ B[:d_out])ᵀ in float32.

The form has no rows that sites share, so a checkpoint of a few hundred kilobytes becomes a LoRA of rank r at every
site, and r is large (PEFT's default is 256): 4·r·(d_in + d_out) bytes a site, refused where the sum is above the
limit for files. A server leaves room for ranks up to 256, or the largest rank of the adapters that it starts with, or
--max-lora-rank; an adapter of a larger rank that comes later is refused by the server with that number.

Names: `base_model.model.<module>.vera_lambda_b`, `.vera_lambda_d`; `base_model.vera_A`, `base_model.vera_B` unless
`save_projection` is false. Then A and B are drawn again as PEFT does: uniform (Kaiming, fan in), first A, then B,
from one CPU generator with the seed `projection_prng_key`. Two things of that are in no file: torch's generator,
which PEFT itself warns about, and the dtype of the base in training. PEFT (0.21) rounds A and B to it, so for a base
in bfloat16 add

    projection_dtype     "float32" (default), "bfloat16" or "float16": the base's dtype in training

to adapter_config.json; a warning says so.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterConfigInvalid, AdapterUnknownTensor, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.fold import check_lowered_size, fold_outputs
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.peft import experts
from loramux_adapters.peft.sites import Part, Sites, plain_name, read_sites
from loramux_adapters.peft.targets import Targets
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.verify import verify

_SHARED = "base_model.vera_"
_LAMBDAS = {
    "lambda_b": Part(PREFIX + "{module}.vera_lambda_b", "O"),
    "lambda_d": Part(PREFIX + "{module}.vera_lambda_d", "R"),
}
_OWN_FIELDS = frozenset(
    {"r", "vera_dropout", "d_initial", "init_weights", "projection_prng_key", "save_projection", "projection_dtype"}
)
# LoRA's fields that change its result and that VeRA does not have.
_ABSENT = ("alpha_pattern", "exclude_modules", "init_lora_weights", "lora_alpha", "rank_pattern", "use_rslora")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HINT = "Give it as it was in training."


@dataclass(frozen=True)
class VeraCheckpoint:
    """A [r, widest d_in] and B [widest d_out, r] belong to all modules."""

    sites: Sites
    a: torch.Tensor
    b: torch.Tensor
    warnings: tuple[str, ...]


class Vera:
    """PEFT's VERA."""

    name = "vera"
    abilities = Abilities((Layout("VeRA", "PEFT", ("VERA",), keys=r".+\.vera_(A|B|lambda_[bd])(\..+)?"),))

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> VeraCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        rank, saved = experts.count(raw, "r", _HINT), _is_saved(raw)
        experts.refuse_absent(raw, _ABSENT)
        config = experts.parse_shared_fields(dict(raw) | {"lora_alpha": 1}, _OWN_FIELDS, rank, ())
        seed, dtype = _seed(raw), _projection_dtype(raw, saved)
        targets = Targets(config)
        widths = [base.linears[module] for module in targets.select(base.linears)]
        wide_in, wide_out = (max((width[axis] for width in widths), default=0) for axis in (0, 1))
        layout = _LAMBDAS | {
            "a": Part(_SHARED + "A", "RM", optional=not saved),
            "b": Part(_SHARED + "B", "NR", optional=not saved),
        }
        sizes = {"R": rank, "M": wide_in, "N": wide_out}
        sites = read_sites(folder, base, config, layout, sizes, count=1, targets=targets, normalise=_normalise)
        if not saved and sites.common:
            raise _unexpected(_SHARED + next(iter(sites.common)).upper())
        check_lowered_size(dict.fromkeys(sites.modules, rank), base, folder.max_bytes)
        if saved:
            return VeraCheckpoint(sites, sites.common["a"][0], sites.common["b"][0], sites.warnings)
        a, b = _draw(rank, wide_in, wide_out, seed)
        warning = (
            f"A and B were drawn again from projection_prng_key {seed} as {dtype}; PEFT rounds them to the dtype that "
            "the base had in training (projection_dtype)."
        )
        a, b = (factor.to(_DTYPES[dtype]) for factor in (a, b))
        return VeraCheckpoint(sites, a, b, (*sites.warnings, warning))

    def lower(self, checkpoint: VeraCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites: dict[str, LoweredSite] = {}
        # Sites of one width share their rows of A until they are written.
        rows: dict[int, torch.Tensor] = {}
        for module, part in checkpoint.sites.modules.items():
            d_in, d_out = base.linears[module]
            if d_in not in rows:
                rows[d_in] = checkpoint.a[:, :d_in].contiguous()
            b = fold_outputs(checkpoint.b[:d_out], part["lambda_b"][0])
            sites[module] = LoweredSite(rows[d_in], b.T.contiguous(), part["lambda_d"][0].float())
        return LoweredAdapter(self.name, sites, checkpoint.warnings)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _normalise(name: str) -> str:
    return name.removesuffix(".default") if name.startswith(_SHARED) else plain_name(name)


def _draw(rank: int, wide_in: int, wide_out: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, wide_in] and B [wide_out, rank], bit for bit as PEFT draws them."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    drawn = []
    for shape in ((rank, wide_in), (wide_out, rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        drawn.append(torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
    return drawn[0], drawn[1]


def _is_saved(raw: Mapping[str, Any]) -> bool:
    value = raw.get("save_projection", True)
    if isinstance(value, bool):
        return value
    raise _invalid("save_projection", f"must be true or false, not {shown(value)}")


def _seed(raw: Mapping[str, Any]) -> int:
    value = raw.get("projection_prng_key", 0)
    # What torch takes as a seed.
    if type(value) is int and -(1 << 63) <= value < 1 << 64:
        return value
    raise _invalid("projection_prng_key", f"must be a whole number of 64 bits, not {shown(value)}")


def _projection_dtype(raw: Mapping[str, Any], saved: bool) -> str:
    value = raw.get("projection_dtype", "float32")
    if saved and "projection_dtype" in raw:
        raise _invalid("projection_dtype", "is for projections that are drawn again, but save_projection is true")
    if isinstance(value, str) and value in _DTYPES:
        return value
    raise _invalid("projection_dtype", f"must be one of {', '.join(_DTYPES)}, not {shown(value)}")


def _invalid(field: str, what: str) -> AdapterConfigInvalid:
    return AdapterConfigInvalid(f"adapter_config.json: {field} {what}.", hint=_HINT, field=field)


def _unexpected(name: str) -> AdapterUnknownTensor:
    return AdapterUnknownTensor(
        f"Tensor {shown(name)} is there, but save_projection is false: PEFT would draw another and ignore it.",
        hint="Set save_projection to true if the tensor was trained with; otherwise remove it.",
        field=name,
    )
