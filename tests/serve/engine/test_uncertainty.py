"""Requests that ask for an uncertainty, over a registry with fakes around it and reads that are told what they say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from loramux.engine.reads import ReadFailed, Report
from loramux.engine.uncertainty import Uncertainty
from loramux.errors import AdapterNotBayesian, InvalidRequest, PoolExhausted, UncertaintyTimeout
from loramux.metrics import instrument
from loramux.registry import Version
from loramux.uncertainty import ENTROPY_KEY
from loramux.uncertainty.abstain import Action, Rule
from loramux.uncertainty.ask import Ask, Mode
from loramux.uncertainty.calibration import Calibrations, Method, Sets, Settings, calibrate, of_scores
from loramux.uncertainty.calibration.platt import Sigmoid
from loramux.uncertainty.exchange import Exchange, exchange
from loramux.uncertainty.recent import Recent
from loramux.uncertainty.scores import decide

from ..fakes import World, lora_request

PROMPT = {"type": "token", "prompt_token_ids": [1, 2, 3]}
DELTA, FINAL = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


class Reads:
    """Says what every draw thinks of an answer; `gate` holds it up."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[Version | None], list[int], Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.late: set[int] = set()

    async def read(
        self,
        draws: Sequence[Version | None],
        prompt: Any,
        answer: Any,
        *,
        timeout_s: float | None = None,
        enough: Any = None,
    ) -> Report:
        assert all(draw is None or draw.leases for draw in draws)
        if enough is not None and enough(await self.read(draws[:4], prompt, answer)):
            draws = draws[:4]
        self.asked.append(([*draws], [*prompt], [*answer]))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        n, s = len(answer), len(draws)
        logp = -0.1 * (1 + np.arange(s)[:, None, None]) * np.ones((s, n, 1))
        entropy = np.full((s, n), 0.5)
        for draw in self.late:
            logp[draw, -1], entropy[draw, -1] = np.nan, np.nan
        return Report(logp, entropy, np.full(n, 0.8))

    async def targets(
        self, draws: Any, prompt: Any, answers: Any, *, timeout_s: float | None, enough: Any = None
    ) -> Any:
        if enough is not None and enough(np.log(np.array([[0.2, 0.7]] * 4))):
            draws = draws[:4]
        self.asked.append(([*draws], [*prompt], [*answers]))
        if self.error is not None:
            raise self.error
        logp = np.log(np.array([[0.2, 0.7]] * len(draws)))
        logp[[*self.late]] = np.nan
        return logp

    async def entropies(self, tag: str) -> list[float]:
        return [0.5, 0.25, 1.0]


