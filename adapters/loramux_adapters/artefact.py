"""The prepared adapter on disk: one native file per content, named by its digest, never changed afterwards."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from loramux_adapters.errors import AdapterCorrupt, AdapterError, AdapterNotFound, shown
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.native import METADATA_KEY, SUFFIX, digest_of, has_capacity, read_native, write_native
from loramux_adapters.tasks import at_task, task_count
from loramux_adapters.verify import check_form

# A writer that was killed leaves its temporary file; an hour is longer than any write takes.
_STALE_S = 3600


@dataclass(frozen=True)
class AdapterSummary:
    """What a list of adapters shows.

    nbytes     of the tensors that answer ordinary requests, as they are stored: a posterior's are not counted
    posterior  its family (`VarianceKind`; several are joined by "+"), None for an adapter that is not Bayesian
    """

    method: str
    rank: int
    ranks: Mapping[str, int]
    experts: int
    bayesian: bool
    sites: int
    nbytes: int
    dtype: str
    warnings: tuple[str, ...]
    base: str
    tasks: int = 0  # that a request may choose from
    posterior: str | None = None


@dataclass(frozen=True)
class Artefact:
    """A prepared adapter. `digest` is the hex sha256 of its lowered content and names the file."""

    path: Path
    digest: str
    summary: AdapterSummary

    @property
    def short(self) -> str:
        return self.digest[:16]


def summarise(adapter: LoweredAdapter, base: str) -> AdapterSummary:
    return AdapterSummary(
        method=adapter.method,
        rank=adapter.rank,
        ranks=adapter.ranks,
        experts=adapter.experts,
        bayesian=adapter.bayesian,
        sites=len(adapter.sites),
        nbytes=adapter.mean.nbytes(),
        dtype=adapter.dtype,
        warnings=adapter.warnings,
        base=base,
        tasks=task_count(adapter),
        posterior=adapter.posterior,
    )


def artefact_path(cache: Path, digest: str) -> Path:
    return cache / f"{digest}{SUFFIX}"


def write_artefact(adapter: LoweredAdapter, base: str, digest: str, cache: Path) -> Path:
    """Write the artefact so that its final name never shows a partial file. Raises OSError when the disk does."""
    cache.mkdir(parents=True, exist_ok=True)
    _remove_stale(cache)
    return write_native(artefact_path(cache, digest), adapter, base, digest)


def open_artefact(path: Path, task: int | None = None) -> LoweredAdapter:
    """Map an artefact into memory, as it is served: of an adapter for several tasks, `task` or its default one.

    Pages are read when they are touched, so this is cheap for any size. Raises as `stored`.
    """
    return at_task(stored(path), task)


def stored(path: Path) -> LoweredAdapter:
    """What an artefact holds, with all of its tasks; mapped into memory.

    Raises AdapterNotFound, or AdapterCorrupt when the file is not a sound native file or its digest is not its name.
    The bytes of the tensors are not hashed here.
    """
    if not path.is_file():
        raise AdapterNotFound(f"No artefact at {shown(path)}.", hint="Prepare the adapter again.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY, "")
            native = read_native(text, file.keys(), file.get_tensor, path.name)
        check_form(native.adapter)
    except (SafetensorError, AdapterError) as error:
        raise _damaged(path, error) from error
    if f"{native.digest}{SUFFIX}" != path.name:
        raise _damaged(path, "its digest is not its name")
    return native.adapter


def is_limited(path: Path) -> bool:
    """Whether the adapter in an artefact is `limited`; reads its description, no tensor and no digest.

    Raises SafetensorError, OSError or ValueError if there is no such file or description.
    """
    with safe_open(path, framework="pt") as file:
        return has_capacity((file.metadata() or {}).get(METADATA_KEY, ""))


def is_intact(path: Path, digest: str) -> bool:
    """Whether the artefact is there and its content has this digest (reads and hashes all of it)."""
    try:
        return digest_of(stored(path)) == digest
    except (AdapterCorrupt, AdapterNotFound):
        return False


def _damaged(path: Path, reason: object) -> AdapterCorrupt:
    return AdapterCorrupt(
        f"Artefact {shown(path.name)} is damaged: {reason}", hint="Delete it and prepare the adapter again."
    )


def _remove_stale(cache: Path) -> None:
    for leftover in cache.glob(".*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > _STALE_S:
                leftover.unlink()
