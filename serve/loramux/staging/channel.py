"""The engine's end of the connection to its stager. Nothing here waits: who is at the other end may have been stopped
in the middle of a message, or wait for a core.

What goes over it is what `multiprocessing.connection.Connection`, the other end, sends and takes: a pickle behind its
length.
"""

from __future__ import annotations

import pickle
import socket
import struct

from loramux.staging.messages import ToEngine, ToStager

_LENGTH = struct.Struct("!i")
_CHUNK = 64 * 1024


class Channel:
    """Over `end`, a connected stream socket that it takes."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._outgoing, self._incoming = bytearray(), bytearray()

    def send(self, message: ToStager) -> None:
        """Have it delivered, after those before, as far as the other end takes them. Raises OSError if it is gone."""
        data = pickle.dumps(message)
        self._outgoing += _LENGTH.pack(len(data)) + data
        self._flush()

    def receive(self) -> ToEngine | None:
        """The next message, None if it has not arrived. Raises EOFError or OSError when there will be none."""
        self._flush()
        while (message := self._complete()) is None:
            try:
                data = self._end.recv(_CHUNK)
            except BlockingIOError:
                return None
            if not data:
                raise EOFError
            self._incoming += data
        return message

    def close(self) -> None:
        self._end.close()

    def _flush(self) -> None:
        while self._outgoing:
            try:
                sent = self._end.send(self._outgoing)
            except BlockingIOError:
                return
            del self._outgoing[:sent]

    def _complete(self) -> ToEngine | None:
        """A message that is there as a whole."""
        if len(self._incoming) < _LENGTH.size:
            return None
        end = _LENGTH.size + _LENGTH.unpack_from(self._incoming)[0]
        if len(self._incoming) < end:
            return None
        data = bytes(self._incoming[_LENGTH.size : end])
        del self._incoming[:end]
        message: ToEngine = pickle.loads(data)
        return message
