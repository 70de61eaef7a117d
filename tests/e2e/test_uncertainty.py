"""Uncertainties through `loramux serve` and the openai client equal Hugging Face's model in float64, draw by draw."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from loramux.paths import cache_dir
from loramux.uncertainty import scores
from loramux.units import format_bytes
from loramux_adapters import BaseModel, LoweredAdapter, lower, open_artefact, prepare, prepare_draw
from loramux_adapters.footprint import draw_pool_bytes, pool_bytes
from loramux_adapters.posterior.tfb import tfb

from . import bayesian
from .conftest import EXAMPLES, Server, run_server
from .hugging_face import load

pytestmark = pytest.mark.engine

S = 3
TOLERANCE = 1e-4  # nats
BASE = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "Name a river in Europe and say in a few words where it flows."}]
LABELS = ["yes", "no", "it depends"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, base_model: BaseModel) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bayesian")
    made = {
        "doubt": bayesian.make(base_model, sigma=0.05, seed=1),
        "doubts": bayesian.make(base_model, sigma=0.1, mixture=True, seed=2),
        "dense": bayesian.make(base_model, sigma=0.005, dense=True, seed=4),
        "sure": bayesian.make(base_model, sigma=0.0, seed=3),
    }
    written = {name: bayesian.write(one, base_model, folder / f"{name}.safetensors") for name, one in made.items()}
    spam = tfb(lower(EXAMPLES / "spam", base_model), base_model, 0.05)
    return written | {"spam-bayes": bayesian.write(spam, base_model, folder / "spam.safetensors")}


@pytest.fixture(scope="module")
def bayesian_server(
    tmp_path_factory: pytest.TempPathFactory, adapters: dict[str, Path], spare_adapters: Path
) -> Iterator[Server]:
    named = [f"--adapter={name}={path}" for name, path in {**adapters, "plain": spare_adapters / "spare0"}.items()]
    with run_server(tmp_path_factory.mktemp("server") / "log", *named, "--adapter-memory", "48MiB") as server:
        yield server


@pytest.fixture(scope="module")
def client(bayesian_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{bayesian_server.url}/v1", api_key="EMPTY", max_retries=0)


@pytest.fixture(scope="module")
def reference(base_path: Path) -> Any:
    return load(base_path, torch.float64)


def draws(source: Path, base: BaseModel, seed: int = 0) -> list[LoweredAdapter]:
    artefact = prepare(source, base, cache_dir() / "artefacts")
    made = [prepare_draw(artefact, cache_dir() / "artefacts", seed=seed, sample=s) for s in range(S)]
    return [open_artefact(draw.path) for draw in made]


def expected(model: Any, drawn: list[LoweredAdapter], prompt: list[int], answer: list[int]) -> torch.Tensor:
    """log p_s,t: [S, n, vocabulary]."""
    found = []
    for draw in drawn:
        with bayesian.hooked(model, draw):
            found.append(bayesian.log_probabilities(model, prompt, answer))
    return torch.stack(found)


def ask(client: openai.OpenAI, model: str, uncertainty: Any, **options: Any) -> Any:
    body = {"uncertainty": uncertainty, "return_token_ids": True, **options.pop("extra_body", {})}
    return client.chat.completions.create(
        **{"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 12, **options}, extra_body=body
    )


def test_draws_take_what_the_plan_says(
    client: openai.OpenAI, bayesian_server: Server, adapters: dict[str, Path], base_model: BaseModel
) -> None:
    """Those that the tests below find right, and leave in memory or have made again. B of `dense` is not the mean's."""

    def used() -> int:
        told: int = bayesian_server.get("/health/ready").json()["adapter_memory"]["used_bytes"]
        assert told == bayesian_server.get("/v1/adapters").json()["memory"]["used_bytes"]
        return told

    plan, before = bayesian_server.log.read_text(), used()
    for model in ("doubt", "doubts", "dense"):
        adapter = lower(adapters[model], base_model)
        draw, mean = draw_pool_bytes(adapter, base_model, torch.float32), pool_bytes(adapter, base_model, torch.float32)
        assert re.search(rf"{model} +{format_bytes(mean)}, a draw {format_bytes(draw)} more", plan)
        assert draw > mean if model == "dense" else draw < 0.8 * mean
        ask(client, model, {"samples": S}, max_tokens=2)
        assert used() == before + S * draw
        before = used()


