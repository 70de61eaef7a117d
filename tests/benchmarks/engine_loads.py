"""What running requests feel of adapters being loaded: time between tokens, with and without loads beside them.

    PYTHONPATH=serve:adapters:kernels python tests/benchmarks/engine_loads.py loramux | stock [small]

32 requests decode under 8 resident adapters (rank 16, all seven projections; Llama-3-8B shapes, random weights), first
alone, then while other adapters are loaded and removed one after the other: ours through the data plane's pieces, stock
vLLM through its own `add_lora`. `small` is a two-layer model, to try the script on a CPU. Rows are CSV on standard
output: device, engine, loads during the run, and the time between two tokens of a request in ms at p50, p90 and p99;
then, as LOADS, seconds of a load at the median and the longest, and p99 beside loads as a multiple of p99 without.
A load that fails ends the script, with its error. Should the process that reads adapters die, its traceback and lines
with "the process that reads adapters" are on standard error.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import engine_decode
import torch
from engine_decode import CONFIG, LINEARS, say, write_adapter

REQUESTS, RESIDENT, OUTPUT = 32, 8, 256
MEMORY = {"pool": 12 * 2**30, "share": 0.85}
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}

Load = Callable[[int], Awaitable[None]]


def shrink_model() -> None:
    """Replace the shapes of `engine_decode` by small ones."""
    CONFIG.update(SMALL)
    MEMORY.update(pool=2**30, share=0.3)
    for name in LINEARS:
        d_in = 256 if name == "mlp.down_proj" else 128
        LINEARS[name] = (d_in, 256 if name in ("mlp.gate_proj", "mlp.up_proj") else 128)


async def gaps(engine: Any, requests: list[Any], round_: str) -> list[float]:
    """Seconds between the tokens of all requests, the first of each left out."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=OUTPUT, temperature=0, ignore_eos=True, detokenize=False)
    found: list[float] = []

    async def one(i: int) -> None:
        generator = torch.Generator().manual_seed(i)
        prompt = torch.randint(2, CONFIG["vocab_size"] - 2, (engine_decode.PROMPT,), generator=generator).tolist()
        last = None
        async for _ in engine.generate(
            {"prompt_token_ids": prompt}, sampling, f"{round_}-{i}", lora_request=requests[i % len(requests)]
        ):
            now = time.perf_counter()
            if last is not None:
                found.append(now - last)
            last = now

    await asyncio.gather(*(one(i) for i in range(REQUESTS)))
    return found


@asynccontextmanager
async def loading(load: Load, remove: Load) -> AsyncIterator[list[float]]:
    """Load and remove other adapters until the end; yields the seconds of each load so far. Raises what a load does."""
    done: list[float] = []

    async def churn() -> None:
        for version_id in itertools.count(1000):
            started = time.perf_counter()
            await load(version_id)
            done.append(time.perf_counter() - started)
            await remove(version_id)

    task = asyncio.create_task(churn())
    try:
        yield done
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def main(kind: str) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    folder = Path(tempfile.mkdtemp())
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    if kind == "loramux":
        from loramux.engine.settings import DataPlaneSettings

        options = DataPlaneSettings(adapter_bytes=int(MEMORY["pool"]), slots=128, max_rank=256).engine_options()
    else:
        options = {"enable_lora": True, "max_loras": RESIDENT + 1, "max_cpu_loras": 64, "max_lora_rank": 16}
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(folder / "model"),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=2048,
            max_num_seqs=128,
            gpu_memory_utilization=MEMORY["share"],
            enable_prefix_caching=False,
            **options,
        )
    )

    # Only now: a process that has used torch's threads cannot be forked, and vLLM forks its engine.
    source = write_adapter(folder / "adapter")

    def request(version_id: int) -> Any:
        return LoRARequest(lora_name=f"a{version_id}@x", lora_int_id=version_id, lora_path=str(source))

    if kind == "loramux":
        from loramux.engine.client import EngineDataPlane
        from loramux_adapters import BaseModel, prepare

        plane = EngineDataPlane(engine)
        artefact = prepare(source, BaseModel.from_pretrained(folder / "model"), folder / "cache")

        async def load(version_id: int) -> None:
            await plane.load(version_id, artefact)

        remove: Load = plane.unload
    else:

        async def load(version_id: int) -> None:
            await engine.add_lora(request(version_id))

        async def remove(version_id: int) -> None:
            await engine.remove_lora(version_id)

    for version_id in range(1, RESIDENT + 1):
        await load(version_id)
    resident = [request(version_id) for version_id in range(1, RESIDENT + 1)]
    device = torch.cuda.get_device_name().replace(",", " ") if torch.cuda.is_available() else "CPU"
    await gaps(engine, resident, "warm")
    alone = await gaps(engine, resident, "alone")
    async with loading(load, remove) as seconds:
        beside = await gaps(engine, resident, "beside")
    if not seconds:
        raise SystemExit("no load ended while the requests ran")
    p99 = []
    for loads, times in ((0, alone), (len(seconds), beside)):
        quantiles = [float(p) * 1e3 for p in torch.tensor(times).quantile(torch.tensor([0.5, 0.9, 0.99]))]
        say(f"ROW,{device},{kind},{loads},{','.join(f'{value:.2f}' for value in quantiles)}")
        p99.append(quantiles[-1])
    say(f"LOADS,{device},{kind},{median(seconds):.3f},{max(seconds):.3f},{p99[1] / p99[0]:.3f}")
    engine.shutdown()


if __name__ == "__main__":
    if "small" in sys.argv:
        shrink_model()
    asyncio.run(main(sys.argv[1]))
