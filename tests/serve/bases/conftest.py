"""A GGUF encoder written from the format's description, sharing no code with the reader it tests."""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

TYPE_CODES = {"F32": 0, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12}
Tensors = dict[str, tuple[np.ndarray, str]]


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _string(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
        case [int(), *_]:
            return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    raise TypeError(value)


def _q4_1(block: np.ndarray) -> bytes:
    low, step = np.float16(block.min()), np.float16((block.max() - block.min()) / 15)
    levels = [min(15, max(0, round(float((x - low) / step)))) if step else 0 for x in block]
    packed = bytes(levels[i] | levels[i + 16] << 4 for i in range(16))
    return struct.pack("<ee", step, low) + packed


def _q8_0(block: np.ndarray) -> bytes:
    step = np.float16(np.abs(block).max() / 127)
    levels = [min(127, max(-128, round(float(x / step)))) if step else 0 for x in block]
    return struct.pack("<e32b", step, *levels)


def _data(array: np.ndarray, kind: str) -> bytes:
    if kind == "F32":
        return array.astype("<f4").tobytes()
    quantise = {"Q4_1": _q4_1, "Q8_0": _q8_0}.get(kind)
    return b"".join(quantise(block) for block in array.astype(np.float64).reshape(-1, 32)) if quantise else b""


def encode_gguf(keys: dict[str, Any], tensors: Tensors) -> bytes:
    alignment = keys.get("general.alignment", 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    head += b"".join(_string(name) + _value(value) for name, value in keys.items())
    body = b""
    for name, (array, kind) in tensors.items():
        body += bytes(-len(body) % alignment)
        head += _string(name) + struct.pack(f"<I{array.ndim}Q", array.ndim, *reversed(array.shape))
        head += struct.pack("<IQ", TYPE_CODES[kind], len(body))
        body += _data(array, kind)
    return head + bytes(-len(head) % alignment) + body


@pytest.fixture(scope="session")
def encode() -> Callable[[dict[str, Any], Tensors], bytes]:
    """`encode(keys, tensors)` → the bytes of a GGUF file; tensors map a name to (array, type name)."""
    return encode_gguf


@pytest.fixture(scope="session")
def tiny_llama() -> tuple[dict[str, Any], Tensors]:
    """Keys and tensors of a one-layer Llama: hidden 32, 2 query heads, 1 key head, bytes as vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    byte_tokens = [chr(b) if b in printable else chr(next(others)) for b in range(256)]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_tokens, "he"]
    keys = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 16,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 257,
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    shapes = {
        "token_embd": (len(tokens), 32, "Q8_0"),
        "blk.0.attn_q": (32, 32, "Q4_1"),
        "blk.0.attn_k": (16, 32, "Q4_1"),
        "blk.0.attn_v": (16, 32, "Q4_1"),
        "blk.0.attn_output": (32, 32, "Q4_1"),
        "blk.0.ffn_gate": (64, 32, "Q4_1"),
        "blk.0.ffn_up": (64, 32, "Q4_1"),
        "blk.0.ffn_down": (32, 64, "Q4_1"),
    }
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": (rng.standard_normal((r, c)), kind) for name, (r, c, kind) in shapes.items()}
    for norm in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        tensors[f"{norm}.weight"] = (rng.standard_normal(32), "F32")
    return keys, tensors
