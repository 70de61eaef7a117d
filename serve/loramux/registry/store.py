"""What outlives the server: which adapters it had, and what their sources contained when they were last read."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loramux.errors import ConfigError, StateNotWritten
from loramux.registry.sources import signature
from loramux_adapters import AdapterSummary, Artefact
from loramux_adapters.artefact import artefact_path

_APPLICATION = 0x6C6D7578  # "lmux", in the file's header
_SCHEMA = 1
_TABLES = """
CREATE TABLE meta (base TEXT NOT NULL);
CREATE TABLE adapters (
    name TEXT PRIMARY KEY,
    source TEXT,             -- NULL: only the artefact is left
    digest TEXT,             -- NULL: not read yet
    previous_source TEXT,
    previous_digest TEXT,
    pending_source TEXT,     -- accepted to become the current version, not read yet
    pinned INTEGER NOT NULL,
    given INTEGER NOT NULL,  -- named by the command line: forgotten when it is not any more
    updated TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE TABLE sources (path TEXT PRIMARY KEY, signature TEXT NOT NULL, digest TEXT NOT NULL);
CREATE TABLE artefacts (digest TEXT PRIMARY KEY, summary TEXT NOT NULL);
"""
# Since then; a server that does not know it yet may use the file, and so may this one a file without it.
_ADDED = """
CREATE TABLE IF NOT EXISTS calibrations (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    digest TEXT NOT NULL,    -- of the version of that name which it holds for
    content TEXT NOT NULL
);
"""


@dataclass(frozen=True)
class Saved:
    """An adapter as the file knows it. Digests are whole, not cut to 16."""

    name: str
    source: str | None = None
    digest: str | None = None
    previous_source: str | None = None
    previous_digest: str | None = None
    pending_source: str | None = None
    pinned: bool = False
    given: bool = False


@dataclass(frozen=True)
class SavedCalibration:
    """What was fitted to answers of one version of an adapter; `content` is for `loramux.uncertainty` to read."""

    id: str
    name: str
    digest: str
    content: str


class Store:
    """One SQLite file, of one server at a time. Every method is one transaction, on the disk when it returns.

    Thread-safe; a call takes a few milliseconds (it waits for the disk), so not for the event loop.
    """

    def __init__(self, connection: sqlite3.Connection, cache: Path, lock: int | None = None) -> None:
        self._connection = connection
        self._cache = cache
        self._lock_file = lock
        self._lock = threading.Lock()
        self._calibrations: dict[str, tuple[SavedCalibration, ...]] = {}  # by name; replaced, never changed
        for row in connection.execute("SELECT id, name, digest, content FROM calibrations ORDER BY rowid"):
            self._add(SavedCalibration(*row))

    @classmethod
    def open(cls, path: Path, *, base: str, cache: Path) -> Store:
        """Open or create the file. `cache` holds the artefacts; `base` says for what base model they were checked.

        With another base than last time, adapters are known by name and source, and have to be read again.
        Raises ConfigError: another server uses it, it is damaged, or it is something else.
        """
        with ExitStack() as undo:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = _locked(path)
                undo.callback(os.close, lock)
                connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
                undo.callback(connection.close)
                _check(connection, path)
                connection.executescript(_ADDED)
                store = cls(connection, cache, lock)
                store._for_base(base)
            except (OSError, sqlite3.OperationalError, StateNotWritten) as error:
                raise ConfigError(
                    f"The state file {path} cannot be used: {error}",
                    hint="Give --state a file in a folder that the server may write to.",
                ) from error
            except sqlite3.DatabaseError as error:
                raise _damaged(path, error) from error
            undo.pop_all()
            return store

    @classmethod
    def in_memory(cls, cache: Path = Path()) -> Store:
        """A store that forgets: for a server whose adapters are all named at its start, and for tests."""
        connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        connection.executescript(_TABLES + _ADDED)
        return cls(connection, cache)

    def close(self) -> None:
        """Give the file up. Whoever still uses the store is told that nothing can be written."""
        with self._lock:  # SQLite does not survive a close in the middle of a call
            self._connection.close()
        if self._lock_file is not None:
            os.close(self._lock_file)

    def adapters(self) -> list[Saved]:
        """All of them, in order of their names."""
        fields = list(Saved.__dataclass_fields__)
        with self._lock:
            rows = self._connection.execute(f"SELECT {', '.join(fields)} FROM adapters ORDER BY name").fetchall()
        values = [dict(zip(fields, row, strict=True)) for row in rows]
        return [Saved(**{**v, "pinned": bool(v["pinned"]), "given": bool(v["given"])}) for v in values]

    def save(self, adapter: Saved) -> None:
        """Write an adapter over what was there under its name. Raises StateNotWritten; then nothing has changed.

        Calibrations of contents that it can no longer be rolled back to are forgotten.
        """
        values = asdict(adapter)
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        kept = {adapter.digest, adapter.previous_digest}
        with self._transaction() as connection:
            connection.execute(f"INSERT OR REPLACE INTO adapters ({names}) VALUES ({marks})", list(values.values()))
            if adapter.digest is not None:  # else it may turn out to be any of them
                self._forget(connection, [c for c in self.calibrations(adapter.name) if c.digest not in kept])

    def delete(self, name: str) -> None:
        """Raises StateNotWritten; then nothing has changed."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM adapters WHERE name = ?", [name])
            self._forget(connection, self.calibrations(name))

    def calibrations(self, name: str) -> tuple[SavedCalibration, ...]:
        """Those of an adapter, oldest first. Waits for nothing: any thread may ask."""
        return self._calibrations.get(name, ())

    def calibration(self, id: str) -> SavedCalibration | None:
        """The one of this id."""
        return next((c for rows in self._calibrations.values() for c in rows if c.id == id), None)

    def keep_calibration(self, new: SavedCalibration, replaced: Sequence[SavedCalibration] = ()) -> None:
        """In the place of others of the same adapter. Raises StateNotWritten; then nothing has changed."""
        with self._transaction() as connection:
            self._forget(connection, replaced)
            values = [new.id, new.name, new.digest, new.content]
            connection.execute("INSERT INTO calibrations VALUES (?, ?, ?, ?)", values)
            self._add(new)

    def forget_calibration(self, row: SavedCalibration) -> None:
        """Raises StateNotWritten; then nothing has changed."""
        with self._transaction() as connection:
            self._forget(connection, [row])

    def remember(self, source: Path, seen: str | None, artefact: Artefact) -> None:
        """Note what `source` contained; `seen` is its signature from before it was read.

        Adapters that were waiting for this to be read are of this content from now on, whatever becomes of the source.
        """
        with self._transaction() as connection:
            summary = json.dumps(asdict(artefact.summary))
            connection.execute("INSERT OR REPLACE INTO artefacts VALUES (?, ?)", [artefact.digest, summary])
            connection.execute(
                "UPDATE adapters SET digest = ? WHERE source = ? AND digest IS NULL", [artefact.digest, str(source)]
            )
            if seen is None:
                connection.execute("DELETE FROM sources WHERE path = ?", [str(source)])
            else:
                connection.execute(
                    "INSERT OR REPLACE INTO sources VALUES (?, ?, ?)", [str(source), seen, artefact.digest]
                )

    def recall(self, source: Path) -> Artefact | None:
        """What `source` contains, if it has not changed since it was read and the artefact is still there."""
        with self._lock:
            row = self._connection.execute(
                "SELECT signature, digest FROM sources WHERE path = ?", [str(source)]
            ).fetchone()
        return self.artefact(row[1]) if row is not None and row[0] == signature(source) else None

    def artefact(self, digest: str) -> Artefact | None:
        """The artefact of this content, if it is in the cache."""
        with self._lock:
            row = self._connection.execute("SELECT summary FROM artefacts WHERE digest = ?", [digest]).fetchone()
        path = artefact_path(self._cache, digest)
        if row is None or not path.is_file():
            return None
        fields: dict[str, Any] = json.loads(row[0])
        return Artefact(path, digest, AdapterSummary(**{**fields, "warnings": tuple(fields["warnings"])}))

    def _for_base(self, base: str) -> None:
        with self._transaction() as connection:
            row = connection.execute("SELECT base FROM meta").fetchone()
            if row is not None and row[0] == base:
                return
            connection.execute("DELETE FROM meta")
            connection.execute("INSERT INTO meta VALUES (?)", [base])
            connection.execute("DELETE FROM sources")
            connection.execute("DELETE FROM artefacts")
            connection.execute("DELETE FROM calibrations")
            self._calibrations = {}
            connection.execute("UPDATE adapters SET digest = NULL, previous_source = NULL, previous_digest = NULL")

    def _add(self, row: SavedCalibration) -> None:
        self._calibrations = {**self._calibrations, row.name: (*self.calibrations(row.name), row)}

    def _forget(self, connection: sqlite3.Connection, rows: Sequence[SavedCalibration]) -> None:
        """Within a transaction."""
        for row in rows:
            connection.execute("DELETE FROM calibrations WHERE id = ?", [row.id])
            left = tuple(c for c in self.calibrations(row.name) if c.id != row.id)
            self._calibrations = {**self._calibrations, row.name: left}

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            before = self._calibrations
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                self._calibrations = before
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise StateNotWritten(
                    "The state file could not be written; nothing was changed.",
                    hint="Is its disk full? The server's log has the details.",
                ) from error