@pytest.mark.parametrize("model", ["doubt", "doubts", "dense"])
def test_scores_equal_the_reference(
    client: openai.OpenAI, adapters: dict[str, Path], base_model: BaseModel, reference: Any, model: str
) -> None:
    answer = ask(client, model, {"samples": S, "per_token": True}, logprobs=True)
    choice = answer.choices[0]
    told = choice.uncertainty
    prompt, tokens = answer.prompt_token_ids, choice.token_ids
    logp = expected(reference, draws(adapters[model], base_model), prompt, tokens)
    p = logp.exp()
    total = torch.special.entr(p.mean(0)).sum(-1).numpy()
    aleatoric = torch.special.entr(p).sum(-1).mean(0).numpy()
    epistemic = (total - aleatoric) * S / (S - 1)
    for t, entry in enumerate(choice.logprobs.content):
        assert abs(entry.uncertainty["aleatoric"] - aleatoric[t]) < TOLERANCE
        assert abs(entry.uncertainty["epistemic"] - epistemic[t]) < TOLERANCE
        assert abs(entry.uncertainty["total"] - aleatoric[t] - epistemic[t]) < TOLERANCE
    assert told["tokens"] == [entry.uncertainty for entry in choice.logprobs.content]
    assert epistemic.mean() > 20 * TOLERANCE

    chosen = logp.gather(2, torch.tensor(tokens)[None, :, None].expand(S, -1, 1))[..., 0].numpy()
    parts = scores.Split(total, aleatoric, np.full(len(total), float(S)))
    for name, value in scores.sequence_scores(parts, chosen).items():
        per_token = len(tokens) if name == "sd_logp" else 1
        assert abs(told[name] - value) < TOLERANCE * per_token, name
    assert abs(told["raw"]["epistemic"] - (total - aleatoric).mean()) < TOLERANCE
    assert told["mode"] == "score" and told["samples"] == S and not told["partial"]
    assert (
        told["posterior"] == ("hierarchical" if model == "dense" else "diagonal_a")
        and told["noise"] == "sequence"
        and told["extra_passes"] == S
    )
    assert answer.usage.uncertainty_tokens == S * (len(prompt) + len(tokens))


def test_the_same_again_and_without_asking(client: openai.OpenAI) -> None:
    """The second time the answer lies in the prefix cache, where nothing can be read."""
    first, second = (ask(client, "doubt", {"samples": S, "mode": "score"}) for _ in range(2))
    assert first.choices[0].uncertainty["epistemic"] == pytest.approx(
        second.choices[0].uncertainty["epistemic"], abs=1e-5
    )
    plain = client.chat.completions.create(model="doubt", messages=QUESTION, temperature=0, max_tokens=12)
    assert plain.choices[0].message.content == first.choices[0].message.content
    assert "uncertainty" not in (plain.choices[0].model_extra or {})


def test_other_seeds_are_other_draws(client: openai.OpenAI) -> None:
    values = [ask(client, "doubt", {"samples": S, "seed": seed}).choices[0].uncertainty["epistemic"] for seed in (0, 1)]
    assert abs(values[0] - values[1]) > TOLERANCE


def test_without_noise_nothing_is_epistemic(client: openai.OpenAI) -> None:
    told = ask(client, "sure", {"samples": 2}).choices[0].uncertainty
    assert told["epistemic"] < 1e-6 and told["mi_max"] < 1e-6


