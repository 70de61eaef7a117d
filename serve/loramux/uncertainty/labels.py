"""Texts to choose between, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loramux.errors import InvalidRequest
from loramux.uncertainty.ask import FIELD

MAX_TOKENS = 32


def tokenise(labels: Sequence[str], tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """The tokens of each label, written right after the prompt. `tokenizer` is Hugging Face's.

    Raises InvalidRequest for a label that does not come back as it went in, is too long, or begins another: what is
    to be told apart must be different answers.
    """
    found: list[tuple[int, ...]] = []
    for place, label in enumerate(labels):
        ids = tuple(tokenizer.encode(label, add_special_tokens=False))
        # Some tokenizers write a space before a text, and drop it when they read.
        if not ids or tokenizer.decode(list(ids)).strip() != label.strip() or _unknown(tokenizer) in ids:
            raise _invalid(f"{label!r} is not made of tokens of this model", "Use another wording.", place)
        if len(ids) > MAX_TOKENS:
            raise _invalid(f"{label!r} has {len(ids)} tokens, more than {MAX_TOKENS}", "Use a shorter one.", place)
        for other, text in zip(found, labels, strict=False):
            if ids[: len(other)] == other or other[: len(ids)] == ids:
                raise _invalid(
                    f"{label!r} and {text!r} begin alike, and one is all of that",
                    "Use labels of which none is the beginning of another, in tokens.",
                    place,
                )
        found.append(ids)
    return tuple(found)


def _unknown(tokenizer: Any) -> int | None:
    unknown: int | None = getattr(tokenizer, "unk_token_id", None)
    return unknown


def _invalid(what: str, hint: str, place: int) -> InvalidRequest:
    return InvalidRequest(f"The label {what}.", hint=hint, param=f"{FIELD}.labels[{place}]")
