"""The engine's end of the connection: it waits for nobody, and loses nothing."""

from __future__ import annotations

import itertools
import pickle
import socket
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.staging.channel import Channel
from loramux.staging.messages import Cancel, Failed, Staged, ToEngine

MESSAGES: tuple[ToEngine, ...] = (
    Staged(1, 2, 3, False),
    Failed(4, "code", "m" * 20_000, "d" * 100_000),
    Failed(5, "", ""),
)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Connection]]:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with Connection(theirs.detach()) as connection:
        yield channel, connection
    channel.close()


def test_what_nobody_reads_waits_here_and_arrives_in_order(ends: tuple[Channel, Connection]) -> None:
    channel, connection = ends
    for load in range(20_000):  # far more than the socket takes
        channel.send(Cancel(load))
    heard: list[object] = []
    reader = threading.Thread(target=lambda: heard.extend(connection.recv() for _ in range(20_000)))
    reader.start()
    while reader.is_alive():
        assert channel.receive() is None  # asking for news is when the rest moves on
        reader.join(0.001)
    assert heard == [Cancel(load) for load in range(20_000)]


@given(st.lists(st.integers(1, 150_000), max_size=12))
def test_a_message_is_there_when_all_of_it_is(cuts: list[int]) -> None:
    """However the bytes come; the other end may be stopped between any two."""
    ours, theirs = socket.socketpair()
    stream = b"".join(len(data).to_bytes(4, "big") + data for data in map(pickle.dumps, MESSAGES))
    bounds = [0, *sorted({cut for cut in cuts if cut < len(stream)}), len(stream)]
    channel, received = Channel(ours), []
    with theirs:
        theirs.setblocking(False)
        for begin, end in itertools.pairwise(bounds):
            while begin < end:
                try:
                    begin += theirs.send(stream[begin:end])
                except BlockingIOError:
                    assert channel.receive() is None
            while (message := channel.receive()) is not None:
                received.append(message)
    assert tuple(received) == MESSAGES
    with pytest.raises(EOFError):
        channel.receive()
    channel.close()


def test_the_other_end_sends_and_hears_as_it_always_does(ends: tuple[Channel, Connection]) -> None:
    channel, connection = ends
    assert channel.receive() is None
    connection.send(MESSAGES[0])
    channel.send(Cancel(7))
    assert channel.receive() == MESSAGES[0] and connection.recv() == Cancel(7)


def test_who_is_gone_is_noticed(ends: tuple[Channel, Connection]) -> None:
    channel, connection = ends
    connection.close()
    with pytest.raises(EOFError):
        channel.receive()
    with pytest.raises(OSError):
        channel.send(Cancel(1))
