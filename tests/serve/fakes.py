"""Stand-ins for what surrounds the registry: reader, device, name directory, observer, engine."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from loramux.errors import PoolExhausted
from loramux.registry import Adapter, AdapterRegistry, State, Store, Version
from loramux_adapters import AdapterSummary, Artefact, Posterior
from loramux_adapters.compose.prepared import Part, Router

BASE = "tiny-base"
#: Where no client may look: artefacts of the fakes lie here unless a test has a folder for them.
CACHE = Path("/var/cache/secret-host-path")


def make_artefact(content: str, cache: Path = CACHE, nbytes: int = 1000) -> Artefact:
    """An artefact whose digest depends on `content` only, and begins with a letter or more of it."""
    digest = f"{content.encode().hex()[:8]}{hashlib.sha256(content.encode()).hexdigest()}"[:64]
    summary = AdapterSummary(
        method="lora",
        rank=8,
        ranks={"model.layers.0.mlp.up_proj": 8},
        experts=1,
        bayesian=False,
        sites=1,
        nbytes=nbytes,
        dtype="float32",
        warnings=(),
        base=BASE,
    )
    return Artefact(cache / f"{digest}.safetensors", digest, summary)


class FakePrepare:
    """Reads a source: its content is its folder's name, unless the test says otherwise. Runs in a thread."""

    def __init__(self, cache: Path = CACHE) -> None:
        self.cache = cache
        self.contents: dict[Path, str] = {}
        self.sizes: dict[str, int] = {}  # by content
        self.errors: dict[Path, Exception] = {}
        self.read: list[Path] = []
        self.gates: dict[Path, threading.Event] = {}  # reading such a source ends when its gate opens

    def __call__(self, source: Path, *, on_read: Callable[[], object] = lambda: None) -> Artefact:
        self.read.append(source)
        if source in self.gates:
            assert self.gates[source].wait(10), "the test never opened the gate"
        if source in self.errors:
            raise self.errors[source]
        on_read()
        content = self.contents.get(source, source.name)
        artefact = make_artefact(content, self.cache, self.sizes.get(content, 1000))
        if self.cache != CACHE:
            artefact.path.write_text(content)
        return artefact


class FakeCompose:
    """Makes an adapter whose content tells of what, in the order in which the parts came. Runs in a thread."""

    def __init__(self, cache: Path = CACHE) -> None:
        self.cache = cache
        self.made: list[str] = []
        self.error: Exception | None = None
        self.gate: threading.Event | None = None

    def __call__(self, parts: Sequence[Part], router: Router | None = None) -> Artefact:
        content = "+".join(f"{part.weight}*{part.artefact.digest}" for part in parts)
        if router is not None:
            content = f"{router}({content})"
        self.made.append(content)
        if self.gate is not None:
            assert self.gate.wait(10), "the test never opened the gate"
        if self.error is not None:
            raise self.error
        artefact = make_artefact(hashlib.sha256(content.encode()).hexdigest(), self.cache)
        if self.cache != CACHE:
            artefact.path.write_text(content)
        return artefact


class FakePosteriors:
    """Makes draws whose content tells of what. Runs in threads."""

    max_rank = 16

    def __init__(self, cache: Path = CACHE) -> None:
        self.cache = cache
        self.made: list[tuple[str, int, int]] = []
        self.error: Exception | None = None
        self.described: list[str] = []
        self.samples: int | None = None
        self.growth, self.rank = 1, 8  # of a draw: its bytes, as a multiple of the mean's
        self.shared = 0.0  # how much of a draw is its mean's
        self.warnings: tuple[str, ...] = ()
        self.same = False  # every draw has one content, as without noise

    def describe(self, artefact: Artefact) -> Posterior:
        self.described.append(artefact.digest)
        if self.error is not None:
            raise self.error
        nbytes = self.growth * artefact.summary.nbytes
        return Posterior("ensemble", 1, 100, self.samples, nbytes, self.rank, self.warnings)

    def draw_bytes(self, artefact: Artefact) -> int:
        return int(self.growth * artefact.summary.nbytes * (1 - self.shared))

    def draw(self, artefact: Artefact, *, seed: int, sample: int) -> Artefact:
        self.made.append((artefact.digest, seed, sample))
        if self.error is not None:
            raise self.error
        content = f"{artefact.digest}/{seed}/{0 if self.same else sample}"
        drawn = make_artefact(hashlib.sha256(content.encode()).hexdigest(), self.cache, artefact.summary.nbytes)
        if self.cache != CACHE:
            drawn.path.write_text(content)
        return drawn


