"""The names, and what a model name in a request means."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence

from loramux.errors import AdapterNotFound
from loramux.registry.entry import Adapter, State, Version

#: Fewer digits of a digest than this name no version.
MIN_DIGITS = 4
# With thousands of adapters the comparison would hold up the event loop.
_COMPARED = 1000


class Catalogue(dict[str, Adapter]):
    """Adapters by name.

    A model may be asked for as `name`, `name@digits` (digits: the beginning of a version's digest, current or
    previous), or either after `base:`. No adapter's name is a base's or begins like that.
    """

    def __init__(self, bases: Sequence[str]) -> None:
        super().__init__()
        self._bases = tuple(bases)  # one model, by all its names

    def is_reserved(self, name: str) -> bool:
        """Whether no adapter may have this name."""
        return any(name == base or name.startswith(f"{base}:") for base in self._bases)

    def adapter(self, spelling: str) -> Adapter:
        """The adapter a spelling speaks of. Raises AdapterNotFound."""
        name = spelling.partition("@")[0]
        for base in self._bases:
            if name.startswith(f"{base}:"):
                name = name.removeprefix(f"{base}:")
                break
        if name not in self:
            raise self.not_found(spelling)
        return self[name]

    def version(self, spelling: str) -> Version:
        """The version a spelling means. Raises AdapterNotFound.

        While the current one is not read yet its digest is not known: then it may be the one, and is returned.
        """
        adapter = self.adapter(spelling)
        _, at, digits = spelling.partition("@")
        if not at:
            return adapter.current
        found = [v for v in adapter.versions() if _has(v, digits)]
        if len(found) == 1:
            return found[0]
        if adapter.current.artefact is None and adapter.current.state is not State.FAILED:
            return adapter.current
        versions = " and ".join(v.tag for v in adapter.versions() if v.artefact)
        raise AdapterNotFound(
            f"The adapter {adapter.name!r} has no such version.",
            hint=f"Its versions are {versions}; give {MIN_DIGITS} digits or more.",
            param="model",
        )

    def not_found(self, spelling: str) -> AdapterNotFound:
        """A 404 which names what the caller may have meant."""
        name = spelling[:128]
        served = (n for n, a in self.items() if a.current.state is not State.FAILED)
        names = [self._bases[0], *itertools.islice(served, _COMPARED)]
        close = difflib.get_close_matches(name.partition("@")[0], names, n=3) or names[:3]
        return AdapterNotFound(
            f"The model {name!r} does not exist.",
            hint=f"Did you mean {', '.join(map(repr, close))}? GET /v1/models lists all.",
            param="model",
        )


def _has(version: Version, digits: str) -> bool:
    if version.artefact is None or len(digits) < MIN_DIGITS:
        return False
    return version.artefact.digest.startswith(digits.lower())
