"""One version of one adapter, and the states it may pass through."""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass, field
from pathlib import Path

from loramux.errors import LoramuxError
from loramux_adapters import Artefact


class State(enum.StrEnum):
    """Where an adapter version stands."""

    KNOWN = "known"  # named, nothing read yet
    VERIFYING = "verifying"  # being read, checked and lowered, outside the engine
    HOST = "host"  # lowered artefact on disk; being copied to the device
    RESIDENT = "resident"  # requests may use it
    DRAINING = "draining"  # its name is gone, running requests finish on it
    GONE = "gone"  # its memory is free
    FAILED = "failed"  # refused or could not be loaded; `error` says why


#: Legal transitions; anything else is a bug and raises.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.KNOWN: frozenset({State.VERIFYING}),
    State.VERIFYING: frozenset({State.HOST, State.FAILED}),
    State.HOST: frozenset({State.RESIDENT, State.FAILED}),
    State.RESIDENT: frozenset({State.DRAINING}),
    State.DRAINING: frozenset({State.GONE}),
    State.GONE: frozenset(),
    State.FAILED: frozenset({State.VERIFYING}),
}


@dataclass(eq=False)
class AdapterEntry:
    """A version: `name` resolved to content. `version_id` is never reused within a server's life."""

    name: str
    source: Path
    version_id: int
    state: State = State.KNOWN
    artefact: Artefact | None = None
    error: LoramuxError | None = None
    in_flight: int = 0
    resident_bytes: int = 0
    load_seconds: dict[str, float] = field(default_factory=dict)
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # resident or failed
    idle: asyncio.Event = field(default_factory=asyncio.Event)  # no request in flight

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def version(self) -> str:
        """`name@digest`: what the engine sees, so that KV blocks are shared by content, never by name alone."""
        return f"{self.name}@{self.artefact.short}" if self.artefact else self.name

    def move(self, state: State) -> None:
        """Enter `state`. Raises ValueError on a transition the table does not allow."""
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"adapter {self.name!r} cannot go from {self.state} to {state}")
        self.state = state
        if state in (State.RESIDENT, State.FAILED):
            self.settled.set()

    def acquire(self) -> None:
        """One more request runs on this version; it stays in device memory until every one is released."""
        self.in_flight += 1
        self.idle.clear()

    def release(self) -> None:
        self.in_flight -= 1
        if self.in_flight == 0:
            self.idle.set()
