"""What loads cost the thread that runs the engine's steps, measured without a GPU and without starting an engine.

    PYTHONPATH=serve:adapters:kernels python tests/benchmarks/load_stalls.py [plain] [mixture] [runs=3] [device=cpu]

A stand-in for the engine's loop runs steps of about 9 ms: 3 ms of Python and small tensor operations, in which the
lock of the interpreter is given away and wanted back as in a real step, then 6 ms of waiting, as for a GPU. Between two
steps it makes at most one call of a load, as the engine does for the calls of `engine/client.py`: other adapters are
loaded and removed without a pause (Llama-3-8B shapes; plain: rank 16, 84 MB; mixture: 8 experts of rank 16, 671 MB).

Rows are CSV on standard output: adapter, loads, ms of a step at p50, p90, p99 and the longest, without and with loads;
per call on the loop's thread its name and ms of processor time, median and longest. A second row: adapter, ms that the
loop's own work waited for the interpreter's lock per load, ms of processor time of other threads of the process per
load. Copies to the device are issued, and done by nobody. What other processes take from the processors is left out.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import engine_decode
import torch
from engine_decode import EXPERTS, LINEARS, RANK, say, write_mixture

from loramux.engine.loads import Loads
from loramux.engine.manager import AdapterManager
from loramux.engine.routing import RoutingMonitor
from loramux.engine.settings import DataPlaneSettings
from loramux.staging import Setup, Staging
from loramux_adapters import LoweredAdapter, LoweredSite
from loramux_adapters.native import digest_of, write_native
from loramux_kernels import AdapterPool, SiteSpec

WORK_S, WAIT_S, STEPS, POLL_S = 0.003, 0.006, 300, 0.005
FUSED = (
    ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.o_proj", ("self_attn.o_proj",)),
    ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.down_proj", ("mlp.down_proj",)),
)


def sites() -> list[SiteSpec]:
    found = []
    for layer in range(engine_decode.CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, parts in FUSED:
            d_outs = tuple(LINEARS[part][1] for part in parts)
            modules = tuple(f"{prefix}.{part}" for part in parts)
            found.append(SiteSpec(f"{prefix}.{name}", modules, LINEARS[parts[0]][0], d_outs))
    return found


def make_manager(capacity_bytes: int, device: str) -> AdapterManager:
    settings = DataPlaneSettings(adapter_bytes=capacity_bytes, slots=8, max_rank=EXPERTS * RANK)
    config: Any = SimpleNamespace(additional_config=settings.as_config())
    manager = AdapterManager(config, torch.device("cpu"))
    manager.pool = AdapterPool(
        sites(),
        capacity_bytes=capacity_bytes,
        slots=settings.slots,
        max_rank=settings.max_rank,
        max_tokens=64,
        max_requests=64,
        dtype=torch.bfloat16,
        device=device,
        backend="triton" if device == "meta" else None,
    )
    manager.routing = RoutingMonitor(manager.pool)
    manager.loads = Loads(manager.pool, Staging(Setup.of(manager.pool, {})))
    return manager


def write_plain(path: Path) -> Path:
    lowered = {}
    for layer in range(engine_decode.CONFIG["num_hidden_layers"]):
        for name, (d_in, d_out) in LINEARS.items():
            a, b = ((torch.randn(RANK, d) * 0.02).bfloat16() for d in (d_in, d_out))
            lowered[f"model.layers.{layer}.{name}"] = LoweredSite(a, b, torch.full((RANK,), 2.0))
    return write_native(path, LoweredAdapter("lora", lowered), "model")


def as_artefact(path: Path) -> Path:
    """The file again with its digest, which names it, as the engine wants it."""
    from safetensors import safe_open

    from loramux_adapters.native import METADATA_KEY, read_native

    with safe_open(path, framework="pt") as file:
        adapter = read_native(file.metadata()[METADATA_KEY], file.keys(), file.get_tensor, path.name).adapter
    digest = digest_of(adapter)
    return write_native(path.with_name(f"{digest}.safetensors"), adapter, "model", digest)


def now() -> float:
    """Seconds, without those in which this thread was ready to run and other processes had the processors."""
    delayed = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    return time.perf_counter() - delayed / 1e9


class Loop:
    """The engine's thread."""

    def __init__(self, manager: AdapterManager) -> None:
        self.manager = manager
        self.calls: dict[str, list[float]] = defaultdict(list)
        self.loads = 0
        self._tensor = torch.zeros(8)
        self._units = 1000
        self._units = int(self._units * WORK_S / min(self._work() for _ in range(50)))

    def _work(self) -> float:
        """Always the same work; seconds that it took, as long as this thread had a processor or did not want one."""
        started = now()
        total = 0
        for unit in range(self._units):
            total += unit % 7
            if unit % 40 == 0:
                self._tensor.add_(1)  # gives the lock away for a moment
        return now() - started

    def steps(self, artefact: Path | None) -> tuple[list[float], list[float]]:
        """Seconds of each step, and of its work."""
        churn = self._churn(str(artefact)) if artefact else None
        not_before = 0.0
        times, works = [], []
        for _ in range(STEPS):
            started = now()
            if churn is not None and time.perf_counter() >= not_before:
                not_before = time.perf_counter() + next(churn)
            works.append(self._work())
            time.sleep(WAIT_S)
            times.append(now() - started)
        return times, works

    def _churn(self, artefact: str) -> Iterator[float]:
        """One call at each turn; yields for how long the client lets the engine alone after it."""
        while True:
            version = 1000 + self.loads
            self._call("begin", version, artefact)
            yield 0
            while (progress := self._call("advance", version))["state"] != "resident":
                if progress["state"] == "failed":
                    raise SystemExit(str(progress))
                yield POLL_S if progress["state"] == "reading" else 0
            self.loads += 1
            yield 0
            self._call("remove", version)
            yield 0

    def _call(self, name: str, *args: Any) -> Any:
        started = time.thread_time()
        result = getattr(self.manager, name)(*args)
        self.calls[name].append(time.thread_time() - started)
        return result


