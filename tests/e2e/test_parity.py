"""Served answers equal PEFT's, float32, real base: every option of its LoRA, alone and in one batch.

Its other methods, and the plainest LoRA, are in `test_methods.py`.

The reference is PEFT's own forward on the Hugging Face model; nothing of loramux computes it. Weights are mild (B of
standard deviation 0.02, 0.1 where few layers are adapted): answers differ from the base's, rounding decides no token.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from . import peft_adapters
from .hugging_face import TOLERANCE, Answer, assert_equal, difference, encode, generate, load

pytestmark = pytest.mark.engine

PROMPTS = (
    "Explain how rain forms.",
    "Write two sentences about a lighthouse keeper.",
    "List three uses of copper.",
    "Why do cats purr?",
    "Describe the colour blue to someone who cannot see.",
    "What happens when bread is toasted?",
)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEATURES: dict[str, dict[str, Any]] = {
    "all_linear": {"r": 6, "lora_alpha": 12, "target_modules": "all-linear"},
    "excluded": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "exclude_modules": ["down_proj", "k_proj"],
    },
    "regex": {"r": 5, "lora_alpha": 5, "target_modules": r".*layers\.(3|17)\.mlp\.(gate|down)_proj"},
    "rslora": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "rank_pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"layers.5.self_attn.q_proj": 24, "up_proj": 3},
    },
    "alpha_pattern": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ["v_proj", "o_proj"],
        "alpha_pattern": {"o_proj": 40, "layers.0.self_attn.v_proj": 2},
    },
    "some_layers": {
        "r": 12,
        "lora_alpha": 24,
        "target_modules": ["q_proj", "gate_proj"],
        "layers_to_transform": [0, 7, 29],
        "layers_pattern": "layers",
    },
    "fan_in_fan_out": {"r": 8, "lora_alpha": 16, "target_modules": ["o_proj"], "fan_in_fan_out": True},
    "float16": {"r": 7, "lora_alpha": 14, "target_modules": ATTENTION, "dtype": torch.float16},
    "bfloat16": {"r": 64, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"], "dtype": torch.bfloat16},
    "dora_some": {
        "r": 16,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": ["v_proj", "down_proj"],
        "use_dora": True,
        "dtype": torch.bfloat16,
    },
}


@pytest.fixture(scope="module")
def reference(base_path: Path) -> Iterator[Any]:
    yield load(base_path, torch.float32)


@pytest.fixture(scope="module")
def prompts(base_path: Path) -> list[list[int]]:
    return encode(base_path, PROMPTS)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, reference: Any, prompts: Any) -> dict[str, tuple[Path, Answer]]:
    """For each feature: the folder PEFT saved, and what PEFT answers to the feature's prompt."""
    import peft.helpers

    folder = tmp_path_factory.mktemp("peft")
    made = {}
    for i, (name, options) in enumerate(FEATURES.items()):
        few = "layers" in str(options.get("target_modules")) or "layers_to_transform" in options
        model = peft_adapters.make(reference, folder / name, options, std=0.1 if few else 0.02, seed=i)
        with peft.helpers.DoraCaching():  # or PEFT computes all lengths of all rows anew for every token
            made[name] = (folder / name, generate(model, prompts[i % len(prompts)]))
        reference = model.unload()
    return made


@pytest.mark.parametrize("name", FEATURES)
def test_alone_equals_peft(engine: Any, adapters: Any, prompts: Any, name: str) -> None:
    source, expected = adapters[name]
    prompt = prompts[list(FEATURES).index(name) % len(prompts)]
    (answer,) = engine.greedy([(prompt, source)])
    assert_equal(answer, expected, name)


def test_adapters_change_the_answer(engine: Any, adapters: Any, prompts: Any) -> None:
    """Otherwise equality with PEFT would prove nothing."""
    base = engine.greedy([(prompts[i % len(prompts)], None) for i in range(len(FEATURES))])
    for (name, (_, expected)), answer in zip(adapters.items(), base, strict=True):
        assert difference(answer, expected) > 10 * TOLERANCE, name


@pytest.mark.parametrize("order", range(3))
def test_all_in_one_batch_equal_peft(
    engine: Any, adapters: Any, prompts: Any, order: int, base_answers: list[Answer]
) -> None:
    """Every feature (ranks 3 to 64) and two base rows share each step; rows come in three orders."""
    rows: list[tuple[str, list[int], Path | None, Answer]] = [
        (name, prompts[i % len(prompts)], source, expected)
        for i, (name, (source, expected)) in enumerate(adapters.items())
    ]
    rows += [("base", prompts[i], None, base_answers[i]) for i in range(2)]
    random.Random(order).shuffle(rows)
    answers = engine.greedy([(prompt, source) for _, prompt, source, _ in rows])
    for (name, _, _, expected), answer in zip(rows, answers, strict=True):
        assert_equal(answer, expected, f"{name} in a mixed batch")


@pytest.fixture(scope="module")
def base_answers(adapters: Any, reference: Any, prompts: Any) -> list[Answer]:
    return [generate(reference, prompts[i]) for i in range(2)]


def test_base_rows_are_bit_identical(engine: Any, adapters: Any, prompts: Any) -> None:
    """The same batch with and without adapters on its other rows: base rows do not change by one bit."""
    sources = [source for source, _ in adapters.values()]
    engine.llm.reset_prefix_cache()  # a hit would change the shapes of the prefill
    plain = engine.greedy([(prompt, None) for prompt in prompts])
    engine.llm.reset_prefix_cache()
    mixed = engine.greedy([(p, None if i % 2 == 0 else sources[i]) for i, p in enumerate(prompts)])
    assert [mixed[i] for i in (0, 2, 4)] == [plain[i] for i in (0, 2, 4)]
    assert all(mixed[i] != plain[i] for i in (1, 3, 5))


def test_prefix_cache_is_not_shared_between_adapters(engine: Any, adapters: Any, prompts: Any) -> None:
    """A long shared prompt, under base, one adapter, another, and the first again."""
    prompt = [token for ids in prompts for token in ids] * 2
    (first, _), (second, _) = adapters["float16"], adapters["all_linear"]
    order = [None, first, second, None, first]
    answers = [engine.greedy([(prompt, source)], tokens=16)[0] for source in order]
    assert answers[3][0] == answers[0][0] and answers[4][0] == answers[1][0]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert difference(answers[a], answers[b]) > TOLERANCE


def test_a_version_that_is_not_resident_fails_its_request_only(engine: Any, prompts: Any) -> None:
    """Inside a step nothing raises: the request with a missing adapter ends with an error, its neighbour does not."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    ghost = LoRARequest(lora_name="ghost@0", lora_int_id=9999, lora_path="/nonexistent")
    outputs = engine.llm.generate(
        [{"prompt_token_ids": prompts[0]}, {"prompt_token_ids": prompts[1]}],
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
        lora_request=[ghost, None],
        use_tqdm=False,
    )
    by_prompt = {tuple(o.prompt_token_ids): o.outputs[0] for o in outputs}
    assert by_prompt[tuple(prompts[0])].finish_reason == "error"
    assert len(by_prompt[tuple(prompts[1])].token_ids) == 8
    assert engine.greedy([(prompts[1], None)], tokens=8)[0][0] == list(by_prompt[tuple(prompts[1])].token_ids)
