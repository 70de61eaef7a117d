"""Our middleware around the app that vLLM really builds, with every route it has to offer."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from vllm.entrypoints.launchers.app import build_app

from loramux.config import ServeConfig
from loramux.engine import arguments
from loramux.engine.settings import DataPlaneSettings

from ..http.guarded import ADMIN, BASE, KEY, KEYS, TEAM, call, chat

SETTINGS = DataPlaneSettings(adapter_bytes=2**30, slots=512, max_rank=256)
OPEN = {("GET", "/health"), ("GET", "/metrics"), ("HEAD", "/metrics")}
#: Where a key with an allow-list gets as far as vLLM.
REACHED = {
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    *((method, path) for method in ("GET", "HEAD") for path in ("/openapi.json", "/docs", "/redoc")),
    ("GET", "/v1/models"),
    ("GET", "/version"),
}


@pytest.fixture(scope="module")
def app() -> FastAPI:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv("VLLM_API_KEY", "of-vllm")
        arguments.set_environment(BASE)
        patch.setenv("VLLM_PLUGINS", "")  # this is about vLLM's own routes
        args = arguments.parse_engine_args(["--enable-request-id-headers"], model=BASE, served_name=BASE)
        arguments.apply_settings(args, SETTINGS, arguments.make_gate(ServeConfig(), KEYS, args))
        return build_app(args, ("generate", "embed", "score", "transcription", "realtime"))


def routes(app: FastAPI) -> list[tuple[str, str]]:
    found = [(method, route.path) for route in app.routes for method in getattr(route, "methods", None) or ("GET",)]  # type: ignore[attr-defined]
    assert len(found) > 50
    return found


async def status(app: FastAPI, method: str, path: str, key: str | None) -> int | None:
    try:
        answer = await call(app, method, path, key=key, body=chat("sql"), headers={"Content-Type": "application/json"})
    except Exception:  # vLLM's handlers, without their engine
        return 500
    assert len(answer.header("x-request-id")) == 1
    return answer.status


async def test_no_route_of_vllm_answers_without_a_key(app: FastAPI) -> None:
    for method, path in routes(app):
        if (method, path) in OPEN:
            continue
        for key in (None, "of-vllm", "EMPTY"):
            assert await status(app, method, path, key) == 401, (method, path)


async def test_a_key_with_an_allow_list_reaches_few(app: FastAPI) -> None:
    reached = set()
    for method, path in routes(app):
        if (method, path) not in OPEN and await status(app, method, path, TEAM) not in (403, 404):
            reached.add((method, path))
    assert reached == REACHED


async def test_a_preflight_reaches_no_route(app: FastAPI) -> None:
    headers = {"Origin": "https://page.example", "Access-Control-Request-Method": "GET"}
    for path in {path for _, path in routes(app) if not path.startswith("/adapters")}:
        answer = await call(app, "OPTIONS", path, headers=headers)
        assert (answer.status, b"CORS" in answer.body) == (400, True), path


@pytest.mark.parametrize("path", ["/sleep", "/collective_rpc", "/update_weights", "/abort_requests", "/adapters"])
async def test_an_ordinary_key_controls_nothing(app: FastAPI, path: str) -> None:
    assert ("POST", path) in routes(app)
    assert await status(app, "POST", path, KEY) == 403


async def test_vllms_own_way_to_load_adapters_is_shut(app: FastAPI) -> None:
    """The hosting standards add it behind our back; it reads any path of the host and knows no registry."""
    assert ("POST", "/adapters") in routes(app)
    assert await status(app, "POST", "/adapters", ADMIN) == 404


async def test_a_websocket_needs_a_key(app: FastAPI) -> None:
    for key in (None, TEAM):
        answer = await call(app, path="/v1/realtime", key=key, type="websocket")
        assert [message["type"] for message in answer.messages] == ["websocket.close"]


async def test_vllms_key_is_one_of_ours_and_never_its_own_gate(app: FastAPI) -> None:
    seen: list[Any] = [middleware.cls for middleware in app.user_middleware]
    assert "AuthenticationMiddleware" not in [middleware.__name__ for middleware in seen]
    assert seen[0].__name__ == "RequestId"
