"""Our endpoint plugin: vLLM calls it once when it builds its app, once when the engine is up."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from vllm.logger import init_logger

from loramux.engine.client import EngineDataPlane
from loramux.engine.names import EngineDirectory
from loramux.errors import LoramuxError
from loramux.http import Services, attach
from loramux.metrics import AdapterMetrics, instrument
from loramux.registry import AdapterRegistry
from loramux_adapters import Artefact

logger = init_logger("vllm.loramux")


@dataclass
class Launch:
    """What `loramux serve` decided before the engine started; travels on vLLM's namespace as `args.loramux`."""

    base: str
    prepare: Callable[[Path], Artefact]
    adapters: dict[str, Path]
    tolerated: frozenset[str] = frozenset()  # names whose failure is listed instead of ending the start
    roots: tuple[Path, ...] = ()
    ready: Callable[[AdapterRegistry], None] = field(default=lambda registry: None)


class LoramuxPlugin:
    """Implements vLLM's `EndpointPlugin`."""

    name = "loramux"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        attach(app)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Wire registry, metrics and names to the engine, and load the adapters of the start."""
        launch: Launch = args.loramux
        data_plane = EngineDataPlane(engine_client)
        directory = EngineDirectory(state.openai_serving_models)
        metrics = AdapterMetrics()
        registry = AdapterRegistry(
            base=launch.base,
            prepare=launch.prepare,
            data_plane=data_plane,
            directory=directory,
            observer=metrics,
            roots=launch.roots,
        )
        metrics.watch_pool((await data_plane.stats())["capacity_bytes"], registry.resident_bytes)
        directory.attach(registry)
        instrument(engine_client, registry, metrics)
        state.loramux = Services(
            registry=registry,
            base=launch.base,
            max_model_len=engine_client.model_config.max_model_len,
            pool_stats=data_plane.stats,
        )
        for name, source in launch.adapters.items():
            try:
                await registry.load(name, source)
            except LoramuxError as error:
                if name not in launch.tolerated:
                    raise
                logger.warning("adapter %s is not served: %s", name, error)
        announce = asyncio.get_running_loop().create_task(_announce(args, lambda: launch.ready(registry)))
        state.loramux_announce = announce  # keeps the task alive


def endpoint_plugin() -> LoramuxPlugin:
    """Entry point of the group `vllm.endpoint_plugins`."""
    return LoramuxPlugin()


async def _announce(args: Namespace, ready: Callable[[], None]) -> None:
    """Call `ready` once the port accepts connections."""
    host = "127.0.0.1" if args.host in (None, "0.0.0.0", "::") else args.host
    while True:
        try:
            _, writer = await asyncio.open_connection(host, args.port)
        except OSError:
            await asyncio.sleep(0.1)
            continue
        writer.close()
        ready()
        return
