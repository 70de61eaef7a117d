"""Measure and lease every request: a wrapper around one engine client's `generate`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from loramux.errors import AdapterNotFound
from loramux.metrics.adapters import AdapterMetrics
from loramux.registry import AdapterEntry, AdapterRegistry

Generate = Callable[..., AsyncGenerator[Any, None]]


def instrument(engine: Any, registry: AdapterRegistry, metrics: AdapterMetrics) -> None:
    """Replace `engine.generate` (on this instance) by one that holds a lease while it runs and counts.

    A request enters the engine only with a lease on a resident version; the version stays in device memory until
    the last lease ends, whatever happens to its name meanwhile. A version that was replaced between the name's
    look-up and now gives way to the current one; one that was unloaded raises AdapterNotFound (from the generator).
    """
    inner: Generate = engine.generate

    async def generate(
        prompt: Any, sampling_params: Any, *args: Any, lora_request: Any = None, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        # vLLM's server may hand over a request that was processed already, with its adapter in it.
        processed = getattr(prompt, "lora_request", None)
        entry = _leasable(registry, lora_request or processed)
        if entry is not None:
            lora_request = _current(lora_request or processed, entry)
            if processed is not None:
                prompt.lora_request = lora_request
            entry.acquire()
        try:
            stream = inner(prompt, sampling_params, *args, lora_request=lora_request, **kwargs)
            measured = _measured(stream, entry.name if entry else registry.base, sampling_params, metrics)
            # Closed inside out, and not left to the garbage collector: vLLM aborts a request when its stream is
            # closed, and only then may the adapter be freed.
            async with aclosing(stream), aclosing(measured):
                async for output in measured:
                    yield output
        finally:
            if entry is not None:
                entry.release()

    engine.generate = generate


def _leasable(registry: AdapterRegistry, lora_request: Any) -> AdapterEntry | None:
    if lora_request is None:
        return None
    name = lora_request.lora_name.partition("@")[0]
    entry = registry.resident(name)
    if entry is None:
        raise AdapterNotFound(
            f"The adapter {name!r} was unloaded.", hint="GET /v1/models lists what is served.", param="model"
        )
    return entry


def _current(lora_request: Any, entry: AdapterEntry) -> Any:
    """`lora_request`, or one like it for `entry` if that is another version."""
    if lora_request.lora_int_id == entry.version_id:
        return lora_request
    assert entry.artefact is not None
    return type(lora_request)(lora_name=entry.version, lora_int_id=entry.version_id, lora_path=str(entry.artefact.path))


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
        # Without streaming the first output is also the last: the engine's own clock knows when its first token
        # was.
        metrics.first_token(name, getattr(stats, "first_token_latency", 0.0) or now - self._last)
        spread = getattr(stats, "last_token_ts", 0.0) - getattr(stats, "first_token_ts", 0.0)
        if new > 1 and spread > 0:
            metrics.tokens(name, spread, new - 1)
