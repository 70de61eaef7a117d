"""A mixed batch through vLLM with our data plane against plain torch hooks, on a GPU (or a CPU, to try the script).

    PYTHONPATH=serve:adapters:kernels python tests/gpu/serving_check.py float32 | bfloat16

A random-weight Llama is written to a temporary folder. torch.compile and CUDA graphs are on, as users run them; on CUDA
float32 uses the Triton attention backend, the only one there that computes float32. Ends with OK, or FAIL and status 1.

The reference is the Hugging Face model with a forward hook per adapted linear, written from the formulas:
y += s · B (A x); DoRA y ← m / ‖W0 + s B A‖_row ⊙ (y + s · B (A x)); mixtures y += Σ_e g_e s · B_e (A_e x) with
g = softmax(W x), or softmax(W LayerNorm(x)), or the two largest, renormalised.
float32: greedy tokens equal, |Δ logprob| < 1e-3. bfloat16: the same tokens are scored by a float32 reference;
adapted rows may deviate from it no more than twice as far as the base rows of the same batch do, whose deviation is
bfloat16's own.

In float32 one answer is also read under every adapter, as draws read it, and entropies are kept of answers that are
written: both within 1e-4 nats of the reference over the whole vocabulary.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The engine in this process: all requests of a batch are there before its first step, so batches repeat exactly.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# Triton's attention otherwise multiplies float32 as TF32, which moves the base model itself by 1e-2.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

import torch
from safetensors.torch import load_file, save_file

TOKENS = 40
VOCAB = 8192
SHAPE: dict[str, Any] = dict(
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=6,
    num_attention_heads=16,
    num_key_value_heads=4,
    vocab_size=VOCAB,
    max_position_embeddings=2048,
    initializer_range=0.05,
    tie_word_embeddings=False,
)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "r8_all": (8, ALL),
    "r64_attention": (64, ("q_proj", "k_proj", "v_proj", "o_proj")),
    "r5_mlp": (5, ("gate_proj", "down_proj")),
    "r1_v": (1, ("v_proj",)),
}
DORA = {"r8_dora": (8, ALL)}
# Experts per token, and whether the router reads LayerNorm(x). All experts: a gate without a step, where rounding
# decides no route.
MIXTURES = {"mixture": (2, False), "soft_mixture": (4, False), "normed_mixture": (4, True)}
LAYER_NORM_EPS = 1e-5
EXPERT_RANKS = (8, 4, 12, 16)
Hook = Callable[[Any, Any, torch.Tensor], torch.Tensor]


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def write_model(folder: Path, dtype: torch.dtype) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype).save_pretrained(folder)


def write_adapter(
    folder: Path, rank: int, targets: tuple[str, ...], linears: dict[str, Any], seed: int, *, dora: bool = False
) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, linear in linears.items():
        if name.endswith(targets):
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, linear.in_features, generator=generator) * 0.03
            tensors[f"{key}.lora_B.weight"] = torch.randn(linear.out_features, rank, generator=generator) * 0.03
            if dora:
                lengths = linear.weight.detach().float().norm(dim=1).cpu()
                factors = 0.5 + torch.rand(linear.out_features, generator=generator)
                tensors[f"{key}.lora_magnitude_vector"] = lengths * factors
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets), "use_dora": dora}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_mixture(path: Path, linears: dict[str, Any], top_k: int, normed: bool, seed: int) -> dict[str, torch.Tensor]:
    """A native file of experts with unequal ranks; returns its experts' tensors for the reference."""
    from loramux_adapters import LoweredAdapter, LoweredSite
    from loramux_adapters.gate import Gate, PreMap, Select
    from loramux_adapters.native import write_native

    generator = torch.Generator().manual_seed(seed)
    tensors, sites, gates = {}, {}, {}
    ranks = torch.tensor(EXPERT_RANKS)
    for name, linear in linears.items():
        if not name.endswith(ALL):
            continue
        a = torch.randn(sum(EXPERT_RANKS), linear.in_features, generator=generator) * 0.03
        b = torch.randn(sum(EXPERT_RANKS), linear.out_features, generator=generator) * 0.03
        router = torch.randn(len(EXPERT_RANKS), linear.in_features, generator=generator) * 0.2
        tensors |= {f"{name}.A": a, f"{name}.B": b, f"{name}.router": router}
        pre = PreMap.LAYER_NORM if normed else PreMap.NONE
        gates[name] = Gate(router, pre=pre, pre_eps=LAYER_NORM_EPS, select=Select.TOP_K, k=top_k)
        expert = torch.repeat_interleave(torch.arange(len(ranks), dtype=torch.int32), ranks)
        sites[name] = LoweredSite(a, b, torch.full((len(a),), 2.0), gate=name, expert=expert)
    write_native(path, LoweredAdapter("mixture", sites, gates=gates), "model")
    return tensors


