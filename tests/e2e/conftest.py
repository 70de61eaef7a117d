"""Real engines with the real small model: one offline engine for parity, one HTTP server for clients."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loramux.bases import prepare_base
from loramux.paths import cache_dir
from loramux_adapters import Artefact, BaseModel, prepare

EXAMPLES = Path(__file__).parents[2] / "adapters" / "examples"
START_S = 300


@pytest.fixture(scope="session")
def base_path() -> Path:
    return Path(prepare_base("smollm2-135m-instruct", progress=lambda line: None))


@pytest.fixture(scope="session")
def base_model(base_path: Path) -> BaseModel:
    return BaseModel.from_pretrained(base_path)


class Engine:
    """vLLM's offline engine with our worker: what is batched together is decided by the test."""

    def __init__(self, model: Path, base: BaseModel, **options: Any) -> None:
        # Read when vLLM is imported. The scheduler in this process: all requests of a batch are there before its
        # first step, so the same call makes the same batches.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from vllm import LLM

        from loramux.engine.settings import DataPlaneSettings

        settings = DataPlaneSettings(adapter_bytes=256 * 2**20, slots=64, max_rank=256)
        self.llm = LLM(
            model=str(model),
            dtype="float32",
            max_model_len=1024,
            # Small, so that prompts are prefilled in chunks, mixed with decoding rows.
            max_num_seqs=32,
            max_num_batched_tokens=128,
            **settings.engine_options(),
            disable_log_stats=True,
            **options,
        )
        self._base = base
        self._requests: dict[Path, Any] = {}
        self._ids = itertools.count(1)

    def adapter(self, source: Path) -> Any:
        """The LoRARequest of an adapter folder, made resident on first use."""
        if source not in self._requests:
            artefact: Artefact = prepare(source, self._base, cache_dir() / "artefacts")
            self._requests[source] = self.resident(artefact, source.name)
        return self._requests[source]

    def resident(self, artefact: Artefact, name: str = "adapter") -> Any:
        """The LoRARequest of a prepared adapter, made resident."""
        from vllm.lora.request import LoRARequest

        version_id = next(self._ids)
        self.rpc("loramux_begin", version_id, str(artefact.path))
        while (progress := self.rpc("loramux_advance", version_id))["state"] != "resident":
            assert progress["state"] != "failed", progress
        return LoRARequest(lora_name=f"{name}@{artefact.short}", lora_int_id=version_id, lora_path=str(artefact.path))

    def rpc(self, method: str, *args: Any) -> Any:
        return self.llm.collective_rpc(method, args=args)[0]

    def greedy(
        self, rows: list[tuple[list[int], Path | None]], tokens: int = 32
    ) -> list[tuple[list[int], list[float]]]:
        """Token ids and their log-probabilities for each (prompt ids, adapter) row, all in one batch."""
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in rows],
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0),
            lora_request=[self.adapter(source) if source else None for _, source in rows],
            use_tqdm=False,
        )
        answers = []
        for output in outputs:
            choice = output.outputs[0]
            ids = list(choice.token_ids)
            assert choice.logprobs is not None
            answers.append((ids, [step[i].logprob for i, step in zip(ids, choice.logprobs, strict=True)]))
        return answers


@pytest.fixture(scope="module")
def engine(base_path: Path, base_model: BaseModel) -> Iterator[Engine]:
    engine = Engine(base_path, base_model)
    yield engine
    engine.llm.llm_engine.engine_core.shutdown()


@dataclass
class Server:
    """A `loramux serve` process."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=120)


ServeFixture = Callable[..., contextlib.AbstractContextManager[Server]]


@contextlib.contextmanager
def run_server(log: Path, *arguments: str) -> Iterator[Server]:
    """Start `loramux serve` on a free port, wait until it is ready, stop it at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A state file of its own: ports come round again, and with them what earlier servers knew.
    options = ["--port", str(port), "--state", str(log.with_name("state.sqlite")), "--max-model-len", "1024"]
    command = [sys.executable, "-m", "loramux", "serve", *options, *arguments]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_S
        while True:
            assert process.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"not ready after {START_S} s:\n{log.read_text()[-3000:]}"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health/ready", timeout=5).status_code == 200:
                    break
            time.sleep(0.2)
        while not re.search(r"loramux is ready", log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield Server(url=url, process=process, log=log)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def examples(base_path: Path) -> Path:
    """The example adapters, with the one that make composes of the others."""
    subprocess.run(["make", "--silent", "adapters/examples/desk.safetensors"], cwd=EXAMPLES.parents[1], check=True)
    return EXAMPLES


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, examples: Path, spare_adapters: Path) -> Iterator[Server]:
    """The server of `make serve`: the default base and the example adapters."""
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ("--adapters", str(examples), "--adapter-root", str(spare_adapters))
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with run_server(log, *flags, *tools) as server:
        yield server


@pytest.fixture(scope="session")
def spare_adapters(tmp_path_factory: pytest.TempPathFactory, base_model: BaseModel) -> Path:
    """A folder of small random adapters, to be loaded while the server runs: spare0 … spare3."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("spare")
    for i in range(4):
        rank = 4 + 4 * i
        generator = torch.Generator().manual_seed(i)
        tensors = {}
        for name, (d_in, d_out) in base_model.linears.items():
            if name.endswith(("q_proj", "v_proj")):
                key = f"base_model.model.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) * 0.05
                tensors[f"{key}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) * 0.05
        path = folder / f"spare{i}"
        path.mkdir()
        save_file(tensors, path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"]}
        (path / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def small_server(
    tmp_path_factory: pytest.TempPathFactory, base_model: BaseModel, spare_adapters: Path
) -> Iterator[Server]:
    """A server whose adapter memory holds one spare adapter of rank 16 (and 2 % for alignment)."""
    weights = sum(
        16 * (i + o) * 4 for name, (i, o) in base_model.linears.items() if name.endswith(("q_proj", "v_proj"))
    )
    memory = ("--adapter-memory", str(int(weights * 1.02)))
    with run_server(tmp_path_factory.mktemp("small") / "log", *memory, "--adapter-root", str(spare_adapters)) as server:
        yield server
