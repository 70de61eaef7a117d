"""The adapters that `loramux serve` starts with: found, checked as far as they must be, and measured."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from loramux.config import ADAPTER_NAME, ServeConfig
from loramux.console import say
from loramux.errors import ConfigError
from loramux.paths import cache_dir
from loramux.registry import Given, Prepare, Store, read_source
from loramux_adapters import AdapterError, Artefact, BaseModel, open_artefact
from loramux_adapters.footprint import draw_pool_bytes, pool_bytes
from loramux_adapters.native import VERSION

#: So many adapters in --adapters folders are read before the server is ready; more are read while it serves.
FEW = 32
#: By the bytes of a weight, which is all that the layout of a pool takes from its dtype.
_DTYPES = {2: torch.bfloat16, 4: torch.float32}


def find(config: ServeConfig, bases: Collection[str]) -> dict[str, Given]:
    """Every adapter the command line names; those named one by one come first. Raises ConfigError."""
    in_dirs = dict(found for folder in config.adapter_dirs for found in adapters_in(folder))
    others = {name: path for name, path in in_dirs.items() if name not in config.adapters}
    adapters = {name: Given(path, required=True) for name, path in config.adapters.items()}
    adapters |= {name: Given(path, settle=len(others) <= FEW) for name, path in others.items()}
    for name in adapters:
        if any(name == base or name.startswith(f"{base}:") for base in bases):
            raise ConfigError(
                f"The adapter name {name!r} is the base model's, or begins with it.",
                hint="Rename it, or give the base another name with --served-model-name.",
            )
    return adapters


def adapters_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of every adapter, folder or native file, in `folder`. Raises ConfigError if it does not exist."""
    if not folder.is_dir():
        raise ConfigError(f"--adapters {folder}: no such folder.")
    for path in sorted(folder.iterdir()):
        native = path.suffix == ".safetensors" and path.is_file()
        if not native and not (path.is_dir() and (any(path.glob("adapter_*")) or any(path.glob("*.safetensors")))):
            continue
        name = path.stem if native else path.name
        if ADAPTER_NAME.fullmatch(name):
            yield name, path
        else:
            say(f"adapter {name!r}: not served, this cannot be an adapter's name.")


def check(adapters: Mapping[str, Given], prepare: Prepare, store: Store, *, all_of_them: bool) -> dict[str, Artefact]:
    """What the adapters contain that must be known now; the others' as far as the store remembers it.

    A failure is reported; that of a required one ends the start, with all of them told. Raises ConfigError.
    """
    known, refused = {}, []
    for name, given in adapters.items():
        if (artefact := store.recall(given.source)) is not None:
            known[name] = artefact
        elif given.settle or all_of_them:
            try:
                known[name] = read_source(prepare, store, given.source)
            except AdapterError as error:
                say(f"adapter {name}: {error}")
                if given.required:
                    refused.append(name)
            except OSError as error:
                raise ConfigError(
                    f"adapter {name}: {error}.",
                    hint="Is there space in the cache? LORAMUX_CACHE names another folder.",
                ) from error
    if refused:
        raise ConfigError(
            f"Not started: {', '.join(refused)} cannot be served exactly (see above).",
            hint="Leave them out, or serve a folder with --adapters DIR, which lists what fails instead.",
        )
    return known


def memory_of(
    artefact: Artefact, base: BaseModel, item_bytes: int, *, max_requests: int, exact: bool, tiled: bool = False
) -> int:
    """Bytes of an adapter in the pool; `item_bytes`: those of one weight there; `max_requests`: how many may run;
    `tiled`: whether the pool is that of a GPU (`pool_bytes`).

    Not `exact`: from the summary alone, up to a few per cent and without the counts of a capacity, for adapters by the
    thousand.
    """
    if exact:
        # Damaged since it was written: it will be read from its source again.
        with suppress(AdapterError):
            return pool_bytes(open_artefact(artefact.path), base, _DTYPES[item_bytes], max_requests, tiled=tiled)
    stored = 2 if artefact.summary.dtype in ("bfloat16", "float16") else 4
    return artefact.summary.nbytes * item_bytes // stored


def draw_memory_of(
    artefact: Artefact, base: BaseModel, item_bytes: int, *, max_requests: int, tiled: bool = False
) -> int:
    """Bytes of one draw of a Bayesian adapter in the pool, beside its mean, at most. Raises AdapterError."""
    return draw_pool_bytes(open_artefact(artefact.path), base, _DTYPES[item_bytes], max_requests, tiled=tiled)


def draws_among(adapters: Mapping[str, Artefact], measure: Callable[[Artefact], int]) -> dict[str, int]:
    """Of those that are Bayesian, by name what a draw takes; the damaged ones left out, as in `memory_of`."""
    found = {}
    for name, artefact in adapters.items():
        if artefact.summary.bayesian:
            with suppress(AdapterError):
                found[name] = measure(artefact)
    return found


def open_store(config: ServeConfig, base: BaseModel, port: int, cache: Path) -> Store:
    """The state file of this server. Raises ConfigError. A dry run has none: it may run beside the server."""
    if config.dry_run:
        return Store.in_memory(cache)
    return Store.open(_state_file(config, base, port), base=_fingerprint(base), cache=cache)


def composed_folder(config: ServeConfig, base: BaseModel, port: int, cache: Path) -> Path:
    """Where this server keeps what its requests compose, emptied of what an earlier run left there.

    The folder goes with the state file, whose lock must be held: then nobody else uses either.
    """
    state = str(_state_file(config, base, port).resolve())
    folder = cache / "composed" / hashlib.sha256(state.encode()).hexdigest()[:16]
    shutil.rmtree(folder, ignore_errors=True)  # what cannot be removed takes room, no more
    return folder


def _state_file(config: ServeConfig, base: BaseModel, port: int) -> Path:
    return config.state or cache_dir() / "state" / f"{base.name.replace('/', '--')}-{port}.sqlite"


def _fingerprint(base: BaseModel) -> str:
    """Changes when what was checked against the base would have to be checked again."""
    weights = base.weights.identity() if base.weights is not None else ""
    layers = [sorted(base.linears.items()), sorted(base.biased), sorted(base.head), sorted(base.embeddings)]
    text = json.dumps([VERSION, *layers, weights])
    return hashlib.sha256(text.encode()).hexdigest()