class Engine:
    """Writes "abc", token by token if asked to, and remembers with what."""

    def __init__(self) -> None:
        self.calls: list[SimpleNamespace] = []
        self.error: Exception | None = None
        self.open = 0

    async def generate(
        self, prompt: Any, params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncGenerator[Any, None]:
        model = lora_request.lora_name if lora_request else None
        self.calls.append(SimpleNamespace(model=model, params=params, id=request_id))
        self.open += 1
        try:
            for place in range(3):
                await asyncio.sleep(0)
                if self.error is not None:
                    raise self.error
                last, tokens = place == 2, [place] if params.output_kind is DELTA else [0, 1, 2]
                if not (last or params.output_kind is DELTA):
                    continue
                choices = [
                    SimpleNamespace(
                        index=index,
                        token_ids=tokens,
                        text="".join("abc"[t] for t in tokens),
                        finish_reason="length" if last else None,
                        logprobs=None
                        if params.logprobs is None
                        else [{t: SimpleNamespace(logprob=-1.0)} for t in tokens],
                    )
                    for index in range(params.n)
                ]
                yield SimpleNamespace(outputs=choices, finished=last, prompt_token_ids=[1, 2, 3], metrics=None)
        finally:
            self.open -= 1


class Observer:
    def __init__(self) -> None:
        self.tokens = 0
        self.told_of: list[tuple[str, dict[str, Any]]] = []

    def read(self, name: str, tokens: int) -> None:
        self.tokens += tokens

    def told(self, name: str, value: dict[str, Any], seconds: float) -> None:
        assert seconds >= 0
        self.told_of.append((name, value))


class Bench:
    def __init__(self, *, bfloat16: bool = False, **world: Any) -> None:
        self.world = World(**world)
        self.engine, self.reads, self.observer = Engine(), Reads(), Observer()
        metrics: Any = SimpleNamespace(
            request_started=lambda *_: None, request_ended=lambda *_: None, tokens=lambda *_: None,
            first_token=lambda *_: None, queued=lambda *_: None,
        )  # fmt: skip
        instrument(self.engine, self.world.registry, metrics)
        self.recent = Recent()
        self.calibrations = Calibrations(self.world.store)
        surroundings: Any = (self.reads, self.calibrations, self.recent, self.observer)
        Uncertainty(self.engine, self.world.registry, *surroundings, max_model_len=20, bfloat16=bfloat16)
        self.outputs: list[Any] = []

    async def load(self, name: str, *, bayesian: bool = True) -> Version:
        version = await self.world.load(name)
        assert version.artefact is not None
        posterior = "diagonal_a" if bayesian else None
        summary = replace(version.artefact.summary, bayesian=bayesian, posterior=posterior)
        version.artefact = replace(version.artefact, summary=summary)
        return version

    async def ask(
        self,
        version: Version | None,
        mode: Mode = Mode.SCORE,
        *,
        prompt: Any = PROMPT,
        kind: RequestOutputKind = FINAL,
        params: dict[str, Any] | None = None,
        fields: dict[str, Any] | None = None,
        **ask: Any,
    ) -> Exchange:
        """One request from beginning to end."""
        asked = Exchange(Ask(mode=mode, **ask), mode, ask.get("samples", 4), **(fields or {}))
        token = exchange.set(asked)
        try:
            request = lora_request(version) if version else None
            sampling = SamplingParams(output_kind=kind, **(params or {}))
            stream = self.engine.generate(prompt, sampling, "r", lora_request=request)
        finally:
            exchange.reset(token)
        async for output in stream:
            self.outputs.append(output)
            for choice in output.outputs:
                if choice.finish_reason is not None:
                    assert choice.index in asked.choices  # told before the end is passed on
        assert self.engine.open == 0
        return asked


@pytest.fixture
async def bench() -> Bench:
    return Bench()


def idle(bench: Bench) -> bool:
    return not any(bench.world.observer.leased.values())


async def test_who_does_not_ask_is_not_touched(bench: Bench) -> None:
    version = await bench.load("a")
    stream = bench.engine.generate(PROMPT, SamplingParams(), "r", lora_request=lora_request(version))
    assert len([output async for output in stream]) == 1
    assert not bench.reads.asked and not bench.world.posteriors.made and idle(bench)


@pytest.mark.parametrize("kind", [DELTA, FINAL])
async def test_what_the_mean_wrote_is_read_by_the_draws(bench: Bench, kind: RequestOutputKind) -> None:
    version = await bench.load("a")
    asked = await bench.ask(version, kind=kind, per_token=True)
    ((draws, prompt, answer),) = bench.reads.asked
    assert [draw.name for draw in draws if draw] == ["+drawn"] * 4 and (prompt, answer) == ([1, 2, 3], [0, 1, 2])
    value = asked.choices[0]
    assert value["mode"] == "score" and value["samples"] == 4 and not value["partial"]
    assert value["epistemic"] == pytest.approx(0.3 * 4 / 3) and value["raw"]["epistemic"] == pytest.approx(0.3)
    assert value["extra_passes"] == 4 and value["latency_ms"] >= 0 and len(value["tokens"]) == 3
    assert asked.tokens == 4 * 6
    assert [call.model for call in bench.engine.calls] == [version.tag]
    assert [name for name, _ in bench.observer.told_of] == ["a"] and idle(bench)


async def test_a_stream_goes_on_while_only_its_end_waits(bench: Bench) -> None:
    version = await bench.load("a")
    bench.reads.gate.clear()
    task = asyncio.create_task(bench.ask(version, kind=DELTA))
    while not bench.reads.asked:
        await asyncio.sleep(0.001)
    assert ["".join(choice.text for choice in output.outputs) for output in bench.outputs] == ["a", "b"]
    bench.reads.gate.set()
    await task
    assert len(bench.outputs) == 3


async def test_every_choice_is_read(bench: Bench) -> None:
    asked = await bench.ask(await bench.load("a"), kind=DELTA, params={"n": 3, "temperature": 1.0})
    assert sorted(asked.choices) == [0, 1, 2] and len(bench.reads.asked) == 3 and asked.tokens == 3 * 24


async def test_a_draw_that_is_late_is_left_out(bench: Bench) -> None:
    bench.reads.late = {1}
    value = (await bench.ask(await bench.load("a"))).choices[0]
    assert value["partial"] and value["samples"] == 3 and value["epistemic"] is not None
    bench.reads.late = {0, 1, 2}
    value = (await bench.ask(await bench.load("b"))).choices[0]
    assert value["partial"] and value["epistemic"] is None and value["nll_ln"] is None


@pytest.mark.parametrize(
    ("error", "code"), [(ReadFailed("no"), "internal_error"), (RuntimeError("a bug"), "internal_error")]
)
async def test_an_answer_is_worth_more_than_its_uncertainty(bench: Bench, error: Exception, code: str) -> None:
    bench.reads.error = error
    value = (await bench.ask(await bench.load("a"))).choices[0]
    assert value["error"]["code"] == code and value["partial"] and value["epistemic"] is None
    assert bench.outputs[-1].outputs[0].text == "abc" and idle(bench)


async def test_draws_without_room_cost_no_answer(bench: Bench) -> None:
    bench = Bench(capacity=2000, patience_s=0.1)
    value = (await bench.ask(await bench.load("a"))).choices[0]
    assert value["error"]["code"] == PoolExhausted.code and bench.outputs and idle(bench)


async def test_draws_that_take_too_long(bench: Bench) -> None:
    version = await bench.load("a")
    bench.world.data_plane.gate.clear()
    value = (await bench.ask(version, timeout_s=0.05)).choices[0]
    assert value["error"]["code"] == "uncertainty_timeout" and value["partial"]
    with pytest.raises(UncertaintyTimeout):
        await bench.ask(version, Mode.DECIDE, timeout_s=0.05, labels=("x", "y"), fields={"labels": ((5,), (6,))})
    bench.world.data_plane.gate.set()


async def test_the_version_is_one_from_beginning_to_end(bench: Bench) -> None:
    """The adapter is replaced while its old version writes: that one's draws read."""
    version = await bench.load("a")
    bench.reads.gate.clear()
    task = asyncio.create_task(bench.ask(version))
    while not bench.reads.asked:
        await asyncio.sleep(0.001)
    await bench.world.load("a", "a2", replace=True)
    assert version.leases
    bench.reads.gate.set()
    await task
    assert version.artefact is not None
    assert {digest for digest, _, _ in bench.world.posteriors.made} == {version.artefact.digest} and idle(bench)


async def test_who_leaves_holds_nothing(bench: Bench) -> None:
    version = await bench.load("a")
    bench.reads.gate.clear()
    task = asyncio.create_task(bench.ask(version, kind=DELTA))
    while not bench.reads.asked:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.01)
    assert bench.engine.open == 0 and idle(bench)


