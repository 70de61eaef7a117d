"""Somebody who serves LoRA adapters with vLLM changes one command: its documented flags and requests, as they are.

Flags and requests are those of vLLM's page on LoRA adapters: serving, `/v1/models`, completions, loading, replacing in
place and unloading. Only `--adapter-root` is new: requests may load from there and from nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import run_server

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory: pytest.TempPathFactory, spare_adapters: Path) -> Iterator[Any]:
    lineage = {"name": "json-lora", "path": str(spare_adapters / "spare1"), "base_model_name": "smollm2-135m-instruct"}
    flags = (
        "--enable-lora",
        "--max-loras",
        "4",
        "--max-lora-rank",
        "64",
        "--max-cpu-loras",
        "8",
        "--lora-dtype",
        "auto",
    )
    modules = ("--lora-modules", f"sql-lora={spare_adapters / 'spare0'}", json.dumps(lineage))
    root = ("--adapter-root", str(spare_adapters))
    with run_server(tmp_path_factory.mktemp("vllm") / "log", *flags, *modules, *root) as server:
        yield server


def _complete(server: Any, model: str) -> Any:
    return server.post(
        "/v1/completions", {"model": model, "prompt": "San Francisco is a", "max_tokens": 7, "temperature": 0}
    )


def test_models_of_the_command_line(vllm_server: Any) -> None:
    cards = {card["id"]: card for card in vllm_server.get("/v1/models").json()["data"]}
    assert set(cards) == {"smollm2-135m-instruct", "sql-lora", "json-lora"}
    assert cards["sql-lora"]["object"] == "model" and cards["sql-lora"]["parent"] == "smollm2-135m-instruct"
    texts = {name: _complete(vllm_server, name).json()["choices"][0]["text"] for name in cards}
    assert len(set(texts.values())) == 3


def test_loading_replacing_and_unloading(vllm_server: Any, spare_adapters: Path) -> None:
    body = {"lora_name": "sql_adapter", "lora_path": str(spare_adapters / "spare2")}
    loaded = vllm_server.post("/v1/load_lora_adapter", body)
    assert loaded.status_code == 200 and "sql_adapter" in loaded.text
    first = _complete(vllm_server, "sql_adapter").json()["choices"][0]["text"]

    body = {"lora_name": "sql_adapter", "lora_path": str(spare_adapters / "spare3"), "load_inplace": True}
    assert vllm_server.post("/v1/load_lora_adapter", body).status_code == 200
    assert _complete(vllm_server, "sql_adapter").json()["choices"][0]["text"] != first

    unloaded = vllm_server.post("/v1/unload_lora_adapter", {"lora_name": "sql_adapter"})
    assert unloaded.status_code == 200 and "sql_adapter" in unloaded.text
    gone = _complete(vllm_server, "sql_adapter")
    assert gone.status_code == 404 and gone.json()["error"]["param"] == "model"


def test_errors_have_the_statuses_that_vllm_gives(vllm_server: Any, spare_adapters: Path) -> None:
    missing = {"lora_name": "none", "lora_path": str(spare_adapters / "nowhere")}
    assert vllm_server.post("/v1/load_lora_adapter", missing).status_code == 404
    taken = {"lora_name": "sql-lora", "lora_path": str(spare_adapters / "spare2")}
    assert vllm_server.post("/v1/load_lora_adapter", taken).status_code == 400
    assert vllm_server.post("/v1/unload_lora_adapter", {"lora_name": "nobody"}).status_code == 404


def test_its_own_metrics_are_still_there(vllm_server: Any) -> None:
    metrics = vllm_server.get("/metrics").text
    assert "vllm:lora_requests_info" in metrics and "vllm:num_requests_running" in metrics
