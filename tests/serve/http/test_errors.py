"""Whoever made an error, it leaves in OpenAI's shape; what is no error leaves as it came."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from loramux import errors
from loramux.errors import LoramuxError
from loramux.http.error_shape import ErrorShape
from loramux.http.errors import DEFAULTS, normalise, render

Message = MutableMapping[str, Any]


class Body(BaseModel):
    n: int


def make_app() -> FastAPI:
    app = FastAPI()

    @app.get("/vllm-404")
    async def vllm_404() -> JSONResponse:
        error = {"message": "The model `x` does not exist.", "type": "NotFoundError", "param": "model", "code": 404}
        return JSONResponse({"error": error}, status_code=404)

    @app.get("/vllm-400")
    async def vllm_400() -> JSONResponse:
        error = {"message": "Too long.", "type": "BadRequestError", "param": "max_tokens", "code": 400}
        return JSONResponse({"error": error}, status_code=400, headers={"x-request-id": "r1"})

    @app.get("/unauthorized")
    async def unauthorized() -> JSONResponse:
        return JSONResponse({"error": "Unauthorized"}, status_code=401)

    @app.get("/text")
    async def text() -> PlainTextResponse:
        return PlainTextResponse("upstream fell over", status_code=503, headers={"retry-after": "3"})

    @app.get("/chunked")
    async def chunked() -> StreamingResponse:
        async def parts() -> Any:
            yield b'{"error": {"message": "in '
            yield b'two parts", "code": 400}}'

        return StreamingResponse(parts(), status_code=400)

    @app.get("/empty")
    async def empty() -> PlainTextResponse:
        return PlainTextResponse("", status_code=418)

    @app.get("/crash")
    async def crash() -> None:
        raise ZeroDivisionError("secret detail")

    @app.post("/validated")
    async def validated(body: Body) -> int:
        return body.n

    app.add_middleware(ErrorShape)
    return app


async def request(method: str, path: str, **kwargs: Any) -> httpx.Response:
    transport = httpx.ASGITransport(make_app(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, **kwargs)


@pytest.mark.parametrize(
    ("method", "path", "kwargs", "status", "code", "type_", "message"),
    [
        ("GET", "/vllm-404", {}, 404, "model_not_found", "invalid_request_error", "The model `x` does not exist."),
        ("GET", "/vllm-400", {}, 400, "invalid_request", "invalid_request_error", "Too long."),
        ("GET", "/unauthorized", {}, 401, "invalid_api_key", "authentication_error", "Unauthorized"),
        ("GET", "/text", {}, 503, "service_unavailable", "server_error", "upstream fell over"),
        ("GET", "/chunked", {}, 400, "invalid_request", "invalid_request_error", "in two parts"),
        ("GET", "/empty", {}, 418, "internal_error", "server_error", "HTTP 418"),
        ("GET", "/crash", {}, 500, "internal_error", "server_error", "HTTP 500"),
        ("GET", "/nowhere", {}, 404, "not_found", "invalid_request_error", "Not Found"),
        ("DELETE", "/text", {}, 405, "method_not_allowed", "invalid_request_error", "Method Not Allowed"),
        ("POST", "/validated", {"json": {"n": "x"}}, 422, "invalid_request", "invalid_request_error", None),
        ("POST", "/validated", {"content": b"{"}, 422, "invalid_request", "invalid_request_error", None),
    ],
)
async def test_every_error_leaves_in_openais_shape(
    method: str, path: str, kwargs: dict[str, Any], status: int, code: str, type_: str, message: str | None
) -> None:
    response = await request(method, path, **kwargs)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["content-length"]) == len(response.content)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "hint"}
    assert (error["code"], error["type"]) == (code, type_)
    assert error["hint"] or status == 418 or code == "model_not_found"
    if message is not None:
        assert error["message"] == message


async def test_a_validation_error_still_says_which_field() -> None:
    response = await request("POST", "/validated", json={"n": "x"})
    assert '"n"' in response.json()["error"]["message"]


async def test_other_headers_survive() -> None:
    assert (await request("GET", "/vllm-400")).headers["x-request-id"] == "r1"
    assert (await request("GET", "/text")).headers["retry-after"] == "3"


async def test_a_crash_is_raised_on_for_the_log_but_not_shown() -> None:
    assert "secret" not in (await request("GET", "/crash")).text
    transport = httpx.ASGITransport(make_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        with pytest.raises(ZeroDivisionError):
            await client.get("/crash")


async def test_what_is_valid_passes_unchanged() -> None:
    response = await request("POST", "/validated", json={"n": 3})
    assert (response.status_code, response.json()) == (200, 3)


async def drive(app: ErrorShape, sent: list[Message], path: str = "/") -> None:
    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(dict(message))

    await app({"type": "http", "method": "GET", "path": path, "headers": []}, receive, send)


async def test_a_stream_passes_chunk_by_chunk() -> None:
    sent: list[Message] = []
    seen_before_next: list[int] = []

    async def streaming(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for i in range(3):
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % i, "more_body": True})
            seen_before_next.append(len(sent))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    await drive(ErrorShape(streaming), sent)
    assert seen_before_next == [2, 3, 4], "a chunk was held back"
    assert [m.get("body") for m in sent[1:]] == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n", b""]


async def test_a_stream_that_breaks_is_not_answered_twice() -> None:
    sent: list[Message] = []

    async def breaking(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: 0\n\n", "more_body": True})
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await drive(ErrorShape(breaking), sent)
    assert [m["type"] for m in sent] == ["http.response.start", "http.response.body"]


async def stream(
    *chunks: bytes | Exception, content_type: bytes = b"text/event-stream; charset=utf-8"
) -> list[Message]:
    """What leaves when an app streams `chunks`, each at once; an exception among them is raised."""
    sent: list[Message] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"Content-Type", content_type)]})
        for i, chunk in enumerate(chunks):
            if isinstance(chunk, Exception):
                raise chunk
            await send({"type": "http.response.body", "body": chunk, "more_body": i + 1 < len(chunks)})
            assert len(sent) == i + 2, "a chunk was held back"

    await drive(ErrorShape(app), sent)
    return sent


EVENT = b'data: {"id": "c-1", "choices": [{"delta": {"content": "data: {\\"error\\": 1}"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
VLLM = {"error": {"message": "Too long.", "type": "BadRequestError", "param": "prompt", "code": 400}}


@pytest.mark.parametrize(
    ("event", "status", "code", "type_"),
    [
        (VLLM, 400, "invalid_request", "invalid_request_error"),
        ({"error": {"message": "Gone.", "code": 500}}, 500, "internal_error", "server_error"),
        ({"error": {"message": "Wait.", "code": 503}}, 503, "service_unavailable", "server_error"),
        (
            {"error": {"message": "Ours.", "type": "server_error", "code": "adapter_loading"}},
            503,
            "adapter_loading",
            "server_error",
        ),
        ({"error": "Text."}, 500, "internal_error", "server_error"),
    ],
)
async def test_an_error_within_a_stream_has_the_shape_too(event: Any, status: int, code: str, type_: str) -> None:
    broken = b"data: " + json.dumps(event).encode() + b"\n\n"
    for chunks in ([EVENT, broken, DONE], [EVENT + broken + DONE]):
        body = b"".join(message.get("body", b"") for message in await stream(*chunks))
        assert body.startswith(EVENT) and body.endswith(b"\n\n" + DONE)
        error = json.loads(body[len(EVENT) + len(b"data: ") : -len(DONE)])["error"]
        assert set(error) == {"message", "type", "param", "code", "hint"}
        assert (error["code"], error["type"]) == (code, type_)
        assert error["message"] in str(event)


@pytest.mark.parametrize(
    "chunk", [EVENT, b'data: {"error": {"mess', b': {"error": 1}\n\n', b'x data: {"error": 1}\n\n', b"\xff\x00", b""]
)
async def test_what_is_no_error_event_passes_as_it_is(chunk: bytes) -> None:
    assert [message["body"] for message in (await stream(chunk, DONE))[1:]] == [chunk, DONE]
    same = b'data: {"error": 1}\n\n'
    assert (await stream(same, content_type=b"application/octet-stream"))[1]["body"] == same


async def test_a_stream_whose_app_crashes_ends_with_an_error_event() -> None:
    sent: list[Message] = []

    async def crashing(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        raise RuntimeError("secret detail")

    with pytest.raises(RuntimeError):
        await drive(ErrorShape(crashing), sent)
    event = sent[-1]["body"]
    assert event.startswith(b"data: ") and event.endswith(b"\n\n") and b"secret" not in event
    assert json.loads(event[6:])["error"]["code"] == "internal_error"
    assert sent[-1]["more_body"], "the answer is not whole, and must not look so"


async def test_a_client_that_left_is_not_an_error() -> None:
    sent: list[Message] = []

    async def cancelled(scope: Any, receive: Any, send: Any) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await drive(ErrorShape(cancelled), sent)
    assert sent == []


async def test_other_protocols_pass() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    for kind in ("lifespan", "websocket"):
        await ErrorShape(app)({"type": kind}, None, None)  # type: ignore[arg-type]
    assert seen == ["lifespan", "websocket"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["error", "message", "code", "detail", "type", "param"]), inner, max_size=4)
    ),
    max_leaves=5,
)


@settings(max_examples=50, deadline=None)
@given(status=st.integers(400, 599), body=json_values)
def test_any_body_at_all_becomes_the_shape(status: int, body: Any) -> None:
    error = json.loads(json.dumps(normalise(status, body)))["error"]
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["code"], str)
    assert isinstance(error["type"], str)


def test_what_stands_beside_the_error_stays() -> None:
    body = normalise(503, {"error": {"message": "No.", "code": "not_ready"}, "adapters": {"host": 1}})
    assert (body["adapters"], body["error"]["message"]) == ({"host": 1}, "No.")


def every_error() -> list[type[LoramuxError]]:
    return [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, LoramuxError)]


@pytest.mark.parametrize("kind", every_error())
def test_our_own_errors_are_already_in_the_shape(kind: type[LoramuxError]) -> None:
    error = kind.__new__(kind)  # some word their message themselves
    LoramuxError.__init__(error, "What happened.", hint="What to do.", param="model")
    status, body, headers = render(error)
    assert normalise(status, body) == body
    assert (status in DEFAULTS) or status == 500
    assert ("Retry-After" in headers) or status != 503
    assert ("WWW-Authenticate" in headers) == (status == 401)
    assert body["error"]["hint"] == "What to do."


def test_codes_are_unique() -> None:
    codes = [k.code for k in every_error() if not issubclass(k, errors.AdapterRefused)]
    assert len(codes) == len(set(codes))
