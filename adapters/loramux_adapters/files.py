"""Opening the files of an adapter folder that may be hostile: bounded, regular files only, nothing outside it."""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from loramux_adapters.errors import AdapterCorrupt, AdapterNotFound, AdapterTooLarge, AdapterUnsafeFile, shown

GIB = 1 << 30
DEFAULT_MAX_BYTES = 8 * GIB
# A config lists module names and patterns: the largest public ones are some tens of kilobytes.
MAX_JSON_BYTES = 1 << 20

_PICKLES = (
    "adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.ckpt", "adapter_model.pkl",
    "pytorch_model_lora.bin",  # ResLoRA
)  # fmt: skip


class AdapterFolder:
    """A folder that holds one adapter, or one safetensors file (`only`) whose folder is not looked at any further.

    All reading goes through here.
    """

    def __init__(self, path: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.only: str | None = None
        # os.path rather than Path: a path that may not be looked at, or cannot exist, is simply not there.
        if path.suffix == ".safetensors" and os.path.lexists(path) and not os.path.isdir(path):
            self.only, path = path.name, path.parent
        if not os.path.isdir(path):
            what = "is a file, not a folder" if os.path.exists(path) else "does not exist"
            raise AdapterNotFound(
                f"Adapter folder {shown(path)} {what}.",
                hint="Give the folder that holds adapter_config.json and adapter_model.safetensors, or a native file.",
            )
        self.path = Path(os.path.realpath(path))
        # Links may not leave it: the adapter's own folder also for a folder inside it.
        self._root = self.path
        self.max_bytes = max_bytes

    def has(self, name: str) -> bool:
        return self.only in (None, name) and os.path.lexists(self.path / name)

    def names(self) -> list[str]:
        """The entries of the folder in order; [] if it may not be listed."""
        if self.only is not None:
            return [self.only]
        try:
            return sorted(os.listdir(self.path))
        except OSError:
            return []

    def subfolder(self, name: str) -> "AdapterFolder":
        """A folder inside this one, with the same limit. Raises AdapterUnsafeFile for any other."""
        plain = name not in ("", ".", "..") and "\0" not in name and os.path.basename(name) == name
        target = Path(os.path.realpath(self.path / name)) if plain else self.path
        if target == self._root or not target.is_relative_to(self._root):
            raise AdapterUnsafeFile(
                f"{shown(name)} is no folder inside the adapter's.",
                hint="Name folders beside adapter_config.json, without a path and without links out of it.",
                field=name,
            )
        part = AdapterFolder(target, self.max_bytes)
        part._root = self._root
        return part

    @contextmanager
    def open(self, name: str, max_bytes: int | None = None) -> Iterator[BufferedReader]:
        """Open a file of the folder for reading, after checking that it is a regular file of bounded size."""
        limit = self.max_bytes if max_bytes is None else min(max_bytes, self.max_bytes)
        with os.fdopen(self._open_regular(name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise AdapterTooLarge(
                    f"{shown(name)} has {size} bytes; the limit is {limit}.",
                    hint="Check that this really is an adapter, or raise the limit.",
                    field=name,
                )
            yield file

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object from the folder. Raises AdapterCorrupt for anything but one object with unique keys."""
        with self.open(name, MAX_JSON_BYTES) as file:
            return parse_json(file.read(MAX_JSON_BYTES + 1), name)

    def _open_regular(self, name: str) -> int:
        target = self._resolve(name)
        try:
            # O_NONBLOCK: a named pipe must not hang us before fstat can tell what it is.
            descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise AdapterUnsafeFile(
                f"Cannot open {shown(name)}: {error.strerror}.",
                hint="Make it a regular file that the server's user may read.",
                field=name,
            ) from error
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise AdapterUnsafeFile(
            f"{shown(name)} is not a regular file.", hint="Copy its content into a plain file.", field=name
        )

    def _resolve(self, name: str) -> Path:
        if not self.has(name):
            raise self._missing(name)
        # Unlike Path.resolve, realpath does not raise on a loop of links; opening one fails.
        target = Path(os.path.realpath(self.path / name))
        if target.is_relative_to(self._root) or self._is_hub_blob(target):
            return target
        raise AdapterUnsafeFile(
            f"{shown(name)} is a link that leaves the adapter's folder.",
            hint="Replace the link by a copy of the file.",
            field=name,
        )

    def _is_hub_blob(self, target: Path) -> bool:
        """The Hugging Face cache stores snapshots/<revision>/<file> as links to its own blobs/<hash>."""
        return self._root.parent.name == "snapshots" and target.parent == self._root.parent.parent / "blobs"

    def _missing(self, name: str) -> AdapterNotFound | AdapterUnsafeFile:
        pickle = next((p for p in _PICKLES if self.has(p)), None)
        if name.endswith(".safetensors") and pickle:
            return unsafe_pickle(pickle)
        found = ", ".join(shown(entry) for entry in self.names()[:12]) or "nothing that may be listed"
        return AdapterNotFound(
            f"No {shown(name)} in {shown(self.path)}; the folder holds {found}.",
            hint="An adapter folder needs adapter_config.json and adapter_model.safetensors.",
            field=name,
        )


def unsafe_pickle(name: str) -> AdapterUnsafeFile:
    """Refuse a pickle and give the command that converts it."""
    command = (
        'python -c "import torch; from safetensors.torch import save_file; '
        f"w = torch.load({name!r}, map_location='cpu', weights_only=True); "
        "save_file({k: v.clone().contiguous() for k, v in w.items()}, 'adapter_model.safetensors')\""
    )
    return AdapterUnsafeFile(
        f"{shown(name)} is a pickle: loading one can run any code.",
        hint=f"Convert it once, in its folder and where you trust it: {command}",
        field=name,
    )


def parse_json(text: bytes, name: str) -> dict[str, Any]:
    """One JSON object; no repeated keys, no NaN or Infinity, bounded nesting (Python's own recursion limit)."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nesting is too deep" if isinstance(error, RecursionError) else str(error)
        raise _bad_json(name, reason) from error
    if not isinstance(value, dict):
        raise _bad_json(name, "it must be one object")
    return value


def _bad_json(name: str, reason: str) -> AdapterCorrupt:
    return AdapterCorrupt(
        f"The JSON in {shown(name)} is not acceptable: {reason[:200]}.",
        hint="Save the adapter again, or copy it again from its origin.",
        field=name,
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {shown(repeated)} appears more than once")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
