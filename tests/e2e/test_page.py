"""The page at `/` of a real server, in a real browser: base and adapter answer the same prompt side by side."""

from __future__ import annotations

from typing import Any

import pytest

from ..browser import chromium

pytestmark = pytest.mark.engine

HEADLINE = "Is this news headline sarcastic or serious? Answer with one word: sarcastic or serious.\n\n"
HEADLINE += "area man confidently explains movie he slept through"


def test_two_models_answer_side_by_side(server: Any) -> None:
    with chromium() as page:
        page.open(f"{server.url}/")
        page.until("document.querySelector('#connection').className == 'good'")
        names = page.run("[...document.querySelectorAll('#adapters td.name > :first-child')].map((n) => n.textContent)")
        assert {"news", "sarcasm", "spam"} <= set(names)
        page.until("[...document.querySelectorAll('.state')].some((badge) => badge.textContent == 'resident')")
        page.run("document.querySelectorAll('.column select')[1].value = 'sarcasm'")
        page.run("document.querySelector('#max-tokens').value = 8")
        page.run("document.querySelector('#prompt').focus()")
        page.type(HEADLINE)
        page.press("Enter", ctrl=True)
        page.until("!document.querySelector('#send').disabled")
        answers = page.run("[...document.querySelectorAll('.answer')].map((node) => node.textContent)")
        assert [answer.split(".")[0].strip().lower() for answer in answers] == ["serious", "sarcastic"]
        assert "first token" in page.text(".figures")
        assert page.complaints == []
