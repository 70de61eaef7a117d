"""States and their transitions."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from loramux.registry import State, Version
from loramux.registry.entry import TRANSITIONS

from ..fakes import FakeObserver, make_artefact


def version_in(state: State, observer: FakeObserver) -> Version:
    return Version("a", Path("/adapters/a"), 1, observer, state=state)


@pytest.mark.parametrize(("old", "new"), list(itertools.product(State, State)))
def test_a_version_moves_along_the_table_only(old: State, new: State) -> None:
    observer = FakeObserver()
    version = version_in(old, observer)
    if new in TRANSITIONS[old]:
        version.move(new)
        assert version.state is new
        assert +observer.states == ({("a", new): 1} if new is not State.GONE else {})
    else:
        with pytest.raises(ValueError, match="cannot go from"):
            version.move(new)
        assert version.state is old


def test_every_state_is_reached_from_known_and_only_gone_is_final() -> None:
    reached = {State.KNOWN}
    while more := set().union(*(TRANSITIONS[s] for s in reached)) - reached:
        reached |= more
    assert reached == set(State)
    assert [state for state in State if not TRANSITIONS[state]] == [State.GONE]


@pytest.mark.parametrize("state", State)
def test_a_retired_version_is_gone_unless_the_device_or_a_task_still_has_it(state: State) -> None:
    version = version_in(state, FakeObserver())
    with version.at_work():
        version.retire()
        assert version.state is state
    kept = state in (State.READING, State.VERIFYING, State.RESIDENT, State.DRAINING)
    assert version.state is (state if kept else State.GONE)


def test_the_engine_sees_name_and_digest() -> None:
    artefact = make_artefact("content")
    version = Version("team/a", Path(), 1, FakeObserver(), artefact=artefact)
    assert version.state is State.HOST
    assert version.tag == f"team/a@{artefact.digest[:16]}"
