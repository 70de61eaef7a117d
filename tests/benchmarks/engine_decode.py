"""Throughput through vLLM: requests of the base, of plain adapters and of mixtures, decoding and prefill.

    PYTHONPATH=serve:adapters:kernels python tests/benchmarks/engine_decode.py base|loramux|stock [PART …]

Llama-3-8B shapes with random weights, so nothing is downloaded; greedy, end-of-sequence ignored, prefix caching off,
torch.compile and CUDA graphs on, best of three. decode: 128 prompt tokens in, 128 out, under plain adapters of rank 16
on all seven projections; mixtures: the same under mixtures of 8 experts of rank 16, top 2, which `stock` has not;
prefill: one token out. Rows are CSV on standard output: device, engine, adapters' kind, requests, prompt tokens, output
tokens, adapters among the requests, seconds, tokens/s (prompt tokens where one token comes out), share of the rows
without adapters of this process.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

PROMPT, OUTPUT, RANK, EXPERTS = 128, 128, 16, 8
PLAIN, MIXTURES = 64, 8
# Requests, and among how many adapters they are spread.
DECODE = {1: (1,), 8: (8,), 32: (32,), 64: (1, 8, 64), 128: (64,)}
PREFILL = ((16, 512), (8, 2000))
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


def write_mixture(path: Path) -> Path:
    from loramux_adapters import LoweredAdapter, LoweredSite
    from loramux_adapters.gate import Gate, Select
    from loramux_adapters.native import write_native

    rank = EXPERTS * RANK
    expert = torch.arange(rank, dtype=torch.int32) // RANK
    sites, gates = {}, {}
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, (d_in, d_out) in LINEARS.items():
            key = f"model.layers.{layer}.{name}"
            a, b = ((torch.randn(rank, d) * 0.02).bfloat16() for d in (d_in, d_out))
            gates[key] = Gate((torch.randn(EXPERTS, d_in) * 0.02).bfloat16(), select=Select.TOP_K, k=2)
            sites[key] = LoweredSite(a, b, torch.full((rank,), 2.0), gate=key, expert=expert)
    write_native(path, LoweredAdapter("mixture", sites, gates=gates), "model")
    return path


class Bench:
    """An engine of `kind`, and requests under adapters that it holds."""

    def __init__(self, kind: str) -> None:
        from vllm import LLM

        self.kind = kind
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "model").mkdir()
        (self.folder / "model" / "config.json").write_text(json.dumps(CONFIG))
        options: dict[str, Any] = {}
        if kind == "loramux":
            from loramux.engine.settings import DataPlaneSettings

            options = DataPlaneSettings(adapter_bytes=12 * 2**30, slots=128, max_rank=256).engine_options()
        elif kind == "stock":
            options = {"enable_lora": True, "max_loras": PLAIN, "max_cpu_loras": PLAIN, "max_lora_rank": RANK}
        started = time.time()
        self.llm = LLM(
            model=str(self.folder / "model"),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=2048,
            max_num_seqs=128,
            gpu_memory_utilization=0.85,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **options,
        )
        self.device = torch.cuda.get_device_name().replace(",", " ")
        say(f"INIT,{self.device},{kind},{time.time() - started:.1f} s")
        self.base: dict[tuple[int, int, int], float] = {}
        self.versions = 0

    def load(self, source: Path, count: int) -> list[Any]:
        """The same content `count` times: slots with rows of their own."""
        from vllm.lora.request import LoRARequest

        started = time.time()
        path = source
        if self.kind == "loramux":
            from loramux_adapters import BaseModel, prepare

            path = prepare(source, BaseModel.from_pretrained(self.folder / "model"), self.folder).path
            say(f"PREPARE,{self.device},{self.kind},{source.name},{time.time() - started:.1f} s")
            started = time.time()
        loaded = []
        for _ in range(count):
            self.versions += 1
            version = self.versions
            loaded.append(LoRARequest(lora_name=f"a{version}@x", lora_int_id=version, lora_path=str(path)))
            if self.kind == "loramux":
                self.llm.collective_rpc("loramux_begin", args=(version, str(path)))
                while (state := self.llm.collective_rpc("loramux_advance", args=(version,))[0])["state"] != "resident":
                    if state["state"] == "failed":
                        raise SystemExit(str(state))
        say(f"LOAD,{self.device},{self.kind},{source.name},{(time.time() - started) / count:.3f} s per adapter")
        return loaded

    def row(self, label: str, batch: int, prompt: int, output: int, adapters: list[Any]) -> None:
        """Run, report, and compare with the same requests without adapters."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=output, temperature=0, ignore_eos=True, detokenize=False)
        generator = torch.Generator().manual_seed(1)
        prompts = [
            {"prompt_token_ids": torch.randint(0, 120000, (prompt,), generator=generator).tolist()}
            for _ in range(batch)
        ]
        requests = [adapters[i % len(adapters)] for i in range(batch)] if adapters else None
        best = float("inf")
        for _ in range(3):
            started = time.time()
            self.llm.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
            best = min(best, time.time() - started)
        if not adapters:
            self.base[batch, prompt, output] = best
        share = self.base[batch, prompt, output] / best
        rate = batch * (prompt if output == 1 else output) / best
        say(
            f"ROW,{self.device},{self.kind},{label},{batch},{prompt},{output},{len(adapters)},"
            f"{best:.4f},{rate:.0f},{share:.3f}"
        )


def main(kind: str, parts: list[str]) -> None:
    bench = Bench(kind)
    shapes = [(batch, PROMPT, OUTPUT) for batch in DECODE] if parts != ["prefill"] else []
    if "prefill" in parts:
        shapes += [(batch, prompt, 1) for batch, prompt in PREFILL]
    for shape in shapes:
        bench.row("base", *shape, [])
    if kind == "base":
        return
    plain = bench.load(write_adapter(bench.folder / "plain"), PLAIN) if set(parts) & {"decode", "prefill"} else []
    if "decode" in parts:
        for batch, counts in DECODE.items():
            for count in counts:
                bench.row("plain", batch, PROMPT, OUTPUT, plain[:count])
    if "prefill" in parts:
        for batch, prompt in PREFILL:
            bench.row("plain", batch, prompt, 1, plain[:MIXTURES])
    if "mixtures" in parts and kind == "loramux":
        mixtures = bench.load(write_mixture(bench.folder / "mixture.safetensors"), MIXTURES)
        for count in (1, MIXTURES):
            bench.row("mixture", 64, PROMPT, OUTPUT, mixtures[:count])
        if "prefill" in parts:
            bench.row("mixture", *PREFILL[1], 1, mixtures)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or ["decode", "mixtures", "prefill"])