def test_several_choices(client: openai.OpenAI) -> None:
    answer = ask(client, "doubt", {"samples": 2}, n=3, temperature=1.0, seed=1)
    told = [choice.uncertainty["nll_ln"] for choice in answer.choices]
    assert len(set(told)) == 3 and None not in told


def test_a_stream_ends_with_the_scores(client: openai.OpenAI) -> None:
    whole = ask(client, "doubt", {"samples": S}).choices[0]
    chunks = list(ask(client, "doubt", {"samples": S}, stream=True, stream_options={"include_usage": True}))
    ends = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert len(ends) == 1 and chunks.index(ends[0]) > 4
    assert ends[0].choices[0].uncertainty["epistemic"] == pytest.approx(whole.uncertainty["epistemic"], abs=1e-5)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.message.content
    assert chunks[-1].usage.uncertainty_tokens > 0


def test_what_is_late_is_partial(client: openai.OpenAI) -> None:
    told = ask(client, "doubts", {"samples": 8, "seed": 99, "timeout_ms": 1}).choices[0].uncertainty
    assert told["partial"] and told["epistemic"] is None


@pytest.mark.parametrize("model", ["doubt", "doubts", "dense"])
def test_decisions_equal_the_reference(
    client: openai.OpenAI, adapters: dict[str, Path], base_model: BaseModel, base_path: Path, reference: Any, model: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_path)
    answer = ask(client, model, {"mode": "decide", "labels": LABELS, "samples": S})
    told = answer.choices[0].uncertainty
    drawn, prompt, logp = draws(adapters[model], base_model), answer.prompt_token_ids, []
    for label in LABELS:
        ids = tokenizer.encode(label, add_special_tokens=False)
        found = expected(reference, drawn, prompt, ids)
        logp.append(found.gather(2, torch.tensor(ids)[None, :, None].expand(S, -1, 1))[..., 0].sum(1).numpy())
    decision = scores.decide(np.stack(logp, 1))
    for entry, p, deviation in zip(told["labels"], decision.mean, decision.deviation, strict=True):
        assert entry["probability"] == pytest.approx(p, abs=TOLERANCE)
        assert entry["deviation"] == pytest.approx(deviation, abs=TOLERANCE)
    for name, value in decision.scores().items():
        assert told[name] == pytest.approx(value, abs=TOLERANCE), name
    assert answer.choices[0].message.content == told["prediction"] == LABELS[decision.predicted]
    assert answer.choices[0].finish_reason == "stop"


