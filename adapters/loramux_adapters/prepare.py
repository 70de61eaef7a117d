"""From an adapter to the artefact that is served."""

from collections.abc import Callable
from pathlib import Path

from loramux_adapters.artefact import Artefact, artefact_path, is_intact, summarise, write_artefact
from loramux_adapters.base_model import BaseModel
from loramux_adapters.detect import find_method, name_owners
from loramux_adapters.errors import AdapterMissingTensor, AdapterUnknownTensor, AdapterUnsupportedFeature
from loramux_adapters.files import DEFAULT_MAX_BYTES, AdapterFolder
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.native import digest_of
from loramux_adapters.serving import check_servable


def lower(
    path: Path, base: BaseModel, max_bytes: int = DEFAULT_MAX_BYTES, *, on_read: Callable[[], object] = lambda: None
) -> LoweredAdapter:
    """Read an adapter's folder or native file, check all of it against the base model and lower it.

    The four steps of its method: detect, read, lower, verify. `on_read` is called after the second.

    Needs about one and a half times its size in memory; refuses files above `max_bytes`. Raises AdapterError.
    """
    folder = AdapterFolder(path, max_bytes)
    method = find_method(folder)
    try:
        checkpoint = method.read(folder, base)
    except (AdapterMissingTensor, AdapterUnknownTensor, AdapterUnsupportedFeature) as error:
        raise name_owners(error, folder, method) from error.__cause__
    on_read()
    adapter = method.lower(checkpoint, base)
    method.verify(adapter, base)
    return adapter


def prepare(
    source: Path,
    base: BaseModel,
    cache: Path,
    max_bytes: int = DEFAULT_MAX_BYTES,
    *,
    on_read: Callable[[], object] = lambda: None,
) -> Artefact:
    """Lower an adapter and keep the result as `cache/<digest>.safetensors`, written once and atomically.

    What the data plane cannot run is refused here (`serving.py`), though it can be lowered and written.
    An intact file of that digest is reused, a damaged one replaced. May run in several processes at once.
    `on_read` is called when nothing is left to be read. Raises AdapterError for the adapter (nothing is written
    then) and OSError for the cache.
    """
    return keep(lower(source, base, max_bytes, on_read=on_read), base.name, cache)


def keep(adapter: LoweredAdapter, base: str, cache: Path) -> Artefact:
    """The second half of `prepare`, for an adapter that was verified; `base` is the name of the model it fits."""
    check_servable(adapter)
    digest = digest_of(adapter)
    path = artefact_path(cache, digest)
    if not is_intact(path, digest):
        path = write_artefact(adapter, base, digest, cache)
    return Artefact(path, digest, summarise(adapter, base))
