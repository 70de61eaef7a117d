"""`/v1/adapters`: cards, conditions, and changes that take their time."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from loramux.errors import PoolExhausted
from loramux.http.keys import Caller
from loramux.plan import SLOTS
from loramux.registry import State
from loramux_adapters import AdapterCorrupt

from ..fakes import BASE, CACHE, until
from .serving import Server, error_of

CARD = {
    "name", "object", "state", "version", "previous", "pending", "pinned", "method", "rank", "experts", "tasks",
    "bayesian", "calibrations",
    "resident_bytes", "leases", "load_seconds", "last_used", "warnings", "error",
}  # fmt: skip


async def put(server: Server, name: str, source: str = "", wait: float | str = 5, **more: Any) -> httpx.Response:
    headers = more.pop("headers", {})
    body = {"source": str(server.root / (source or name)), **more}
    return await server.client.put(f"/v1/adapters/{name}?wait={wait}", json=body, headers=headers)


async def test_put_get_list_delete(server: Server) -> None:
    answer = await put(server, "a", "one")
    card = answer.json()
    assert answer.status_code == 200
    assert set(card) == CARD
    assert (card["name"], card["object"], card["state"], card["pinned"]) == ("a", "adapter", "resident", False)
    assert (card["method"], card["rank"], card["experts"], card["bayesian"]) == ("lora", 8, 1, False)
    assert (card["resident_bytes"], card["leases"], card["error"], card["warnings"]) == (1000, 0, None, [])
    assert set(card["load_seconds"]) == {"read", "verify", "copy"}
    assert answer.headers["etag"] == f'"{card["version"]}"' and len(card["version"]) == 16

    again = await put(server, "a", "one")
    assert again.json() | {"last_used": None} == card | {"last_used": None}
    second = (await put(server, "a", "two")).json()
    assert (second["previous"], second["version"] != card["version"]) == (card["version"], True)

    got = await server.client.get("/v1/adapters/a")
    assert (got.json()["version"], got.headers["etag"]) == (second["version"], f'"{second["version"]}"')
    listed = (await server.client.get("/v1/adapters")).json()
    assert listed == {
        "object": "list",
        "data": [got.json()],
        "memory": {"capacity_bytes": 10**6, "used_bytes": 1000, "resident": 1, "slots": SLOTS},
    }

    gone = await server.client.delete("/v1/adapters/a")
    assert (gone.status_code, gone.json()["state"], set(gone.json())) == (200, "gone", CARD)
    for call in (server.client.get, server.client.delete):
        error_of(await call("/v1/adapters/a"), 404, "model_not_found")
    assert (await server.client.get("/v1/adapters")).json()["data"] == []


@pytest.mark.parametrize("name", ["team/a", "team:a.v1", "x" * 128, "rollback", "a/pin"])
async def test_every_name_has_its_routes(server: Server, name: str) -> None:
    assert (await put(server, name, "one")).status_code == 200
    assert (await server.client.get(f"/v1/adapters/{name}")).json()["name"] == name
    assert (await server.client.post(f"/v1/adapters/{name}/pin")).json()["pinned"]
    assert (await put(server, name, "two")).json()["pinned"]
    assert (await server.client.post(f"/v1/adapters/{name}/rollback")).json()["name"] == name
    assert not (await server.client.post(f"/v1/adapters/{name}/unpin")).json()["pinned"]
    assert (await server.client.delete(f"/v1/adapters/{name}")).status_code == 200


async def test_202_while_it_is_on_its_way_and_the_rest_is_told_by_get(server: Server) -> None:
    gate = server.world.prepare.gates[server.root / "a"] = threading.Event()
    for wait in (0, 0.02):
        answer = await put(server, "a", wait=wait)
        if wait == 0:
            assert answer.status_code == 202
            assert (answer.json()["state"], answer.json()["version"]) in (("known", None), ("reading", None))
            assert "etag" not in answer.headers
        else:
            error_of(answer, 409, "adapter_busy")
            assert answer.headers["retry-after"]
    gate.set()
    await until(lambda: server.world.state("a") is State.RESIDENT)
    assert (await server.client.get("/v1/adapters/a")).json()["state"] == "resident"


async def test_a_replacement_that_is_on_its_way_is_pending(server: Server) -> None:
    version = (await put(server, "a", "one")).json()["version"]
    gate = server.world.prepare.gates[server.root / "two"] = threading.Event()
    answer = await put(server, "a", "two", wait=0.02)
    assert (answer.status_code, answer.json()["version"]) == (202, version)
    assert (answer.json()["state"], answer.json()["pending"]) == ("resident", "reading")
    server.world.prepare.errors[server.root / "two"] = AdapterCorrupt("Broken.", hint="Copy it again.")
    gate.set()
    await until(lambda: server.world.registry.adapter("a").error)
    card = (await server.client.get("/v1/adapters/a")).json()
    assert (card["state"], card["version"], card["pending"]) == ("resident", version, None)
    assert card["error"] == {"code": "adapter_corrupt", "message": "Broken.", "hint": "Copy it again."}


async def test_a_client_that_leaves_does_not_stop_its_put(server: Server) -> None:
    gate = server.world.prepare.gates[server.root / "a"] = threading.Event()
    task = asyncio.create_task(put(server, "a"))
    await until(lambda: server.world.prepare.read)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    await until(lambda: server.world.state("a") is State.RESIDENT)


async def test_a_refused_replacement_leaves_the_version_before_it(server: Server) -> None:
    version = (await put(server, "a", "one")).json()["version"]
    server.world.prepare.errors[server.root / "bad"] = AdapterCorrupt("Broken.", hint="Copy it again.")
    error_of(await put(server, "a", "bad"), 400, "adapter_corrupt")
    server.world.data_plane.errors = [PoolExhausted.of(10**7, 5)]
    full = await put(server, "a", "big")
    error_of(full, 503, "adapter_memory_full")
    assert int(full.headers["retry-after"]) > 0
    assert (await server.client.get("/v1/adapters/a")).json()["version"] == version


@pytest.mark.parametrize(
    ("headers", "there", "allowed"),
    [
        ({"If-Match": '"{version}"'}, True, True),
        ({"If-Match": '"0000000000000000"'}, True, False),
        ({"If-Match": '"0000000000000000", "{version}"'}, True, True),
        ({"If-Match": "{version}"}, True, True),
        ({"If-Match": 'W/"{version}"'}, True, False),
        ({"If-Match": "*"}, True, True),
        ({"If-Match": "*"}, False, False),
        ({"If-Match": '"{version}"'}, False, False),
        ({"If-Match": ""}, True, False),
        ({"If-None-Match": "*"}, True, False),
        ({"If-None-Match": "*"}, False, True),
        ({"If-None-Match": '"{version}"'}, True, False),
        ({"If-None-Match": '"0000000000000000"'}, True, True),
    ],
)
async def test_conditions(server: Server, headers: dict[str, str], there: bool, allowed: bool) -> None:
    version = (await put(server, "a", "one")).json()["version"]
    if there:
        await put(server, "a", "two")
        version = (await put(server, "a", "one")).json()["version"]
    else:
        await server.client.delete("/v1/adapters/a")
    headers = {key: value.format(version=version) for key, value in headers.items()}
    calls = [lambda: put(server, "a", "three", headers=headers)]
    if there:
        calls += [
            lambda: server.client.post("/v1/adapters/a/rollback", headers=headers),
            lambda: server.client.delete("/v1/adapters/a", headers=headers),
        ]
    before = [version and (v.version_id, v.state) for v in _versions(server)]
    for call in calls[:1] if allowed else calls:
        answer = await call()
        if allowed:
            assert answer.status_code == 200, answer.text
        else:
            error_of(answer, 412, "precondition_failed")
            assert [(v.version_id, v.state) for v in _versions(server)] == before


def _versions(server: Server) -> list[Any]:
    return [v for adapter in server.world.registry.adapters().values() for v in adapter.versions()]


async def test_of_two_who_saw_the_same_version_one_replaces_it(server: Server) -> None:
    headers = {"If-Match": f'"{(await put(server, "a", "zero")).json()["version"]}"'}
    answers = await asyncio.gather(*(put(server, "a", source, headers=headers) for source in ("one", "two")))
    assert sorted(answer.status_code for answer in answers) == [200, 412]
    fresh = {"If-None-Match": "*"}
    answers = await asyncio.gather(*(put(server, "b", source, headers=fresh) for source in ("one", "two")))
    assert sorted(answer.status_code for answer in answers) == [200, 412]


async def test_rollback_needs_something_to_roll_back_to(server: Server) -> None:
    await put(server, "a", "one")
    error_of(await server.client.post("/v1/adapters/a/rollback"), 409, "no_previous_version")
    for verb in ("rollback", "pin", "unpin"):
        error_of(await server.client.post(f"/v1/adapters/nobody/{verb}"), 404, "model_not_found")


async def test_delete_says_whether_requests_still_run(server: Server) -> None:
    await put(server, "a")
    version = await server.world.hold("a")
    card = (await server.client.delete("/v1/adapters/a")).json()
    assert (card["state"], card["leases"], card["resident_bytes"]) == ("draining", 1, 1000)
    server.world.registry.release(version)


@pytest.mark.parametrize("name", [BASE, f"{BASE}:a"])
async def test_the_base_keeps_its_name(server: Server, name: str) -> None:
    error_of(await put(server, name, "a"), 409, "adapter_name_taken")


@pytest.mark.parametrize("path", ["/etc", "../x", "~root", "a\0b", ""])
async def test_a_path_outside_the_roots_is_403(server: Server, path: str) -> None:
    source = path if path.startswith("~") else str(server.root.parent / path) if not path else str(server.root / path)
    answer = await server.client.put("/v1/adapters/a", json={"source": source})
    assert error_of(answer, 403, "adapter_path_not_allowed")["param"] == "source"
    assert server.world.prepare.read == []


@pytest.mark.parametrize(
    "body",
    [None, [], {}, {"source": 7}, {"source": None}, {"source": "x", "pinned": "yes"}, {"source": "x", "pined": True}],
    ids=str,
)
async def test_a_bad_body_is_422(server: Server, body: Any) -> None:
    error_of(await server.client.put("/v1/adapters/a", json=body), 422, "invalid_request")
    assert server.world.registry.adapters() == {}


@pytest.mark.parametrize("name", ["-a", "a b", "a%00", "a@1", "%C3%A4", "x" * 129])
async def test_a_bad_name_is_422(server: Server, name: str) -> None:
    error_of(await server.client.put(f"/v1/adapters/{name}", json={"source": "x"}), 422, "invalid_request")


@pytest.mark.parametrize("wait", ["-1", "nan", "inf", "1e9", "soon", ""])
async def test_a_bad_wait_is_422(server: Server, wait: str) -> None:
    error_of(await put(server, "a", wait=wait), 422, "invalid_request")


async def test_no_answer_shows_a_path_of_the_host(server: Server) -> None:
    folder = server.root / "missing"
    server.world.prepare.errors[folder] = AdapterCorrupt(f"Adapter folder '{folder}' is broken.", hint="Look.")
    answers = [
        await put(server, "a"),
        await put(server, "missing"),
        await put(server, "a", "missing"),
        await put(server, "x", "../outside"),
        await server.client.get("/v1/adapters"),
        await server.client.get("/v1/adapters/a"),
        await server.client.get("/v1/adapters/missing"),
        await server.client.get("/v1/models"),
        await server.client.post("/v1/adapters/a/rollback"),
        await server.client.delete("/v1/adapters/a"),
    ]
    for answer in answers:
        assert server.root.name not in answer.text
        assert CACHE.name not in answer.text


async def test_a_caller_with_an_allow_list_sees_its_adapters_only(server: Server) -> None:
    for name in ("sql", "legal-1", "secret"):
        await put(server, name)
    server.app.state.caller = Caller("team", admin=False, adapters=("sql", "legal-*"))

    async def with_caller(scope: Any, receive: Any, send: Any) -> None:
        scope.setdefault("state", {})["loramux_caller"] = server.app.state.caller
        await server.app(scope, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(with_caller), base_url="http://test") as client:
        adapters = (await client.get("/v1/adapters")).json()["data"]
        models = (await client.get("/v1/models")).json()["data"]
    assert [card["name"] for card in adapters] == ["sql", "legal-1"]
    assert [card["id"] for card in models] == [BASE, "sql", "legal-1"]


def test_sources_are_paths(tmp_path: Path) -> None:
    """A source of the API may be a native file too: nothing in the routes asks for a folder."""
    from loramux.http.adapters import PutAdapter

    assert PutAdapter.model_validate({"source": str(tmp_path / "a.safetensors")}).source.suffix == ".safetensors"
