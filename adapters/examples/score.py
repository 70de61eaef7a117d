"""Accuracy on held-out texts, as a user sees it and as is fair to a model that was never told the answer format.

generated   greedy decoding, at most 4 tokens; right when the first word is the label, ignoring case and punctuation
ranked      the label with the highest log-probability, its lower-case and capitalised spellings taken together
calibrated  ranked, after subtracting each label's mean score over the held-out texts, which removes a constant
            preference for one label (the texts are balanced, so this flatters whatever it is applied to)
"""

import re
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from encode import Encoder, shared_cache
from sources import Rows
from transformers import DynamicCache, PreTrainedModel

BATCH = 32
NEW_TOKENS = 4


@dataclass(frozen=True)
class Scores:
    """Fractions of right answers over `n` texts; `answers[i]` is what text i was answered with."""

    n: int
    generated: float
    ranked: float
    calibrated: float
    answers: tuple[str, ...]


@torch.inference_mode()
def score(model: PreTrainedModel, encoder: Encoder, rows: Rows) -> Scores:
    """Scores of `model` on `rows`. Only prompts of equal length share a batch, so nothing is padded."""
    labels = encoder.task.labels
    suffixes = [encoder.suffix(encoder.cut(text, encoder.task.max_tokens)) for text, _ in rows]
    order = sorted(range(len(rows)), key=lambda i: len(suffixes[i]))
    scores = torch.zeros(len(rows), len(labels))
    answers = [""] * len(rows)
    for _, group in groupby(order, key=lambda i: len(suffixes[i])):
        indices = list(group)
        for start in range(0, len(indices), BATCH):
            batch = indices[start : start + BATCH]
            cache = shared_cache(model, encoder, len(batch))
            logits = _step(model, cache, torch.tensor([suffixes[i] for i in batch]))
            for column, label in enumerate(labels):
                scores[batch, column] = _label_log_probability(model, encoder, cache, logits, label)
            for i, answer in zip(batch, _generate(model, encoder, cache, logits), strict=True):
                answers[i] = answer
    right = torch.tensor([labels.index(label) for _, label in rows])
    words = [re.match(r"\W*(\w*)", answer) for answer in answers]
    seen = [word is not None and word[1].lower() == label for word, (_, label) in zip(words, rows, strict=True)]
    return Scores(
        n=len(rows),
        generated=sum(seen) / len(rows),
        ranked=_accuracy(scores, right),
        calibrated=_accuracy(scores - scores.mean(dim=0), right),
        answers=tuple(answers),
    )


def _accuracy(scores: torch.Tensor, right: torch.Tensor) -> float:
    return (scores.argmax(dim=1) == right).float().mean().item()


def _step(model: PreTrainedModel, cache: DynamicCache, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token log-probabilities [batch, vocabulary] after `tokens` [batch, length]; `cache` grows by them."""
    output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return torch.log_softmax(output.logits[:, -1].float(), dim=-1)


def _label_log_probability(
    model: PreTrainedModel, encoder: Encoder, cache: DynamicCache, logits: torch.Tensor, label: str
) -> torch.Tensor:
    """log(P(label) + P(Label)) [batch]; leaves `cache` as it was."""
    spellings = []
    for spelling in (label, label.capitalize()):
        tokens = encoder.label(spelling)
        total, current = logits[:, tokens[0]], logits
        for previous, token in pairwise(tokens):
            current = _step(model, cache, torch.full((len(logits), 1), previous))
            total = total + current[:, token]
        if len(tokens) > 1:
            cache.crop(1 - len(tokens))
        spellings.append(total)
    return torch.logsumexp(torch.stack(spellings), dim=0)


def _generate(model: PreTrainedModel, encoder: Encoder, cache: DynamicCache, logits: torch.Tensor) -> list[str]:
    tokens = [logits.argmax(dim=-1)]
    while len(tokens) < NEW_TOKENS:
        tokens.append(_step(model, cache, tokens[-1][:, None]).argmax(dim=-1))
    end = encoder.tokenizer.eos_token_id
    rows = torch.stack(tokens, dim=1).tolist()
    return [str(encoder.tokenizer.decode(row[: row.index(end)] if end in row else row)) for row in rows]
