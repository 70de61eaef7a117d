"""The page in a real browser, against a fake server: what it shows, streams and asks for, and what it never runs."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser

import httpx
import pytest

from loramux.http import page as module

from ...browser import Page, chromium
from ..fake_server import BASE, FakeServer, Stage, card, error, failed, served

SPITE = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"


@pytest.fixture(scope="module")
def stage() -> Iterator[tuple[Stage, str]]:
    stage = Stage()
    with served(stage) as url:
        yield stage, url


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with chromium() as page:
        yield page


@pytest.fixture
def server(stage: tuple[Stage, str]) -> FakeServer:
    fake = FakeServer({"sql": card("sql", leases=2, pinned=True), "bad": failed("bad", f"NaN. {SPITE}")})
    fake.app.include_router(module.router)
    stage[0].fake, fake.url = fake, stage[1]
    return fake


@pytest.fixture
def browser(server: FakeServer, tab: Page) -> Iterator[Page]:
    """The page, open; what it is blamed for and what it asked for is checked afterwards."""
    tab.look()
    tab.open(f"{server.url}/")
    tab.run("sessionStorage.clear()")
    tab.complaints.clear()
    tab.requested.clear()
    tab.open(f"{server.url}/")
    yield tab
    assert [text for text in tab.complaints if "the server responded with a status of" not in text] == []
    assert {url for url in tab.requested if not url.startswith((server.url, "data:"))} == set()
    assert tab.run("document.title") == "loramux"


def ready(browser: Page) -> None:
    browser.until("document.querySelector('#connection').className == 'good'")


def poll(browser: Page) -> None:
    """Now, as when the tab is shown again, and not in two seconds."""
    browser.run("document.dispatchEvent(new Event('visibilitychange'))")


def ask(browser: Page, prompt: str) -> None:
    browser.run("document.querySelector('#prompt').focus()")
    browser.type(prompt)
    browser.press("Enter", ctrl=True)


def answers(browser: Page) -> list[str]:
    found: list[str] = browser.run("[...document.querySelectorAll('.answer')].map((node) => node.textContent)")
    return found


def figures(browser: Page) -> list[str]:
    found: list[str] = browser.run("[...document.querySelectorAll('.figures')].map((node) => node.textContent)")
    return found


def idle(browser: Page) -> None:
    browser.until("!document.querySelector('#send').disabled")


def rows(browser: Page) -> list[list[str]]:
    found: list[list[str]] = browser.run(
        "[...document.querySelectorAll('#adapters tbody tr')].map((row) => [...row.cells].map((c) => c.textContent))"
    )
    return found


async def test_the_document_is_whole_and_its_policy_allows_nothing_else(server: FakeServer) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(server.app), base_url="http://test") as client:
        answer = await client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "http" not in re.sub(r"frame-ancestors.*", "", policy)

    attributes: list[tuple[str, str | None]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            attributes.extend(attrs)

    Reader().feed(answer.text)
    assert [value for name, value in attributes if name in ("src", "href", "action")] == ["data:,"]
    assert [name for name, _ in attributes if name.startswith("on") or name == "style"] == []
    for tag in ("script", "style"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy and "{{" not in inline
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", answer.text)


def test_base_and_adapters_are_shown(browser: Page) -> None:
    ready(browser)
    assert browser.text("#base") == BASE
    good, bad = rows(browser)
    assert good == ["sql", "resident", "lora", "8", "00112233aabbccdd", "3.00 MiB", "2", "yes"]
    assert bad[0] == f"badNaN. {SPITE}Use an earlier checkpoint." and bad[1:3] == ["failed", "–"]
    assert browser.text("#memory") == "3.00 MiB of 1.00 GiB"


def test_the_state_is_live(browser: Page, server: FakeServer) -> None:
    ready(browser)
    browser.run("document.querySelector('#prompt').focus()")
    server.cards["sql"]["state"] = "draining"
    server.cards["new"] = card("new", state="verifying", version=None)
    del server.cards["bad"]
    browser.until("document.querySelectorAll('.state')[1]?.textContent == 'verifying'")
    assert [row[:2] for row in rows(browser)] == [["sql", "draining"], ["new", "verifying"]]
    assert browser.run("[...document.querySelectorAll('.column select')[0].options].map((o) => o.value)") == [
        BASE,
        "sql",
        "new",
    ]
    assert browser.run("document.activeElement.id") == "prompt"
    server.cards["sql"] = card("sql", pending="reading")
    poll(browser)
    browser.until("document.querySelector('#adapters tr:nth-child(1) td:nth-child(2)').innerText.includes('next')")
    assert rows(browser)[0][1] == "residentnext: reading"
    server.answer = error(503, "not_ready", "It is restarting.", "")
    poll(browser)
    browser.until("document.querySelector('#connection').className == 'bad'")
    assert browser.text("#connection") == "It is restarting."


def test_many_adapters_can_be_filtered(browser: Page, server: FakeServer) -> None:
    ready(browser)
    server.cards = {f"a{i}": card(f"a{i}") for i in range(250)}
    poll(browser)
    browser.until("document.querySelectorAll('#adapters tbody tr').length == 200")
    assert browser.text("#more").startswith("50 more")
    browser.run("document.querySelector('#filter').focus()")
    browser.type("A24")
    browser.until("document.querySelectorAll('#adapters tbody tr').length == 11")
    assert not browser.run("document.querySelector('#more').checkVisibility()")


def test_no_adapters(browser: Page, server: FakeServer) -> None:
    ready(browser)
    server.cards.clear()
    poll(browser)
    browser.until("document.querySelector('#none').checkVisibility()")
    assert "loramux adapters add" in browser.text("#none")
    assert not browser.run("document.querySelector('#adapters').checkVisibility()")


def test_one_prompt_to_two_models_then_to_three(browser: Page, server: FakeServer) -> None:
    ready(browser)
    ask(browser, "a slow b")
    browser.until("document.querySelectorAll('.answer')[1].textContent.length > 3")
    assert browser.run("document.querySelector('#send').disabled")
    idle(browser)
    assert answers(browser) == [f"{BASE}: a slow b", "sql: a slow b"]
    for line in figures(browser):
        assert re.fullmatch(r"first token \d+ ms · \d+\.\d tokens/s · 4 tokens", line)
    server.cards["new"] = card("new")
    poll(browser)
    browser.until("document.querySelector('.column select').options.length == 3")
    browser.run("document.querySelector('#add').click()")
    assert browser.run("document.querySelector('#add').disabled")
    assert browser.run("document.activeElement.value") == "new"
    browser.run("document.querySelector('#system').value = 'Be brief.'")
    ask(browser, "!")
    idle(browser)
    assert answers(browser)[2] == "new: a slow b!"
    body = server.seen[-1].body
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["max_tokens"], body["temperature"], body["stream"]) == (256, 0, True)
    browser.run("document.querySelectorAll('.remove')[0].click()")
    assert len(answers(browser)) == 2
    assert not browser.run("document.querySelector('.remove').checkVisibility()")


def test_an_answer_is_text_whatever_it_says(browser: Page) -> None:
    ready(browser)
    ask(browser, SPITE)
    idle(browser)
    assert answers(browser)[0] == f"{BASE}: {SPITE}"
    assert browser.run("document.querySelectorAll('.answer *').length") == 0


def test_stop(browser: Page, server: FakeServer) -> None:
    ready(browser)
    ask(browser, "hang")
    browser.until("[...document.querySelectorAll('.answer')].every((node) => node.textContent.endsWith('hang'))")
    browser.run("document.querySelector('#stop').click()")
    idle(browser)
    assert all(line.endswith("stopped") for line in figures(browser))
    assert server.stopped.wait(5)
    assert browser.run("document.querySelector('#stop').disabled")


@pytest.mark.parametrize(("prompt", "words"), [("break", "It broke.See the log."), ("cut", "The answer broke off.")])
def test_an_answer_that_ends_badly_keeps_what_came(browser: Page, prompt: str, words: str) -> None:
    ready(browser)
    ask(browser, prompt)
    idle(browser)
    assert answers(browser)[1] == f"sql: {prompt}{words}"
    assert figures(browser)[1].endswith("failed")


def test_a_model_that_went_away_fails_alone(browser: Page, server: FakeServer) -> None:
    ready(browser)
    del server.cards["sql"]
    ask(browser, "x")
    idle(browser)
    assert answers(browser) == [f"{BASE}: x", "There is no sql.Ask for one that is listed."]


def test_nothing_is_sent_without_a_prompt(browser: Page, server: FakeServer) -> None:
    ready(browser)
    browser.run("document.querySelector('#send').click()")
    browser.run("document.querySelector('#prompt').focus()")
    browser.press("Enter", ctrl=True)
    assert server.paths("POST") == []
    browser.run("document.querySelector('#max-tokens').value = 0")
    ask(browser, "x")
    assert browser.run("document.querySelector('details').open") and server.paths("POST") == []


def test_a_key_is_asked_for_and_kept_in_this_tab_only(browser: Page, server: FakeServer) -> None:
    ready(browser)
    assert not browser.run("document.querySelector('#key-form').checkVisibility()")
    server.key = "secret"
    browser.open(f"{server.url}/")
    browser.until("document.querySelector('#key-form').checkVisibility()")
    for text, expected in (("wrong", "this key is not accepted"), ("secret", "connected")):
        browser.run("document.querySelector('#key').focus()")
        browser.type(text)
        browser.press("Enter")
        browser.until(f"document.querySelector('#connection').textContent == '{expected}'")
    assert not browser.run("document.querySelector('#key-form').checkVisibility()")
    ask(browser, "x")
    idle(browser)
    assert answers(browser)[0] == f"{BASE}: x"
    assert browser.run("localStorage.length + document.cookie.length") == 0
    assert not any("secret" in url for url in browser.requested)
    browser.open(f"{server.url}/")
    ready(browser)


def test_everything_is_reached_by_keyboard(browser: Page) -> None:
    ready(browser)
    reached = []
    browser.run("document.activeElement.blur()")
    for _ in range(8):
        browser.press("Tab")
        reached.append(browser.run("document.activeElement.id || document.activeElement.localName"))
    assert reached == ["prompt", "summary", "send", "add", "select", "div", "select", "div"]
    unnamed = (
        "[...document.querySelectorAll('input, select, textarea, button')]"
        ".filter((n) => !n.labels?.length && !n.ariaLabel && !n.textContent.trim()).length"
    )
    assert browser.run(unnamed) == 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 768, 1600])
def test_it_fits_every_screen_and_can_be_read(browser: Page, width: int, dark: bool) -> None:
    """Nothing scrolls sideways, and text has WCAG's contrast of 4.5 in both schemes."""
    browser.look(width=width, dark=dark)
    ready(browser)
    assert browser.run("document.documentElement.scrollWidth") <= width
    weak = browser.run(
        """(() => {
          const light = (colour) => {
            const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => v / 255)
              .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const back = (node) => {
            for (; node; node = node.parentElement) {
              const colour = getComputedStyle(node).backgroundColor;
              if (!colour.endsWith(", 0)")) return colour;
            }
          };
          return [...document.querySelectorAll("h1, h2, p, td, th, label, button, select, summary, .state, .why")]
            .filter((node) => node.checkVisibility() && node.textContent.trim() && !node.disabled)
            .filter((node) => {
              const [a, b] = [light(getComputedStyle(node).color), light(back(node))].sort((x, y) => y - x);
              return (a + 0.05) / (b + 0.05) < 4.5;
            })
            .map((node) => node.textContent);
        })()"""
    )
    assert weak == []
