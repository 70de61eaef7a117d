"""Many more adapters than fit, Zipf traffic: every answer is that adapter's own, and nothing leaks."""

from __future__ import annotations

import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from loramux_adapters import BaseModel

from ...adapters.hooks import hooked
from ..conftest import run_server
from ..hugging_face import encode, load, lora_deltas
from .conftest import MakeAdapter, complete, put

ADAPTERS, FIT = 60, 8
REQUESTS, CLIENTS = 900, 6
TOKENS = 16
CYCLES, WARM_CYCLES = 2000, 400
#: Python's and the allocator's own noise; 2,000 adapters of 1 MiB that leaked would be 2 GiB.
LEAK_MIB = 48


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, make_adapter: MakeAdapter) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("churn")
    return {f"a{i}": make_adapter(folder / f"a{i}", seed=i, rank=2 + i % 3) for i in range(ADAPTERS)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, adapters: dict[str, Path], base_model: BaseModel) -> Any:
    one = sum(4 * (i + o) * 4 for name, (i, o) in base_model.linears.items() if name.endswith(("q_proj", "v_proj")))
    folder = next(iter(adapters.values())).parent
    flags = ("--adapter-memory", str(int(one * FIT * 1.05)), "--adapters", str(folder), "--adapter-root", str(folder))
    with run_server(tmp_path_factory.mktemp("churn-log") / "log", *flags) as server:
        yield server


@pytest.fixture(scope="module")
def expected(adapters: dict[str, Path], base_path: Path) -> dict[str, str]:
    """Greedy text of each adapter, from forward hooks on the Hugging Face model: y += 2 · B (A x)."""
    from transformers import AutoTokenizer

    model, tokenizer = load(base_path, torch.float32), AutoTokenizer.from_pretrained(base_path)
    (prompt,) = encode(base_path, ("Write a line about a lighthouse.",))
    texts = {}
    for name, path in adapters.items():
        with hooked(model, lora_deltas(path, scale=2)):
            ids = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=TOKENS,
                do_sample=False,
            )
        texts[name] = tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
    return texts


def test_zipf_traffic_over_sixty_adapters_in_room_for_eight(
    server: Any, expected: dict[str, str], base_path: Path
) -> None:
    (prompt,) = encode(base_path, ("Write a line about a lighthouse.",))
    rng = random.Random(0)
    names = list(expected)
    rng.shuffle(names)
    asked = [*names, *rng.choices(names, [1 / (n + 1) for n in range(len(names))], k=REQUESTS - len(names))]
    with httpx.Client(base_url=server.url, timeout=300) as client, ThreadPoolExecutor(CLIENTS) as pool:
        answers = pool.map(lambda name: (name, complete(client, name, prompt, TOKENS)), asked)
        wrong = [(name, text) for name, text in answers if text != expected[name]]
        assert not wrong, f"{len(wrong)} of {REQUESTS}: {wrong[:3]}"
        metrics = client.get("/metrics").text
    evictions = sum(float(n) for n in re.findall(r"^loramux_adapter_evictions_total\S* (\S+)", metrics, re.MULTILINE))
    assert evictions > 0, "nothing was evicted: the pool was not under pressure"
    assert len(set(expected.values())) > ADAPTERS * 0.9, "the adapters must differ"


def test_two_thousand_loads_leave_nothing_behind(server: Any, adapters: dict[str, Path]) -> None:
    names = [f"a{i}" for i in range(4)]
    with httpx.Client(base_url=server.url, timeout=120) as client:
        sizes = []
        for cycle in range(CYCLES):
            name = names[cycle % len(names)]
            answer = put(client, "cycle", adapters[name])
            assert answer.status_code == 200, answer.text
            if cycle % 50 == 0:
                complete(client, "cycle", "The lighthouse", 2)
            assert client.delete("/v1/adapters/cycle").status_code == 200
            if cycle >= WARM_CYCLES and cycle % 100 == 0:
                sizes.append(_resident_mib(server.process.pid))
        memory = client.get("/v1/adapters").json()["memory"]
    assert memory["used_bytes"] <= memory["capacity_bytes"]
    grown = max(sizes[-3:]) - min(sizes[:3])
    assert grown < LEAK_MIB, f"resident memory by 100 cycles, MiB: {[round(s) for s in sizes]}"


def _resident_mib(pid: int) -> float:
    """Resident memory of a process and its descendants."""
    total = int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) / 1024
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        total += sum(_resident_mib(int(child)) for child in children.read_text().split())
    return total