def quantiles(times: list[float]) -> str:
    values = torch.tensor(times).quantile(torch.tensor([0.5, 0.9, 0.99, 1.0])).tolist()
    return ",".join(f"{value * 1e3:.2f}" for value in values)


def main(kinds: list[str], runs: int, device: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            source = Path(folder) / f"{kind}.safetensors"
            artefact = as_artefact(write_plain(source) if kind == "plain" else write_mixture(source))
            source.unlink()
            manager = make_manager((1 if kind == "plain" else 2) * 2**30, device)
            loop = Loop(manager)
            for _ in range(runs):
                loop.calls.clear()
                loop.loads = 0
                alone, work_alone = loop.steps(None)
                others = time.process_time() - time.thread_time()
                beside, work_beside = loop.steps(artefact)
                others = time.process_time() - time.thread_time() - others
                loads = max(loop.loads, 1)
                lost = (sum(work_beside) - len(work_beside) * median(work_alone)) / loads
                calls = " ".join(f"{n} {median(t) * 1e3:.2f} {max(t) * 1e3:.2f}" for n, t in loop.calls.items())
                say(f"ROW,{kind},{loop.loads},{quantiles(alone)},{quantiles(beside)},{calls}")
                say(f"LOADER,{kind},{lost * 1e3:.1f},{others / loads * 1e3:.1f}")
                manager.remove(1000 + loop.loads)
            manager.loads.close()


if __name__ == "__main__":
    options = dict(argument.split("=") for argument in sys.argv[1:] if "=" in argument)
    kinds = [argument for argument in sys.argv[1:] if "=" not in argument]
    main(kinds or ["plain", "mixture"], int(options.get("runs", 3)), options.get("device", "meta"))