def test_a_streamed_decision(client: openai.OpenAI) -> None:
    whole = ask(client, "doubt", {"mode": "decide", "labels": LABELS}).choices[0]
    chunks = list(ask(client, "doubt", {"mode": "decide", "labels": LABELS}, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.message.content
    (end,) = [c for c in chunks if c.choices[0].finish_reason]
    assert end.choices[0].uncertainty["confidence"] == pytest.approx(whole.uncertainty["confidence"], abs=1e-5)


@pytest.mark.parametrize("stream", [False, True])
def test_choices_under_draws_of_their_own(client: openai.OpenAI, stream: bool) -> None:
    """Each is the answer of one draw: with a temperature of 0, draws that differ may say different things."""
    asked = ask(client, "doubts", {"mode": "sample", "samples": 4}, stream=stream)
    texts, told = dict.fromkeys(range(4), ""), {}
    if stream:
        for chunk in asked:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    told[choice.index] = choice.uncertainty
    else:
        texts = {choice.index: choice.message.content for choice in asked.choices}
        told = {choice.index: choice.uncertainty for choice in asked.choices}
    assert len(texts) == len(told) == 4 and len(set(texts.values())) > 1
    assert {one["draw"] for one in told.values()} == {0, 1, 2, 3}
    for one in told.values():
        assert one["clusters"] == len({other["cluster"] for other in told.values()})
    again = ask(client, "doubts", {"mode": "sample", "samples": 4})
    assert {choice.index: choice.message.content for choice in again.choices} == texts


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", [BASE, "plain", "doubt"])
def test_fast_equals_the_reference(
    client: openai.OpenAI, reference: Any, adapters: dict[str, Path], base_model: BaseModel, model: str, stream: bool
) -> None:
    asked = ask(client, model, {"mode": "fast", "per_token": True}, stream=stream)
    if stream:
        (told,) = [c.choices[0].uncertainty for c in asked if c.choices and c.choices[0].finish_reason]
        assert told["total"] > 0 and not told["partial"] and told["nll_ln"] > 0
        return
    choice, told = asked.choices[0], asked.choices[0].uncertainty
    if model == BASE:
        logp = bayesian.log_probabilities(reference, asked.prompt_token_ids, choice.token_ids)
        entropies = torch.special.entr(logp.exp()).sum(-1).tolist()
        chosen = logp.gather(1, torch.tensor(choice.token_ids)[:, None])[:, 0].tolist()
        assert [token["total"] for token in told["tokens"]] == pytest.approx(entropies, abs=TOLERANCE)
        for name, value in scores.fast_scores(entropies, chosen).items():
            assert told[name] == pytest.approx(value, abs=TOLERANCE)
    assert len(told["tokens"]) == len(choice.token_ids) and told["samples"] == 0


def test_fast_tells_of_several_choices(client: openai.OpenAI) -> None:
    asked = ask(client, "plain", True, n=3, temperature=1.0, seed=3)
    told = [choice.uncertainty for choice in asked.choices]
    assert len({one["nll_ln"] for one in told}) == 3 and {one["mode"] for one in told} == {"fast"}
    plain = client.chat.completions.create(
        model="plain", messages=QUESTION, max_tokens=12, n=3, temperature=1.0, seed=3
    )
    assert [c.message.content for c in asked.choices] == [c.message.content for c in plain.choices]


def test_an_answer_that_was_written_elsewhere(client: openai.OpenAI, bayesian_server: Server) -> None:
    """The mean's own answer, sent back, has the scores that it came with."""
    answer = ask(client, "doubt", {"samples": S}, extra_body={"ignore_eos": True})
    text = answer.choices[0].message.content
    body = {"model": "doubt", "messages": QUESTION, "completion": text, "uncertainty": {"samples": S}}
    scored = bayesian_server.post("/v1/uncertainty/score", body).json()
    choice = scored["choices"][0]
    assert choice["message"]["content"] == text
    if scored["usage"]["completion_tokens"] == len(answer.choices[0].token_ids):  # it is split as it was written
        for name in ("epistemic", "nll_ln"):
            assert choice["uncertainty"][name] == pytest.approx(answer.choices[0].uncertainty[name], abs=1e-5)
    plain = bayesian_server.post("/v1/uncertainty/score", {**body, "model": "plain"}).json()["choices"][0]
    assert plain["uncertainty"]["mode"] == "fast" and plain["uncertainty"]["nll_ln"] > 0
    refused = bayesian_server.post("/v1/uncertainty/score", {**body, "completion": "word " * 1100})
    assert refused.status_code == 400 and refused.json()["error"]["hint"]


def test_answers_that_are_not_sure_enough(client: openai.OpenAI) -> None:
    rule = {"score": "mi_mean", "value": 1e-5}
    refused = ask(client, "doubt", {"samples": 2, "abstain_above": rule | {"action": "refuse"}}).choices[0]
    assert refused.message.content is None and "mi_mean" in refused.message.refusal and refused.uncertainty["abstained"]
    routed = ask(client, "doubt", {"samples": 2, "abstain_above": rule | {"action": "route", "route_to": BASE}})
    plain = client.chat.completions.create(model=BASE, messages=QUESTION, temperature=0, max_tokens=12)
    assert routed.model == BASE and routed.choices[0].message.content == plain.choices[0].message.content
    assert routed.choices[0].uncertainty["action"] == "route"
    sure = ask(client, "doubt", {"samples": 2, "abstain_above": rule | {"value": 9.0}}).choices[0]
    assert sure.uncertainty["abstained"] is False and sure.message.content


def test_as_many_draws_as_it_takes(client: openai.OpenAI) -> None:
    """Far from the threshold four draws do, and say what four do; near it all read."""
    four, eight = (ask(client, "doubt", {"samples": n}).choices[0].uncertainty for n in (4, 8))
    for value, expected in ((100.0, four), (eight["mi_mean"] * 1.01, eight)):
        rule = {"score": "mi_mean", "value": value}
        answer = ask(client, "doubt", {"samples": "auto", "abstain_above": rule})
        told = answer.choices[0].uncertainty
        assert told["samples"] == told["extra_passes"] == expected["samples"] and not told["partial"]
        assert told["mi_mean"] == pytest.approx(expected["mi_mean"], abs=1e-5) and not told["abstained"]
        assert answer.usage.uncertainty_tokens == told["samples"] * (
            len(answer.prompt_token_ids) + len(answer.choices[0].token_ids)
        )
    decide = {"mode": "decide", "labels": LABELS, "samples": "auto", "max_samples": 6}
    told = (
        ask(client, "doubt", {**decide, "abstain_below": {"score": "confidence", "value": 1e-6}}).choices[0].uncertainty
    )
    assert told["samples"] == 4 and not told["abstained"]


def test_feedback(client: openai.OpenAI, bayesian_server: Server) -> None:
    answer = ask(client, "doubt", {"samples": 2}, extra_headers={"X-Request-Id": "of-the-client"})
    for given in (answer.id, "of-the-client"):
        told = bayesian_server.post("/v1/uncertainty/feedback", {"id": given, "correct": True})
        assert told.json()["correct"] and told.json()["counted"] == (given == answer.id), told.text
    assert bayesian_server.post("/v1/uncertainty/feedback", {"id": answer.id, "correct": False}).status_code == 409
    assert 'loramux_uncertainty_labelled{adapter="doubt",mode="score"} 1.0' in bayesian_server.get("/metrics").text


def test_completions_have_it_too(client: openai.OpenAI) -> None:
    answer: Any = client.completions.create(
        model="doubt", prompt="The Rhine flows", max_tokens=8, extra_body={"uncertainty": {"samples": 2}}
    )
    assert answer.choices[0].uncertainty["epistemic"] > 0


def test_adapters_without_a_posterior(client: openai.OpenAI) -> None:
    told = ask(client, "plain", {"mode": "score"}).choices[0].uncertainty
    assert told["mode"] == "fast" and told["posterior"] is None
    decided = ask(client, BASE, {"mode": "decide", "labels": LABELS}).choices[0].uncertainty
    assert decided["epistemic"] is None and decided["confidence"] > 1 / 3 and decided["samples"] == 0
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "plain", {"mode": "score", "on_unsupported": "error"})
    assert error.value.code == "adapter_not_bayesian"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"samples": 0}, "uncertainty.samples"),
        ({"samples": 10**6}, "uncertainty.samples"),
        ({"samples": 64}, "uncertainty.samples"),  # no room
        ({"mode": "guess"}, "uncertainty.mode"),
        ({"scores": ["vibes"]}, "uncertainty.scores"),
        ({"mode": "decide", "labels": ["yes"]}, "uncertainty.labels"),
        ({"mode": "decide", "labels": ["yes", "yes sir"]}, "uncertainty.labels[1]"),
        ({"mode": "decide", "labels": ["yes", "\ud7ff" * 40]}, "uncertainty.labels[1]"),
        ({"model": "score"}, "uncertainty.model"),
    ],
)
def test_bad_requests_are_refused_with_a_hint_and_the_server_goes_on(
    client: openai.OpenAI, asked: Any, param: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, "doubt", asked, stream=stream)
        assert error.value.param == param
        assert error.value.body["hint"]  # type: ignore[index]
    assert ask(client, "doubt", {"samples": 2}, max_tokens=2).choices[0].uncertainty["epistemic"] is not None


