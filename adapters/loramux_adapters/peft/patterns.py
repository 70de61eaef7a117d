"""Regular expressions from an adapter's config: Python's `re` semantics, with a time limit.

`re` cannot be interrupted, so one nested repetition in a config would stop the server for ever. The `regex` package
(which transformers depends on) takes a timeout; where its syntax means something else than in `re`, we refuse.
"""

import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import regex  # type: ignore[import-untyped]

from loramux_adapters.errors import AdapterConfigInvalid, shown

MAX_LENGTH = 1 << 16
# For all patterns of one adapter on all its modules; ordinary ones need milliseconds.
BUDGET_S = 5.0

# `regex` reads {e<=1} as fuzzy matching and [[:alpha:]] as a class.
_OTHER_MEANING = re.compile(r"\{(?!\d*,?\d*\})|\[\[:")


class Patterns:
    """Matches the patterns of one adapter's config within one time budget."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + BUDGET_S
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def fullmatch(self, pattern: str, text: str, field: str) -> bool:
        compiled = self._compile(pattern, field)
        return self._timed(compiled.fullmatch, text, field) is not None

    def match(self, pattern: str, text: str, field: str) -> "regex.Match[str] | None":
        """Match at the start of the text, as re.match does."""
        return self._timed(self._compile(pattern, field).match, text, field)

    def _timed(self, matcher: "Callable[..., regex.Match[str] | None]", text: str, field: str) -> Any:
        remaining = self._deadline - time.monotonic()
        try:
            if remaining > 0:
                return matcher(text, timeout=remaining)
        except TimeoutError:
            pass
        raise AdapterConfigInvalid(
            f"adapter_config.json: matching the patterns in {field} takes more than {BUDGET_S:g} s.",
            hint="Name the modules in a list, without nested repetitions.",
            field=field,
        )

    def _compile(self, pattern: str, field: str) -> "regex.Pattern[str]":
        if pattern in self._compiled:
            return self._compiled[pattern]
        if len(pattern) > MAX_LENGTH:
            raise self._invalid(pattern, field, f"has {len(pattern)} characters; the limit is {MAX_LENGTH}")
        if _OTHER_MEANING.search(pattern):
            raise self._invalid(pattern, field, "has a brace that is no repetition, or a POSIX class")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                re.compile(pattern)
                compiled = self._compiled[pattern] = regex.compile(pattern)
        except (re.error, regex.error, Warning, OverflowError, RecursionError) as error:
            raise self._invalid(pattern, field, f"is not a valid pattern ({error})") from error
        return compiled

    @staticmethod
    def _invalid(pattern: str, field: str, reason: str) -> AdapterConfigInvalid:
        return AdapterConfigInvalid(
            f"adapter_config.json: the pattern {shown(pattern)} {reason}.",
            hint="Name the modules in a list instead.",
            field=field,
        )
