"""Tensor names, shapes and config fields of LoRA experts with a router at each site, as forks of PEFT save them."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import (
    AdapterConfigInvalid,
    AdapterMissingTensor,
    AdapterShapeMismatch,
    AdapterUnknownTensor,
    AdapterUnsupportedFeature,
    shown,
)
from loramux_adapters.gate import Norm
from loramux_adapters.peft import checks
from loramux_adapters.peft.config import LoraConfig, parse_config
from loramux_adapters.peft.tensors import PREFIX, Pair, claim, refuse_tensor
from loramux_adapters.weights import WeightsFile

# Fields of PEFT that are younger than the forks of it.
LATER_FIELDS = ("alpha_pattern", "exclude_modules", "rank_pattern", "use_rslora")


class Layout:
    """How a code base spells the tensors of a site: templates with {module} and, but for the router, {expert}."""

    def __init__(self, a: str, b: str, router: str) -> None:
        self._templates = {"a": a, "b": b, "router": router}
        self._patterns = {part: _pattern(template) for part, template in self._templates.items()}

    def spell(self, part: str, module: str, expert: int = 0) -> str:
        return self._templates[part].format(module=module, expert=expert)

    def find(self, name: str) -> tuple[str, str, int] | None:
        """(part, module, expert) of a tensor's name; None for another's."""
        for part, pattern in self._patterns.items():
            if match := pattern.fullmatch(name):
                return part, match["module"], int(match.groupdict().get("expert") or 0)
        return None


@dataclass
class Found:
    """The tensors that the file has for one site: expert -> name of A and of B, and the router's name."""

    a: dict[int, str] = field(default_factory=dict)
    b: dict[int, str] = field(default_factory=dict)
    router: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MixtureNames:
    """Names of one site's tensors; experts in order."""

    experts: tuple[Pair, ...]
    router: str


@dataclass(frozen=True)
class Mixture:
    """One site's part of the checkpoint: A_e [r, d_in]; B_e [d_out, r]; router [E, d_in]."""

    a: tuple[torch.Tensor, ...]
    b: tuple[torch.Tensor, ...]
    router: torch.Tensor


def with_prefix(name: str) -> str:
    """PEFT's spelling of a name that was saved without the wrapper's prefix."""
    return name if name.startswith(PREFIX) else PREFIX + name


def group(names: Iterable[str], layout: Layout, normalise: Callable[[str], str]) -> dict[str, Found]:
    """Tensors by module. `normalise` undoes other spellings. A name that the layout does not know is refused."""
    modules: dict[str, Found] = {}
    for name in sorted(names):
        place = layout.find(normalise(name))
        if place is None:
            raise refuse_tensor(name)
        part, module, expert = place
        claim(getattr(modules.setdefault(module, Found()), part), expert, name)
    return modules


def resolve(found: Found, layout: Layout, module: str, experts: int) -> MixtureNames:
    """Exactly `experts` experts and a router. Raises AdapterMissingTensor or AdapterUnknownTensor otherwise."""
    if 0 not in found.router:
        raise _missing(layout.spell("router", module), "Without its router a mixture cannot be applied.")
    pairs = []
    for expert in range(experts):
        for part, slots in (("a", found.a), ("b", found.b)):
            if expert not in slots:
                raise _missing(layout.spell(part, module, expert), f"The mixture has {experts} experts.")
        pairs.append(Pair(found.a[expert], found.b[expert]))
    for expert, name in sorted((found.a | found.b).items()):
        if expert >= experts:
            raise AdapterUnknownTensor(
                f"Tensor {shown(name)} belongs to expert {expert}, but there are {experts}, counted from 0.",
                hint="Correct the number of experts as it was in training, or remove the tensor.",
                field=name,
            )
    return MixtureNames(tuple(pairs), found.router[0])


def check_mixtures(
    mixtures: Mapping[str, MixtureNames],
    weights: WeightsFile,
    ranks: Mapping[str, int],
    base: BaseModel,
    trained_on: str | None,
) -> None:
    """A_e must be [r, d_in], B_e [d_out, r] and the router [E, d_in], with r from the config; all of a known dtype."""
    for expert in range(max((len(names.experts) for names in mixtures.values()), default=0)):
        pairs = {module: names.experts[expert] for module, names in mixtures.items() if expert < len(names.experts)}
        checks.check_shapes(pairs, weights.tensors, ranks, base, trained_on)
    for module, names in mixtures.items():
        expected, shape = (len(names.experts), base.linears[module][0]), weights.tensors[names.router].shape
        if shape != expected:
            raise AdapterShapeMismatch(
                f"The router {shown(names.router)} has shape {shape}, not {expected}.",
                hint="It needs a row per expert, as wide as the input of its layer.",
                field=names.router,
            )
        for name in (names.router, *(name for pair in names.experts for name in (pair.a, pair.b))):
            weights.check_dtype(name)


