"""Every reason to refuse an adapter.

AdapterError
├── AdapterNotFound             adapter_not_found             no such folder, or a file it must hold is missing
├── AdapterUnsafeFile           adapter_unsafe_file           pickle, link out of the folder, not a regular file
├── AdapterTooLarge             adapter_too_large             a file or a header is over its limit
├── AdapterCorrupt              adapter_corrupt               truncated, trailing bytes, a lying header, bad JSON
├── AdapterConfigInvalid        adapter_config_invalid        a config field is missing or has an impossible value
├── AdapterUnsupportedFeature   adapter_unsupported_feature   valid, but cannot be applied exactly
├── AdapterWrongBase            adapter_wrong_base            made for another base model
├── AdapterUnknownTensor        adapter_unknown_tensor        a tensor that no rule accounts for
├── AdapterMissingTensor        adapter_missing_tensor        the config promises a tensor that is not there
├── AdapterShapeMismatch        adapter_shape_mismatch        a shape that contradicts the config or the base model
├── AdapterNotFinite            adapter_not_finite            NaN or infinity among the weights
└── AdapterNoEffect             adapter_no_effect             the weights change nothing at all

`code` is stable: match on it, never on the message.
"""

from typing import ClassVar


def shown(name: object, limit: int = 160) -> str:
    """Quote an untrusted name for a message: one line, no control characters, bounded length."""
    text = ascii(name) if not str(name).isprintable() else f"'{name}'"
    return text if len(text) <= limit else f"{text[: limit - 3]}...'"


class AdapterError(Exception):
    """An adapter was refused. `field` names the config field or tensor at fault, `hint` says what to do next."""

    code: ClassVar[str] = "adapter_error"

    def __init__(self, message: str, *, hint: str, field: str | None = None) -> None:
        super().__init__(message, hint, field)
        self.message = message
        self.hint = hint
        self.field = field

    def __str__(self) -> str:
        return f"{self.message} {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments would otherwise break crossing a process boundary.
        return _rebuild, (type(self), self.message, self.hint, self.field)


def _rebuild(kind: type[AdapterError], message: str, hint: str, field: str | None) -> AdapterError:
    return kind(message, hint=hint, field=field)


class AdapterNotFound(AdapterError):
    code = "adapter_not_found"


class AdapterUnsafeFile(AdapterError):
    code = "adapter_unsafe_file"


class AdapterTooLarge(AdapterError):
    code = "adapter_too_large"


class AdapterCorrupt(AdapterError):
    code = "adapter_corrupt"


class AdapterConfigInvalid(AdapterError):
    code = "adapter_config_invalid"


class AdapterUnsupportedFeature(AdapterError):
    code = "adapter_unsupported_feature"


class AdapterWrongBase(AdapterError):
    code = "adapter_wrong_base"


class AdapterUnknownTensor(AdapterError):
    code = "adapter_unknown_tensor"


class AdapterMissingTensor(AdapterError):
    code = "adapter_missing_tensor"


class AdapterShapeMismatch(AdapterError):
    code = "adapter_shape_mismatch"


class AdapterNotFinite(AdapterError):
    code = "adapter_not_finite"


class AdapterNoEffect(AdapterError):
    code = "adapter_no_effect"