def of_readme(word: str, server: Server) -> list[str]:
    """What the README's block with this word prints."""
    text = (Path(__file__).parents[2] / "serve" / "README.md").read_text()
    (block,) = (b for b in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if word in b)
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        exec(compile(block.replace("http://127.0.0.1:8000", server.url), "README.md", "exec"), {})
    return written.getvalue().splitlines()


def mails() -> list[dict[str, str]]:
    """Forty of them; one of five has the wrong label, so that nobody is right about all."""
    spam = ("Win a free {} now, click here", "Cheap {} without prescription, order today", "You won 5000 dollars: {}")
    ham = ("The minutes of our meeting about the {}", "Can you send me the {} by Friday?", "Lunch and the {} tomorrow?")
    things = ("cruise", "watch", "report", "tablets", "schedule", "laptop", "budget")
    kinds = [("spam", spam[i % 3]) if i % 2 else ("ham", ham[i % 3]) for i in range(40)]
    other = {"spam": "ham", "ham": "spam"}
    return [
        {"text": text.format(things[i % 7]), "label": label if i % 5 else other[label]}
        for i, (label, text) in enumerate(kinds)
    ]


def test_a_calibration(
    bayesian_server: Server, client: openai.OpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mails.jsonl").write_text("\n".join(map(json.dumps, mails())))
    monkeypatch.chdir(tmp_path)
    card, told = of_readme("uncertainty/calibrate", bayesian_server)
    assert re.fullmatch(r"(temperature|platt|isotonic) ECE \d\.\d\d -> 0\.[0-4]\d 40", card), card
    (kept,) = bayesian_server.get("/v1/adapters/spam-bayes").json()["calibrations"]
    assert told.split()[-1] == kept["id"] and ("spam" in told or "ham" in told)
    plain = ask(client, "spam-bayes", {"mode": "decide", "labels": ["spam", "ham"], "samples": 3}).choices[0]
    assert "calibration" not in plain.uncertainty

    answers = [ask(client, "doubt", {"samples": 2}, max_tokens=4, seed=i, temperature=1.5) for i in range(3)]
    texts = [choice.message.content or "x" for answer in answers for choice in answer.choices]
    data = [
        {"messages": QUESTION, "completion": text, "correct": (i + place) % 3 > 0}
        for i in range(10)
        for place, text in enumerate(texts)
    ]
    wish = {"model": "doubt", "uncertainty": {"samples": 2}, "data": data, "method": "platt"}
    card = bayesian_server.post("/v1/uncertainty/calibrate", wish).json()
    assert card["settings"] == {"mode": "score", "noise": "sequence", "samples": 2, "seed": 0}, card
    told = ask(client, "doubt", {"samples": 2}).choices[0].uncertainty
    assert told["calibration"]["id"] == card["id"] and 0 < told["confidence"] < 1
    assert told["raw"]["confidence"] == pytest.approx(np.exp(-told["nll_ln"]))
    httpx.delete(f"{bayesian_server.url}/v1/uncertainty/calibrations/{card['id']}").raise_for_status()
    assert "calibration" not in ask(client, "doubt", {"samples": 2}).choices[0].uncertainty


def test_the_readme(bayesian_server: Server) -> None:
    answer, spam, ham = of_readme("deviation", bayesian_server)
    assert re.fullmatch(r"spam [01]\.\d\d \d\.\d{3} 0\.\d{4}", answer), answer
    assert float(spam.split()[1]) > 0.5 > float(ham.split()[1])


def test_metrics(client: openai.OpenAI, bayesian_server: Server) -> None:
    ask(client, "doubt", {"samples": 2})
    page = bayesian_server.get("/metrics").text
    assert 'loramux_uncertainty_requests_total{adapter="doubt",mode="score",outcome="complete"}' in page
    assert 'loramux_uncertainty_score_count{adapter="doubt",mode="score",score="epistemic"}' in page
    assert 'loramux_requests_total{adapter="+drawn"' in page