async def test_errors_of_the_answer_are_raised(bench: Bench) -> None:
    version = await bench.load("a")
    bench.engine.error = ValueError("too long")
    for mode in (Mode.SCORE, Mode.SAMPLE, Mode.FAST):
        with pytest.raises(ValueError, match="too long"):
            await bench.ask(version, mode)
    assert idle(bench)


@pytest.mark.parametrize("kind", [DELTA, FINAL])
async def test_the_most_probable_label_is_the_answer(bench: Bench, kind: RequestOutputKind) -> None:
    labels = {"labels": ((5,), (6, 7))}
    asked = await bench.ask(await bench.load("a"), Mode.DECIDE, kind=kind, labels=("x", "y"), fields=labels)
    (output,) = bench.outputs
    assert output.outputs[0].text == "y" and output.outputs[0].token_ids == [6, 7] and output.finished
    value = asked.choices[0]
    assert value["prediction"] == "y" and value["epistemic"] == 0 and value["samples"] == 4
    assert value["confidence"] == pytest.approx(7 / 9) and value["label_mass"] == pytest.approx(0.9)
    assert not bench.engine.calls and idle(bench)


async def test_a_decision_with_draws_that_are_late(bench: Bench) -> None:
    labels = {"labels": ((5,), (6,))}
    bench.reads.late = {3}
    asked = await bench.ask(await bench.load("a"), Mode.DECIDE, labels=("x", "y"), fields=labels)
    assert asked.choices[0]["partial"] and asked.choices[0]["samples"] == 3
    bench.reads.late = {1, 2, 3}
    with pytest.raises(UncertaintyTimeout):
        await bench.ask(await bench.load("b"), Mode.DECIDE, labels=("x", "y"), fields=labels)


