"""A server with loramux's answers and nothing behind them, on a real port: for what talks HTTP itself."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

BASE = "tiny-base"


def card(name: str, **fields: Any) -> dict[str, Any]:
    """An adapter as `GET /v1/adapters` lists it."""
    return {
        "name": name,
        "object": "adapter",
        "state": "resident",
        "version": "00112233aabbccdd",
        "previous": None,
        "pending": None,
        "pinned": False,
        "method": "lora",
        "rank": 8,
        "experts": 1,
        "bayesian": False,
        "resident_bytes": 3 * 2**20,
        "leases": 0,
        "load_seconds": {"read": 0.1, "verify": 0.02, "copy": 0.03},
        "last_used": None,
        "warnings": [],
        "error": None,
        **fields,
    }


def failed(name: str, message: str) -> dict[str, Any]:
    error = {"code": "adapter_not_finite", "message": message, "hint": "Use an earlier checkpoint."}
    nothing = {"version": None, "method": None, "rank": None, "resident_bytes": 0, "load_seconds": {}}
    return card(name, state="failed", error=error, **nothing)


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class FakeServer:
    """Set `cards`, `key`, `answer` and `states` as a test needs; look at `seen` afterwards.

    A prompt is answered by "<model>: <prompt>", word by word. Prompts that say more: `hang` never ends, `break` ends
    in an error event, `cut` just ends, `slow` waits between words.
    """

    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    key: str | None = None
    answer: Response | None = None  # to every request
    loading: list[str] = field(default_factory=list)  # states that a PUT goes through, one per look at it
    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)  # a client left its answer

    def paths(self, method: str) -> list[str]:
        return [seen.path for seen in self.seen if seen.method == method]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI: write the request down, then answer as told, or as the routes do."""
        request = Request(scope, receive)
        body = await request.body()
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        self.seen.append(Seen(request.method, path, dict(request.headers), json.loads(body) if body else None))
        open_ = request.url.path in ("/", "/health/ready")
        answer: Any = self.answer
        if answer is None and self.key and not open_ and request.headers.get("authorization") != f"Bearer {self.key}":
            answer = error(401, "invalid_api_key", "The API key is missing or wrong.", "Send it as a bearer token.")
        whole: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return whole.pop() if whole else await receive()

        await (answer or self.app)(scope, again, send)

    @functools.cached_property
    def app(self) -> FastAPI:
        """The routes; a test may add others."""
        app = FastAPI()
        app.get("/health/ready")(lambda: {"status": "ready", "base": BASE})
        app.get("/v1/models")(self._models)
        app.get("/v1/adapters")(self._list)
        app.get("/v1/adapters/{name:path}")(self._show)
        app.put("/v1/adapters/{name:path}")(self._put)
        app.delete("/v1/adapters/{name:path}")(self._delete)
        app.post("/v1/adapters/{name:path}/{action}")(self._change)
        app.post("/v1/chat/completions")(self._chat)
        return app

    async def _models(self) -> dict[str, Any]:
        base = {"id": BASE, "object": "model", "parent": None}
        adapters = [
            {
                "id": c["name"],
                "object": "model",
                "parent": BASE,
                "adapter": {k: c[k] for k in ("state", "method", "rank")},
            }
            for c in self.cards.values()
        ]
        return {"object": "list", "data": [base, *adapters]}

    async def _list(self) -> dict[str, Any]:
        used = sum(c["resident_bytes"] for c in self.cards.values())
        resident = sum(c["state"] == "resident" for c in self.cards.values())
        memory = {"capacity_bytes": 2**30, "used_bytes": used, "resident": resident, "slots": 1024}
        return {"object": "list", "data": list(self.cards.values()), "memory": memory}

    async def _show(self, name: str) -> Any:
        if name not in self.cards:
            return not_found(name)
        if self.loading:
            self.cards[name]["state"] = self.loading.pop(0)
        return self.cards[name]

    async def _put(self, name: str, request: Request) -> Any:
        self.cards[name] = card(name, pinned=(await request.json()).get("pinned", False))
        wait = float(request.query_params.get("wait", "30"))
        deadline = time.monotonic() + wait
        while self.loading:
            if time.monotonic() >= deadline:
                self.cards[name]["state"] = self.loading[0]
                return JSONResponse(self.cards[name], status_code=202)
            await asyncio.sleep(0.01)
        self.cards[name]["state"] = "resident"
        return self.cards[name]

    async def _delete(self, name: str) -> Any:
        found = self.cards.pop(name, None)
        return not_found(name) if found is None else found | {"state": "draining"}

    async def _change(self, name: str, action: str) -> Any:
        if name not in self.cards:
            return not_found(name)
        if action == "rollback":
            return error(409, "no_previous_version", f"{name} has no previous version.", "Add one.")
        self.cards[name]["pinned"] = action == "pin"
        return self.cards[name]

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        if body["model"] not in {BASE, *self.cards}:
            return not_found(body["model"])
        return StreamingResponse(self._watched(request, body), media_type="text/event-stream")

    async def _watched(self, request: Request, body: dict[str, Any]) -> AsyncIterator[str]:
        ended = False
        try:
            async for event in self._stream(request, body):
                yield event
            ended = not await request.is_disconnected()
        finally:
            if not ended:
                self.stopped.set()

    async def _stream(self, request: Request, body: dict[str, Any]) -> AsyncIterator[str]:
        prompt = body["messages"][-1]["content"]
        yield ": a comment, as some proxies send\n\n"
        words = f"{body['model']}: {prompt}".split(" ")
        for i, word in enumerate(words):
            yield _event({"choices": [{"index": 0, "delta": {"content": word if i == 0 else f" {word}"}}]})
            await asyncio.sleep(0.02 if "slow" in prompt else 0)
        if "hang" in prompt:
            while not await request.is_disconnected():
                await asyncio.sleep(0.01)
            return
        if "break" in prompt:
            yield _event({"error": {"message": "It broke.", "code": "internal_error", "hint": "See the log."}})
        if "cut" in prompt:
            return
        yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        yield _event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(words)}})
        yield "data: [DONE]\n\n"


def error(status: int, code: str, message: str, hint: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "t", "param": None, "code": code, "hint": hint}}, status)


def not_found(name: str) -> JSONResponse:
    return error(404, "model_not_found", f"There is no {name}.", "Ask for one that is listed.")


def proxy_page(status: int) -> PlainTextResponse:
    """What a gateway in front of a dead server says."""
    return PlainTextResponse("<html>\x1b[31mBad gateway</html>", status_code=status)


@dataclass
class Stage:
    """One real port for many fakes: starting and stopping a server takes longer than most tests."""

    fake: FakeServer | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert self.fake is not None, "a request after its test"
        await self.fake(scope, receive, send)


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The URL of `app`, served from a thread."""
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the fake server did not start"
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
