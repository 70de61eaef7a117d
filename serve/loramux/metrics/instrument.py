"""Measure and lease every request: a wrapper around one engine client's `generate`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from loramux.metrics.adapters import AdapterMetrics
from loramux.registry import AdapterRegistry, Version

Generate = Callable[..., AsyncGenerator[Any, None]]


def instrument(engine: Any, registry: AdapterRegistry, metrics: AdapterMetrics) -> None:
    """Replace `engine.generate` (on this instance) by one that holds a lease while it runs and counts.

    A request enters the engine only with a lease on a resident version, waiting for it if need be; the version stays
    in device memory until the last lease ends, whatever happens to its name meanwhile. A version that was replaced
    between the name's look-up and now gives way to the current one, unless the caller asked for it by its digest.
    Raises what `AdapterRegistry.lease` raises (from the generator).
    """
    inner: Generate = engine.generate

    async def generate(
        prompt: Any, sampling_params: Any, *args: Any, lora_request: Any = None, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        # vLLM's server may hand over a request that was processed already, with its adapter in it.
        processed = getattr(prompt, "lora_request", None)
        asked = lora_request or processed
        version = await leased(registry, asked) if asked is not None else None
        if processed is not None:
            prompt.lora_request = asked
        try:
            stream = inner(prompt, sampling_params, *args, lora_request=lora_request, **kwargs)
            measured = _measured(stream, version.name if version else registry.base, sampling_params, metrics)
            # Closed inside out, and not left to the garbage collector: vLLM aborts a request when its stream is
            # closed, and only then may the adapter be freed.
            async with aclosing(stream), aclosing(measured):
                async for output in measured:
                    yield output
        finally:
            if version is not None:
                registry.release(version)

    engine.generate = generate


async def leased(registry: AdapterRegistry, asked: Any) -> Version:
    """A lease on the version that `asked` names, or on the one that has taken its place; `asked` names it then.

    One answer may take several calls with the same request (beam search, tools): from the second on it wants exactly
    the version of the first.
    """
    spelling: str = asked.base_model_name or ""
    version = await registry.lease(asked.lora_name, exact="@" in spelling)
    assert version.artefact is not None
    asked.lora_name, asked.lora_int_id = version.tag, version.version_id
    asked.lora_path = str(version.artefact.path)
    if "@" not in spelling:
        asked.base_model_name = f"{spelling or version.name}@{version.digest}"
    return version


async def _measured(
    stream: AsyncGenerator[Any, None], name: str, sampling_params: Any, metrics: AdapterMetrics
) -> AsyncGenerator[Any, None]:
    request = _Request(delta=getattr(getattr(sampling_params, "output_kind", None), "name", "") == "DELTA")
    metrics.request_started(name)
    try:
        async for output in stream:
            request.observe(output, name, metrics)
            yield output
    except (GeneratorExit, asyncio.CancelledError):
        raise  # the client left: the outcome stays "abort" unless the answer was complete
    except BaseException:
        request.outcome = "error"
        raise
    finally:
        metrics.request_ended(name, request.outcome, request.prompt_tokens, request.generated)


class _Request:
    """What is known of one running request."""

    def __init__(self, *, delta: bool) -> None:
        self.outcome = "abort"
        self.prompt_tokens = 0
        self._finish_reason = "abort"
        self._delta = delta  # outputs carry new tokens only, not all so far
        self._tokens: dict[int, int] = {}  # choice index -> tokens so far
        self._last = time.monotonic()
        self._first_seen = False

    @property
    def generated(self) -> int:
        return sum(self._tokens.values())

    def observe(self, output: Any, name: str, metrics: AdapterMetrics) -> None:
        """Account for one output of the engine."""
        self.prompt_tokens = len(output.prompt_token_ids or ()) or self.prompt_tokens
        before = self.generated
        for choice in output.outputs:
            earlier = self._tokens.get(choice.index, 0) if self._delta else 0
            self._tokens[choice.index] = earlier + len(choice.token_ids)
            self._finish_reason = choice.finish_reason or self._finish_reason
        if output.finished:  # every choice, not just one of several
            self.outcome = self._finish_reason
        new = self.generated - before
        if not new:
            return
        now = time.monotonic()
        if self._first_seen:
            metrics.tokens(name, now - self._last, new)
        else:
            self._first_seen = True
            self._observe_first(output.metrics, now, new, name, metrics)
        self._last = now

    def _observe_first(self, stats: Any, now: float, new: int, name: str, metrics: AdapterMetrics) -> None:
        if (scheduled := getattr(stats, "scheduled_ts", 0.0)) > 0:
            metrics.queued(name, scheduled - stats.queued_ts)
        # Without streaming the first output is also the last: the engine's own clock knows when its first token
        # was.
        metrics.first_token(name, getattr(stats, "first_token_latency", 0.0) or now - self._last)
        spread = getattr(stats, "last_token_ts", 0.0) - getattr(stats, "first_token_ts", 0.0)
        if new > 1 and spread > 0:
            metrics.tokens(name, spread, new - 1)