async def test_one_set_of_weights_decides_without_doubting_itself(bench: Bench) -> None:
    for version in (None, await bench.load("plain", bayesian=False)):
        asked = await bench.ask(version, Mode.DECIDE, labels=("x", "y"), fields={"labels": ((5,), (6,))})
        value = asked.choices[0]
        assert value["epistemic"] is None and value["samples"] == 0 and value["posterior"] is None
        assert bench.reads.asked[-1][0] == [version] and not value["partial"]
    assert not bench.world.posteriors.made and idle(bench)


@pytest.mark.parametrize("kind", [DELTA, FINAL])
async def test_samples_are_written_by_the_draws(bench: Bench, kind: RequestOutputKind) -> None:
    version = await bench.load("a")
    params = {"n": 4, "seed": 10, "temperature": 1.0}
    asked = await bench.ask(version, Mode.SAMPLE, kind=kind, params=params)
    assert len({call.model for call in bench.engine.calls}) == 4
    assert all(call.model.startswith("+drawn@") and call.params.n == 1 for call in bench.engine.calls)
    assert sorted(call.params.seed for call in bench.engine.calls) == [10, 11, 12, 13]
    assert {i: value["draw"] for i, value in asked.choices.items()} == {i: i for i in range(4)}
    assert all(value["agreement"] == 1 and value["clusters"] == 1 for value in asked.choices.values()) and idle(bench)


async def test_samples_without_a_posterior_are_of_the_adapter(bench: Bench) -> None:
    plain = await bench.load("plain", bayesian=False)
    params = {"n": 4, "temperature": 1.0}
    for version, model in ((plain, plain.tag), (None, None)):
        bench.engine.calls.clear()
        await bench.ask(version, Mode.SAMPLE, params=params)
        assert [call.model for call in bench.engine.calls] == [model] * 4
    assert idle(bench)


@pytest.mark.parametrize("kind", [DELTA, FINAL])
@pytest.mark.parametrize("n", [1, 3])
async def test_fast_tells_of_every_choice_as_it_is_written(bench: Bench, kind: RequestOutputKind, n: int) -> None:
    version = await bench.load("plain", bayesian=False)
    params = {"n": n, "temperature": 1.0}
    asked = await bench.ask(version, Mode.FAST, kind=kind, params=params, per_token=True)
    assert sorted(asked.choices) == list(range(n))
    for value in asked.choices.values():
        assert value["nll_ln"] == 1.0 and value["entropy_max"] == 1.0 and not value["partial"]
        assert [token["total"] for token in value["tokens"]] == [0.5, 0.25, 1.0]
    tags = {call.params.extra_args[ENTROPY_KEY] for call in bench.engine.calls}
    assert len(tags) == n and idle(bench)


async def test_fast_says_when_it_does_not_know(bench: Bench) -> None:
    async def none(tag: str) -> list[float]:
        return []

    bench.reads.entropies = none  # type: ignore[method-assign]
    value = (await bench.ask(None, Mode.FAST)).choices[0]
    assert value["partial"] and value["total"] is None


