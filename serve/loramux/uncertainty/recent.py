"""Answers of late: what was told of them, and what came back about whether they were right.

In memory, and bounded: it is what shows in metrics and can be calibrated with, no archive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loramux.errors import AnswerNotFound, FeedbackConflict, InvalidRequest
from loramux.uncertainty.calibration import Settings

#: Answers that feedback can name, of all versions; the oldest go first.
NAMED = 10_000
#: Of each version, the last ones; and the last ones that feedback was given on.
WINDOW, LABELLED = 200, 500
#: Versions; the one goes first that was scored longest ago.
VERSIONS = 100


@dataclass(eq=False)
class Scored:
    """One answer. `told` is without calibration, `confidence` as it was told, with one if there was one."""

    name: str
    digest: str | None  # whole; None: the base model
    settings: Settings
    told: dict[str, Any]
    confidence: float | None
    right: bool | None = None
    label: str | None = None  # the right one, if that is known

    def judge(self, *, correct: bool | None, label: str | None) -> bool:
        """Note whether it was right; False if just that is known. Raises InvalidRequest, FeedbackConflict."""
        if label is not None:
            if label not in self.settings.labels:
                raise InvalidRequest(
                    f"{label[:64]!r} is none of the labels that the answer was chosen from.",
                    hint=f"They are {', '.join(map(repr, self.settings.labels)) or 'none: send correct'}.",
                    param="label",
                )
            correct = label == self.told["prediction"]
        elif correct is not None and self.settings.labels:
            others = [one for one in self.settings.labels if one != self.told["prediction"]]
            label = self.told["prediction"] if correct else others[0] if len(others) == 1 else None
        if self.right is None:
            self.right, self.label = correct, label
            return True
        if self.right == correct and label in (None, self.label):
            return False
        raise FeedbackConflict("Another feedback on this answer came before.", hint="The first one counts.")


@dataclass(eq=False)
class Window:
    """Of one version."""

    last: deque[Scored] = field(default_factory=lambda: deque(maxlen=WINDOW))
    labelled: deque[Scored] = field(default_factory=lambda: deque(maxlen=LABELLED))


class Recent:
    """Filled by the event loop; `windows` may be asked for from another thread."""

    def __init__(self) -> None:
        self._windows: dict[tuple[str, str | None], Window] = {}  # scored longest ago first
        self._named: dict[tuple[str, str, int], Scored] = {}  # adapter, id, choice; oldest first

    def add(
        self, name: str, digest: str | None, told: Mapping[str, Any], labels: Sequence[str], confidence: float | None
    ) -> Scored | None:
        """An answer that has its scores, all of them; None if it has not."""
        if told["partial"]:
            return None
        kept = {key: value for key, value in told.items() if key not in ("tokens", "raw", "warnings")}
        one = Scored(name, digest, Settings.of(told, labels), kept, confidence)
        window = self._windows.pop((name, digest), None) or Window()
        window.last.append(one)
        self._windows[name, digest] = window
        _trim(self._windows, VERSIONS)
        return one

    def call(self, one: Scored, ids: Iterable[str], choice: int) -> None:
        """What an answer is called by who gives feedback on it."""
        for id in ids:
            self._named.pop((one.name, id, choice), None)
            self._named[one.name, id, choice] = one
        _trim(self._named, NAMED)

    def feedback(
        self, id: str, choice: int, names: Iterable[str], *, correct: bool | None, label: str | None
    ) -> tuple[Scored, bool]:
        """Note whether an answer of one of these adapters was right; and whether that is news.

        Raises AnswerNotFound, InvalidRequest, FeedbackConflict.
        """
        one = next((found for name in names if (found := self._named.get((name, id, choice)))), None)
        if one is None:
            raise AnswerNotFound(
                f"No answer with scores is known by {id[:128]!r}.",
                hint=f"Send the answer's id or X-Request-Id; the last {NAMED} of this server are known.",
                param="id",
            )
        new = one.judge(correct=correct, label=label)
        if new and (window := self._windows.get((one.name, one.digest))) is not None:
            window.labelled.append(one)
        return one, new

    def labelled(self, name: str, digest: str, settings: Settings) -> list[Scored]:
        """The answers of a version under these settings that feedback was given on; oldest first."""
        window = self._windows.get((name, digest), Window())
        return [one for one in list(window.labelled) if one.settings == settings]

    def windows(self) -> Iterator[tuple[str, str | None, Window]]:
        """Name, digest and window of the version of each name that was scored last."""
        newest = {name: (digest, window) for (name, digest), window in self._windows.copy().items()}
        for name, (digest, window) in newest.items():
            yield name, digest, window


def _trim(entries: dict[Any, Any], most: int) -> None:
    while len(entries) > most:
        del entries[next(iter(entries))]
