"""Tokens of a task's prompts, and the part that all of them share.

The chat template and the instruction are the same tokens in front of every text. Attention is causal, so their
keys and values are the same too: they are computed once per batch and repeated along it, with gradients flowing
through the repeat. This is exact, and about halves the work, because a headline is shorter than its instruction.
"""

from dataclasses import dataclass

import torch
from tasks import Task
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoder:
    """`prefix`: the tokens in front of every text of `task`."""

    tokenizer: PreTrainedTokenizerBase
    task: Task
    prefix: tuple[int, ...]

    @classmethod
    def create(cls, tokenizer: PreTrainedTokenizerBase, task: Task) -> "Encoder":
        prompts = [encode_prompt(tokenizer, task, text) for text in ("Some text", "other words", "1 more")]
        prefix: list[int] = []
        for column in zip(*prompts, strict=False):
            if len(set(column)) > 1:
                break
            prefix.append(column[0])
        return cls(tokenizer, task, tuple(prefix))

    def cut(self, text: str, max_tokens: int) -> str:
        """The first `max_tokens` tokens of `text`."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)[:max_tokens]
        # A cut inside a multi-byte character would leave a replacement character.
        return str(self.tokenizer.decode(ids)).rstrip("\ufffd ")

    def suffix(self, text: str) -> list[int]:
        """The prompt's tokens after the shared prefix, up to where the answer begins."""
        ids = encode_prompt(self.tokenizer, self.task, text)
        if tuple(ids[: len(self.prefix)]) != self.prefix:
            raise ValueError(f"the first token of {text[:20]!r} merges with the instruction")
        return ids[len(self.prefix) :]

    def answer(self, label: str) -> list[int]:
        """The label's tokens and the end-of-turn token."""
        return [*self.label(label), int(self.tokenizer.eos_token_id)]

    def label(self, label: str) -> list[int]:
        return list(self.tokenizer.encode(label, add_special_tokens=False))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, task: Task, text: str) -> list[int]:
    """The chat prompt of one user message, as the server builds it from the base model's template."""
    messages = [{"role": "user", "content": task.message(text)}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(prompt, add_special_tokens=False))


def shared_cache(model: PreTrainedModel, encoder: Encoder, batch: int) -> DynamicCache:
    """Keys and values of the shared prefix, repeated `batch` times."""
    cache = DynamicCache()
    model(input_ids=torch.tensor([encoder.prefix]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(batch)
    return cache
