"""Which method and which layout a folder holds: from its files and config, and what its tensors' names say to that."""

from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from typing import Any

from loramux_adapters.abilities import Layout
from loramux_adapters.base_weights import MODEL_FILES
from loramux_adapters.errors import (
    AdapterError,
    AdapterMissingTensor,
    AdapterNotFound,
    AdapterUnsupportedFeature,
    shown,
)
from loramux_adapters.files import AdapterFolder
from loramux_adapters.methods import METHODS, Method
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.methods.native import Native
from loramux_adapters.native import METADATA_KEY
from loramux_adapters.peft.tensors import WEIGHTS_FILE
from loramux_adapters.weights import open_weights

# Names that are looked at to tell whose they are: enough for any layout, and bounded for a hostile header.
_LOOKED_AT = 4096


def find_method(folder: AdapterFolder) -> Method[Any]:
    """The method that the folder holds. Raises an AdapterError when none of ours does."""
    for method in METHODS:
        if (folder.only is None or method.name == Native.name) and method.detect(folder):
            return method
    if folder.only is not None:
        raise AdapterUnsupportedFeature(
            f"{shown(folder.only)} has no loramux description, so it is no native adapter.",
            hint="For any other kind of adapter give its folder, not one of its files.",
            field=METADATA_KEY,
        )
    owners = _owners(_tensor_names(folder))
    if owners and not folder.has(CONFIG_FILE):
        raise AdapterNotFound(
            f"Its tensors are named as in {_either(owners)}, but there is no {CONFIG_FILE}.",
            hint=f"Write one as it was in training; {_signs(owners)}. adapters/README.md lists the fields.",
            field=CONFIG_FILE,
        )
    if not folder.has(CONFIG_FILE) and any(folder.has(name) for name in MODEL_FILES):
        raise AdapterNotFound(
            "The folder holds a whole model and no adapter.",
            hint="If it is a base with an adapter merged into it, `loramux adapters extract` makes an adapter of that.",
            field=CONFIG_FILE,
        )
    peft_type = folder.read_json(CONFIG_FILE).get("peft_type")
    served = ", ".join(method.name for method in METHODS if method.abilities.serve)
    raise AdapterUnsupportedFeature(
        f"{CONFIG_FILE}: peft_type is {shown(peft_type)}."
        + (f" The tensors are named as in {_either(owners)}." if owners else ""),
        hint=f"Correct it: {_signs(owners)}." if owners else f"Methods served: {served}.",
        field="peft_type",
    )


def find_layout(folder: AdapterFolder) -> Layout:
    """The layout that the folder holds. Raises as `find_method` does."""
    layouts = find_method(folder).abilities.layouts
    kind = None if folder.only else peft_config(folder).get("peft_type")
    fitting = [
        layout
        for layout in layouts
        if kind in layout.types or (kind is None and any(folder.has(name) for name in layout.files))
    ]
    return (fitting or layouts)[0]


def name_owners(error: AdapterError, folder: AdapterFolder, method: Method[Any]) -> AdapterError:
    """The same refusal; where it is about a tensor and tensors are named as in other methods' layouts, it says so."""
    names = _tensor_names(folder)
    owners = _owners(names, but=method.abilities.layouts)
    if not owners or not (error.field in names or isinstance(error, AdapterMissingTensor)):
        return error
    return type(error)(
        f"{error.message} There are tensors named as in {_either(owners)}; the config says {find_layout(folder)}.",
        hint=f"Correct the config if it is one of these: {_signs(owners)}. Otherwise: {error.hint}",
        field=error.field,
    )


def _tensor_names(folder: AdapterFolder) -> Collection[str]:
    """Nothing if they cannot be read: they only explain another refusal."""
    try:
        with open_weights(folder, WEIGHTS_FILE) as weights:
            return weights.tensors.keys()
    except AdapterError:
        return ()


def _owners(names: Collection[str], but: Sequence[Layout] = ()) -> list[Layout]:
    """The layouts that some of these tensors' names give away, less the names that `but` has too."""
    some = [name for name in islice(names, _LOOKED_AT) if not any(layout.has_tensor(name) for layout in but)]
    layouts = (layout for method in METHODS for layout in method.abilities.layouts)
    return [layout for layout in layouts if any(map(layout.has_tensor, some))]


def _either(layouts: Iterable[Layout]) -> str:
    return " or ".join(map(str, layouts))


def _signs(layouts: Iterable[Layout]) -> str:
    return ", ".join(f"{layout} has {layout.sign}" for layout in layouts)
