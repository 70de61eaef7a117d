"""Hostile requests: whatever is sent, nothing reaches the server behind the gate that should not."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.http import body_limit
from loramux.registry import Held

from ..serve.http.guarded import ADMIN, BASE, KEY, TEAM, Inner, call, chat, gate, guarded

#: Written down once more, from the contract.
OPEN = re.compile(r"/|/health|/health/[a-z_-]+|/metrics|/metrics/")
parts = st.sampled_from(
    ["/", "//", "/v1", "/v1/", "v1", "/health", "/health/", "ready", "/metrics", "/models", "/adapters", "/a", "sql",
     "/chat/completions", "/completions", "/load_lora_adapter", "..", "%2e%2e", "%2f", "\n", "\x00", "?", "#", ";",
     "\\", "/pin", "/sleep", "http://host", "*", "/V1", "/docs", "/tokenize"]
)  # fmt: skip
paths = st.lists(parts, max_size=5).map("".join) | st.text(max_size=20)
methods = st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "X"])
values = st.sampled_from(
    [b"", b"Bearer", b"Bearer ", b"Bearer wrong", b"bearer \x00", KEY.encode()[:-1], b"Basic eDp5"]
)
values |= st.binary(max_size=30)
header_names = st.sampled_from(
    [b"authorization", b"Authorization", b"x-api-key", b"cookie", b"x-forwarded-for", b"x-http-method-override",
     b"x-original-url", b"content-length", b"transfer-encoding", b"origin", b"x-request-id", b"host", b"upgrade"]
)  # fmt: skip
header_lists = st.lists(st.tuples(header_names, values), max_size=4)


@settings(max_examples=400, deadline=None)
@given(methods, paths, header_lists, st.binary(max_size=50), st.sampled_from(["http", "websocket"]), st.booleans())
async def test_without_a_key_only_open_paths_are_reached(
    method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes, kind: str, protected: bool
) -> None:
    inner = Inner()
    app = guarded(inner, gate(protect_metrics=protected))
    answer = await call(app, method, path, headers=headers, body=body, type=kind)
    is_open = kind == "http" and method in ("GET", "HEAD") and OPEN.fullmatch(path) is not None
    is_open = is_open and not (protected and path.startswith("/metrics"))
    assert bool(inner.scopes) == (is_open and answer.status != 413)
    if kind == "http" and not is_open:
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")


models = st.sampled_from(
    ["sql", "other", f"{BASE}:sql", f"{BASE}:other", "sql@1", "other@sql", BASE, "legal-a", "", None, 7]
)
members = st.lists(
    st.tuples(st.sampled_from(["model", "Model", "\\u006dodel", "messages", "prompt"]), models), max_size=4
).map(lambda pairs: "{" + ", ".join(f'"{key}": {json.dumps(value)}' for key, value in pairs) + "}")
MINE = {"sql", "sql@1", f"{BASE}:sql", BASE, "legal-a", "", None}


@settings(max_examples=400, deadline=None)
@given(methods, paths, header_lists, members | st.text(max_size=20), st.integers(1, 50))
async def test_a_restricted_key_reaches_no_other_model(
    method: str, path: str, headers: list[tuple[bytes, bytes]], body: str, size: int
) -> None:
    inner = Inner()
    raw = body.encode("utf-8", "surrogatepass")
    pieces = [raw[i : i + size] for i in range(0, len(raw), size)] or [b""]
    key = [(b"authorization", f"Bearer {TEAM}".encode())]
    answer = await call(guarded(inner, gate()), method, path, headers=[*key, *headers], body=pieces)
    if not inner.scopes or OPEN.fullmatch(path):
        assert answer.status != 500
        return
    if method == "POST":
        assert path in ("/v1/chat/completions", "/v1/completions")
        pairs: list[Any] = json.loads(inner.bodies[0], object_pairs_hook=list)
        named = [value for name, value in pairs if name == "model"]
        assert len(named) <= 1 and set(named) <= MINE
    elif method != "OPTIONS":
        assert method in ("GET", "HEAD")
        name = re.fullmatch(r"/v1/(?:models|adapters)/(.+)", path, re.DOTALL)
        assert path in ("/v1/models", "/v1/adapters", "/docs") or (name and name[1].startswith(("sql", "legal-")))


names = st.sampled_from(["sql", "sql@1", f"{BASE}:sql", "legal-a", "other", "SQL", f"{BASE}:other", "other@sql", BASE])
part_lists = st.lists(
    names
    | st.fixed_dictionaries({"name": names}, optional={"weight": st.sampled_from([0.5, "1"]), "task": st.just(0)})
    | st.sampled_from([None, 7, [], {"NAME": "other"}]),
    max_size=4,
)
routers = st.sampled_from(["arrow", None, {"type": "arrow", "top_k": 1}, {"type": "arrow", "parts": ["other"]}, 7])
composing = st.lists(
    st.tuples(st.sampled_from(["model", "m\\u006fdel"]), st.sampled_from([BASE, "sql", "other", None]))
    | st.tuples(st.sampled_from(["adapters", "\\u0061dapters", "adapter\\u0073", "Adapters"]), part_lists)
    | st.tuples(st.sampled_from(["router", "route\\u0072", "r\\u006Futer"]), routers),
    max_size=5,
).map(lambda pairs: "{" + ", ".join(f'"{key}": {json.dumps(value)}' for key, value in pairs) + "}")


@settings(max_examples=400, deadline=None)
@given(composing, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-be"]))
async def test_a_restricted_key_composes_no_others_adapters(body: str, encoding: str) -> None:
    """And what it cannot compose answers nothing: the base does not stand in for it."""
    composed: list[list[str]] = []

    @asynccontextmanager
    async def compose(parts: Any, router: Any) -> AsyncIterator[Held]:
        composed.append([part.name for part in parts])
        yield Held(SimpleNamespace(tag="+composed@00"), ())  # type: ignore[arg-type]

    inner = Inner()
    services = SimpleNamespace(registry=SimpleNamespace(composed=compose))
    raw = body.encode(encoding)
    answer = await call(guarded(inner, gate(), services=services), "POST", "/v1/completions", key=TEAM, body=raw)
    assert answer.status in (200, 400, 404) and all(set(used) <= MINE - {BASE} for used in composed)
    asked = json.loads(body)
    wants = asked.get("adapters") is not None or asked.get("router") is not None
    assert bool(composed) == (wants and answer.status == 200)
    for content in inner.bodies:
        seen = json.loads(content)
        assert seen.get("model") in ({"+composed@00"} if wants else MINE)
        assert not wants or not seen.keys() & {"adapters", "router"}


@asynccontextmanager
async def listening(app: Any, http: str) -> AsyncIterator[int]:
    """A real HTTP server, so that requests may be malformed; yields its port."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, http=http, ws="none", lifespan="off", log_level="critical")  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    try:
        while not server.started:
            await asyncio.sleep(0.005)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.force_exit = server.should_exit = True
        await task


