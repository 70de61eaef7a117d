"""Weighted sums that requests ask for: versions like any other, made of prepared adapters, forgotten when many come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from loramux.errors import AdapterRefused, InvalidRequest
from loramux.registry.entry import State, Version
from loramux.registry.protocols import Compose
from loramux_adapters import AdapterCorrupt, AdapterError, AdapterNotFound, Artefact
from loramux_adapters.compose.linear import Part

if TYPE_CHECKING:
    from loramux.registry.changes import Changes
    from loramux.registry.residency import Residency

#: The name of all of them, in metrics and before the `@`. No adapter's name begins like that.
COMPOSED = "+composed"
#: More are forgotten, least recently used first, with their artefacts.
KEPT = 64

Key = tuple[tuple[str, str, float], ...]


class Compositions:
    """Sums by the content, names and weights of their parts, the least recently used first.

    Names are in the key because messages name parts, and equal contents may have different owners.
    """

    def __init__(self, compose: Compose, changes: Changes, residency: Residency, *, kept: int = KEPT) -> None:
        self._compose = compose
        self._changes = changes
        self._residency = residency
        self._kept = kept
        self._versions: dict[Key, Version] = {}
        self._users: Counter[Key] = Counter()

    def __len__(self) -> int:
        return len(self._versions)

    def find(self, tag: str) -> Version | None:
        """The version of this tag. Of two with the same content either will do."""
        return next((version for version in self._versions.values() if version.tag == tag), None)

    @contextmanager
    def held(self, parts: Sequence[tuple[Version, float]]) -> Iterator[Version]:
        """The sum of versions that are prepared; it is not forgotten meanwhile. The order of the parts is nothing.

        Raises InvalidRequest for a version given twice.
        """
        _check_different([version for version, _ in parts])
        ordered = sorted((_part(version, weight) for version, weight in parts), key=_identity)
        key = tuple(map(_identity, ordered))
        version = self._versions.pop(key, None) or self._new(ordered)
        self._versions[key] = version
        self._users[key] += 1
        try:
            yield version
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
            self._clean()

    def _new(self, parts: Sequence[Part]) -> Version:
        def make() -> Artefact:
            try:
                return self._compose(parts)
            except (AdapterCorrupt, AdapterNotFound):
                raise AdapterRefused(
                    "The prepared form of a part is lost or damaged.",
                    code="adapter_unreadable",
                    hint="Ask for each part once as `model`, or put it again.",
                    param="adapters",
                ) from None
            except AdapterError as error:
                raise AdapterRefused(error.message, code=error.code, hint=error.hint, param="adapters") from None

        version = self._changes.version(COMPOSED, parts[0].artefact.path)
        version.make = make
        return version

    def _clean(self) -> None:
        """Forget what failed, so that it is tried again, and what is too much."""
        idle = [key for key, version in self._versions.items() if not self._users[key] and not version.busy]
        failed = [key for key in idle if self._versions[key].state is State.FAILED]
        for key in failed:
            self._forget(self._versions.pop(key))
        for key in [key for key in idle if key in self._versions][: max(0, len(self._versions) - self._kept)]:
            self._forget(self._versions.pop(key))

    def _forget(self, version: Version) -> None:
        version.retire()
        self._residency.drain(version)
        if version.artefact is not None and not any(v.tag == version.tag for v in self._versions.values()):
            with suppress(OSError):
                version.artefact.path.unlink(missing_ok=True)


def _part(version: Version, weight: float) -> Part:
    assert version.artefact is not None
    return Part(version.name, version.artefact, weight)


def _identity(part: Part) -> tuple[str, str, float]:
    return part.artefact.digest, part.name, part.weight


def _check_different(versions: Sequence[Version]) -> None:
    for place, version in enumerate(versions):
        if version in versions[:place]:
            raise InvalidRequest(
                f"The adapter {version.name!r} is given twice.",
                hint="Give it once, with the sum of its weights.",
                param=f"adapters[{place}].name",
            )
