"""API keys: who is calling, and which adapters they may see. Only digests of keys are kept."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from loramux.config import read_yaml
from loramux.errors import ConfigError

_KEY = re.compile(r"[\x21-\x7e]+")  # what fits into a header
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # what fits into a log
_FILE_HINT = 'Write  keys: [{name: team-a, key: "…", adapters: ["sql", "legal-*"]}]'


@dataclass(frozen=True)
class Caller:
    """Whom a request comes from; routes find it at `request.state.loramux_caller`."""

    name: str
    admin: bool  # may change what is served
    adapters: tuple[str, ...] | None = None  # patterns of adapter names; None: all

    @property
    def restricted(self) -> bool:
        return self.adapters is not None

    def allows(self, adapter: str) -> bool:
        """May this caller see and use the adapter of that name? (The base is everybody's.)"""
        return self.adapters is None or any(fnmatchcase(adapter, pattern) for pattern in self.adapters)


#: Who calls without a key where none is needed but some are set.
STRANGER = Caller("anonymous", admin=False, adapters=())


@dataclass(frozen=True)
class Key:
    """One key, as its SHA-256."""

    caller: Caller
    digest: bytes = field(repr=False)

    @classmethod
    def of(cls, key: str, caller: Caller) -> Key:
        return cls(caller, _digest(key))


@dataclass(frozen=True)
class KeyRing:
    """All keys of a server. `anonymous` is whom a request without a key comes from, None if it must have one."""

    keys: tuple[Key, ...] = ()
    anonymous: Caller | None = Caller("anonymous", admin=True)

    def identify(self, presented: str) -> Caller | None:
        """Whose key this is, None if nobody's. Takes as long whichever key it is, or none."""
        digest = _digest(presented)
        matching = [hmac.compare_digest(digest, key.digest) for key in self.keys]  # no early exit
        return self.keys[matching.index(True)].caller if any(matching) else None

    @classmethod
    def build(cls, api_keys: Iterable[str] = (), admin_key: str | None = None, file: Path | None = None) -> KeyRing:
        """The keys of the command line, the environment and the keys file. Raises ConfigError, never with a key in it.

        Without an admin key, every key that is not restricted to some adapters is one.
        """
        plain = list(dict.fromkeys(api_keys))
        names = ["api-key"] if len(plain) == 1 else [f"api-key-{i + 1}" for i in range(len(plain))]
        admins = admin_key is None
        keys = [
            Key.of(_checked_key(key, "--api-key"), Caller(name, admin=admins))
            for name, key in zip(names, plain, strict=True)
        ]
        keys += _keys_in(file, admins) if file is not None else []
        anonymous = None if keys or file is not None else Caller("anonymous", admin=admins)
        if admin_key is not None:
            keys.append(Key.of(_checked_key(admin_key, "--admin-key"), Caller("admin", admin=True)))
        _refuse_twins(keys)
        return cls(tuple(keys), anonymous)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _checked_key(key: object, where: str) -> str:
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ConfigError(
            f"{where}: this cannot be a key.",
            hint="A key is text of printable ASCII characters without spaces. In YAML, put it in quotes.",
        )
    return key


def _keys_in(file: Path, admins: bool) -> list[Key]:
    content = read_yaml(file, hint=_FILE_HINT)
    entries = content.get("keys")
    if set(content) != {"keys"} or not isinstance(entries, list):
        raise ConfigError(f"{file} must have one entry, `keys`, which is a list.", hint=_FILE_HINT)
    return [_key_of(entry, f"{file}, key {number}", admins) for number, entry in enumerate(entries, 1)]


def _key_of(entry: Any, where: str, admins: bool) -> Key:
    if not isinstance(entry, Mapping) or not {"name", "key"} <= set(entry) <= {"name", "key", "adapters"}:
        raise ConfigError(f"{where}: needs `name` and `key`, may have `adapters`, nothing else.", hint=_FILE_HINT)
    name, patterns = entry["name"], entry.get("adapters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: this cannot be a key's name.",
            hint="Use letters, digits and . _ - ; start with a letter or digit; at most 64 characters.",
        )
    if "adapters" in entry and not (isinstance(patterns, list) and all(isinstance(p, str) and p for p in patterns)):
        raise ConfigError(
            f"{where} ({name}): `adapters` is not a list of names and patterns.",
            hint="Leave it out for all adapters; an empty list allows the base alone.",
        )
    allowed = None if patterns is None else tuple(patterns)
    return Key.of(_checked_key(entry["key"], f"{where} ({name})"), Caller(name, admins and allowed is None, allowed))


def _refuse_twins(keys: list[Key]) -> None:
    """One key with two owners, or one name for two keys, would make rights and logs ambiguous."""
    names = [key.caller.name for key in keys]
    owners: dict[bytes, str] = {}
    for key in keys:
        if names.count(key.caller.name) > 1 or key.caller.name == STRANGER.name:
            raise ConfigError(f"The key name {key.caller.name!r} is taken.", hint="Give every key another name.")
        if key.digest in owners:
            raise ConfigError(
                f"{owners[key.digest]} and {key.caller.name} are the same key.", hint="Give each its own."
            )
        owners[key.digest] = key.caller.name
