"""Versions that are made of prepared ones because a request needs them: few are kept, and names do not lead to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Generic, TypeVar

from loramux.registry.entry import State, Version

if TYPE_CHECKING:
    from loramux.registry.residency import Residency

Key = TypeVar("Key", bound=Hashable)


class Made(Generic[Key]):
    """Versions by what they are made of, the least recently used first.

    Of those that nobody holds, all above `kept` are forgotten, with their artefacts, and so is what failed, so that it
    is tried again.
    """

    def __init__(self, residency: Residency, *, kept: int) -> None:
        self._residency = residency
        self._kept = kept
        self._versions: dict[Key, Version] = {}
        self._users: Counter[Key] = Counter()

    def __len__(self) -> int:
        return len(self._versions)

    def find(self, tag: str) -> Version | None:
        """The version of this tag; of several with the same content, one that is on the device or held, if any is."""
        found = [(key, version) for key, version in self._versions.items() if version.tag == tag]
        found.sort(key=lambda one: (one[1].state is State.RESIDENT, self._users[one[0]] > 0))
        return found[-1][1] if found else None

    @contextmanager
    def held(self, key: Key, new: Callable[[], Version]) -> Iterator[Version]:
        """The version of this key; it is not forgotten meanwhile."""
        version = self._versions.pop(key, None) or new()
        self._versions[key] = version
        self._users[key] += 1
        try:
            yield version
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
            self._clean()

    def _clean(self) -> None:
        for key in self._idle():
            if self._versions[key].state is State.FAILED:
                self._forget(self._versions.pop(key))
        for key in self._idle()[: max(0, len(self._versions) - self._kept)]:
            self._forget(self._versions.pop(key))

    def _idle(self) -> list[Key]:
        return [key for key, version in self._versions.items() if not self._users[key] and not version.busy]

    def _forget(self, version: Version) -> None:
        version.retire()
        self._residency.drain(version)
        if version.artefact is not None and not any(v.tag == version.tag for v in self._versions.values()):
            with suppress(OSError):
                version.artefact.path.unlink(missing_ok=True)
