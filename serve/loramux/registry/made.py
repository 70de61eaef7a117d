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
        """The version of this tag. Of those with the same content one on the device, else one that a request holds."""
        twins = [(key, version) for key, version in self._versions.items() if version.tag == tag]
        best = max(twins, key=lambda twin: (twin[1].state is State.RESIDENT, self._users[twin[0]] > 0), default=None)
        return None if best is None else best[1]

    @contextmanager
    def held(self, key: Key, new: Callable[[], Version]) -> Iterator[Version]:
        """The version of this key; it is not forgotten meanwhile."""
        self._clean()  # some may have failed since those who wanted them left
        version = self._versions.pop(key) if key in self._versions else new()
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
        """Forget what failed, so that it is tried again, and what is too much."""
        for key in self._idle():
            if self._versions[key].state is State.FAILED:
                self._forget(key)
        for key in self._idle()[: max(0, len(self._versions) - self._kept)]:
            self._forget(key)

    def _idle(self) -> list[Key]:
        return [key for key, version in self._versions.items() if not self._users[key] and not version.busy]

    def _forget(self, key: Key) -> None:
        version = self._versions.pop(key)
        version.retire()
        self._residency.drain(version)
        if version.artefact is not None and self.find(version.tag) is None:
            with suppress(OSError):
                version.artefact.path.unlink(missing_ok=True)
