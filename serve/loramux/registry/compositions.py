"""Sums and mixtures that requests ask for: versions like any, made of prepared adapters, forgotten when many come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from loramux.errors import InvalidRequest
from loramux.registry.entry import Version
from loramux.registry.failures import made_of
from loramux.registry.made import Made
from loramux.registry.protocols import Compose
from loramux_adapters import Artefact
from loramux_adapters.compose.prepared import Part, Router

if TYPE_CHECKING:
    from loramux.registry.changes import Changes
    from loramux.registry.residency import Residency

#: The name of all of them, in metrics and before the `@`. No adapter's name begins like that.
COMPOSED = "+composed"
#: More are forgotten, least recently used first, with their artefacts.
KEPT = 64

_Identity = tuple[str, float, int, str]
Key = tuple[Router | None, tuple[_Identity, ...]]


class Share(NamedTuple):
    """A part as a request asks for it."""

    name: str  # whatever `model` could be
    weight: float = 1.0
    task: int | None = None  # of an adapter for several; none: its default


class Held(NamedTuple):
    """What was made of a request's parts, which stand in an order of its own: the e-th is part `order[e]`."""

    version: Version
    order: tuple[int, ...]


class Compositions:
    """Versions by the content, names and weights of their parts, the least recently used first.

    Names are in the key because messages name parts, and equal contents may have different owners.
    """

    def __init__(self, compose: Compose, changes: Changes, residency: Residency, *, kept: int = KEPT) -> None:
        self._compose = compose
        self._changes = changes
        self._made: Made[Key] = Made(residency, kept=kept)

    def __len__(self) -> int:
        return len(self._made)

    def find(self, tag: str) -> Version | None:
        """The version of this tag."""
        return self._made.find(tag)

    @contextmanager
    def held(self, parts: Sequence[tuple[Version, float, int | None]], router: Router | None = None) -> Iterator[Held]:
        """The sum of versions that are prepared, or a router over them; it is not forgotten meanwhile.

        The order of the parts makes no difference, and contents come before names in ours: what is made of equal
        contents is equal, whoever they belong to.

        Raises InvalidRequest for a version (or one task of it) given twice, and for a task that it has not.
        """
        _check_different([(version, task) for version, _, task in parts], weighed=router is None)
        for place, (version, _, task) in enumerate(parts):
            _check_task(version, task, f"adapters[{place}].task")
        given = [_part(*part) for part in parts]
        order = tuple(sorted(range(len(given)), key=lambda place: _identity(given[place])))
        ordered = [given[place] for place in order]
        key = router, tuple(map(_identity, ordered))
        with self._made.held(key, lambda: self._new(ordered, router)) as version:
            yield Held(version, order)

    def _new(self, parts: Sequence[Part], router: Router | None) -> Version:
        def make() -> Artefact:
            hint = "Ask for each part once as `model`, or put it again."
            with made_of("a part", hint=hint, lost="adapters", refused="adapters"):
                return self._compose(parts, router)

        version = self._changes.version(COMPOSED, parts[0].artefact.path)
        version.make = make
        return version


def _part(version: Version, weight: float, task: int | None) -> Part:
    assert version.artefact is not None
    return Part(version.name, version.artefact, weight, task)


def _identity(part: Part) -> _Identity:
    return part.artefact.digest, part.weight, -1 if part.task is None else part.task, part.name


def _check_task(version: Version, task: int | None, param: str) -> None:
    tasks = 0 if version.artefact is None else version.artefact.summary.tasks
    if task is not None and not 0 <= task < tasks:
        has = f"Its tasks are 0 to {tasks - 1}." if tasks else "It has none to choose from: leave `task` out."
        raise InvalidRequest(f"The adapter {version.name!r} has no task {task}.", hint=has, param=param)


def _check_different(parts: Sequence[tuple[Version, int | None]], *, weighed: bool) -> None:
    for place, (version, task) in enumerate(parts):
        if (version, task) in parts[:place]:
            raise InvalidRequest(
                f"The adapter {version.name!r} is given twice.",
                hint="Give it once, with the sum of its weights." if weighed else "Give it once.",
                param=f"adapters[{place}].name",
            )
