"""The conversion: rotary order, names, tokenizer; and the real model where the cache has it."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramux.bases import ARCHIVES, DEFAULT_BASE
from loramux.bases.gguf import GGUF, GGUFError
from loramux.bases.smollm2 import convert, unpermute
from loramux.paths import cache_dir

TEXTS = ["In 2024, 1234567 people paid 3.50 €.", "def f(x):\n    return x + 10\n", "  two  spaces, ümlaut, 日本 42"]


def rotate_pairs(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """llama.cpp's rotary embedding: neighbours (2i, 2i+1) turn by angle i."""
    out = np.empty_like(x)
    out[0::2] = x[0::2] * np.cos(angle) - x[1::2] * np.sin(angle)
    out[1::2] = x[0::2] * np.sin(angle) + x[1::2] * np.cos(angle)
    return out


def rotate_halves(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """The Hugging Face one: rows i and i + d/2 turn by angle i."""
    a, b = np.split(x, 2)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)])


def test_unpermuted_projections_give_the_same_attention_scores():
    heads, size, hidden = 3, 8, 5
    rng = np.random.default_rng(2)
    query, key = rng.standard_normal((2, heads * size, hidden))
    x, y = rng.standard_normal((2, hidden))
    at_x, at_y = (position * 10000.0 ** (-np.arange(size // 2) / (size // 2)) for position in (3, 11))
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        theirs = rotate_pairs(query[rows] @ x, at_x) @ rotate_pairs(key[rows] @ y, at_y)
        ours_q, ours_k = unpermute(query, heads)[rows], unpermute(key, heads)[rows]
        assert rotate_halves(ours_q @ x, at_x) @ rotate_halves(ours_k @ y, at_y) == pytest.approx(theirs)


@pytest.fixture(scope="module")
def tiny_folder(encode, tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    convert(GGUF(encode(*tiny_llama)), folder)
    return folder


def test_transformers_finds_every_weight_and_no_other(tiny_folder):
    model, report = AutoModelForCausalLM.from_pretrained(tiny_folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.tie_word_embeddings
    assert model.config.rms_norm_eps == 1e-5
    assert model.dtype == torch.bfloat16


def test_unmoved_weights_are_the_decoded_ones_in_bfloat16(encode, tiny_llama, tiny_folder):
    gguf, weights = GGUF(encode(*tiny_llama)), load_file(tiny_folder / "model.safetensors")
    assert len(weights) == len(gguf.tensors)
    for theirs, ours in {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
        "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
    }.items():
        expected = torch.from_numpy(gguf.tensor(f"{theirs}.weight")).bfloat16()
        assert torch.equal(weights[f"{ours}.weight"], expected)


@pytest.mark.parametrize("text", TEXTS)
def test_tiny_tokenizer_round_trips(tiny_folder, text):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_merges_and_special_tokens_are_used(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert tokenizer("<|im_start|>he<|im_end|>").input_ids == [1, 259, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.architecture": "gemma3"}, "gemma3"),
        ({"tokenizer.ggml.pre": "qwen2"}, "qwen2"),
        ({"llama.block_count": None}, "lacks the key 'llama.block_count'"),
    ],
)
def test_another_model_is_refused(encode, tiny_llama, tmp_path, change, words):
    keys, tensors = tiny_llama
    changed = {name: value for name, value in {**keys, **change}.items() if value is not None}
    with pytest.raises(GGUFError, match=words):
        convert(GGUF(encode(changed, tensors)), tmp_path)


def test_a_tensor_without_counterpart_is_refused(encode, tiny_llama, tmp_path):
    keys, tensors = tiny_llama
    with pytest.raises(GGUFError, match=r"'blk\.0\.attn_q\.bias' has no counterpart"):
        convert(GGUF(encode(keys, {**tensors, "blk.0.attn_q.bias": (np.zeros(32), "F32")})), tmp_path)


@pytest.fixture(scope="module")
def real_folder():
    folder = cache_dir() / "bases" / ARCHIVES[DEFAULT_BASE].folder
    if not (folder / "prepared.json").exists():
        pytest.skip("the default base is not in the cache: run `loramux prepare`")
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_the_default_base_tokenizes_digits_one_by_one_and_round_trips(real_folder, text):
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(len(piece.strip()) == 1 for piece in map(tokenizer.decode, ids) if any(c.isdigit() for c in piece))


def test_the_default_base_has_the_parameters_it_should(real_folder):
    weights = load_file(real_folder / "model.safetensors")
    assert sum(weight.numel() for weight in weights.values()) == 134_515_008
    assert json.loads((real_folder / "config.json").read_text())["num_hidden_layers"] == 30


def test_the_default_base_knows_the_capital_of_france(real_folder):
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    model = AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(tokens)