def _locked(path: Path) -> int:
    """Hold the lock of this state file until the process ends. Raises ConfigError if another server holds it.

    A record lock: unlike flock's, engine processes that were forked from this one do not inherit it, so it ends
    with this process even if they outlive it.
    """
    side = path.with_name(f"{path.name}.lock")
    file = os.open(side, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ConfigError(
            f"Another server uses the state file {path}.",
            hint="Stop it, or give this one a file of its own with --state FILE (or another --port).",
        ) from None
    except BaseException:
        os.close(file)
        raise
    return file


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Make sure that the file is ours and whole, and that what is committed stays. A new one gets its tables."""
    application, schema, objects = (
        connection.execute(query).fetchone()[0]
        for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )
    if objects and application != _APPLICATION:
        raise ConfigError(
            f"{path} is a database of something else.", hint="Give --state another file, or one that does not exist."
        )
    if schema > _SCHEMA:
        raise ConfigError(
            f"{path} was written by a newer loramux (schema {schema}; this one knows {_SCHEMA}).",
            hint="Install that one, or give --state another file.",
        )
    if (result := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise _damaged(path, result)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    if not objects:
        connection.executescript(
            f"BEGIN; {_TABLES} PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {_SCHEMA}; COMMIT;"
        )


def _damaged(path: Path, reason: object) -> ConfigError:
    return ConfigError(
        f"The state file {path} is damaged or no state file: {reason}.",
        hint="Move it away (and its -wal and -shm): adapters named by options come back, those that were put while "
        "the server ran must be put again.",
    )