def read_mixture(names: MixtureNames, weights: WeightsFile) -> Mixture:
    return Mixture(
        tuple(weights.read(pair.a) for pair in names.experts),
        tuple(weights.read(pair.b) for pair in names.experts),
        weights.read(names.router),
    )


def parse_shared_fields(
    raw: Mapping[str, Any], own: Collection[str], rank: int, absent: Collection[str] = LATER_FIELDS
) -> LoraConfig:
    """Check what a fork's config shares with PEFT's LoRA: all fields but its `own`; `rank` stands for its `r`.

    A field that is `absent` from the fork must have no value, see `refuse_absent`.
    """
    refuse_absent(raw, absent)
    return parse_config({key: value for key, value in raw.items() if key not in own} | {"r": rank})


def refuse_absent(raw: Mapping[str, Any], fields: Collection[str]) -> None:
    """Fields that the code base does not read must have no value: nobody knows what was trained."""
    for name in fields:
        if raw.get(name):
            raise AdapterUnsupportedFeature(
                f"adapter_config.json: {name} is {shown(raw[name])}, which this code base does not read.",
                hint="Remove the field if it played no part in training.",
                field=name,
            )


def check_flag(raw: Mapping[str, Any], name: str) -> None:
    """A field that selects the method is true, not just something."""
    if raw[name] is not True:
        raise AdapterConfigInvalid(
            f"adapter_config.json: {name} must be true or false, not {shown(raw[name])}.",
            hint="Correct the field as it was in training.",
            field=name,
        )


def count(raw: Mapping[str, Any], name: str, hint: str) -> int:
    """A positive integer of the config."""
    return _natural(raw.get(name), raw, name, hint)


def gate_norm(raw: Mapping[str, Any]) -> Norm:
    """The field `gate_norm` of the formats that are our own: what becomes of the selected probabilities."""
    value = raw.get("gate_norm", "renorm")
    if value in ("renorm", "softmax"):
        return Norm(value)
    raise AdapterConfigInvalid(
        f"adapter_config.json: gate_norm is {shown(value)}.",
        hint='Give "renorm" to divide by their sum, or "softmax".',
        field="gate_norm",
    )


def share(raw: Mapping[str, Any], name: str, hint: str) -> float:
    """A number of the config above 0 and at most 1."""
    value = raw.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    raise AdapterConfigInvalid(
        f"adapter_config.json: {name} must be above 0 and at most 1, not {shown(value)}.", hint=hint, field=name
    )


def per_layer(raw: Mapping[str, Any], name: str, layer: int, hint: str) -> int:
    """A positive integer of the config, given once for all layers or as a list with one for each."""
    value = raw.get(name)
    if isinstance(value, list):
        value = value[layer] if layer < len(value) else None
    return _natural(value, raw, name, hint)


def layer_of(module: str) -> int:
    """The first number in a module's name."""
    match = re.search(r"\.([0-9]{1,6})\.", module)
    return int(match[1]) if match else 0


def check_top_k(k: int, experts: int, where: str, field: str = "top_k") -> None:
    if k > experts:
        raise AdapterConfigInvalid(
            f"adapter_config.json: {field} is {k}, but {where} has {experts} experts.",
            hint="Correct it as it was in training.",
            field=field,
        )


def _natural(value: Any, raw: Mapping[str, Any], name: str, hint: str) -> int:
    if type(value) is int and value > 0:
        return value
    raise AdapterConfigInvalid(
        f"adapter_config.json: {name} must be a positive number"
        f"{', or a list with one for each layer' if isinstance(raw.get(name), list) else ''}, "
        f"not {shown(raw.get(name))}.",
        hint=hint,
        field=name,
    )


def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{module\}", "(?P<module>.+)")
    return re.compile(pattern.replace(r"\{expert\}", "(?P<expert>[0-9]{1,6})"))


def _missing(name: str, reason: str) -> AdapterMissingTensor:
    return AdapterMissingTensor(
        f"Tensor {shown(name)} is missing. {reason}",
        hint="Save the adapter again with all its experts and routers.",
        field=name,
    )
