"""An adapter, its versions, and the states a version may pass through."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loramux.errors import LoramuxError
from loramux.registry.protocols import Observer
from loramux_adapters import Artefact


class State(enum.StrEnum):
    """Where a version of an adapter stands."""

    KNOWN = "known"  # named, nothing read yet
    READING = "reading"  # its source is being read, outside the engine
    VERIFYING = "verifying"  # being checked and lowered, outside the engine
    HOST = "host"  # its artefact is on disk; not on the device, or on its way there
    RESIDENT = "resident"  # on the device: requests may use it
    DRAINING = "draining"  # takes no new request; leaves the device when the running ones end
    GONE = "gone"  # nothing of it is left but its artefact
    FAILED = "failed"  # refused or unreadable; `error` says why


#: Legal transitions; anything else is a bug and raises.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.KNOWN: frozenset({State.READING, State.HOST, State.GONE}),  # HOST: read and checked by an earlier start
    State.READING: frozenset({State.VERIFYING, State.FAILED}),
    State.VERIFYING: frozenset({State.HOST, State.FAILED}),
    State.HOST: frozenset({State.RESIDENT, State.READING, State.FAILED, State.GONE}),  # READING: artefact was lost
    State.RESIDENT: frozenset({State.DRAINING}),
    State.DRAINING: frozenset({State.HOST, State.RESIDENT, State.GONE}),  # RESIDENT: called back before it had left
    State.GONE: frozenset(),
    State.FAILED: frozenset({State.READING, State.GONE}),
}


@dataclass(eq=False)
class Version:
    """One content of one adapter.

    `version_id` stays the same while it is evicted and loaded again, and no other content ever gets it: rows of a
    batch and blocks of the KV cache are the right ones for as long as the server lives.
    """

    name: str
    source: Path
    version_id: int
    observer: Observer
    state: State = State.KNOWN
    artefact: Artefact | None = None
    make: Callable[[], Artefact] | None = None  # made of others instead of read from `source`; raises LoramuxError
    expected: str | None = None  # whole digest that it must turn out to have, if its artefact was lost
    error: LoramuxError | None = None  # of its last read or load
    pinned: bool = False  # never evicted to make room
    retired: bool = False  # no name leads here any more: it is gone once it is off the device
    busy: int = 0  # tasks at work on it
    leases: int = 0  # running requests
    waiting: int = 0  # requests that wait for it: it is not evicted before they had it
    resident_bytes: int = 0
    needed_bytes: int = 0  # what it took when it was resident; 0 before that
    needed_beside: bool = False  # … with what another lent it not counted
    # Of a draw: its mean. What both have alike is borrowed, if the mean is on the device when the draw is copied there.
    lender: Version | None = field(default=None, repr=False)
    borrowed_from: Version | None = field(default=None, repr=False)  # who lends to it, or to the copy on its way
    borrowers: dict[Version, None] = field(default_factory=dict, repr=False)  # it does not leave before them
    loads: int = 0  # since it was read
    mended: bool = False  # its artefact was unreadable, and read from the source again
    load_seconds: dict[str, float] = field(default_factory=dict)  # of the last read, verify and copy
    last_used: float | None = None  # unix seconds

    def __post_init__(self) -> None:
        self.observer.moved(self.name, None, self.state)
        if self.artefact is not None:
            self.move(State.HOST)

    @property
    def digest(self) -> str | None:
        """16 hex digits, once the content is known."""
        return self.artefact.short if self.artefact else None

    @property
    def tag(self) -> str:
        """`name@digest`: what the engine sees, so that KV blocks are shared by content, never by name alone."""
        return f"{self.name}@{self.digest}" if self.artefact else self.name

    @property
    def prepared(self) -> bool:
        """Its artefact is there, and nothing has to be read."""
        return self.state in (State.HOST, State.RESIDENT, State.DRAINING)

    @property
    def bayesian(self) -> bool:
        """Whether it has a posterior to draw from, as far as its content is known."""
        return self.artefact is not None and self.artefact.summary.bayesian

    def move(self, state: State) -> None:
        """Enter `state`. Raises ValueError on a transition the table does not allow."""
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"version {self.tag!r} cannot go from {self.state} to {state}")
        old, self.state = self.state, state
        self.observer.moved(self.name, old, state)

    def retire(self) -> None:
        """No name leads here any more. What is on the device still has to be drained."""
        self.retired, self.pinned = True, False
        self._bury()

    def borrow(self, lender: Version) -> None:
        self.borrowed_from = lender
        lender.borrowers[self] = None

    def give_back(self) -> Version | None:
        """Borrow no more; who lent, if anybody did."""
        lender, self.borrowed_from = self.borrowed_from, None
        if lender is not None:
            del lender.borrowers[self]
        return lender

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While a task reads or loads it, it cannot be gone."""
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
            self._bury()

    def _bury(self) -> None:
        if self.retired and not self.busy and self.state in (State.KNOWN, State.HOST, State.FAILED):
            self.move(State.GONE)


@dataclass(eq=False)
class Adapter:
    """A name, what answers to it now, and what did before."""

    name: str
    current: Version
    previous: Version | None = None  # kept on the host for a rollback
    pending: Version | None = None  # on its way to become the current one
    pinned: bool = False
    given: bool = False  # named by the command line, not by a request
    error: LoramuxError | None = None  # why the last replacement failed: the current version serves on

    def versions(self) -> Iterator[Version]:
        """Those that can be asked for, the current one first."""
        yield self.current
        if self.previous is not None:
            yield self.previous
