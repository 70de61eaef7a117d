"""Reading checkpoints whose tensors are named by templates and shaped by letters.

A method describes its files with one `Part` for each kind of tensor. Everything else is the same for all of them: every
tensor is claimed by one part, every site has all its tensors, every shape follows from the config and the base, and no
weight is read before that is so.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterMissingTensor, AdapterUnknownTensor, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.peft import checks
from loramux_adapters.peft.config import LoraConfig
from loramux_adapters.peft.experts import with_prefix
from loramux_adapters.peft.targets import Targets
from loramux_adapters.peft.tensors import WEIGHTS_FILE, Pair, claim, refuse_tensor
from loramux_adapters.weights import WeightsFile, open_weights

_ADAPTER_NAME = re.compile(r"\.(lora_\w+|moe_layer|vera_\w+|weight_m_wdecomp)\.default(?=\.|$)")


@dataclass(frozen=True)
class Part:
    """One kind of tensor.

    template  its name, with {module} unless there is one for the whole adapter, and {index} if there are several
    axes      a letter for each axis: I and O are the layer's widths, 1 is one, the others come with the sizes
    copy_of   the part that it repeats, number for number: may be absent, is compared with it and never kept
    optional  whether it may be absent
    """

    template: str
    axes: str
    copy_of: str | None = None
    optional: bool = False


Layout = Mapping[str, Part]
Sizes = Mapping[str, int] | Callable[[str, int], Mapping[str, int]]
Tensors = Mapping[str, tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Sites:
    """What a checkpoint holds: module -> part -> its tensors in order of their index, and what the user should know.

    indices  module -> the indices that are there: all of them, unless the layout is sparse
    common   the parts that belong to no module
    """

    modules: Mapping[str, Tensors]
    indices: Mapping[str, tuple[int, ...]]
    common: Tensors
    warnings: tuple[str, ...]


@dataclass
class _Found:
    names: dict[str, dict[int, str]] = field(default_factory=dict)

    def first(self) -> str:
        return next(name for names in self.names.values() for name in names.values())

    def indices(self) -> tuple[int, ...]:
        return tuple(sorted({index for names in self.names.values() for index in names}))


def plain_name(name: str) -> str:
    """PEFT's spelling of a name from a raw state_dict: with the wrapper's prefix, without the adapter's name."""
    return _ADAPTER_NAME.sub(r".\1", with_prefix(name))


def read_sites(
    folder: AdapterFolder,
    base: BaseModel,
    config: LoraConfig,
    layout: Layout,
    sizes: Sizes,
    *,
    count: int | None,
    targets: Targets | None = None,
    normalise: Callable[[str], str] = plain_name,
    sparse: bool = False,
) -> Sites:
    """Read adapter_model.safetensors.

    sizes   length of each letter other than I, O and 1, for all or by module ("" for the adapter) and index
    count   how many tensors a part with {index} has at every site; None: as many as the highest one says
    targets the config's, from a caller that asked it before (it notes which patterns were used)
    sparse  an index may be absent at a site, with all the parts that belong to it, but not at all sites

    Raises AdapterUnknownTensor, AdapterMissingTensor, AdapterShapeMismatch and what `peft.checks` raises.
    """
    checks.check_folder(folder)
    targets = targets or Targets(config)
    with open_weights(folder, WEIGHTS_FILE) as weights:
        found = _group(weights, layout, normalise)
        common = found.pop("", _Found())
        if count is None:
            count = 1 + max((index for part in found.values() for index in part.indices()), default=0)
        _check_complete("", common, layout, (0,))
        for module, part in found.items():
            _check_indices(part, count)
            _check_complete(module, part, layout, part.indices() if sparse else range(count))
        if sparse:
            _check_all_used(found, count)
        checks.check_modules(
            {module: Pair(part.first(), part.first()) for module, part in found.items()},
            targets,
            base,
            config.base_model,
        )
        expected = {
            module: _expected(part, layout, partial(_lengths, sizes, base, module)) for module, part in found.items()
        }
        checks.check_expected(expected, weights.tensors, base, config.base_model)
        checks.check_expected(
            {"": _expected(common, layout, partial(_lengths, sizes, base, ""))},
            weights.tensors,
            base,
            config.base_model,
        )
        for name in weights.tensors:
            weights.check_dtype(name)
        for part in (common, *found.values()):
            _check_copies(part, layout, weights)
        return Sites(
            {module: _read(part, layout, weights) for module, part in sorted(found.items())},
            {module: part.indices() for module, part in found.items()},
            _read(common, layout, weights),
            checks.collect_warnings(folder, config.base_model, targets, base),
        )