def lora_hook(a: torch.Tensor, b: torch.Tensor) -> Hook:
    return lambda _, inputs, y: y + 2.0 * (inputs[0] @ a.T) @ b.T


def dora_hook(a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor, weight: torch.Tensor) -> Hook:
    lengths = (weight + 2.0 * b @ a).norm(dim=1)
    return lambda _, inputs, y: magnitude / lengths * (y + 2.0 * (inputs[0] @ a.T) @ b.T)


def mixture_hook(a: torch.Tensor, b: torch.Tensor, router: torch.Tensor, top_k: int, normed: bool) -> Hook:
    """Expert by expert."""

    def hook(_: Any, inputs: Any, y: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        read = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS) if normed else x
        p = torch.softmax(read @ router.T, -1)
        chosen = torch.zeros_like(p).scatter(-1, p.topk(top_k, -1).indices, 1.0)
        gates = p * chosen / (p * chosen).sum(-1, keepdim=True)
        first = 0
        for e, rank in enumerate(EXPERT_RANKS):
            rows = slice(first, first + rank)
            y = y + gates[..., e : e + 1] * 2.0 * (x @ a[rows].T) @ b[rows]
            first += rank
        return y

    return hook


class Reference:
    """Hugging Face model with hooks; one adapter at a time."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        self.linears = {n: m for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear)}
        self.device = device
        self.mixtures: dict[str, dict[str, torch.Tensor]] = {}

    def hooks(self, adapter: Path) -> dict[str, Hook]:
        """By the name of the linear."""
        mixture = adapter.suffix != ""
        found = self.mixtures[adapter.stem] if mixture else load_file(adapter / "adapter_model.safetensors")
        weights = {name: tensor.to(self.device) for name, tensor in found.items()}
        made: dict[str, Hook] = {}
        for name, linear in self.linears.items():
            key = f"base_model.model.{name}"
            if mixture and f"{name}.A" in weights:
                parts = (weights[f"{name}.{part}"] for part in ("A", "B", "router"))
                made[name] = mixture_hook(*parts, *MIXTURES[adapter.stem])
            elif f"{key}.lora_A.weight" in weights:
                a, b = weights[f"{key}.lora_A.weight"], weights[f"{key}.lora_B.weight"]
                magnitude = weights.get(f"{key}.lora_magnitude_vector")
                made[name] = lora_hook(a, b) if magnitude is None else dora_hook(a, b, magnitude, linear.weight)
        return made

    def logprobs(self, prompt: list[int], answer: list[int], adapter: Path | None) -> torch.Tensor:
        """Log-probabilities [answer, vocabulary] of each next token, given what came before it."""
        hooks = self.hooks(adapter) if adapter is not None else {}
        handles = [self.linears[name].register_forward_hook(hook) for name, hook in hooks.items()]
        try:
            with torch.inference_mode():
                ids = torch.tensor([prompt + answer], device=self.device)
                logits = self.model(ids).logits[0, len(prompt) - 1 : -1]
            return logits.float().log_softmax(-1).cpu()
        finally:
            for handle in handles:
                handle.remove()


def check_reads(llm: Any, reference: Reference, requests: dict[str | None, Any], sources: dict[str, Path]) -> int:
    """What `engine/scoring.py` and `engine/entropies.py` read, against the reference; the number of failures."""
    from vllm import SamplingParams

    from loramux.uncertainty import ENTROPY_KEY, READ_KEY

    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(0, VOCAB, (150,), generator=generator).tolist()
    names: list[str | None] = [None, *sources]
    tagged = [SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False) for _ in names]
    for i, params in enumerate(tagged):
        params.extra_args = {ENTROPY_KEY: str(i)}
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for _ in names], tagged, lora_request=[requests[n] for n in names], use_tqdm=False
    )
    worst = 0.0
    for i, (name, output) in enumerate(zip(names, outputs, strict=True)):
        logp = reference.logprobs(prompt, list(output.outputs[0].token_ids), sources[name] if name else None).double()
        entropies = torch.tensor(llm.collective_rpc("loramux_entropies", args=(str(i),))[0], dtype=torch.float64)
        worst = max(worst, float((entropies - torch.special.entr(logp.exp()).sum(-1)).abs().max()))
    say(f"{'OK  ' if worst < 1e-4 else 'FAIL'} entropies of {len(names)} answers: {worst:.2e}")
    failures = int(not worst < 1e-4)

    answer = torch.randint(0, VOCAB, (200,), generator=generator).tolist()
    spec = {"job": "read", "draws": len(names), "first": len(prompt) - 1, "full": True}
    spec["targets"] = [[token] for token in answer]
    reads = [
        SamplingParams(
            temperature=0,
            max_tokens=1,
            detokenize=False,
            skip_reading_prefix_cache=True,
            extra_args={READ_KEY: spec | {"draw": draw}},
        )
        for draw in range(len(names))
    ]
    # Somebody else decodes beside them.
    llm.generate(
        [{"prompt_token_ids": prompt}, *({"prompt_token_ids": prompt + answer[:-1]} for _ in names)],
        [SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False), *reads],
        lora_request=[None, *(requests[name] for name in names)],
        use_tqdm=False,
    )
    report = llm.collective_rpc("loramux_scores", args=("read",))[0]
    logp = torch.stack([reference.logprobs(prompt, answer, sources[n] if n else None) for n in names]).double()
    p = logp.exp()
    expected = {
        "logp": logp.gather(2, torch.tensor(answer)[None, :, None].expand(len(names), -1, 1)),
        "entropy": torch.special.entr(p).sum(-1),
        "total": torch.special.entr(p.mean(0)).sum(-1),
    }
    for field, values in expected.items():
        gap = float((torch.tensor(report[field], dtype=torch.float64) - values).abs().max())
        bound = 1e-3 if field == "logp" else 1e-4
        good = report["error"] is None and gap < bound
        failures += not good
        say(f"{'OK  ' if good else 'FAIL'} {field} under {len(names)} adapters: {gap:.2e}")
    llm.collective_rpc("loramux_drop_scores", args=("read",))
    return failures


def main(dtype_name: str) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, dtype_name)
    folder = Path(tempfile.mkdtemp())
    write_model(folder / "model", dtype)
    reference = Reference(folder / "model", device)
    for seed, (name, (rank, targets)) in enumerate((ADAPTERS | DORA).items()):
        write_adapter(folder / name, rank, targets, reference.linears, seed, dora=name in DORA)
    sources = {name: folder / name for name in ADAPTERS | DORA}
    for seed, (name, (top_k, normed)) in enumerate(MIXTURES.items(), start=99):
        if dtype is torch.float32 or top_k == len(EXPERT_RANKS):  # in bfloat16 rounding would decide the others' routes
            sources[name] = folder / f"{name}.safetensors"
            reference.mixtures[name] = write_mixture(sources[name], reference.linears, top_k, normed, seed)

    import vllm
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from loramux.engine.settings import DataPlaneSettings
    from loramux_adapters import BaseModel, prepare

    say(f"CHECK {dtype_name} vllm {vllm.__version__} torch {torch.__version__} on {device}")
    settings = DataPlaneSettings(adapter_bytes=256 * 2**20, slots=64, max_rank=64)
    options: dict[str, Any] = {}
    if device == "cuda":
        options["gpu_memory_utilization"] = 0.5
        if dtype is torch.float32:
            options["attention_backend"] = "TRITON_ATTN"
    started = time.time()
    llm = LLM(
        model=str(folder / "model"),
        skip_tokenizer_init=True,
        dtype=dtype_name,
        max_model_len=1024,
        max_num_seqs=32,
        **settings.engine_options(),
        **options,
    )
    say(f"INIT {time.time() - started:.1f} s")
    base = BaseModel.from_pretrained(folder / "model")
    requests: dict[str | None, Any] = {None: None}
    for version, (name, source) in enumerate(sources.items(), start=1):
        artefact = prepare(source, base, folder / "artefacts")
        llm.collective_rpc("loramux_begin", args=(version, str(artefact.path)))
        while (progress := llm.collective_rpc("loramux_advance", args=(version,))[0])["state"] != "resident":
            if progress["state"] == "failed":
                say(f"FAIL load {name}: {progress}")
                return 1
        requests[name] = LoRARequest(lora_name=f"{name}@x", lora_int_id=version, lora_path=str(artefact.path))
    say(f"POOL {llm.collective_rpc('loramux_stats')[0]}")

    generator = torch.Generator().manual_seed(1)
    who: list[str | None] = [None, *sources, None, *sources, *list(ADAPTERS)[:3]]
    prompts = [
        torch.randint(0, VOCAB, (int(n),), generator=generator).tolist()
        for n in torch.randint(3, 300, (len(who),), generator=generator)
    ]

    def generate(rows: list[int], names: list[str | None]) -> list[tuple[list[int], list[float]]]:
        llm.reset_prefix_cache()  # a hit would change the shapes of the prefill
        outputs = llm.generate(
            [{"prompt_token_ids": prompts[i]} for i in rows],
            SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0, detokenize=False),
            lora_request=[requests[name] for name in names],
            use_tqdm=False,
        )
        return [
            (
                list(o.outputs[0].token_ids),
                [s[t].logprob for t, s in zip(o.outputs[0].token_ids, o.outputs[0].logprobs, strict=True)],
            )
            for o in outputs
        ]

    failures = 0
    everyone = list(range(len(who)))
    mixed = generate(everyone, who)
    alone = [generate([i], [who[i]])[0] for i in everyone]
    worst: dict[str | None, float] = {}
    for i, name in enumerate(who):
        source = sources[name] if name else None
        tokens, logprobs = mixed[i]
        expected = reference.logprobs(prompts[i], tokens, source)
        gap = max(abs(p - float(expected[t, token])) for t, (token, p) in enumerate(zip(tokens, logprobs, strict=True)))
        worst[name] = max(worst.get(name, 0.0), gap)
        if dtype is torch.float32:
            greedy = expected.argmax(-1).tolist() == tokens
            same = alone[i][0] == tokens
            without = reference.logprobs(prompts[i], tokens, None)
            effect = float((expected - without).abs().max())
            good = greedy and same and gap < 1e-3 and (name is None or effect > 0.1)
            failures += not good
            say(
                f"{'OK  ' if good else 'FAIL'} row {i} {name}: max |Δ logprob| {gap:.2e}, greedy tokens equal {greedy}"
                f", alone == mixed {same}, effect of the adapter {effect:.2f}"
            )
    say("WORST " + ", ".join(f"{name}: {gap:.2e}" for name, gap in worst.items()))
    if dtype is not torch.float32:
        bad = [name for name, gap in worst.items() if name and gap > 2 * worst[None] + 1e-3]
        failures += len(bad)
        say(f"{'FAIL' if bad else 'OK  '} adapted rows within twice the base rows' own rounding: {not bad} {bad}")

    if dtype is torch.float32:
        failures += check_reads(llm, reference, requests, sources)

    # The same batch shape with and without adapters beside the base rows.
    plain = generate(everyone, [None] * len(who))
    base_rows = [i for i in everyone if who[i] is None]
    again = generate(everyone, [None] * len(who))
    say(f"INFO the engine repeats itself without adapters: {again == plain}")
    identical = all(plain[i] == mixed[i] for i in base_rows)
    failures += not identical
    say(
        f"{'OK  ' if identical else 'FAIL'} base rows bit-identical with and without adapters in the batch: {identical}"
    )
    say("FAIL" if failures else "OK")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