async def exchange(port: int, *pieces: bytes, end: bool = True) -> bytes:
    """All that the server says to these bytes until it, or if it waits for more our end, closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if end:
            writer.write_eof()
    answer = b""
    with suppress(ConnectionError):
        async with asyncio.timeout(5):
            answer = await reader.read()
    writer.close()
    return answer


@pytest.fixture(params=["h11", "httptools"])
def http(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def lines(*lines: str) -> bytes:
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


HOST = "Host: x"
MALFORMED = [
    lines("GET /v1/models HTTP/1.1", HOST),
    lines("GET http://x/v1/models HTTP/1.1", HOST),
    lines("GET http://x/health/../v1/models HTTP/1.1", HOST),
    lines("GET //v1/models HTTP/1.1", HOST),
    lines("GET /%76%31/models HTTP/1.1", HOST),
    lines("GET /health%2f..%2fv1/models HTTP/1.1", HOST),
    lines("GET /health;/v1/models HTTP/1.1", HOST),
    lines("GET /health%00 HTTP/1.1", HOST),
    lines("GET /health%0a HTTP/1.1", HOST),
    lines("GET /v1/models#/health HTTP/1.1", HOST),
    lines("GET /v1/models?/health HTTP/1.1", HOST),
    lines("get /health HTTP/1.1", HOST),
    lines("GET /v1/models HTTP/1.0"),
    lines("GET * HTTP/1.1", HOST),
    lines("OPTIONS * HTTP/1.1", HOST, "Origin: x"),
    lines("POST /health HTTP/1.1", HOST, "X-HTTP-Method-Override: GET", "Content-Length: 0"),
    lines("GET /v1/models HTTP/1.1", HOST, f"Authorization : Bearer {KEY}x"),
    lines("GET /v1/models HTTP/1.1", HOST, "Authorization: Bearer wrong", f"Authorization: Bearer {KEY}"),
    lines("GET /v1/realtime HTTP/1.1", HOST, "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
          "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
    b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03",
    b"GET\r\n\r\n",
]  # fmt: skip


async def test_malformed_requests_reach_nothing(http: str) -> None:
    inner = Inner()
    async with listening(guarded(inner, gate()), http) as port:
        for request in MALFORMED:
            answer = await exchange(port, request)
            assert inner.scopes == [], request
            assert re.match(rb"(HTTP/1.1 4\d\d|$)", answer), (request, answer)
        assert (await exchange(port, lines("GET /health HTTP/1.1", HOST))).startswith(b"HTTP/1.1 200")


SMUGGLED = lines("GET /v1/models HTTP/1.1", HOST)


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Length: 3", "Transfer-Encoding: chunked"],
        ["Content-Length: 3", "Content-Length: 4"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: xchunked"],
        ["Content-Length: +3"],
    ],
    ids=str,
)
async def test_a_request_within_a_request_needs_its_own_key(http: str, headers: list[str]) -> None:
    """However the server delimits the first (with a key), the second is a request by itself or a body."""
    inner = Inner()
    async with listening(guarded(inner, gate()), http) as port:
        first = lines("POST /v1/completions HTTP/1.1", HOST, f"Authorization: Bearer {KEY}", *headers)
        await exchange(port, first + b"0\r\n\r\n" + SMUGGLED)
        await exchange(port, lines("GET /health HTTP/1.1", HOST) + SMUGGLED)
    assert {scope["path"] for scope in inner.scopes} <= {"/v1/completions", "/health"}


async def test_a_chunked_body_without_end_is_cut_off(http: str) -> None:
    inner = Inner()
    async with listening(guarded(inner, gate(max_body=10_000)), http) as port:
        head = lines("POST /v1/completions HTTP/1.1", HOST, f"X-Api-Key: {KEY}", "Transfer-Encoding: chunked")
        answer = await exchange(port, head, *[b"400\r\n" + b"x" * 1024 + b"\r\n"] * 20, end=False)
    assert inner.bodies == []
    assert answer.startswith(b"HTTP/1.1 413") and b'"request_too_large"' in answer
    assert b"connection: close" in answer.lower()


async def test_a_large_declared_body_is_refused_before_it_is_sent(http: str) -> None:
    inner = Inner()
    async with listening(guarded(inner, gate()), http) as port:
        head = lines("POST /v1/completions HTTP/1.1", HOST, f"X-Api-Key: {KEY}", "Content-Length: 999999999999",
                     "Expect: 100-continue")  # fmt: skip
        answer = await exchange(port, head, end=False)
    assert inner.scopes == []
    assert answer.startswith(b"HTTP/1.1 413")


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(body_limit, "PATIENCE_S", 0.05)
    return


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("key", [KEY, TEAM])
@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
async def test_a_body_that_never_comes_holds_no_connection(http: str, key: str, framing: str) -> None:
    inner = Inner()
    async with listening(guarded(inner, gate()), http) as port:
        head = lines("POST /v1/completions HTTP/1.1", HOST, f"X-Api-Key: {key}", framing)
        answer = await exchange(port, head, b"1\r\n{\r\n", end=False)
    assert inner.bodies == []
    assert answer.startswith(b"HTTP/1.1 408") and b'"request_timeout"' in answer


async def test_a_header_cannot_be_injected_by_the_request_id(http: str) -> None:
    async with listening(guarded(Inner(), gate()), http) as port:
        for value in ("a\x0bSet-Cookie: x", "a\tb", "a%0d%0aSet-Cookie: x", "é"):
            answer = await exchange(port, lines("GET /health HTTP/1.1", HOST, f"X-Request-Id: {value}"))
            assert b"set-cookie" not in answer.lower()


async def test_a_restricted_key_and_a_body_in_many_pieces(http: str) -> None:
    inner = Inner()
    async with listening(guarded(inner, gate()), http) as port:
        head = lines("POST /v1/completions HTTP/1.1", HOST, f"X-Api-Key: {TEAM}", "Transfer-Encoding: chunked")
        for model, status in (("other", b"404"), ("sql", b"200")):
            chunks = [b"1\r\n" + bytes([byte]) + b"\r\n" for byte in chat(model)]
            answer = await exchange(port, head, *chunks, b"0\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 " + status)
    assert inner.bodies == [chat("sql")]


@pytest.mark.parametrize("depth", [10, 1000, 10**5])
async def test_deep_json_is_refused_or_passed_but_never_crashes(depth: int) -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        nested = opening * depth + "1" + closing * depth
        body = f'{{"model": "sql", "x": {nested}}}'.encode()
        for key, path in ((TEAM, "/v1/completions"), (KEY, "/v1/completions"), (ADMIN, "/v1/load_lora_adapter")):
            answer = await call(guarded(Inner(), gate()), "POST", path, key=key, body=body)
            assert answer.status in (200, 400)
