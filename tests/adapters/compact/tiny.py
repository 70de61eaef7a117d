"""A model with the layers of `checkpoints.BASE`, and a tokeniser of a few words with a chat template."""

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

WORDS = ("<end>", "<unk>", "user", "assistant", "yes", "no", "which", "one", "rain", "sun", "snow", "wind")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
CONFIG = LlamaConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=40,
    vocab_size=len(WORDS),
)


def make_model() -> Any:
    """In float32."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG).eval()


def make_tokenizer() -> Any:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made
