"""Requests for an adapter with a capacity read no cached prefix; all others do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from loramux.engine.scheduler import LoramuxScheduler
from loramux_adapters.artefact import digest_of, write_artefact
from loramux_adapters.gate import Capacity, Gate
from loramux_adapters.lowered import LoweredAdapter, LoweredSite


def write(folder: Path, capacity: Capacity | None) -> str:
    site = LoweredSite(torch.ones(2, 8), torch.ones(2, 8), torch.ones(2), gate="g", expert=torch.arange(2).int())
    adapter = LoweredAdapter("sira", {"q": site}, gates={"g": Gate(torch.ones(2, 8), capacity=capacity)})
    return str(write_artefact(adapter, "base", digest_of(adapter), folder))


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Requests as vLLM's own scheduler gets them."""
    requests: list[Any] = []
    monkeypatch.setattr(AsyncScheduler, "add_request", lambda self, request: requests.append(request))
    return requests


def enter(path: str | None, skip: bool | None = False) -> None:
    lora = None if path is None else SimpleNamespace(lora_path=path)
    scheduler = object.__new__(LoramuxScheduler)
    scheduler.add_request(SimpleNamespace(lora_request=lora, skip_reading_prefix_cache=skip))


def test_only_a_capacity_keeps_a_request_from_the_cache(tmp_path: Path, entered: list[Any]) -> None:
    limited, free = write(tmp_path, Capacity(2)), write(tmp_path, None)
    for path in (None, free, limited, limited):
        enter(path)
    assert [request.skip_reading_prefix_cache for request in entered] == [False, False, True, True]


def test_who_asks_not_to_read_it_does_not(tmp_path: Path, entered: list[Any]) -> None:
    enter(write(tmp_path, None), skip=True)
    assert entered[0].skip_reading_prefix_cache is True


def test_what_cannot_be_read_is_computed_whole_and_asked_again(tmp_path: Path, entered: list[Any]) -> None:
    path = Path(write(tmp_path, None))
    content = path.read_bytes()
    path.unlink()
    enter(str(path))
    path.write_bytes(content)
    enter(str(path))
    assert [request.skip_reading_prefix_cache for request in entered] == [True, False]
