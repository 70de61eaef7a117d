"""SmolLM2 as llama.cpp's GGUF → the Hugging Face checkpoint folder vLLM and transformers read.

Three things differ between the two: tensor names; the row order of the query and key projections (llama.cpp
interleaves the two halves of every rotary pair); and the tokenizer, which GGUF holds as lists of tokens and merges.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loramux.bases.gguf import GGUF, FloatArray, GGUFError

_CONTROL_TOKEN = 3
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf: GGUF, folder: Path) -> None:
    """Write config, generation config, bfloat16 weights and tokenizer into `folder`, which exists.

    Raises:
        GGUFError: a key is missing, the file describes another architecture, or a tensor has no counterpart.
    """
    if (architecture := _key(gguf, "general.architecture")) != "llama":
        raise GGUFError(f"the file holds a {architecture!r} model, not a Llama-shaped one")
    if (pre := _key(gguf, "tokenizer.ggml.pre")) != "smollm":
        raise GGUFError(f"the file's tokenizer splits text the {pre!r} way; only 'smollm' is known")
    weights = dict(_weights(gguf))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it 0600, and a cache may be shared
    _write_json(folder / "config.json", _config(gguf, tied="lm_head.weight" not in weights))
    _write_json(folder / "generation_config.json", _token_ids(gguf))
    _tokenizer(gguf).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(gguf))


def unpermute(weight: FloatArray, heads: int) -> FloatArray:
    """Undo the rotary interleave: in every head, rows (a_0, b_0, a_1, b_1, …) → (a_0, a_1, …, b_0, b_1, …)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _weights(gguf: GGUF) -> Iterator[tuple[str, torch.Tensor]]:
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    for name in gguf.tensors:
        weight = gguf.tensor(name)
        match name.split("."):
            case ["blk", layer, part, "weight"] if part in _INNER:
                if part in heads:
                    weight = unpermute(weight, _key(gguf, heads[part]))
                target = f"model.layers.{layer}.{_INNER[part]}.weight"
            case [part, "weight"] if part in _OUTER:
                target = f"{_OUTER[part]}.weight"
            case _:
                raise GGUFError(f"tensor {name!r} has no counterpart in a Llama checkpoint")
        yield target, torch.from_numpy(weight).to(torch.bfloat16).contiguous()


def _config(gguf: GGUF, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": _key(gguf, "llama.rope.dimension_count"),
        "hidden_act": "silu",
        "hidden_size": _key(gguf, "llama.embedding_length"),
        "intermediate_size": _key(gguf, "llama.feed_forward_length"),
        "max_position_embeddings": _key(gguf, "llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": _key(gguf, "llama.attention.head_count"),
        "num_hidden_layers": _key(gguf, "llama.block_count"),
        "num_key_value_heads": _key(gguf, "llama.attention.head_count_kv"),
        # Stored as float32: 9.99999974e-06 stands for 1e-05.
        "rms_norm_eps": float(f"{_key(gguf, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_scaling": None,
        "rope_theta": _key(gguf, "llama.rope.freq_base"),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": _key(gguf, "llama.vocab_size"),
        **_token_ids(gguf),
    }


def _token_ids(gguf: GGUF) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {ours: _key(gguf, f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}


def _tokenizer(gguf: GGUF) -> Tokenizer:
    tokens = _key(gguf, "tokenizer.ggml.tokens")
    kinds = _key(gguf, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in _key(gguf, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if tokenizer.get_vocab_size() != len(tokens):
        raise GGUFError("tokenizer.ggml.tokens holds a token twice")
    return tokenizer


def _tokenizer_config(gguf: GGUF) -> dict[str, Any]:
    tokens = _key(gguf, "tokenizer.ggml.tokens")
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{ours: tokens[_key(gguf, f"tokenizer.ggml.{theirs}_token_id")] for ours, theirs in names.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "model_max_length": _key(gguf, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": _key(gguf, "tokenizer.chat_template"),
    }


def _key(gguf: GGUF, name: str) -> Any:
    if name not in gguf.keys:
        raise GGUFError(f"the file lacks the key {name!r}")
    return gguf.keys[name]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