class FakeDataPlane:
    """A device of so many bytes that remembers which versions lie on it, in the order of what happened."""

    def __init__(self, capacity: int = 10**6) -> None:
        self.capacity = capacity
        self.resident: dict[int, int] = {}  # version id -> bytes
        self.lent: dict[int, int] = {}  # version id -> whose bytes it uses
        self.shared = 0.0  # how much of a version its lender has already
        self.log: list[tuple[str, int]] = []
        self.error: Exception | None = None
        self.errors: list[Exception] = []  # of the next loads, one each
        self.gate = asyncio.Event()
        self.gate.set()

    async def load(self, version_id: int, artefact: Artefact, lender: int | None = None) -> int:
        if lender is not None:
            self.lent[version_id] = lender
        try:
            return await self._load(version_id, artefact, lender)
        except BaseException:
            self.lent.pop(version_id, None)
            raise

    async def _load(self, version_id: int, artefact: Artefact, lender: int | None) -> int:
        assert lender is None or (lender in self.resident and lender not in self.lent)
        await self.gate.wait()
        await asyncio.sleep(0)
        if self.errors:
            raise self.errors.pop(0)
        if self.error is not None:
            raise self.error
        size = artefact.summary.nbytes
        if lender is not None:
            size -= int(size * self.shared)
        free = self.capacity - sum(self.resident.values())
        if size > free:
            raise PoolExhausted.of(size, free)
        assert version_id not in self.resident
        self.resident[version_id] = size
        self.log.append(("load", version_id))
        return size

    async def unload(self, version_id: int) -> None:
        await self.gate.wait()
        await asyncio.sleep(0)
        assert version_id not in self.lent.values(), "its bytes would not be free"
        self.lent.pop(version_id, None)
        del self.resident[version_id]
        self.log.append(("unload", version_id))


class FakeObserver:
    """Remembers what it was told, and that every version's states follow from each other."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, Any]] = []
        self.states: Counter[tuple[str, State]] = Counter()
        self.leased: dict[str, int] = {}
        self.waits: list[tuple[str, float]] = []

    def moved(self, name: str, old: State | None, new: State) -> None:
        if old is not None:
            assert self.states[name, old] > 0
            self.states[name, old] -= 1
        if new is not State.GONE:
            self.states[name, new] += 1

    def loaded(self, name: str, tier: str, stages: Mapping[str, float], resident_bytes: int) -> None:
        self.events.append(("loaded", name, (tier, *sorted(stages))))

    def load_failed(self, name: str, code: str) -> None:
        self.events.append(("failed", name, code))

    def evicted(self, name: str) -> None:
        self.events.append(("evicted", name, None))

    def unloaded(self, name: str) -> None:
        self.events.append(("unloaded", name, None))

    def leases(self, name: str, count: int) -> None:
        self.leased[name] = count

    def drawn(self, name: str, hits: int, misses: int) -> None:
        self.events.append(("drawn", name, (hits, misses)))

    def waited(self, name: str, seconds: float) -> None:
        self.waits.append((name, seconds))


@dataclass
class World:
    """A registry with fakes all around it."""

    roots: tuple[Path, ...] = ()
    patience_s: float = 5.0
    capacity: int = 10**6
    prepare: FakePrepare = field(default_factory=FakePrepare)
    compose: FakeCompose = field(default_factory=FakeCompose)
    posteriors: FakePosteriors = field(default_factory=FakePosteriors)
    observer: Any = field(default_factory=FakeObserver)
    store: Store = field(default_factory=Store.in_memory)

    def __post_init__(self) -> None:
        self.data_plane = FakeDataPlane(self.capacity)
        self.registry = AdapterRegistry(
            base=BASE,
            prepare=self.prepare,
            compose=self.compose,
            posteriors=self.posteriors,
            data_plane=self.data_plane,
            observer=self.observer,
            store=self.store,
            capacity_bytes=self.capacity,
            roots=self.roots,
            patience_s=self.patience_s,
        )

    def current(self, name: str) -> Version:
        return self.registry.adapters()[name].current

    async def load(self, name: str, content: str = "", **options: Any) -> Version:
        """Put an adapter, and wait until it is resident."""
        return (await self.registry.load(name, Path("/adapters") / (content or name), **options)).current

    async def hold(self, name: str, *, exact: bool = False) -> Version:
        """A lease, as a request takes one."""
        version = await self.registry.resolve(name)
        return await self.registry.lease(version.tag, exact=exact or "@" in name)

    def state(self, name: str) -> State | None:
        adapter: Adapter | None = self.registry.adapters().get(name)
        return adapter.current.state if adapter else None


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop run until `condition` holds; fails after five seconds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def quiet() -> None:
    """Let the event loop run until nothing runs but who asks: what nobody waits for any more has ended too."""
    await until(lambda: len(asyncio.all_tasks()) == 1)


@dataclass
class FakeLoRARequest:
    """The fields of vLLM's LoRARequest that are used."""

    lora_name: str
    lora_int_id: int
    lora_path: str
    base_model_name: str | None = None


def lora_request(version: Version, spelling: str | None = None) -> FakeLoRARequest:
    assert version.artefact is not None
    return FakeLoRARequest(version.tag, version.version_id, str(version.artefact.path), spelling)


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
        self.requests.append(copy(lora_request))
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
