"""Expert load and router entropy: sampled per adapter for Prometheus, in full for a request that asks.

    mean entropy, nats = rate(loramux_router_entropy_nats_total) / rate(loramux_router_decisions_total)
    load of expert e   = rate(loramux_expert_weight_total{expert="e"}) / rate(loramux_router_decisions_total)

A decision is one token at one router. The worker counts them (`loramux.engine.routing`); here they get names.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter

from loramux.metrics.labels import Labels
from loramux.rpc import Engine, call

logger = logging.getLogger(__name__)

#: Key of `SamplingParams.extra_args` whose value is a tag: tells the worker to report on the request.
REQUEST_KEY = "loramux_routing"
POLL_S = 5.0
#: Versions whose samples can be named; far more than a device holds.
_MAX_NAMES = 4096


@dataclass
class Report:
    """What a request's routers decided; filled when its answer is complete. None: it met no router.

    The engine may answer it by several requests of its own, one for each choice or prompt: they are counted together.
    """

    value: dict[str, Any] | None = None
    tag: str = field(default_factory=lambda: uuid.uuid4().hex)
    running: int = 0  # requests in the engine


#: Set by whoever wants the report of the requests that start in this context.
wanted: ContextVar[Report | None] = ContextVar("loramux_routing_wanted", default=None)


class RoutingMetrics:
    """Counters of what routers decided. `labels` bounds the number of adapters that have series of their own."""

    def __init__(self, labels: Labels, registry: CollectorRegistry = REGISTRY) -> None:
        self._series = labels.series
        self._decisions = Counter(
            "loramux_router_decisions", "Sampled decisions: a token at a router.", ["adapter"], registry=registry
        )
        self._entropy = Counter(
            "loramux_router_entropy_nats",
            "Entropy of the router's softmax, summed over sampled decisions.",
            ["adapter"],
            registry=registry,
        )
        self._selected = Counter(
            "loramux_expert_decisions",
            "Sampled decisions that selected the expert.",
            ["adapter", "expert"],
            registry=registry,
        )
        self._weight = Counter(
            "loramux_expert_weight",
            "Share of the experts' weight, summed over sampled decisions.",
            ["adapter", "expert"],
            registry=registry,
        )

    def add(self, name: str, sums: dict[str, Any]) -> None:
        self._series(self._decisions, name).inc(sums["decisions"])
        self._series(self._entropy, name).inc(sums["entropy"])
        for family, values in ((self._selected, sums["selected"]), (self._weight, sums["weight"])):
            for expert, value in enumerate(values):
                self._series(family, name, str(expert)).inc(value)


class RoutingWatch:
    """Wraps one engine client's `generate`, and collects what the worker sampled.

    Install it before leases are (`instrument`): it must see the version that a request runs on.
    """

    def __init__(self, engine: Engine, metrics: RoutingMetrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._names: dict[int, str] = {}  # version id -> adapter
        self._running = 0
        self._idle = True  # nothing ran since the last collection
        self._inner = engine.generate
        engine.generate = self._generate

    async def _generate(
        self, prompt: Any, sampling_params: Any, *args: Any, lora_request: Any = None, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        report: Report | None = None
        # vLLM's server may hand over a request that was processed already, with its adapter in it.
        version: Any = lora_request or getattr(prompt, "lora_request", None)
        if version is not None:
            self._remember(version)
            if (report := wanted.get()) is not None:
                report.running += 1
                for params in (sampling_params, getattr(prompt, "sampling_params", None)):
                    if params is not None:
                        params.extra_args = {**(params.extra_args or {}), REQUEST_KEY: report.tag}
        self._running += 1
        self._idle = False
        try:
            async with aclosing(
                self._inner(prompt, sampling_params, *args, lora_request=lora_request, **kwargs)
            ) as stream:
                async for output in stream:
                    if report is not None and output.finished:
                        ended, report = report, None
                        ended.running -= 1
                        if not ended.running:
                            ended.value = await self._report(ended.tag, version.lora_name)
                    yield output
        finally:
            self._running -= 1
            if report is not None:  # it ended early: what was counted is dropped
                report.running -= 1
                if not report.running:
                    with suppress(Exception):
                        await call(self._engine, "loramux_routing_report", report.tag)

    async def collect(self) -> None:
        """Add to the metrics what was sampled since the last call. An idle engine is left alone."""
        if self._idle:
            return
        self._idle = self._running == 0
        for version_id, sums in (await call(self._engine, "loramux_routing")).items():
            if (name := self._names.get(int(version_id))) is not None:
                self._metrics.add(name, sums)

    async def run(self, every_s: float = POLL_S) -> None:
        """Collect for ever."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.collect()
            except Exception as error:  # the engine is restarting or gone; its own health check says so
                logger.warning("router statistics were not collected: %s", error)

    def _remember(self, lora_request: Any) -> None:
        self._names.pop(lora_request.lora_int_id, None)
        while len(self._names) >= _MAX_NAMES:  # the one that was used longest ago
            del self._names[next(iter(self._names))]
        self._names[lora_request.lora_int_id] = lora_request.lora_name.rpartition("@")[0]

    async def _report(self, tag: str, version: str) -> dict[str, Any] | None:
        try:
            sums = await call(self._engine, "loramux_routing_report", tag)
        except Exception as error:  # an answer is worth more than its statistics
            logger.warning("no routing report: %s", error)
            return None
        if not sums or not sums["decisions"]:
            return None
        n = sums["decisions"]
        return {
            "adapter": version,
            "tokens": sums["tokens"],
            "decisions": n,
            "entropy_nats": sums["entropy"] / n,
            "experts": [
                {"expert": e, "weight": weight / n, "selected": selected / n}
                for e, (weight, selected) in enumerate(zip(sums["weight"], sums["selected"], strict=True))
            ],
        }
