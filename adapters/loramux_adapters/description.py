"""Reading untrusted JSON objects field by field: every field is taken with its type, and what is left is refused."""

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeVar

from loramux_adapters.errors import AdapterConfigInvalid, AdapterError, AdapterUnsupportedFeature, shown

Choice = TypeVar("Choice", bound=StrEnum)
MAX_TEXT = 2000
_MISSING = object()


class Fields:
    """One object. `where` is its place in the description, as error messages name it ("gates.g0")."""

    def __init__(self, raw: Any, where: str = "") -> None:
        self.where = where
        if not isinstance(raw, dict):
            raise invalid(where or "the description", raw, "must be an object")
        self._left: dict[str, Any] = dict(raw)

    def __enter__(self) -> "Fields":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        """Refuse what was not taken, unless something is refused already."""
        if kind is None and self._left:
            field = self.place(min(self._left))
            raise AdapterUnsupportedFeature(
                f"{shown(field)} is not a field that is known.",
                hint="It would be ignored, which may change the result: remove it, or update loramux.",
                field=field,
            )

    def place(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def text(self, name: str, default: Any = _MISSING) -> Any:
        return self._take(name, default, _is_text, f"must be a string of at most {MAX_TEXT} printable characters")

    def integer(self, name: str, default: Any = _MISSING) -> Any:
        # Bounded, because a larger one has no meaning anywhere and would not fit a tensor's index.
        return self._take(name, default, lambda v: type(v) is int and abs(v) < 1 << 31, "must be an integer")

    def number(self, name: str, default: Any = _MISSING) -> Any:
        value = self._take(name, default, _is_number, "must be a finite number")
        return float(value) if type(value) is int else value

    def choice(self, name: str, kind: type[Choice], default: Any = _MISSING) -> Any:
        options = [option.value for option in kind]
        value = self._take(name, default, lambda v: v in options, f"must be one of {', '.join(options)}")
        return kind(value) if isinstance(value, str) else value

    def names(self, name: str) -> tuple[str, ...]:
        """A list of strings without repeats; () if absent."""
        value = self._take(name, [], _is_names, "must be a list of different printable strings")
        return tuple(value)

    def nested(self, name: str) -> "Fields | None":
        value = self._left.pop(name, None)
        return None if value is None else Fields(value, self.place(name))

    def table(self, name: str) -> dict[str, "Fields"]:
        """An object of objects; {} if absent."""
        value = self._left.pop(name, {})
        if not isinstance(value, dict):
            raise invalid(self.place(name), value, "must be an object")
        return {key: Fields(entry, f"{self.place(name)}.{key}") for key, entry in value.items()}

    def _take(self, name: str, default: Any, accept: Any, rule: str) -> Any:
        value = self._left.pop(name, _MISSING)
        if value is _MISSING:
            if default is not _MISSING:
                return default
            raise AdapterConfigInvalid(
                f"{shown(self.place(name))} is missing.", hint=f"It {rule}.", field=self.place(name)
            )
        if not accept(value):
            raise invalid(self.place(name), value, rule)
        return value


def invalid(field: str, value: Any, rule: str) -> AdapterError:
    return AdapterConfigInvalid(
        f"{shown(field)} is {shown(value)}: it {rule}.", hint="Correct the file's description.", field=field
    )


def _is_number(value: Any) -> bool:
    # An integer of a thousand digits is valid JSON but no float.
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 1 << 53)


def _is_text(value: Any) -> bool:
    # Printable, because it reaches terminals and logs.
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value)) and len(set(value)) == len(value)


def without_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that differ from their default, so that equal content has one description."""
    return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}
