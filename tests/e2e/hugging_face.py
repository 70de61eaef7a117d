"""The reference side of the end-to-end tests: greedy answers of a Hugging Face model, and what counts as equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..adapters.hooks import Delta

TOKENS = 32
TOLERANCE = 1e-3  # nats, on every generated token

Answer = tuple[list[int], list[float]]  # token ids, and the log-probability of each


def load(path: Path, dtype: torch.dtype) -> Any:
    """The model, made to go on after an end-of-turn token, as `ignore_eos` makes the engine."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def encode(path: Path, texts: tuple[str, ...]) -> list[list[int]]:
    """Each text as the user's message, in tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True, return_dict=False)
        for t in texts
    ]


def lora_deltas(folder: Path, scale: float) -> dict[str, Delta]:
    """What the LoRA in a PEFT folder adds, by module: scale · B A x."""
    tensors = load_file(folder / "adapter_model.safetensors")

    def delta(a: torch.Tensor, b: torch.Tensor) -> Delta:
        return lambda x: scale * (x @ a.T) @ b.T

    names = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    return {
        name.removeprefix("base_model.model."): delta(*(tensors[f"{name}.lora_{factor}.weight"] for factor in "AB"))
        for name in sorted(names)
    }


def generate(model: Any, prompt: list[int]) -> Answer:
    """Greedy decoding of TOKENS tokens."""
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    ids = output.sequences[0, len(prompt) :].tolist()
    assert len(ids) == TOKENS
    return ids, [float(torch.log_softmax(step[0], -1)[i]) for i, step in zip(ids, output.logits, strict=True)]


def greedy_after(model: Any, prompt: list[int], tokens: list[int]) -> Answer:
    """What greedy decoding chooses after the prompt and after each of `tokens`: all of these, if it answers the same.

    One pass of the model, not one for each token.
    """
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    best = torch.log_softmax(logits, -1).max(-1)
    return best.indices.tolist(), best.values.tolist()


def difference(ours: Answer, theirs: Answer) -> float:
    """max |Δ logprob| over the tokens of two answers."""
    return max(abs(a - b) for a, b in zip(ours[1], theirs[1], strict=True))


def assert_equal(ours: Answer, theirs: Answer, what: str) -> None:
    assert ours[0] == theirs[0], f"{what}: tokens differ"
    assert difference(ours, theirs) < TOLERANCE, f"{what}: logprobs differ by {difference(ours, theirs)}"
