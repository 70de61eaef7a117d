"""Fields of a body: found however JSON may write them, and looked for without parsing where none can be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.http import asgi
from loramux.http.asgi import field_in, with_length

FIELDS = ("adapters", "routing", "router")
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@st.composite
def spelled(draw: st.DrawFn) -> tuple[str, str]:
    """A name of letters, and one of the ways in which JSON may write it."""
    name = draw(st.sampled_from(FIELDS) | st.text(ALPHABET, min_size=1, max_size=8))
    ways = [draw(st.sampled_from(["{0}", "\\u{1:04x}", "\\u{1:04X}"])) for _ in name]
    return name, "".join(way.format(letter, ord(letter)) for way, letter in zip(ways, name, strict=True))


@settings(max_examples=300, deadline=None)
@given(spelled(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]))
def test_no_way_of_writing_a_field_hides_it(field: tuple[str, str], encoding: str) -> None:
    name, written = field
    body = f'{{"model": "é", "{written}" : [1]}}'.encode(encoding)
    assert field_in(body, name) == {"model": "é", name: [1]}
    assert field_in(body, "zzzzzzzzz", name) == {"model": "é", name: [1]} and field_in(body, "zzzzzzzzz") is None


@pytest.mark.parametrize("letter", ALPHABET)
def test_every_letter_may_be_escaped(letter: str) -> None:
    for code in (f"{ord(letter):04x}", f"{ord(letter):04X}"):
        assert field_in(f'{{"\\u{code}": 1}}'.encode(), letter) == {letter: 1}


@pytest.mark.parametrize(
    "body",
    [
        {"model": "a", "messages": [{"role": "user", "content": "Which adapters?"}]},
        {"text": "Ünïcödé ß é ñ \x80 \xff \n \t 中文 🙂"},  # what `json.dumps` escapes
        {"text": r"\u0041 in the text has a backslash that is escaped"},
    ],
)
def test_other_bodies_are_not_parsed(body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.dumps(body).encode()
    monkeypatch.setattr(asgi, "json", None)
    assert field_in(content, *FIELDS) is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'"adapters"',
        b'["adapters"]',
        b'{"adapters": ',
        b'{"user": "adapters"}',
        b'{"user": "\\"adapters\\""}',
        b'{"nested": {"adapters": 1}}',
        b'{"\\u0061dapter": 1}',
        b'{"\\U0061dapters": 1}',
        b'{"\xff": "\\u0061", "adapters": 1}',
        b'{"adapters": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    ],
)
def test_what_is_no_object_with_the_field_is_left_alone(body: bytes) -> None:
    assert field_in(body, "adapters") is None


def test_the_length_is_said_once() -> None:
    headers = [(b"Content-Length", b"1"), (b"a", b"b"), (b"content-length", b"2")]
    assert with_length(headers, 30) == [(b"a", b"b"), (b"content-length", b"30")]
