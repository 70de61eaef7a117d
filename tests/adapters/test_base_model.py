"""What an adapter is checked against."""

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from loramux_adapters import BaseModel

LLAMA = LlamaConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    vocab_size=61,
)


def test_llama_from_its_folder(tmp_path):
    LLAMA.save_pretrained(tmp_path / "tiny-llama")
    base = BaseModel.from_pretrained(tmp_path / "tiny-llama")
    assert (base.name, base.num_layers) == ("tiny-llama", 2)
    assert len(base.linears) == 14
    assert base.linears["model.layers.1.self_attn.k_proj"] == (64, 32)
    assert base.linears["model.layers.0.mlp.down_proj"] == (96, 64)
    assert base.head == {"lm_head"} and base.embeddings == {"model.embed_tokens"}


def test_the_name_in_the_hub_cache(tmp_path):
    folder = tmp_path / "models--somebody--Tiny-Llama" / "snapshots" / "0123abcd"
    LLAMA.save_pretrained(folder)
    assert BaseModel.from_pretrained(folder).name == "Tiny-Llama"


def test_gpt2_keeps_its_weights_transposed():
    base = BaseModel.from_pretrained(GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=300))
    assert base.linears["transformer.h.0.attn.c_attn"] == (48, 144)
    assert base.linears["transformer.h.1.mlp.c_proj"] == (192, 48)
    assert base.head == {"lm_head"} and base.embeddings == {"transformer.wte", "transformer.wpe"}


def test_no_weights_are_made():
    """A model of 8 billion parameters must be listed without its 16 GB."""
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, vocab_size=128_000)
    assert len(BaseModel.from_pretrained(config, name="big").linears) == 224


def test_a_head_of_another_name_is_found():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = torch.nn.Linear(4, 5, device="meta"), torch.nn.Linear(5, 9, device="meta")

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.out

    base = BaseModel.from_module(Model(), "odd")
    assert base.linears == {"body": (4, 5)} and "out" in base.head


def test_a_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        BaseModel.from_pretrained(tmp_path)
