"""The native format: an adapter that is in the one form already. Specified in adapters/README.md."""

from dataclasses import replace

from loramux_adapters.abilities import OURS, Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterCorrupt, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.native import METADATA_KEY, SUFFIX, NativeFile, digest_of, read_native
from loramux_adapters.verify import check_base, check_form, verify
from loramux_adapters.weights import NATIVE_DTYPES, open_weights


class Native:
    """A safetensors file that describes itself, alone or as the only one of a folder without adapter_config.json."""

    name = "native"
    abilities = Abilities(
        (
            Layout(
                "native", OURS, when="a `.safetensors` file with `loramux` metadata, alone or the only one of a folder"
            ),
        ),
        write=True,
        serve="what the data plane runs",
        router="any",
        prefix_cache="whatever is served without a `capacity`",
        posterior="any",
    )

    def detect(self, folder: AdapterFolder) -> bool:
        name = native_name(folder)
        if name is None:
            return False
        with open_weights(folder, name, NATIVE_DTYPES) as weights:
            return METADATA_KEY in weights.metadata

    def read(self, folder: AdapterFolder, base: BaseModel) -> NativeFile:
        return read_file(folder, base)

    def lower(self, checkpoint: NativeFile, base: BaseModel) -> LoweredAdapter:
        adapter = checkpoint.adapter
        if checkpoint.base == base.name:
            return adapter
        warning = f"The adapter names {shown(checkpoint.base)} as its base model; it was checked on {shown(base.name)}."
        return replace(adapter, warnings=tuple(dict.fromkeys((*adapter.warnings, warning))))

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def native_name(folder: AdapterFolder) -> str | None:
    """The file that is native if any is: the one named, or the only safetensors file of a folder without a config."""
    if folder.only is not None:
        return folder.only
    candidates = [name for name in folder.names() if name.endswith(SUFFIX)]
    return candidates[0] if len(candidates) == 1 and not folder.has("adapter_config.json") else None


def read_file(folder: AdapterFolder, base: BaseModel | None = None) -> NativeFile:
    """Read a native file. Names and shapes are checked, against the base too if there is one, before any weight."""
    name = native_name(folder)
    assert name is not None, "detect() comes first"
    with open_weights(folder, name, NATIVE_DTYPES) as weights:
        text = weights.metadata[METADATA_KEY]
        outline = read_native(text, weights.tensors, weights.outline, name).adapter
        check_form(outline)
        if base is not None:
            check_base(outline, base)
        native = read_native(text, weights.tensors, weights.read, name)
    if native.digest is not None and native.digest != digest_of(native.adapter):
        raise AdapterCorrupt(
            f"The content of {shown(name)} has another digest than the file says.",
            hint="Copy it again from its origin, or leave out the digest.",
            field="digest",
        )
    return native
