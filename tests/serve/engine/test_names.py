"""What vLLM's server finds when it looks a model up."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramux.engine.names import EngineDirectory
from loramux.errors import AdapterNotFound
from loramux.http.composition import Composed, answered_by
from loramux.registry import Given, Share, State

from ..fakes import BASE, World, until


class Models:
    """Stands in for OpenAIServingModels, asked as vLLM's serving classes ask it."""

    def __init__(self, world: World) -> None:
        self.lora_requests: Any = {}
        self.resolve_lora: Any = None
        self.model_name: Any = None
        self.base_model_paths = [SimpleNamespace(name=BASE)]
        EngineDirectory(self, world.registry)

    async def check(self, model: str) -> None:
        if model not in self.lora_requests:
            await self.resolve_lora(model)

    def get(self, model: str) -> Any:
        return self.lora_requests.get(model)


async def test_what_is_resident_is_found_at_once_in_every_spelling() -> None:
    world = World()
    models = Models(world)
    version = await world.load("a")
    for spelling in ("a", f"a@{version.digest}", f"{BASE}:a", f"{BASE}:a@{str(version.digest)[:6]}"):
        assert spelling in models.lora_requests
        request = models.get(spelling)
        assert (request.lora_name, request.lora_int_id) == (version.tag, version.version_id)
        assert models.model_name(request) == spelling
        assert models.get(spelling) is not request  # an answer is held to one version by its request
    assert "b" not in models.lora_requests and models.get("b") is None and 7 not in models.lora_requests
    with pytest.raises(KeyError):
        models.lora_requests["b"]
    assert models.model_name() == models.model_name(None) == BASE


async def test_what_is_not_there_yet_is_waited_for() -> None:
    world = World()
    models = Models(world)
    await world.registry._startup.restore({"a": Given(Path("/adapters/a"))})
    assert "a" not in models.lora_requests
    await models.check("a")
    assert models.get("a").lora_name == world.current("a").tag
    with pytest.raises(AdapterNotFound):
        await models.check("b")


async def test_what_was_found_stays_found_though_it_was_evicted_meanwhile() -> None:
    """Between vLLM's two look-ups; the lease brings it back. For other requests it has to be waited for."""
    world = World(capacity=1000)
    models = Models(world)
    version = await world.load("a")
    await world.load("b")

    async def request() -> Any:
        await models.check("a")
        await world.load("b", replace=True)
        await until(lambda: version.state is State.HOST)
        return models.get("a")

    assert (await asyncio.create_task(request())).lora_int_id == version.version_id
    assert models.get("a") is None


async def test_what_was_resident_stays_found_too() -> None:
    """It was there at the first look-up and needed no waiting, and is evicted before the second."""
    world = World(capacity=1000)
    models = Models(world)
    version = await world.load("a")

    async def request() -> Any:
        assert "a" in models.lora_requests
        await world.load("b")
        assert version.state is State.HOST
        return models.get("a")

    assert (await asyncio.create_task(request())).lora_int_id == version.version_id
    assert models.get("a") is None


async def test_the_name_means_the_new_version_at_once() -> None:
    world = World()
    models = Models(world)
    one = await world.load("a", "one")
    two = await world.load("a", "two", replace=True)
    assert models.get("a").lora_int_id == two.version_id
    assert models.get(f"a@{one.digest}") is None  # it drains; to be asked for
    await world.registry.delete("a")
    assert models.get("a") is None


async def test_a_sum_is_found_by_its_request_alone_and_called_what_was_written() -> None:
    world = World()
    models = Models(world)
    await world.load("a")
    async with world.registry.composed([Share("a", 0.5)]) as (version, _):
        token = answered_by.set(Composed(version, BASE))
        request = models.get(version.tag)
        assert (request.lora_name, request.lora_int_id) == (version.tag, version.version_id)
        assert models.model_name(request) == BASE
        assert BASE not in models.lora_requests and models.model_name(models.get("a")) == "a"
        answered_by.reset(token)
        assert version.tag not in models.lora_requests
        with pytest.raises(AdapterNotFound):
            await models.check(version.tag)
