"""Real clients against `loramux serve` with the real base and the example adapters."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).parents[2] / "adapters" / "examples"
TASKS: dict[str, Any] = json.loads((EXAMPLES / "prompts.json").read_text())
BASE = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0)


def _ask(client: openai.OpenAI, model: str, text: str, **options: Any) -> Any:
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], temperature=0, **{"max_tokens": 16, **options}
    )


def test_base_and_every_adapter_answer_under_their_own_name(client: openai.OpenAI) -> None:
    for model in (BASE, *TASKS):
        answer = _ask(client, model, "What is the capital of France?")
        assert answer.model == model
        assert answer.choices[0].message.content
    assert "Paris" in _ask(client, BASE, "What is the capital of France?").choices[0].message.content


def test_models_lists_base_and_adapters(client: openai.OpenAI) -> None:
    cards = {card.id: card.model_dump() for card in client.models.list()}
    assert {BASE, *TASKS} <= set(cards)
    for name in TASKS:
        card = cards[name]
        assert card["parent"] == BASE
        assert card["adapter"]["state"] == "resident" and card["adapter"]["method"] == "lora"
        assert card["adapter"]["rank"] > 0 and card["adapter"]["experts"] == 1 and not card["adapter"]["bayesian"]
        assert str(EXAMPLES) not in json.dumps(card)
    assert client.models.retrieve("spam").id == "spam"


def test_stream_equals_the_whole_answer(client: openai.OpenAI) -> None:
    question = "Name three rivers in Europe."
    long = {"max_tokens": 24, "extra_body": {"ignore_eos": True}}
    whole = _ask(client, "news", question, **long).choices[0].message.content
    chunks = list(_ask(client, "news", question, stream=True, **long))
    assert len(chunks) > 5
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert {c.model for c in chunks} == {"news"}


def test_logprobs(client: openai.OpenAI) -> None:
    task = TASKS["spam"]
    answer = _ask(client, "spam", _prompt(task, task["examples"][0]), logprobs=True, top_logprobs=3, max_tokens=2)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.logprob == max(t.logprob for t in token.top_logprobs)


def test_named_tool(client: openai.OpenAI) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "file_story",
            "strict": True,  # without it vLLM does not hold the model to the schema
            "parameters": {
                "type": "object",
                "properties": {"desk": {"type": "string", "enum": ["sport", "tech"]}},
                "required": ["desk"],
                "additionalProperties": False,
            },
        },
    }
    answer = _ask(
        client,
        "news",
        "File this story: the striker scored twice.",
        max_tokens=64,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "file_story"}},
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "file_story"
    assert json.loads(call.function.arguments)["desk"] in ("sport", "tech")


def test_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"verdict": {"type": "string", "enum": ["spam", "ham"]}},
        "required": ["verdict"],
        "additionalProperties": False,
    }
    answer = _ask(
        client,
        "spam",
        "Win a free cruise now! Reply in JSON.",
        max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content)["verdict"] in ("spam", "ham")


def test_unknown_model_names_close_ones(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        _ask(client, "spma", "Hello")
    assert caught.value.code == "model_not_found"
    assert "'spam'" in caught.value.body["hint"]  # type: ignore[index]


def test_bad_requests_have_a_string_code_and_a_hint(server: Any) -> None:
    for path, body, status in (
        ("/v1/chat/completions", {"model": BASE}, 400),
        ("/v1/chat/completions", {"model": BASE, "messages": [], "temperature": -3}, 400),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, 403),
        ("/v1/unload_lora_adapter", {"lora_name": "nobody"}, 404),
        ("/v1/nowhere", {}, 404),
    ):
        response = server.post(path, body)
        error = response.json()["error"]
        assert response.status_code == status, (path, error)
        assert isinstance(error["code"], str) and error["hint"] and error["message"]


@pytest.mark.parametrize("name", TASKS)
def test_adapter_beats_base_on_its_own_task(client: openai.OpenAI, name: str) -> None:
    """Our own example texts; accuracies on held-out data are in adapters/examples/results.json."""
    task = TASKS[name]

    def right(model: str, example: dict[str, str]) -> bool:
        answer = _ask(client, model, _prompt(task, example), max_tokens=4).choices[0].message.content
        word = re.match(r"\W*(\w+)", answer or "")
        return word is not None and word[1].lower() == example["label"]

    with ThreadPoolExecutor(8) as pool:
        score = {
            model: sum(pool.map(right, [model] * len(task["examples"]), task["examples"])) / len(task["examples"])
            for model in (name, BASE)
        }
    assert score[name] >= 0.8 and score[name] >= score[BASE] + 0.3, score


def _prompt(task: dict[str, Any], example: dict[str, str]) -> str:
    return f"{task['instruction']}\n\n{example['text']}"


def test_metrics_per_adapter_beside_vllms_own(client: openai.OpenAI, server: Any) -> None:
    def value(text: str, series: str) -> float:
        found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    before = server.get("/metrics").text
    answer = _ask(client, "sarcasm", "Hello there", max_tokens=5)
    after = server.get("/metrics").text
    for series, expected in (
        (f'loramux_requests_total{{adapter="sarcasm",outcome="{answer.choices[0].finish_reason}"}}', 1),
        ('loramux_prompt_tokens_total{adapter="sarcasm"}', answer.usage.prompt_tokens),
        ('loramux_generation_tokens_total{adapter="sarcasm"}', answer.usage.completion_tokens),
        ('loramux_time_to_first_token_seconds_count{adapter="sarcasm"}', 1),
    ):
        assert value(after, series) - value(before, series) == expected, series
    assert value(after, 'loramux_requests_in_flight{adapter="sarcasm"}') == 0
    assert value(after, 'loramux_adapter_resident_bytes{adapter="sarcasm"}') > 0
    assert value(after, 'loramux_adapter_load_seconds_count{adapter="sarcasm",stage="copy",tier="host"}') == 1
    assert (
        0
        < value(after, 'loramux_adapter_pool_bytes{kind="used"}')
        <= value(after, 'loramux_adapter_pool_bytes{kind="capacity"}')
    )
    assert "vllm:request_success_total" in after and "vllm:time_to_first_token_seconds" in after


def test_health(server: Any) -> None:
    assert server.get("/health").status_code == 200
    ready = server.get("/health/ready")
    assert ready.status_code == 200 and ready.json()["status"] == "ready"


def test_printed_curl_works(server: Any) -> None:
    line = re.search(r"(curl -s .*)", server.log.read_text())
    assert line, "no curl in the start-up summary"
    answer = subprocess.run(line[1], shell=True, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"]


def test_vllms_serving_benchmark_with_several_adapters(server: Any, base_path: Path) -> None:
    run = (
        "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
        "p = argparse.ArgumentParser(); add_cli_args(p); main(p.parse_args())"
    )
    options = ["--backend", "openai", "--base-url", server.url, "--model", BASE, "--tokenizer", str(base_path)]
    options += ["--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "8"]
    options += ["--num-prompts", "6", "--lora-modules", *TASKS]
    result = subprocess.run(
        [sys.executable, "-c", run, *options], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(r"Successful requests:\s+6\b", result.stdout), result.stdout[-2000:]
