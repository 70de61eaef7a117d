"""Adapters come and go while others decode; a full pool answers clearly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.engine

BASE = "smollm2-135m-instruct"


def _complete(server: Any, model: str, prompt: str, tokens: int = 40) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def _load(server: Any, path: Path, name: str = "", **options: Any) -> Any:
    return server.post("/v1/load_lora_adapter", {"lora_name": name or path.name, "lora_path": str(path), **options})


def test_loading_changes_no_token_of_running_requests(server: Any, spare_adapters: Path) -> None:
    rows = [(BASE, "The lighthouse"), ("spam", "Dear friend"), ("news", "In the final minute"), ("sarcasm", "Area man")]

    def answers(meanwhile: Any = lambda: None) -> list[str]:
        with ThreadPoolExecutor(len(rows)) as pool:
            running = [pool.submit(_complete, server, model, prompt) for model, prompt in rows]
            meanwhile()
            assert not all(r.done() for r in running), "the loads came too late to disturb anything"
            return [r.result() for r in running]

    def load_and_unload() -> None:
        for i in (0, 1):
            assert _load(server, spare_adapters / f"spare{i}").status_code == 200
        assert server.post("/v1/unload_lora_adapter", {"lora_name": "spare0"}).status_code == 200

    undisturbed = answers()
    assert answers(load_and_unload) == undisturbed
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "spare1"}).status_code == 200


def test_replace_in_place_and_unload(server: Any, spare_adapters: Path) -> None:
    prompt = "Once upon a time"
    assert _load(server, spare_adapters / "spare2", "swap").status_code == 200
    first = _complete(server, "swap", prompt)
    taken = _load(server, spare_adapters / "spare3", "swap")
    assert taken.status_code == 400 and taken.json()["error"]["code"] == "adapter_exists"
    assert _load(server, spare_adapters / "spare3", "swap", load_inplace=True).status_code == 200
    second = _complete(server, "swap", prompt)
    assert second != first, "the old version's answer, or its cached prefix"
    assert _load(server, spare_adapters / "spare2", "swap", load_inplace=True).status_code == 200
    assert _complete(server, "swap", prompt) == first
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "swap"}).status_code == 200
    gone = server.post("/v1/completions", {"model": "swap", "prompt": prompt})
    assert gone.status_code == 404 and gone.json()["error"]["code"] == "model_not_found"


def test_running_request_survives_its_adapters_unload(server: Any, spare_adapters: Path) -> None:
    assert _load(server, spare_adapters / "spare1", "leaver").status_code == 200
    tokens = 400  # it has to be running still when the unload arrives
    expected = _complete(server, "leaver", "The lighthouse", tokens)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_complete, server, "leaver", "The lighthouse", tokens)
        while 'in_flight{adapter="leaver"} 1.0' not in server.get("/metrics").text:
            assert not running.done()
        unloaded = server.post("/v1/unload_lora_adapter", {"lora_name": "leaver"})
        assert unloaded.status_code == 200 and unloaded.json()["model"]["adapter"]["state"] == "draining"
        assert running.result() == expected


def test_small_pool(small_server: Any, spare_adapters: Path) -> None:
    """Room for one adapter of rank 16, or for two of ranks 12 and 4: they take turns, and no answer shows it."""
    server, prompt = small_server, "The lighthouse"

    def state(name: str) -> str:
        return str(server.get(f"/v1/adapters/{name}").json()["state"])

    expected = {}
    for name in ("spare3", "spare2", "spare0"):
        assert _load(server, spare_adapters / name).status_code == 200
        expected[name] = _complete(server, name, prompt)
    assert len(set(expected.values())) == 3
    assert [state(name) for name in expected] == ["host", "resident", "resident"]

    with ThreadPoolExecutor(3) as pool:
        running = {name: pool.submit(_complete, server, name, prompt) for name in ("spare2", "spare0")}
        waiting = pool.submit(_load, server, spare_adapters / "spare3", load_inplace=True)
        assert {name: r.result() for name, r in running.items()} == {n: expected[n] for n in running}
        assert waiting.result().status_code == 200
    for name in (*expected, *expected):  # each needs the room that another has
        assert _complete(server, name, prompt) == expected[name]

    assert server.post("/v1/adapters/spare3/pin", {}).json()["pinned"]
    _complete(server, "spare3", prompt)
    full = server.post("/v1/completions", {"model": "spare2", "prompt": prompt})
    assert full.status_code == 503 and full.json()["error"]["code"] == "adapter_memory_full"
    assert "--adapter-memory" in full.json()["error"]["hint"] and int(full.headers["retry-after"]) > 0
    assert not server.post("/v1/adapters/spare3/unpin", {}).json()["pinned"]
    assert _complete(server, "spare2", prompt) == expected["spare2"]
    memory = server.get("/v1/adapters").json()["memory"]
    assert memory["resident"] == 1 and memory["used_bytes"] <= memory["capacity_bytes"]


def test_swap_by_version_and_rollback(server: Any, spare_adapters: Path) -> None:
    """Both versions can be called; the name means the new one, then the old one again."""
    prompt = "Once upon a time"

    def put(source: str) -> Any:
        body = {"source": str(spare_adapters / source)}
        return httpx.put(f"{server.url}/v1/adapters/swapped", json=body, timeout=60).json()

    one = put("spare1")["version"]
    first = _complete(server, "swapped", prompt)
    two = put("spare2")
    assert (two["previous"], two["state"]) == (one, "resident")
    second = _complete(server, "swapped", prompt)
    assert second != first
    for spelling, answer in ((f"swapped@{one[:8]}", first), (f"{BASE}:swapped", second)):
        body = {"model": spelling, "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        got = server.post("/v1/completions", body).json()
        assert (got["model"], got["choices"][0]["text"]) == (spelling, answer)
    assert server.post("/v1/adapters/swapped/rollback", {}).json()["version"] == one
    assert _complete(server, "swapped", prompt) == first
    assert httpx.delete(f"{server.url}/v1/adapters/swapped", timeout=60).status_code == 200
