"""Decode throughput through vLLM: the engine without loramux, and with it at 0, 1, 8 and 64 plain adapters.

    PYTHONPATH=serve:adapters:kernels python tests/benchmarks/engine_decode.py base | loramux [BATCH …]

Llama-3-8B shapes with random weights, so nothing is downloaded; 128 prompt tokens in, 128 out, greedy, end-of-sequence
ignored, prefix caching off, torch.compile and CUDA graphs on, best of three. Adapters: rank 16, all seven projections.
Rows are CSV on standard output: device, engine, batch, adapters, seconds, tokens/s.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

PROMPT, OUTPUT, RANK = 128, 128, 16
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
LINEARS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 1024),
    "self_attn.v_proj": (4096, 1024),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 14336),
    "mlp.up_proj": (4096, 14336),
    "mlp.down_proj": (14336, 4096),
}


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def write_adapter(folder: Path) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, (d_in, d_out) in LINEARS.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = (torch.randn(RANK, d_in) * 0.02).bfloat16()
            tensors[f"{key}.lora_B.weight"] = (torch.randn(d_out, RANK) * 0.02).bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name.split(".")[1] for name in LINEARS]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def main(kind: str, batches: list[int]) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folder = Path(tempfile.mkdtemp())
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    options: dict[str, Any] = {}
    if kind == "loramux":
        from loramux.engine.settings import DataPlaneSettings

        settings = DataPlaneSettings(adapter_bytes=6 * 2**30, slots=128, max_rank=256)
        options = settings.engine_options()
    started = time.time()
    llm = LLM(
        model=str(folder / "model"),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_seqs=128,
        gpu_memory_utilization=0.85,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )
    device = torch.cuda.get_device_name().replace(",", " ")
    say(f"INIT,{device},{kind},{time.time() - started:.1f} s")

    loaded: list[Any] = []
    counts = [0]
    if kind == "loramux":
        from loramux_adapters import BaseModel, prepare

        artefact = prepare(write_adapter(folder / "adapter"), BaseModel.from_pretrained(folder / "model"), folder)
        started = time.time()
        for version in range(1, 65):  # the same content 64 times: 64 slots with rows of their own
            llm.collective_rpc("loramux_begin", args=(version, str(artefact.path)))
            while (state := llm.collective_rpc("loramux_advance", args=(version, 2**24))[0])["state"] != "resident":
                if state["state"] == "failed":
                    raise SystemExit(str(state))
            loaded.append(LoRARequest(lora_name=f"a{version}@x", lora_int_id=version, lora_path=str(artefact.path)))
        say(f"LOAD,{device},{kind},{(time.time() - started) / 64:.3f} s per adapter")
        counts = [0, 1, 8, 64]

    sampling = SamplingParams(max_tokens=OUTPUT, temperature=0, ignore_eos=True, detokenize=False)
    for batch in batches:
        generator = torch.Generator().manual_seed(1)
        prompts = [
            {"prompt_token_ids": torch.randint(0, 120000, (PROMPT,), generator=generator).tolist()}
            for _ in range(batch)
        ]
        for count in counts:
            if count > batch:
                continue
            requests = [loaded[i % count] for i in range(batch)] if count else None
            best = float("inf")
            for _ in range(3):
                started = time.time()
                llm.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
                best = min(best, time.time() - started)
            say(f"ROW,{device},{kind},{batch},{count},{best:.4f},{batch * OUTPUT / best:.0f}")


if __name__ == "__main__":
    main(sys.argv[1], [int(text) for text in sys.argv[2:]] or [1, 8, 64, 128])
