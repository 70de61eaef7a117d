"""Campaigns: minutes of churn against a real server. `make campaign`; left out of `make test`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from loramux_adapters import BaseModel

MakeAdapter = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.campaign)


@pytest.fixture(scope="session")
def make_adapter(base_model: BaseModel) -> MakeAdapter:
    """Write a plain LoRA with random weights: same seed, same adapter. Strong enough that answers differ early."""

    def make(path: Path, *, seed: int, rank: int = 4, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> Path:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, (d_in, d_out) in base_model.linears.items():
            if name.endswith(targets):
                key = f"base_model.model.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) * 0.05
                tensors[f"{key}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) * 0.15
        path.mkdir(parents=True)
        save_file(tensors, path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets)}
        (path / "adapter_config.json").write_text(json.dumps(config))
        return path

    return make


def put(client: httpx.Client, name: str, source: Path, **query: Any) -> httpx.Response:
    return client.put(f"/v1/adapters/{name}", json={"source": str(source)}, params=query)


def complete(client: httpx.Client, model: str, prompt: str | list[int], tokens: int) -> str:
    """Greedy text of exactly so many tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])