async def test_an_adapter_that_lost_its_posterior_meanwhile(bench: Bench) -> None:
    """Between the look-up and the lease it was replaced by one without."""
    version = await bench.load("a", bayesian=False)
    assert (await bench.ask(version, Mode.SCORE)).choices[0]["mode"] == "fast"
    with pytest.raises(AdapterNotBayesian):
        await bench.ask(version, Mode.SCORE, fast_if_unsupported=False)
    assert idle(bench)


@pytest.mark.parametrize("prompt", ["text", {"type": "multimodal", "prompt_token_ids": [1]}, {"prompt_embeds": 1}])
async def test_what_is_more_than_tokens_is_refused(bench: Bench, prompt: Any) -> None:
    version = await bench.load("a")
    for mode in (Mode.SCORE, Mode.DECIDE):
        with pytest.raises(InvalidRequest):
            await bench.ask(version, mode, prompt=prompt)
    assert idle(bench)


async def test_an_answer_that_was_written_elsewhere(bench: Bench) -> None:
    version = await bench.load("a")
    given = {"text": "xy", "given": (7, 8)}
    asked = await bench.ask(version, fields=given)
    assert bench.reads.asked[-1][1:] == ([1, 2, 3], [7, 8]) and len(bench.reads.asked[-1][0]) == 4
    assert asked.choices[0]["epistemic"] is not None and not bench.engine.calls
    (output,) = bench.outputs
    assert output.outputs[0].text == "xy" and output.outputs[0].finish_reason == "stop" and output.finished
    for plain in (None, await bench.load("plain", bayesian=False)):
        asked = await bench.ask(plain, Mode.FAST, fields=given)
        assert bench.reads.asked[-1] == ([plain], [1, 2, 3], [7, 8])
        assert asked.choices[0]["total"] == 0.5 and asked.choices[0]["nll_ln"] == pytest.approx(0.1)
    assert idle(bench)


@pytest.mark.parametrize(
    ("mode", "fields"),
    [(Mode.SCORE, {"text": "x", "given": (7,) * 18}), (Mode.DECIDE, {"labels": ((5,), (6,) * 18)})],
)
async def test_what_the_model_has_no_room_for(bench: Bench, mode: Mode, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="20 tokens"):
        await bench.ask(await bench.load("a"), mode, labels=("x", "y"), fields=fields)
    assert not bench.reads.asked and idle(bench)


async def test_answers_that_are_not_sure(bench: Bench) -> None:
    version = await bench.load("a")
    for value, abstained in ((0.3, True), (0.5, False)):
        asked = await bench.ask(version, abstain=Rule("mi_mean", value, False))
        assert asked.choices[0]["abstained"] is abstained
        assert asked.choices[0]["action"] == ("flag" if abstained else None)
    assert [value.get("action") for _, value in bench.observer.told_of] == ["flag", None]
    bench.reads.error = RuntimeError("a bug")
    asked = await bench.ask(version, abstain=Rule("mi_mean", 0.3, False, Action.REFUSE))
    assert asked.choices[0]["abstained"] is None and asked.choices[0]["action"] == "refuse"


async def test_answers_of_a_calibrated_version(bench: Bench) -> None:
    version, other = await bench.load("a"), await bench.load("b")
    rng = np.random.default_rng(0)
    x = rng.random(200)
    items = of_scores("nll_ln", x.tolist(), (rng.random(200) < np.exp(-5 * x)).tolist())
    settings = Settings(Mode.SCORE, "sequence", 4, 0)
    made = calibrate(items, settings, score="nll_ln", method=Method.PLATT, sets=Sets.LAC, risk=0.1)
    await bench.calibrations.keep(version, made)
    told = (await bench.ask(version, scores=("confidence",))).choices[0]
    raw = (await bench.ask(version, calibrated=False)).choices[0]
    assert isinstance(made.map, Sigmoid) and told["confidence"] == made.map(np.array([raw["nll_ln"]]))[0]
    assert told["calibration"] == {"id": made.id, "method": "platt", "n": 200, "ece": made.told["ece"]}
    assert told["raw"]["confidence"] == raw["confidence"] and "nll_ln" not in told and "calibration" not in raw
    assert bench.observer.told_of[0][1]["confidence"] == told["confidence"]
    for asked in (await bench.ask(other), await bench.ask(version, samples=3), await bench.ask(version, seed=1)):
        assert "calibration" not in asked.choices[0]
    below = Rule("confidence", told["confidence"] + 1e-6, True)
    assert told["confidence"] < raw["confidence"] > below.value
    assert (await bench.ask(version, abstain=below)).choices[0]["abstained"]
    bench.reads.late = {1}
    assert "calibration" not in (await bench.ask(version)).choices[0]


