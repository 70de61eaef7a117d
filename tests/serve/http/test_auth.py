"""Who gets in, and as whom."""

from __future__ import annotations

import pytest

from loramux.http.keys import Caller, KeyRing

from .guarded import ADMIN, KEY, TEAM, Inner, call, gate, guarded


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"Authorization": f"Bearer {KEY}"}, "api-key"),
        ({"Authorization": f"bearer {KEY}"}, "api-key"),
        ({"Authorization": f"BEARER   {KEY} "}, "api-key"),
        ({"X-Api-Key": KEY}, "api-key"),
        ({"Authorization": "Basic dTpw", "X-Api-Key": KEY}, "api-key"),  # a proxy's own, ours beside it
        ({"Authorization": f"Bearer {ADMIN}"}, "admin"),
        ({"Authorization": f"Bearer {TEAM}"}, "team-a"),
    ],
)
async def test_a_key_is_its_owner(headers: dict[str, str], name: str) -> None:
    inner = Inner()
    assert (await call(guarded(inner, gate()), headers=headers)).status == 200
    assert inner.caller.name == name


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer{KEY}"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY.upper()}"},
        {"Authorization": f"Bearer wrong, Bearer {KEY}"},
        {"Authorization": "Bearer wrong", "X-Api-Key": KEY},
        {"X-Api-Key": "wrong"},
        {"Cookie": f"api_key={KEY}"},
        {"Authorization": "Bearer \xff\xfe"},
    ],
)
async def test_without_a_valid_key_nothing_is_reached(headers: dict[str, str]) -> None:
    inner = Inner()
    answer = await call(guarded(inner, gate()), headers=headers)
    assert (answer.status, answer.error["code"], inner.scopes) == (401, "invalid_api_key", [])
    assert answer.header("www-authenticate") == ["Bearer"]
    assert answer.error["type"] == "authentication_error"
    assert KEY not in answer.body.decode()


async def test_a_key_in_the_query_is_no_key() -> None:
    answer = await call(guarded(Inner(), gate()), query_string=f"api_key={KEY}".encode())
    assert answer.status == 401


@pytest.mark.parametrize("path", ["/", "/health", "/health/ready", "/metrics"])
async def test_open_paths_need_no_key_and_take_any(path: str) -> None:
    for key in (None, "wrong", KEY, TEAM):
        assert (await call(guarded(Inner(), gate()), path=path, key=key)).status == 200


async def test_metrics_can_be_protected() -> None:
    app = guarded(Inner(), gate(protect_metrics=True))
    assert (await call(app, path="/metrics")).status == 401
    assert (await call(app, path="/metrics", key=KEY)).status == 200
    # They name every tenant's adapters.
    assert (await call(app, path="/metrics", key=TEAM)).status == 403


CHANGES = [
    ("PUT", "/v1/adapters/a"),
    ("DELETE", "/v1/adapters/a"),
    ("POST", "/v1/adapters/a/rollback"),
    ("POST", "/v1/adapters/a/pin"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/sleep"),
]


@pytest.mark.parametrize(("method", "path"), CHANGES)
async def test_changes_need_the_admin_key(method: str, path: str) -> None:
    inner = Inner()
    app = guarded(inner, gate())
    assert (await call(app, method, path)).status == 401
    assert (await call(app, method, path, key="wrong")).status == 401
    for key in (KEY, TEAM):
        answer = await call(app, method, path, key=key)
        assert (answer.status, answer.error["code"]) == (403, "admin_key_required")
        assert answer.error["hint"]
    assert inner.scopes == []
    assert (await call(app, method, path, key=ADMIN)).status == 200
    assert inner.caller.admin


@pytest.mark.parametrize(("method", "path"), CHANGES)
async def test_without_an_admin_key_any_key_changes(method: str, path: str) -> None:
    app = guarded(Inner(), gate(keys=KeyRing.build([KEY])))
    assert (await call(app, method, path)).status == 401
    assert (await call(app, method, path, key=KEY)).status == 200


@pytest.mark.parametrize(("method", "path"), CHANGES)
async def test_an_admin_key_alone(method: str, path: str) -> None:
    app = guarded(Inner(), gate(keys=KeyRing.build(admin_key=ADMIN)))
    assert (await call(app, method, path)).status == 401
    assert (await call(app, method, path, key="EMPTY")).status == 401
    assert (await call(app, method, path, key=ADMIN)).status == 200
    # OpenAI's clients always send some key.
    assert (await call(app, "POST", "/v1/chat/completions", key="EMPTY")).status == 200


async def test_without_keys_all_is_open() -> None:
    inner = Inner()
    app = guarded(inner, gate(keys=KeyRing.build()))
    for method, path in [*CHANGES, ("GET", "/v1/models")]:
        assert (await call(app, method, path, key="EMPTY")).status == 200
    assert inner.caller == Caller("anonymous", admin=True)


async def test_who_calls_an_open_path_sees_nothing_by_that() -> None:
    inner = Inner()
    await call(guarded(inner, gate()), path="/health")
    assert not inner.caller.admin and not inner.caller.allows("sql")


async def test_routes_past_our_registry_do_not_exist() -> None:
    inner = Inner()
    app = guarded(inner, gate())
    for method, path in (("POST", "/adapters"), ("DELETE", "/adapters/a")):
        answer = await call(app, method, path, key=ADMIN)
        assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert inner.scopes == []


async def test_a_websocket_without_a_key_is_closed_before_it_opens() -> None:
    inner = Inner()
    app = guarded(inner, gate())
    for key in (None, "wrong", TEAM):
        answer = await call(app, path="/v1/realtime", key=key, type="websocket")
        assert [m["type"] for m in answer.messages] == ["websocket.close"]
    assert inner.scopes == []
    await call(app, path="/v1/realtime", key=KEY, type="websocket")
    assert inner.scopes[0]["type"] == "websocket"


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/"])
async def test_without_a_gate_nothing_is_served(kind: str, path: str) -> None:
    inner = Inner()
    with pytest.raises(RuntimeError, match="gate"):
        await call(guarded(inner), path=path, key=ADMIN, type=kind)
    assert inner.scopes == []


async def test_the_lifespan_passes() -> None:
    inner = Inner()
    await guarded(inner)({"type": "lifespan"}, None, None)
    assert inner.scopes[0]["type"] == "lifespan"
