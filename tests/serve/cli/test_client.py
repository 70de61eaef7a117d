"""Whatever answers, or does not, becomes JSON of ours or one error with a hint; keys go where they should only."""

from __future__ import annotations

import argparse
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.responses import JSONResponse, RedirectResponse

from loramux.cli.client import Client, ServerRefused, ServerUnreachable
from loramux.errors import ConfigError

from ..fake_server import BASE, FakeServer, error, proxy_page

QUESTION = {"model": BASE, "messages": [{"role": "user", "content": "a b"}]}


def client(url: str | None = None, key: str | None = None) -> Client:
    return Client.of(argparse.Namespace(url=url, key=key))


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A port that takes connections; what happens then is the test's."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def url_of(listening: socket.socket) -> str:
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


@pytest.mark.parametrize("given", ["host:9", "http://host:9/", "http://host:9/v1", "http://host:9/v1/"])
def test_addresses_as_people_have_them(given: str) -> None:
    assert client(given).url == "http://host:9"


@pytest.mark.parametrize(
    "given", ["ftp://host", "http://", "http://host:port", "http://ho st", "host:1\n2", "http://ä"]
)
def test_what_is_no_address(given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        client(given)
    assert caught.value.hint


def test_the_default_address_and_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert client().url == "http://127.0.0.1:8000"
    monkeypatch.setenv("LORAMUX_URL", "there:1")
    assert client().url == "http://there:1"
    assert client("here:2").url == "http://here:2"


@pytest.mark.parametrize(
    ("given", "user", "admin", "expected"),
    [
        (None, None, None, (None, None)),
        (None, "u", None, ("u", "u")),
        (None, None, "a", ("a", "a")),
        (None, "u", "a", ("u", "a")),
        ("k", "u", "a", ("k", "k")),
    ],
)
def test_which_key_opens_what(
    monkeypatch: pytest.MonkeyPatch, server: FakeServer, given: Any, user: Any, admin: Any, expected: Any
) -> None:
    for name, value in {"LORAMUX_API_KEY": user, "LORAMUX_ADMIN_KEY": admin}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    ours = client(key=given)
    ours.models()
    ours.lifecycle("POST", "sql", "/pin")
    sent = tuple(seen.headers.get("authorization") for seen in server.seen)
    assert sent == tuple(key and f"Bearer {key}" for key in expected)


def test_a_key_is_never_shown() -> None:
    assert "secret" not in repr(client(key="secret"))
    with pytest.raises(ConfigError) as caught:
        client(key="secret\n")
    assert "secret" not in str(caught.value)


def test_nothing_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServerUnreachable) as caught:
        client(url).models()
    assert caught.value.message == f"Nothing answers at {url}."
    assert "loramux serve" in str(caught.value.hint)


def test_a_host_that_is_not_there() -> None:
    with pytest.raises(ServerUnreachable, match=r"Nothing answers at http://no-such-host\.invalid"):
        client("no-such-host.invalid").models()


def test_a_server_that_does_not_answer(silent: socket.socket) -> None:
    with pytest.raises(ServerUnreachable, match="did not answer"):
        client(url_of(silent)).send("GET", "/", timeout_s=0.05)


@pytest.mark.parametrize("said", [b"", b"SSH-2.0\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"])
def test_a_server_that_speaks_something_else_or_breaks_off(silent: socket.socket, said: bytes) -> None:
    def speak() -> None:
        connection, _ = silent.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(said)

    thread = threading.Thread(target=speak)
    thread.start()
    with pytest.raises(ServerUnreachable) as caught:
        client(url_of(silent)).models()
    thread.join()
    assert caught.value.hint


@pytest.mark.parametrize("status", [200, 502])
def test_a_proxys_page_is_named_and_cannot_colour_the_terminal(server: FakeServer, status: int) -> None:
    server.answer = proxy_page(status)
    with pytest.raises(ServerUnreachable, match=f"{status}.*Bad gateway") as caught:
        client().models()
    assert "\x1b" not in str(caught.value) and "proxy" in str(caught.value.hint)


@pytest.mark.parametrize("body", [[], "text", None, {"error": "Unauthorized"}])
def test_json_of_others(server: FakeServer, body: Any) -> None:
    server.answer = JSONResponse(body, 500)
    with pytest.raises(ServerUnreachable, match="answered 500"):
        client().models()


def test_a_redirect_is_not_followed(server: FakeServer) -> None:
    server.answer = RedirectResponse("http://127.0.0.1:1/elsewhere")
    with pytest.raises(ServerUnreachable, match="answered 307"):
        client(key="secret").models()
    assert len(server.seen) == 1


def test_the_servers_own_error_keeps_all_its_parts(server: FakeServer) -> None:
    server.answer = error(404, "model_not_found", "There is no \x1b[2Jx.", "Did you mean y?")
    with pytest.raises(ServerRefused) as caught:
        client().models()
    found = caught.value
    assert (found.code, found.message, found.hint, found.answered) == (
        "model_not_found",
        "There is no [2Jx.",
        "Did you mean y?",
        404,
    )


def test_a_missing_key_is_explained_in_this_commands_terms(server: FakeServer) -> None:
    server.key = "k"
    with pytest.raises(ServerRefused) as caught:
        client().models()
    assert caught.value.code == "invalid_api_key" and "LORAMUX_API_KEY" in str(caught.value.hint)
    assert client(key="k").models()[0]["id"] == BASE


def test_an_answer_in_pieces(server: FakeServer) -> None:
    events = list(client().chat(QUESTION))
    pieces = [choice["delta"].get("content", "") for event in events for choice in event["choices"]]
    assert "".join(pieces) == f"{BASE}: a b" and len(pieces) > 3
    assert server.seen[-1].body["stream"] is True


@pytest.mark.parametrize(
    ("prompt", "kind", "words"), [("break", ServerRefused, "It broke"), ("cut", ServerUnreachable, "broke off")]
)
def test_an_answer_that_ends_badly(server: FakeServer, prompt: str, kind: type[Exception], words: str) -> None:
    events = client().chat({"model": BASE, "messages": [{"role": "user", "content": prompt}]})
    assert next(events)
    with pytest.raises(kind, match=words):
        list(events)


def test_leaving_an_answer_stops_it_on_the_server(server: FakeServer) -> None:
    events = client().chat({"model": BASE, "messages": [{"role": "user", "content": "hang"}]})
    next(events)
    events.close()
    assert server.stopped.wait(5)


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    assert client().models()