async def test_a_set_that_was_asked_for_is_null_without_a_calibration(bench: Bench) -> None:
    labels = {"labels": ((5,), (6,))}
    asked = await bench.ask(await bench.load("a"), Mode.DECIDE, labels=("x", "y"), fields=labels, alpha=0.1)
    assert asked.choices[0]["prediction_set"] is None


async def test_answers_are_remembered_as_they_were_told(bench: Bench) -> None:
    version = await bench.load("a")
    asked = await bench.ask(version, scores=("nll_ln",))
    one = asked.scored[0]
    assert version.artefact is not None and (one.name, one.digest) == ("a", version.artefact.digest)
    assert one.told["mi_mean"] > 0 and one.confidence == one.told["confidence"]
    assert one.settings == Settings(Mode.SCORE, "sequence", 4, 0) and bench.observer.tokens == 24
    assert not (await bench.ask(version, calibrated=False)).scored
    bench.reads.late = {0, 1}
    assert not (await bench.ask(version)).scored  # not all draws read it
    assert (await bench.ask(None, Mode.FAST)).scored[0].digest is None


async def test_draws_that_are_there_are_told_from_those_that_are_not(bench: Bench) -> None:
    """Once a request, though it draws ahead and again for every choice."""
    version = await bench.load("a")
    for _ in range(2):
        await bench.ask(version, params={"n": 3, "temperature": 1.0})
    found = [event[1:] for event in bench.world.observer.events if event[0] == "drawn"]
    assert found == [("a", (0, 4)), ("a", (4, 0))]


@pytest.mark.parametrize(("value", "samples"), [(0.39, 8), (9.0, 4)])
async def test_draws_until_it_is_clear_whether_to_abstain(bench: Bench, value: float, samples: int) -> None:
    """mi_mean of four draws is 0.4, of eight 0.343: near the one threshold, far below the other."""
    rule = Rule("mi_mean", value, False)
    asked = await bench.ask(await bench.load("a"), samples=8, adaptive=True, abstain=rule)
    told = asked.choices[0]
    assert (told["samples"], told["extra_passes"], told["partial"]) == (samples, samples, False) and told["adaptive"]
    assert told["mi_mean"] == pytest.approx(0.3 * samples / (samples - 1)) and not told["abstained"]
    assert asked.tokens == samples * 6


async def test_decisions_until_it_is_clear(bench: Bench) -> None:
    labels, version = {"labels": ((5,), (6,))}, await bench.load("a")
    told = decide(np.log([[0.2, 0.7]] * 4)).scores()["confidence"]
    for value, samples in ((0.5, 4), (told, 8)):
        rule = Rule("confidence", value, True)
        asked = await bench.ask(
            version, Mode.DECIDE, labels=("x", "y"), fields=labels, samples=8, adaptive=True, abstain=rule
        )
        assert asked.choices[0]["samples"] == samples and not asked.choices[0]["partial"]


@pytest.mark.parametrize("bfloat16", [False, True])
async def test_noise_that_the_served_dtype_swallows_is_told_of(bfloat16: bool) -> None:
    bench = Bench(bfloat16=bfloat16)
    bench.world.posteriors.warnings = ("bfloat16 would swallow the noise",)
    version = await bench.load("a")
    await bench.world.registry.samples(version, 4)
    told = (await bench.ask(version, params={"n": 2, "temperature": 1.0})).choices
    expected = ["bfloat16 would swallow the noise"] if bfloat16 else None
    assert [one.get("warnings") for one in told.values()] == [expected] * 2
    assert "warnings" not in (await bench.ask(version, Mode.FAST)).choices[0]
