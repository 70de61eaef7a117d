"""MC-dropout: PEFT's LoRA, see `lora.py`. That it is to be sampled is said in our way, by its peft_type."""

from . import lora

make_tensors, delta = lora.make_tensors, lora.delta


def make_config(**changes):
    return lora.make_config(peft_type="MCDROPOUT", lora_dropout=0.1) | changes
