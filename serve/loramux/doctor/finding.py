"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"  # works, but not as well as it could, or not for everything
    FAIL = "fail"  # serving does not work, or not correctly


@dataclass(frozen=True)
class Finding:
    """`advice` is what to do, for all that is not ok."""

    level: Level
    subject: str
    text: str
    advice: str | None = None

    @classmethod
    def ok(cls, subject: str, text: str) -> Finding:
        return cls(Level.OK, subject, text)

    @classmethod
    def warn(cls, subject: str, text: str, advice: str) -> Finding:
        return cls(Level.WARN, subject, text, advice)

    @classmethod
    def fail(cls, subject: str, text: str, advice: str) -> Finding:
        return cls(Level.FAIL, subject, text, advice)
