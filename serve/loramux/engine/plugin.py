"""Our endpoint plugin: vLLM calls it once when it builds its app, once when the engine is up."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from loramux.config import LOAD_PATIENCE_S
from loramux.engine.client import EngineDataPlane
from loramux.engine.lora_gauge import bound_lora_gauge
from loramux.engine.names import EngineDirectory
from loramux.engine.reads import Reads
from loramux.engine.uncertainty import Uncertainty
from loramux.http import Services, attach
from loramux.metrics import (
    AdapterMetrics,
    ReliabilityMetrics,
    RoutingMetrics,
    RoutingWatch,
    UncertaintyMetrics,
    instrument,
)
from loramux.registry import AdapterRegistry, Compose, Given, Posteriors, Prepare, Store
from loramux.uncertainty.calibration import Calibrations
from loramux.uncertainty.recent import Recent


@dataclass
class Launch:
    """What `loramux serve` decided before the engine started; travels on vLLM's namespace as `args.loramux`."""

    base: str
    prepare: Prepare
    compose: Compose
    posteriors: Posteriors
    store: Store
    adapters: dict[str, Given]
    roots: tuple[Path, ...] = ()
    patience_s: float = LOAD_PATIENCE_S
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
        metrics = AdapterMetrics()
        metrics.build_info(launch.base)
        stats = await data_plane.stats()
        registry = AdapterRegistry(
            base=launch.base,
            aliases=args.served_model_name[1:],
            prepare=launch.prepare,
            compose=launch.compose,
            posteriors=launch.posteriors,
            data_plane=data_plane,
            observer=metrics,
            store=launch.store,
            capacity_bytes=stats["capacity_bytes"],
            roots=launch.roots,
            patience_s=launch.patience_s,
        )
        metrics.watch_pool(stats["capacity_bytes"], registry.resident_bytes, stats["overhead_bytes"])
        bound_lora_gauge(engine_client)
        EngineDirectory(state.openai_serving_models, registry)
        routing = RoutingWatch(engine_client, RoutingMetrics(metrics.labels))
        instrument(engine_client, registry, metrics)
        by_priority = engine_client.vllm_config.scheduler_config.policy == "priority"
        reads = Reads(engine_client, await data_plane.score_rows(), by_priority=by_priority)
        max_model_len = engine_client.model_config.max_model_len
        observer = UncertaintyMetrics(metrics.labels)
        bfloat16 = str(engine_client.model_config.dtype) == "torch.bfloat16"
        calibrations, recent = Calibrations(launch.store), Recent()
        ReliabilityMetrics(metrics.labels, recent, calibrations)
        surroundings = (registry, reads, calibrations, recent, observer)
        Uncertainty(engine_client, *surroundings, max_model_len=max_model_len, bfloat16=bfloat16)
        state.loramux = Services(
            registry=registry,
            base=launch.base,
            max_model_len=max_model_len,
            pool_stats=data_plane.stats,
            tokenizer=engine_client.renderer.tokenizer,
            calibrations=calibrations,
            recent=recent,
        )
        await registry.start(launch.adapters)
        loop = asyncio.get_running_loop()
        announce = loop.create_task(_announce(args, lambda: launch.ready(registry)))
        state.loramux_tasks = (announce, loop.create_task(routing.run()))  # keeps them alive


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
