"""Tiny random base models, and the PEFT library as the reference that our lowering is compared with."""

import tempfile
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from loramux_adapters import BaseModel, LoweredAdapter

from ..form import logits

CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=61,
    ),
    "gpt2": GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=61, n_positions=32),
    "qwen2": Qwen2Config(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=61,
    ),
}


class Reference:
    """A base model in float32, from which PEFT makes adapters, and PEFT's and our results in float64."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
        self.folder = tempfile.TemporaryDirectory()
        for name, parameter in self.model.named_parameters():
            if name.endswith(".bias"):  # zero at first, which would hide what happens to it
                torch.nn.init.normal_(parameter, std=0.1)
        self.model.save_pretrained(self.folder.name)
        self.base = BaseModel.from_pretrained(self.folder.name, name=f"tiny-{kind}")
        self.tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))

    def save(self, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        """Let PEFT make a LoRA, give every factor random values and save it."""
        return self.save_config(folder, LoraConfig(**options), dtype)

    def save_config(self, folder: Path, config: PeftConfig, dtype: torch.dtype = torch.float32) -> Path:
        """The same for any adapter whose parameters are called lora_… or vera_lambda_…; magnitudes are moved from
        where they begin, and so are biases that are trained."""
        torch.manual_seed(2)
        adapted = get_peft_model(deepcopy(self.model), config, autocast_adapter_dtype=False)
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name:
                parameter.data = (parameter.data * (0.5 + torch.rand(parameter.shape))).to(dtype)
            elif name.endswith(".bias") and parameter.requires_grad and "lora_" not in name:
                parameter.data += 0.2 * torch.randn(parameter.shape)
            elif "lora_" in name or "vera_lambda_" in name:
                parameter.data = torch.randn(parameter.shape).mul_(0.3).to(dtype)
        adapted.save_pretrained(folder)
        return folder

    def peft_logits(self, folder: Path, adapter: LoweredAdapter) -> torch.Tensor:
        """Logits of the adapter as PEFT loads it. Our scale is float32: its rounding is checked, then shared."""
        loaded = PeftModel.from_pretrained(deepcopy(self.model), folder, autocast_adapter_dtype=False)
        loaded.double().eval()
        seen = set()
        for name, module in loaded.base_model.model.named_modules():
            if isinstance(module, LoraLayer):
                scale = adapter.sites[name].scale.double()
                assert scale.tolist() == [float(torch.tensor(module.scaling["default"]))] * len(scale)
                module.scaling["default"] = scale[0].item()
                seen.add(name)
        assert seen == set(adapter.sites)
        with torch.no_grad():
            return loaded(self.tokens).logits

    def library_logits(self, folder: Path) -> torch.Tensor:
        """Logits of the adapter in float64 as PEFT loads it and scales it."""
        loaded = PeftModel.from_pretrained(deepcopy(self.model), folder, autocast_adapter_dtype=False)
        with torch.no_grad():
            return loaded.double().eval()(self.tokens).logits

    def assert_same(self, adapter: LoweredAdapter, expected: torch.Tensor) -> None:
        """The lowered form gives these logits, up to float32 rounding of what was folded; they are not the base's."""
        size = expected.abs().max()
        assert (logits(self.model, adapter, self.tokens) - expected).abs().max() < 1e-6 * size
        assert (self.base_logits() - expected).abs().max() > 1e-3 * size

    def base_logits(self) -> torch.Tensor:
        with torch.no_grad():
            return deepcopy(self.model).double()(self.tokens).logits


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Reference]:
    return cache(Reference)
