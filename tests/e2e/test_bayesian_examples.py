"""The two Bayesian examples, as `make serve` serves them: they answer, and say how sure they are."""

from __future__ import annotations

import openai
import pytest

from .conftest import Server

pytestmark = pytest.mark.engine

QUESTIONS = {
    "reviews": (
        "Is this review of a film good or bad? Answer with one word: good or bad.",
        "diagonal_a",
        {
            "A moving, beautifully acted film that stays with you for days.": "good",
            "Dull, predictable and far too long; a waste of a fine cast.": "bad",
        },
    ),
    "topics": (
        "What is this news story about? Answer with one word: business, culture, government, games or tech.",
        "diagonal_a",
        {
            "Late goal sends City through\nA header in the final minute gave the visitors a place in the cup.": "games",
            "Oil firm's profits rise\nShares in the company rose after it told of record earnings.": "business",
        },
    ),
}


@pytest.mark.parametrize("model", QUESTIONS)
def test_examples_answer_and_know_what_they_do_not_know(server: Server, model: str) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0)
    instruction, family, texts = QUESTIONS[model]
    labels = instruction.rpartition(": ")[2].rstrip(".").replace(" or ", ", ").split(", ")
    for text, right in texts.items():
        messages = [{"role": "user", "content": f"{instruction}\n\n{text}"}]
        answer = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=4, extra_body={"uncertainty": {"samples": 4}}
        )
        assert answer.choices[0].message.content == right and answer.choices[0].finish_reason == "stop"
        told = answer.choices[0].uncertainty
        assert told["posterior"] == family and told["epistemic"] > 0 and not told["partial"]
        decision = client.chat.completions.create(
            model=model,
            messages=messages,
            extra_body={"uncertainty": {"mode": "decide", "labels": labels, "samples": 4}},
        )
        decided = decision.choices[0].uncertainty
        assert decision.choices[0].message.content == right
        chances = {label["label"]: label for label in decided["labels"]}
        assert set(chances) == set(labels) and chances[right]["probability"] == max(
            label["probability"] for label in decided["labels"]
        )
        assert chances[right]["deviation"] > 0 and decided["label_mass"] > 0.9
