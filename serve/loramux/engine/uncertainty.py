"""Requests that ask for an uncertainty, carried out: a wrapper around one engine client's `generate`.

score    the mean writes; the last output of each choice is held back until the draws have read it
         (an answer that came with the request is only read)
decide   nothing is written: the draws read the labels, and the most probable one is the answer
sample   one call per draw, merged into one stream of choices (`fan_out`)
fast     the mean writes, and the worker keeps the entropy that each token was chosen with (`entropies`)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from vllm.outputs import CompletionOutput, RequestOutput

from loramux.engine.fan_out import Written, fan_out
from loramux.engine.names import lora_request as request_for
from loramux.engine.reads import Reads, Report
from loramux.errors import InvalidRequest, LoramuxError, UncertaintyTimeout
from loramux.metrics.instrument import Generate, leased
from loramux.registry import AdapterRegistry, Version
from loramux.uncertainty import ENTROPY_KEY, adaptive, answers
from loramux.uncertainty.ask import FIELD, Mode, resolve
from loramux.uncertainty.calibration import Calibrations
from loramux.uncertainty.exchange import Exchange, exchange
from loramux.uncertainty.recent import Recent
from loramux.uncertainty.scores import Array, decide

logger = logging.getLogger(__name__)

Outputs = AsyncGenerator[Any, None]


class Observer(Protocol):
    """Told what came of requests, for metrics."""

    def told(self, name: str, value: dict[str, Any], seconds: float) -> None:
        """A choice of `name` has its uncertainty, `seconds` after its text was there."""

    def read(self, name: str, tokens: int) -> None:
        """Tokens were read for it beyond those of the answer itself."""


class Uncertainty:
    """Replaces `generate` of one engine client, on the instance; outside of what takes leases there."""

    def __init__(
        self,
        engine: Any,
        registry: AdapterRegistry,
        reads: Reads,
        calibrations: Calibrations,
        recent: Recent,
        observer: Observer,
        *,
        max_model_len: int,
        bfloat16: bool = False,
    ) -> None:
        self._max_model_len = max_model_len
        self._bfloat16 = bfloat16  # what weights are served in
        self._around = _Around(engine.generate, registry, reads, calibrations, recent, observer)
        engine.generate = self.generate

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> Outputs:
        """As vLLM's. Requests that do not ask are not touched."""
        asked = exchange.get()
        if asked is None:
            return self._around.generate(prompt, sampling_params, request_id, **options)
        return self._carry_out(asked, prompt, sampling_params, request_id, **options)

    async def _carry_out(
        self, asked: Exchange, prompt: Any, params: Any, request_id: str, *, lora_request: Any = None, **options: Any
    ) -> Outputs:
        registry = self._around.registry
        async with AsyncExitStack() as held:
            mean = None
            if lora_request is not None:
                # One version from beginning to end: the draws are its own.
                mean = await leased(registry, lora_request)
                held.callback(registry.release, mean)
            asked.mode = resolve(
                asked.ask, bayesian=mean is not None and mean.bayesian
            )  # it may be another than was looked up
            warnings = registry.draw_warnings(mean) if mean is not None and self._bfloat16 else ()
            answer = _Answer(self._around, asked, mean, prompt, params, warnings)
            modes = {Mode.SCORE: answer.score, Mode.DECIDE: answer.decide, Mode.SAMPLE: answer.sample}
            carry_out = modes.get(asked.mode, answer.fast) if asked.text is None else answer.given
            longest = max((len(tokens) for tokens in (asked.given, *asked.labels)), default=0)
            if longest and len(_tokens(prompt)) + longest > self._max_model_len:
                raise InvalidRequest(
                    f"Prompt and answer have more than the {self._max_model_len} tokens that this model takes.",
                    hint="Shorten the prompt or the answer.",
                )
            async with aclosing(carry_out(request_id, lora_request, options)) as outputs:
                async for output in outputs:
                    yield output


@dataclass(frozen=True)
class _Around:
    """What all requests of an engine share. `generate`: the engine's own."""

    generate: Generate
    registry: AdapterRegistry
    reads: Reads
    calibrations: Calibrations
    recent: Recent
    observer: Observer


