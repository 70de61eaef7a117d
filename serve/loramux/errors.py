"""Every error a user of the server can meet.

    LoramuxError                    500  internal_error
    ├── ConfigError                 400  config_invalid            (command line, YAML: stops the start)
    │   ├── BaseModelError          400  base_model_unavailable    (loramux.bases)
    │   └── IncompatibleEngine      500  engine_incompatible       (a hook of vLLM is missing)
    ├── AdapterRefused              400  the code of the check that refused it
    │   └── AdapterSourceMissing    404  adapter_not_found         (no such folder)
    ├── AdapterNotFound             404  model_not_found
    ├── AdapterExists               400  adapter_exists
    ├── PathNotAllowed              403  adapter_path_not_allowed
    ├── PoolExhausted               503  adapter_memory_full
    └── AdapterLoading              503  adapter_loading           (waited its time; Retry-After)

Each class knows its HTTP status, OpenAI `type`, stable string `code` and a hint that names the next command.
`loramux.http.errors` renders them; nothing anywhere matches on message text.
"""

from __future__ import annotations

from typing import ClassVar


class LoramuxError(Exception):
    """Base of the family. `hint` says what to do next; `param` names the offending request field."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"
    retry_after_s: int | None = None

    def __init__(self, message: str, *, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class ConfigError(LoramuxError):
    """The command line or the configuration file asks for something that cannot be."""

    status = 400
    type = "invalid_request_error"
    code = "config_invalid"


class IncompatibleEngine(ConfigError):
    """The installed vLLM lacks a hook that correct answers depend on."""

    status = 500
    type = "server_error"
    code = "engine_incompatible"


class AdapterRefused(LoramuxError):
    """The adapter cannot be applied exactly; `code` is that of the check that refused it."""

    status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, *, code: str, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message, hint=hint, param=param)
        self.code = code


class AdapterSourceMissing(AdapterRefused):
    """There is no adapter at the given path."""

    status = 404


class AdapterNotFound(LoramuxError):
    """No base and no adapter answers to this name."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class AdapterExists(LoramuxError):
    """The name is taken."""

    status = 400
    type = "invalid_request_error"
    code = "adapter_exists"


class PathNotAllowed(LoramuxError):
    """The source lies outside every --adapter-root."""

    status = 403
    type = "permission_error"
    code = "adapter_path_not_allowed"


class PoolExhausted(LoramuxError):
    """No room in adapter memory for one more version."""

    status = 503
    type = "server_error"
    code = "adapter_memory_full"
    retry_after_s = 5


class AdapterLoading(LoramuxError):
    """The adapter was still loading when the request's patience ended."""

    status = 503
    type = "server_error"
    code = "adapter_loading"
    retry_after_s = 5
