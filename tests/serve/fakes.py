"""Stand-ins for what surrounds the registry: reader, device, name directory, observer, engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from loramux.registry import AdapterEntry, AdapterRegistry
from loramux_adapters import AdapterSummary, Artefact

BASE = "tiny-base"
#: Where no client may look: every artefact of the fakes lies here.
CACHE = Path("/var/cache/secret-host-path")


def make_artefact(content: str) -> Artefact:
    """An artefact whose digest depends on `content` only."""
    digest = content.encode().hex().ljust(64, "0")[:64]
    summary = AdapterSummary(
        method="lora",
        rank=8,
        ranks={"model.layers.0.mlp.up_proj": 8},
        experts=1,
        bayesian=False,
        sites=1,
        nbytes=1000,
        dtype="float32",
        warnings=(),
        base=BASE,
    )
    return Artefact(CACHE / f"{digest}.safetensors", digest, summary)


class FakePrepare:
    """Reads a source: its content is its folder's name, unless the test says otherwise. Runs in a thread."""

    def __init__(self) -> None:
        self.contents: dict[Path, str] = {}
        self.errors: dict[Path, Exception] = {}
        self.read: list[Path] = []
        self.gates: dict[Path, threading.Event] = {}  # reading such a source ends when its gate opens

    def __call__(self, source: Path) -> Artefact:
        self.read.append(source)
        if source in self.gates:
            assert self.gates[source].wait(10), "the test never opened the gate"
        if source in self.errors:
            raise self.errors[source]
        return make_artefact(self.contents.get(source, source.name))


class FakeDataPlane:
    """A device that remembers which versions lie on it, in the order of what happened."""

    def __init__(self) -> None:
        self.resident: set[int] = set()
        self.log: list[tuple[str, int]] = []
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def load(self, version_id: int, artefact: Artefact) -> int:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.resident.add(version_id)
        self.log.append(("load", version_id))
        return artefact.summary.nbytes

    async def unload(self, version_id: int) -> None:
        await self.gate.wait()
        self.resident.remove(version_id)
        self.log.append(("unload", version_id))


class FakeDirectory:
    """Published versions by name; refuses to publish what is not on the device."""

    def __init__(self, data_plane: FakeDataPlane) -> None:
        self.names: dict[str, AdapterEntry] = {}
        self._data_plane = data_plane

    def publish(self, entry: AdapterEntry) -> None:
        assert entry.version_id in self._data_plane.resident
        self.names[entry.name] = entry

    def withdraw(self, name: str) -> None:
        self.names.pop(name, None)


class FakeObserver:
    def __init__(self) -> None:
        self.events: list[tuple[str, str, Any]] = []

    def loaded(self, name: str, stages: dict[str, float], resident_bytes: int) -> None:
        self.events.append(("loaded", name, resident_bytes))

    def load_failed(self, name: str, code: str) -> None:
        self.events.append(("failed", name, code))

    def unloaded(self, name: str) -> None:
        self.events.append(("unloaded", name, None))


@dataclass
class World:
    """A registry with fakes all around it."""

    roots: tuple[Path, ...] = ()
    patience_s: float = 5.0
    prepare: FakePrepare = field(default_factory=FakePrepare)
    data_plane: FakeDataPlane = field(default_factory=FakeDataPlane)
    observer: Any = field(default_factory=FakeObserver)

    def __post_init__(self) -> None:
        self.directory = FakeDirectory(self.data_plane)
        self.registry = AdapterRegistry(
            base=BASE,
            prepare=self.prepare,
            data_plane=self.data_plane,
            directory=self.directory,
            observer=self.observer,
            roots=self.roots,
            patience_s=self.patience_s,
        )


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop run until `condition` holds; fails after five seconds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@dataclass(frozen=True)
class FakeLoRARequest:
    """The fields of vLLM's LoRARequest that are used."""

    lora_name: str
    lora_int_id: int
    lora_path: str


def lora_request(entry: AdapterEntry) -> FakeLoRARequest:
    assert entry.artefact is not None
    return FakeLoRARequest(entry.version, entry.version_id, str(entry.artefact.path))


def output(*choices: tuple[Sequence[int], str | None], finished: bool = False, prompt: int = 3) -> SimpleNamespace:
    """A RequestOutput: per choice its token ids and finish reason."""
    return SimpleNamespace(
        prompt_token_ids=[0] * prompt,
        outputs=[
            SimpleNamespace(index=index, token_ids=list(tokens), finish_reason=reason)
            for index, (tokens, reason) in enumerate(choices)
        ],
        finished=finished,
        metrics=None,
    )


class FakeEngine:
    """An engine client whose `generate` yields what the test lists; an exception in the list is raised there.

    `log` tells when streams were entered and left, and with which adapter.
    """

    def __init__(self, *script: Any) -> None:
        self.script = script
        self.log: list[str] = []
        self.requests: list[Any] = []
        self.on_close: Callable[[], None] = lambda: None

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncIterator[Any]:
        self.log.append("entered")
        self.requests.append(lora_request)
        try:
            for item in self.script:
                await asyncio.sleep(0)
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, asyncio.Event):
                    await item.wait()
                    continue
                yield item
        finally:
            await asyncio.sleep(0)  # vLLM's abort awaits as well
            self.on_close()
            self.log.append("left")
