"""`"routing": true`: what the experts did comes with the answer, plain or streamed; other requests pass untouched."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from loramux.http.routing import RoutingReport
from loramux.metrics.routing import wanted

REPORT = {"adapter": "desk@00", "tokens": 3, "decisions": 6, "entropy_nats": 0.5, "experts": []}
CHUNK = {"id": "c1", "object": "chat.completion.chunk", "created": 7, "model": "desk", "choices": [{"index": 0}]}


def _app() -> FastAPI:
    """An engine that fills the report that is wanted where it runs, as the wrapper of `generate` does."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await request.json()
        if body.get("model") == "broken":
            return JSONResponse({"error": {"message": "no"}}, status_code=400)
        if not body.get("stream"):
            _fill()
            return {"id": "c1", "seen": body}

        async def events() -> AsyncIterator[str]:
            yield f"data: {json.dumps(CHUNK)}\n\n"
            if body.get("model") == "dies":
                yield 'data: {"error": {"message": "gone"}}\n\n'
            _fill()
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post("/v1/embeddings")
    async def other(request: Request) -> Any:
        return {"seen": (await request.body()).decode()}

    app.add_middleware(RoutingReport)
    return app


def _fill() -> None:
    if (report := wanted.get()) is not None:
        report.value = dict(REPORT)


async def _post(body: Any, path: str = "/v1/chat/completions") -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(_app()), base_url="http://test") as client:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await client.post(path, content=content, headers={"Content-Type": "application/json"})


async def test_the_report_is_a_field_of_the_answer() -> None:
    request = {"model": "desk", "messages": [], "routing": True}
    answer = await _post(request)
    assert answer.json() == {"id": "c1", "seen": request, "routing": REPORT}
    assert int(answer.headers["content-length"]) == len(answer.content)


async def test_a_stream_gets_one_more_chunk_before_its_end() -> None:
    answer = await _post({"model": "desk", "stream": True, "routing": True})
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert json.loads(events[0]) == CHUNK and events[-1] == "[DONE]"
    assert json.loads(events[1]) == CHUNK | {"choices": [], "routing": REPORT}
    assert len(events) == 3


@pytest.mark.parametrize("asked", [{}, {"routing": False}, {"routing": None}, {"user": '"routing": true'}])
@pytest.mark.parametrize("stream", [False, True])
async def test_who_does_not_ask_gets_the_answer_as_it_is(asked: dict[str, Any], stream: bool) -> None:
    answer = await _post({"model": "desk", "stream": stream, **asked})
    assert answer.status_code == 200 and "decisions" not in answer.text


@pytest.mark.parametrize("value", [1, "yes", [], {}])
async def test_other_values_are_refused(value: Any) -> None:
    answer = await _post({"model": "desk", "routing": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "routing" and answer.json()["error"]["hint"]


async def test_errors_stay_as_they_are() -> None:
    answer = await _post({"model": "broken", "routing": True})
    assert answer.status_code == 400 and "routing" not in answer.json()
    stream = await _post({"model": "dies", "stream": True, "routing": True})
    assert '"error"' in stream.text and stream.text.rstrip().endswith("[DONE]")


async def test_a_body_that_is_no_json_is_the_routes_business() -> None:
    with pytest.raises(json.JSONDecodeError):
        await _post(b'{"routing": true')


async def test_other_routes_pass() -> None:
    assert (await _post({"routing": 5}, "/v1/embeddings")).json() == {"seen": '{"routing": 5}'}


async def test_nothing_is_wanted_afterwards() -> None:
    await _post({"model": "desk", "routing": True})
    assert wanted.get() is None
