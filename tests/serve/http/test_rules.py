"""What each request must show, path by path."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette._utils import get_route_path

from loramux.http.asgi import route_path
from loramux.http.rules import Lifecycle, Need, lifecycle, need, replaced


def scope(method: str, path: str, *, kind: str = "http", headers: Any = (), root_path: str = "") -> dict[str, Any]:
    return {"type": kind, "method": method, "path": path, "headers": list(headers), "root_path": root_path}


PREFLIGHT = [(b"Origin", b"https://page.example"), (b"Access-Control-Request-Method", b"POST")]
OPEN, KEY, ADMIN = Need.OPEN, Need.KEY, Need.ADMIN


@pytest.mark.parametrize(
    ("method", "path", "needed"),
    [
        ("GET", "/", OPEN),
        ("HEAD", "/", OPEN),
        ("GET", "/health", OPEN),
        ("GET", "/health/ready", OPEN),
        ("GET", "/metrics", OPEN),
        ("GET", "/metrics/", OPEN),
        ("POST", "/", ADMIN),
        ("POST", "/health", ADMIN),
        ("GET", "/health/../v1/models", KEY),
        ("GET", "/health/", KEY),
        ("GET", "/healthy", KEY),
        ("GET", "/health\n", KEY),
        ("GET", "//health", KEY),
        ("GET", "/Health", KEY),
        ("GET", "", KEY),
        ("GET", "http://host/health", KEY),
        ("GET", "/metrics/x", KEY),
        ("GET", "/v1/models", KEY),
        ("GET", "/v1/adapters", KEY),
        ("GET", "/v1/adapters/a", KEY),
        ("GET", "/openapi.json", KEY),
        ("GET", "/ping", KEY),
        ("OPTIONS", "/v1/models", KEY),
        ("OPTIONS", "/metrics", KEY),
        ("POST", "/v1/chat/completions", KEY),
        ("POST", "/v1/anything/new", KEY),
        ("POST", "/tokenize", KEY),
        ("POST", "/inference/v1/generate", KEY),
        ("PUT", "/v1/adapters/a", ADMIN),
        ("DELETE", "/v1/adapters/a/b", ADMIN),
        ("PATCH", "/v1/adapters/a", ADMIN),
        ("POST", "/v1/adapters/a/pin", ADMIN),
        ("PUT", "//v1///adapters/a/", ADMIN),
        ("POST", "/v1/load_lora_adapter", ADMIN),
        ("POST", "/v1/unload_lora_adapter/", ADMIN),
        ("post", "/v1/load_lora_adapter", ADMIN),
        ("POST", "/adapters", ADMIN),
        ("DELETE", "/adapters/a", ADMIN),
        ("POST", "/sleep", ADMIN),
        ("POST", "/collective_rpc", ADMIN),
        ("POST", "/reset_prefix_cache", ADMIN),
        ("POST", "/scale_elastic_ep", ADMIN),
        ("POST", "/inference/v1/abort_requests", ADMIN),
        ("POST", "/a/control/route/of/tomorrow", ADMIN),
        ("POST", "/tokenize\n", ADMIN),
    ],
)
def test_what_a_request_must_show(method: str, path: str, needed: Need) -> None:
    assert need(scope(method, path), protect_metrics=False) is needed


def test_metrics_can_be_protected() -> None:
    for path in ("/metrics", "/metrics/"):
        assert need(scope("GET", path), protect_metrics=True) is KEY


@pytest.mark.parametrize("path", ["/v1/models", "/v1/adapters/a", "/metrics"])
def test_a_preflight_carries_no_key(path: str) -> None:
    assert need(scope("OPTIONS", path, headers=PREFLIGHT), protect_metrics=True) is OPEN
    for half in (PREFLIGHT[:1], PREFLIGHT[1:]):
        assert need(scope("OPTIONS", path, headers=half), protect_metrics=True) is KEY
    assert need(scope("PUT", "/v1/adapters/a", headers=PREFLIGHT), protect_metrics=True) is ADMIN


def test_a_websocket_is_never_open() -> None:
    assert need(scope("GET", "/v1/realtime", kind="websocket"), protect_metrics=False) is KEY
    for path in ("/", "/health", "/metrics"):
        assert need(scope("GET", path, kind="websocket"), protect_metrics=False) is ADMIN


@pytest.mark.parametrize(
    ("method", "path", "change"),
    [
        ("PUT", "/v1/adapters/team/a:v1", Lifecycle("put", "team/a:v1")),
        ("DELETE", "/v1/adapters/a", Lifecycle("delete", "a")),
        ("POST", "/v1/adapters/a/rollback", Lifecycle("rollback", "a")),
        ("POST", "/v1/adapters/a/b/unpin", Lifecycle("unpin", "a/b")),
        ("POST", "/v1/adapters/pin", Lifecycle("post", "pin")),
        ("PUT", "/v1/adapters/a/pin", Lifecycle("put", "a/pin")),
        ("POST", "/v1/load_lora_adapter", Lifecycle("load", None)),
        ("POST", "/v1/unload_lora_adapter", Lifecycle("unload", None)),
        ("GET", "/v1/adapters/a", None),
        ("POST", "/v1/chat/completions", None),
        ("POST", "/v1/adapters_", None),
    ],
)
def test_changes_are_told_from_the_path(method: str, path: str, change: Lifecycle | None) -> None:
    assert lifecycle(scope(method, path)) == change


def test_the_hosting_standards_own_adapter_routes_are_known() -> None:
    assert all(replaced(scope("POST", path)) for path in ("/adapters", "/adapters/a/b", "//adapters"))
    assert not any(replaced(scope("POST", path)) for path in ("/v1/adapters", "/adapters2", "/"))


segments = st.sampled_from(["/", "/a", "/api", "/api/", "/api/v1", "//", "/health", "api", "", "/apix"])


@given(st.lists(segments, max_size=4).map("".join), segments)
def test_a_rule_sees_the_path_that_the_router_sees(path: str, root_path: str) -> None:
    request = scope("GET", path, root_path=root_path)
    assert route_path(request) == get_route_path(request)


def test_a_root_path_opens_nothing() -> None:
    assert need(scope("GET", "/health/v1/models", root_path="/health"), protect_metrics=False) is KEY
    assert need(scope("PUT", "/api/v1/adapters/a", root_path="/api"), protect_metrics=False) is ADMIN
    assert need(scope("GET", "/api/health", root_path="/api"), protect_metrics=False) is OPEN
