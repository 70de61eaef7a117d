"""Our routes on a plain FastAPI app, over a registry with fakes around it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from loramux.errors import AdapterRefused, PoolExhausted
from loramux.registry import Given, State
from loramux_adapters import AdapterCorrupt

from ..fakes import BASE, CACHE, until
from .serving import Server, error_of


async def test_core_routes_of_the_same_path_and_method_give_way(server: Server) -> None:
    assert (await server.client.get("/v1/models")).json()["object"] == "list"
    assert (await server.load("a")).status_code == 200
    assert (await server.client.get("/v1/load_lora_adapter")).json() == "other method"


async def test_models_lists_the_base_and_every_adapter_with_its_state(server: Server) -> None:
    server.world.prepare.errors[server.root / "bad"] = AdapterCorrupt("Broken.", hint="Copy it again.")
    await server.load("a")
    await server.load("bad")
    listed = (await server.client.get("/v1/models")).json()
    cards = {card["id"]: card for card in listed["data"]}
    assert list(cards) == [BASE, "a", "bad"]
    assert all(card["object"] == "model" and card["max_model_len"] == 4096 for card in cards.values())
    assert "adapter" not in cards[BASE]
    assert cards["a"]["parent"] == BASE
    assert cards["a"]["root"] == f"a@{cards['a']['adapter']['version']}"
    assert cards["a"]["adapter"]["state"] == "resident"
    assert cards["a"]["adapter"]["resident_bytes"] == 1000
    assert cards["bad"]["adapter"]["state"] == "failed"
    assert cards["bad"]["adapter"]["error"]["code"] == "adapter_corrupt"


async def test_no_answer_shows_a_path_of_the_host(server: Server) -> None:
    folder = server.root / "missing"
    server.world.prepare.errors[folder] = AdapterCorrupt(f"Adapter folder '{folder}' is broken.", hint="Look.")
    server.world.prepare.errors[server.root / "locked"] = PermissionError(13, "Permission denied", str(folder))
    answers = [
        await server.load("a"),
        await server.load("a"),
        await server.load("missing"),
        await server.load("locked"),
        await server.post("/v1/load_lora_adapter", lora_name="x", lora_path="/etc"),
        await server.client.get("/v1/models"),
        await server.client.get("/v1/models/a"),
        await server.client.get("/v1/models/missing"),
        await server.client.get("/health/ready"),
        await server.post("/v1/unload_lora_adapter", lora_name="a"),
    ]
    for answer in answers:
        assert server.root.name not in answer.text
        assert CACHE.name not in answer.text


@pytest.mark.parametrize("name", ["a", "team/a", "team:a.v1"])
async def test_one_model_by_name(server: Server, name: str) -> None:
    await server.load(name)
    card = (await server.client.get(f"/v1/models/{name}")).json()
    assert card in (await server.client.get("/v1/models")).json()["data"]
    assert card["id"] == name
    assert (await server.client.get(f"/v1/models/{BASE}")).json()["id"] == BASE


async def test_an_unknown_model_is_404_and_proposes_one(server: Server) -> None:
    await server.load("support-bot")
    error = error_of(await server.client.get("/v1/models/suport-bot"), 404, "model_not_found")
    assert "support-bot" in error["hint"]


async def test_load_twice_then_in_place_then_unload(server: Server) -> None:
    first = (await server.load("a")).json()
    assert first["message"] == "Success: LoRA adapter 'a' added successfully."
    error_of(await server.load("a"), 400, "adapter_exists")
    server.world.prepare.contents[server.root / "a"] = "new"
    second = (await server.load("a", load_inplace=True)).json()
    assert second["model"]["root"] != first["model"]["root"]
    gone = await server.post("/v1/unload_lora_adapter", lora_name="a", lora_int_id=7)
    assert gone.json()["model"]["adapter"]["state"] == "gone"
    error_of(await server.post("/v1/unload_lora_adapter", lora_name="a"), 404, "model_not_found")
    assert not server.world.data_plane.resident


async def test_unload_answers_while_requests_still_run(server: Server) -> None:
    await server.load("a")
    await server.world.hold("a")
    answer = await server.post("/v1/unload_lora_adapter", lora_name="a")
    assert (answer.status_code, answer.json()["model"]["adapter"]["state"]) == (200, "draining")


@pytest.mark.parametrize("path", ["/etc", "../x", "~root", "~nobody-has-this-name", "a\0b"])
async def test_a_path_outside_the_roots_is_403(server: Server, path: str) -> None:
    source = path if path.startswith("~") else str(server.root / path)
    answer = await server.post("/v1/load_lora_adapter", lora_name="x", lora_path=source)
    error_of(answer, 403, "adapter_path_not_allowed")
    assert server.world.prepare.read == []


@pytest.mark.parametrize("name", ["", "-a", "a b", "a\n", "a@1", "ä", "x" * 129, "../a", 7, None])
async def test_a_bad_name_is_422(server: Server, name: Any) -> None:
    answer = await server.post("/v1/load_lora_adapter", lora_name=name, lora_path=server.root / "a")
    error = error_of(answer, 422, "invalid_request")
    assert "lora_name" in error["message"]


async def test_the_full_pool_says_when_to_come_back(server: Server) -> None:
    server.world.data_plane.error = PoolExhausted("full", hint="Unload one.")
    answer = await server.load("a")
    error_of(answer, 503, "adapter_memory_full")
    assert int(answer.headers["retry-after"]) > 0


async def test_a_refused_adapter_keeps_the_code_of_its_check(server: Server) -> None:
    server.world.data_plane.error = AdapterRefused("No.", code="adapter_unservable", hint="Retrain it.")
    error = error_of(await server.load("a"), 400, "adapter_unservable")
    assert (error["type"], error["hint"]) == ("invalid_request_error", "Retrain it.")


async def test_not_ready_while_the_adapters_of_the_start_load_and_ready_ever_after(server: Server) -> None:
    world = server.world
    world.data_plane.gate.clear()
    start = asyncio.create_task(world.registry.start({"a": Given(server.root / "a")}))
    await until(lambda: world.state("a") is State.HOST)
    answer = await server.client.get("/health/ready")
    assert (answer.json()["status"], answer.json()["adapters"]) == ("loading", {"host": 1})
    error_of(answer, 503, "not_ready")
    world.data_plane.gate.set()
    await start
    answer = await server.client.get("/health/ready")
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ready",
        "base": BASE,
        "adapters": {"resident": 1},
        "adapter_memory": {"capacity_bytes": 10, "used_bytes": 4},
    }
    # One user's load must not take the server away from all others.
    world.data_plane.gate.clear()
    later = asyncio.create_task(server.load("b"))
    await until(lambda: world.state("b") is State.HOST)
    assert (await server.client.get("/health/ready")).status_code == 200
    world.data_plane.gate.set()
    await later


async def test_ready_tells_a_busy_engine_from_a_dead_one(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux.http.health._STATS_S", 0.01)

    async def busy() -> dict[str, int]:
        await asyncio.sleep(60)
        raise AssertionError

    async def dead() -> dict[str, int]:
        raise RuntimeError("EngineDeadError")

    await server.world.registry.start({})
    server.app.state.loramux.pool_stats = busy
    answer = await server.client.get("/health/ready")
    assert (answer.status_code, answer.json()["adapter_memory"]) == (200, None)
    server.app.state.loramux.pool_stats = dead
    answer = await server.client.get("/health/ready")
    assert answer.json()["status"] == "engine_down"
    error_of(answer, 503, "not_ready")