class _Answer:
    """One request. `mean` is leased; None: the base model."""

    def __init__(
        self, around: _Around, asked: Exchange, mean: Version | None, prompt: Any, params: Any, warnings: Sequence[str]
    ) -> None:
        self._around = around
        self._asked = asked
        self._mean = mean
        self._prompt = prompt
        self._params = params
        self._warnings = list(warnings)
        self._name = mean.name if mean else around.registry.base
        self._drawn = False
        self._posterior = mean.artefact.summary.posterior if mean and mean.artefact else None

    async def score(self, request_id: str, lora_request: Any, options: dict[str, Any]) -> Outputs:
        prompt = _tokens(self._prompt)
        written = Written(self._params)
        held_back: list[Any] = []
        # Made, and on the device, while the answer is written; if they cannot be, that is met again when they are read.
        tasks = [asyncio.ensure_future(self._warm())]
        try:
            stream = self._around.generate(self._prompt, self._params, request_id, lora_request=lora_request, **options)
            async with aclosing(stream):
                async for output in stream:
                    ended = written.add(output)
                    tasks += [asyncio.ensure_future(self._tell(i, prompt, written.tokens[i])) for i in ended]
                    if held_back or ended:
                        held_back.append(output)
                    else:
                        yield output
            await asyncio.gather(*tasks[1:])
            for output in held_back:
                yield output
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def decide(self, request_id: str, lora_request: Any, options: dict[str, Any]) -> Outputs:
        asked, prompt, started = self._asked, _tokens(self._prompt), time.monotonic()
        async with AsyncExitStack() as held:
            draws = await self._draws(held, started)
            logp = await self._around.reads.targets(
                draws, prompt, asked.labels, timeout_s=self._left(started), enough=self._decided()
            )
        read = len(logp)
        logp = logp[~np.isnan(logp).any(1)]
        if len(logp) < min(2, len(draws)):
            raise _too_late()
        self._read_tokens(read * (len(prompt) + sum(len(label) - 1 for label in asked.labels)))
        value, place = answers.decided(asked, self._posterior, logp, read)
        self._told(0, value, started)
        yield _whole(request_id, prompt, asked.ask.labels[place], asked.labels[place], lora_request)

    async def given(self, request_id: str, lora_request: Any, options: dict[str, Any]) -> Outputs:
        """Read an answer that was written elsewhere; without draws, the adapter's own pass."""
        asked, prompt, started = self._asked, _tokens(self._prompt), time.monotonic()
        if asked.mode is Mode.SCORE:
            await self._tell(0, prompt, asked.given)
        else:
            report = await self._around.reads.read([self._mean], prompt, asked.given, timeout_s=self._left(started))
            entropies, logp = report.entropy[0].tolist(), report.logp[0, :, 0].tolist()
            self._read_tokens(len(prompt) + len(asked.given))
            self._told(0, answers.fast(asked, self._posterior, entropies, logp), started)
        yield _whole(request_id, prompt, asked.text or "", asked.given, lora_request)

    async def sample(self, request_id: str, lora_request: Any, options: dict[str, Any]) -> Outputs:
        asked, started = self._asked, time.monotonic()
        async with AsyncExitStack() as held:
            draws = [*await self._draws(held, started)]
            if len(draws) == 1:
                draws *= asked.samples
            calls = []
            for i, draw in enumerate(draws):
                request = copy(lora_request) if draw is None or draw is self._mean else request_for(draw.tag, draw)
                calls.append((f"{request_id}-{i}", {**options, "lora_request": request}))
            written = Written(self._params)
            held_back: list[Any] = []
            outputs = fan_out(self._around.generate, self._prompt, self._params, calls, greedy=asked.greedy)
            async with aclosing(outputs):
                async for output in outputs:
                    ended = written.add(output)
                    if held_back or ended:
                        held_back.append(output)
                    else:
                        yield output
        texts = dict(sorted(written.texts.items()))
        for index, value in answers.sampled(asked, self._posterior, texts).items():
            self._told(index, value, time.monotonic())
        for output in held_back:
            yield output

    async def fast(self, request_id: str, lora_request: Any, options: dict[str, Any]) -> Outputs:
        asked, params = self._asked, copy(self._params)
        params.logprobs = params.logprobs or 0  # 0: of the chosen token alone
        tags = [uuid.uuid4().hex for _ in range(params.n)]
        calls = [
            (f"{request_id}-{i}" if i else request_id, {**options, "lora_request": copy(lora_request)})
            for i in range(params.n)
        ]
        for tag, (_, one) in zip(tags, calls, strict=True):
            one["extra_args"] = {ENTROPY_KEY: tag}
        written = Written(params)
        async with aclosing(fan_out(self._around.generate, self._prompt, params, calls)) as outputs:
            async for output in outputs:
                for i in written.add(output):
                    started = time.monotonic()
                    entropies = await self._around.reads.entropies(tags[i])
                    self._told(i, answers.fast(asked, self._posterior, entropies, written.logp.get(i, [])), started)
                yield output

    async def _tell(self, index: int, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        """Fill in the uncertainty of a choice that is written. Its text is worth more: nothing is raised."""
        asked, started, passes = self._asked, time.monotonic(), self._asked.samples
        try:
            report = await self._read(prompt, tokens, started)
            passes = len(report.logp)
            value = answers.scored(asked, self._posterior, report.logp[..., 0], report.entropy, report.total)
            self._read_tokens(passes * (len(prompt) + len(tokens)))
        except LoramuxError as error:
            value = answers.failed(asked, self._posterior, error.code, error.message)
        except Exception:
            logger.exception("an answer was not scored")
            value = answers.failed(asked, self._posterior, "internal_error", "The answer could not be scored.")
        self._told(index, value | {"extra_passes": passes}, started)

    async def _read(self, prompt: Sequence[int], tokens: Sequence[int], started: float) -> Report:
        async with AsyncExitStack() as held:
            draws = await self._draws(held, started)
            return await self._around.reads.read(
                draws, prompt, tokens, timeout_s=self._left(started), enough=self._read_enough()
            )

    def _read_enough(self) -> Callable[[Report], bool] | None:
        """Of an adaptive request: whether the draws that have read tell if the answer is sure."""
        asked, rule = self._asked, self._asked.ask.abstain
        if not asked.ask.adaptive or rule is None:
            return None

        def enough(report: Report) -> bool:
            logp = report.logp[..., 0]
            told = answers.scored(asked, self._posterior, logp, report.entropy, report.total)
            error = adaptive.sequence_error(rule.score, told, logp, report.entropy)
            return adaptive.is_clear(rule, told[rule.score], error, len(logp))

        return enough

    def _decided(self) -> Callable[[Array], bool] | None:
        """The same for labels."""
        rule = self._asked.ask.abstain
        if not self._asked.ask.adaptive or rule is None:
            return None

        def enough(logp: Array) -> bool:
            score = decide(logp).scores()[rule.score]
            return adaptive.is_clear(rule, score, adaptive.decision_error(rule.score, logp), len(logp))

        return enough

    async def _draws(self, held: AsyncExitStack, started: float) -> Sequence[Version | None]:
        """The draws, leased; of an adapter without a posterior, itself. Raises UncertaintyTimeout."""
        if self._mean is None or not self._mean.bayesian:
            return [self._mean]
        asked, counted, self._drawn = self._asked, not self._drawn, True  # once a request: it may draw ahead
        try:
            async with asyncio.timeout(self._left(started)):
                return await held.enter_async_context(
                    self._around.registry.drawn(self._mean, seed=asked.ask.seed, samples=asked.samples, counted=counted)
                )
        except TimeoutError:
            raise _too_late() from None

    async def _warm(self) -> None:
        with contextlib.suppress(LoramuxError):
            async with AsyncExitStack() as held:
                await self._draws(held, time.monotonic())

    def _read_tokens(self, tokens: int) -> None:
        self._asked.tokens += tokens
        self._around.observer.read(self._name, tokens)

    def _left(self, started: float) -> float | None:
        timeout = self._asked.ask.timeout_s
        return None if timeout is None else max(0.0, started + timeout - time.monotonic())

    def _told(self, index: int, value: dict[str, Any], started: float) -> None:
        seconds = time.monotonic() - started
        if self._warnings and value["samples"]:
            value = value | {"warnings": self._warnings}
        value = self._calibrated(raw := value)
        self._remember(index, raw, value.get("confidence"))
        if (rule := self._asked.ask.abstain) is not None:
            value = value | rule.judged(value)
        self._asked.choices[index] = answers.asked_for(self._asked, value) | {"latency_ms": round(seconds * 1000, 3)}
        self._around.observer.told(self._name, value, seconds)

    def _remember(self, index: int, raw: dict[str, Any], confidence: float | None) -> None:
        """For feedback and drift; answers to calibrate with are others' and old ones, sums have no name."""
        mean, ask = self._mean, self._asked.ask
        if not ask.calibrated or (mean is not None and mean.make is not None):
            return
        digest = mean.artefact.digest if mean is not None and mean.artefact is not None else None
        if (one := self._around.recent.add(self._name, digest, raw, ask.labels, confidence)) is not None:
            self._asked.scored[index] = one

    def _calibrated(self, value: dict[str, Any]) -> dict[str, Any]:
        """As what answers was calibrated for just these settings, if it was; a set that was asked for is null else."""
        ask = self._asked.ask
        found = None
        if ask.calibrated and self._mean is not None:
            found = self._around.calibrations.applied(self._mean, value, ask.labels, ask.alpha)
        return ({} if ask.alpha is None else {"prediction_set": None}) | (found or value)


def _tokens(prompt: Any) -> Sequence[int]:
    """Raises InvalidRequest for a prompt that is more than tokens."""
    if not isinstance(prompt, dict) or prompt.get("type", "token") != "token" or "prompt_token_ids" not in prompt:
        raise InvalidRequest(
            "An uncertainty can only be told of text.", hint="Send a prompt of text, or no `uncertainty`.", param=FIELD
        )
    tokens: Sequence[int] = prompt["prompt_token_ids"]
    return tokens


def _whole(
    request_id: str, prompt: Sequence[int], text: str, tokens: Sequence[int], lora_request: Any
) -> RequestOutput:
    """An answer that nothing wrote, as the engine gives one."""
    choice = CompletionOutput(
        index=0,
        text=text,
        token_ids=list(tokens),
        cumulative_logprob=None,
        logprobs=None,
        finish_reason="stop",
    )
    return RequestOutput(
        request_id=request_id,
        prompt=None,
        prompt_token_ids=list(prompt),
        prompt_logprobs=None,
        outputs=[choice],
        finished=True,
        lora_request=lora_request,
        num_cached_tokens=0,
    )


def _too_late() -> UncertaintyTimeout:
    return UncertaintyTimeout(
        "The draws could not be read in time.", hint="Send a larger timeout_ms, or fewer samples.", param=FIELD
    )