def _group(weights: WeightsFile, layout: Layout, normalise: Callable[[str], str]) -> dict[str, _Found]:
    patterns = {key: _pattern(part.template) for key, part in layout.items()}
    modules: dict[str, _Found] = {}
    for name in sorted(weights.tensors):
        normal = normalise(name)
        key, place = next(
            ((key, match.groupdict()) for key, pattern in patterns.items() if (match := pattern.fullmatch(normal))),
            ("", {}),
        )
        if not key:
            raise refuse_tensor(name)
        places = modules.setdefault(place.get("module", ""), _Found()).names.setdefault(key, {})
        claim(places, int(place.get("index", "0")), name)
    return modules


def _check_indices(found: _Found, count: int) -> None:
    for names in found.names.values():
        for index, name in sorted(names.items()):
            if index >= count:
                raise AdapterUnknownTensor(
                    f"Tensor {shown(name)} has the number {index}, but there are {count}, counted from 0.",
                    hint="Correct their number in the config as it was in training, or remove the tensor.",
                    field=name,
                )


def _check_complete(module: str, found: _Found, layout: Layout, indices: "range | tuple[int, ...]") -> None:
    for key, part in layout.items():
        if ("{module}" in part.template) != bool(module):
            continue
        names = found.names.get(key, {})
        if part.copy_of is not None or (part.optional and not names):
            continue
        for index in indices if "{index}" in part.template else (0,):
            if index not in names:
                missing = part.template.format(module=module, index=index)
                raise AdapterMissingTensor(
                    f"Tensor {shown(missing)} is missing.",
                    hint="Save the adapter again with all that belongs to it.",
                    field=missing,
                )


def _check_all_used(found: Mapping[str, _Found], count: int) -> None:
    used = {index for part in found.values() for index in part.indices()}
    missing = next((index for index in range(count) if index not in used), None)
    if missing is not None:
        raise AdapterMissingTensor(
            f"No tensor has the number {missing}, but there are {count}, counted from 0.",
            hint="Save all of them, or correct their number in the config.",
            field=str(missing),
        )


def _lengths(sizes: Sizes, base: BaseModel, module: str, index: int) -> Mapping[str, int]:
    own = sizes if isinstance(sizes, Mapping) else sizes(module, index)
    widths = dict(zip("IO", base.linears[module], strict=True)) if module else {}
    return {**widths, "1": 1, **own}


def _expected(found: _Found, layout: Layout, lengths_at: Callable[[int], Mapping[str, int]]) -> list[checks.Expected]:
    expected = []
    for key, names in found.names.items():
        for index, name in sorted(names.items()):
            lengths, axes = lengths_at(index), layout[key].axes
            width = next((lengths[axis] for axis in axes if axis in "IO"), None)
            expected.append(checks.Expected(name, tuple(lengths[axis] for axis in axes), width))
    return expected


def _check_copies(found: _Found, layout: Layout, weights: WeightsFile) -> None:
    for key, names in found.names.items():
        originals = found.names.get(layout[key].copy_of or "", {})
        for index, name in names.items() if layout[key].copy_of is not None else ():
            if _content(name, weights) != _content(originals[index], weights):
                raise AdapterUnknownTensor(
                    f"Tensor {shown(name)} should repeat {shown(originals[index])}, but differs.",
                    hint="Nobody can tell which one was trained: save the adapter again.",
                    field=name,
                )


def _content(name: str, weights: WeightsFile) -> tuple[torch.dtype, bytes]:
    tensor = weights.read(name)
    return tensor.dtype, tensor.view(torch.uint8).numpy().tobytes()


def _read(found: _Found, layout: Layout, weights: WeightsFile) -> Tensors:
    return {
        key: tuple(weights.read(name) for _, name in sorted(names.items()))
        for key, names in found.names.items()
        if layout[key].copy_of is None
    }


def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{module\}", "(?P<module>.+)")
    return re.compile(pattern.replace(r"\{index\}", "(?P<index>0|[1-9][0-9]{0,5})"))
