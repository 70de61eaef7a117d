"""Every error a user of the server can meet.

    LoramuxError                    500  internal_error
    ├── ConfigError                 400  config_invalid            (command line, YAML: stops the start)
    │   ├── BaseModelError          400  base_model_unavailable    (loramux.bases)
    │   └── IncompatibleEngine      500  engine_incompatible       (a hook of vLLM is missing)
    ├── AdapterRefused              400  the code of the check that refused it
    │   └── AdapterSourceMissing    404  adapter_not_found         (no such folder)
    ├── AdapterNotFound             404  model_not_found
    ├── AdapterExists               400  adapter_exists
    ├── AdapterNameTaken            409  adapter_name_taken        (the base model's)
    ├── AdapterBusy                 409  adapter_busy              (another change of it is under way)
    ├── NoPreviousVersion           409  no_previous_version
    ├── PreconditionFailed          412  precondition_failed       (If-Match, If-None-Match)
    ├── InvalidRequest              400  invalid_request
    ├── AdapterNotBayesian          400  adapter_not_bayesian      (it has no posterior to draw from)
    ├── CalibrationNotFound         404  calibration_not_found
    ├── AnswerNotFound              404  answer_not_found          (feedback on what is not known, or no longer)
    ├── FeedbackConflict            409  feedback_conflict         (it was said to be otherwise before)
    ├── DrawsDoNotFit               400  uncertainty_no_room       (the draws asked for exceed adapter memory)
    ├── InvalidApiKey               401  invalid_api_key
    ├── AdminKeyRequired            403  admin_key_required
    ├── RouteNotAllowed             403  route_not_allowed         (a key with an allow-list, another route)
    ├── RouteNotFound               404  not_found
    ├── RequestTimeout              408  request_timeout           (the body stalled)
    ├── RequestTooLarge             413  request_too_large
    ├── PathNotAllowed              403  adapter_path_not_allowed
    ├── PoolExhausted               503  adapter_memory_full
    ├── AdapterLoading              503  adapter_loading           (waited its time; Retry-After)
    ├── UncertaintyTimeout          504  uncertainty_timeout       (a decision's draws were not read in time)
    ├── ItemsNotScored              503  items_not_scored          (to calibrate with; Retry-After)
    └── StateNotWritten             500  state_not_written         (the change was not made)

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


class AdapterNameTaken(LoramuxError):
    """The name is the base model's."""

    status = 409
    type = "invalid_request_error"
    code = "adapter_name_taken"


class AdapterBusy(LoramuxError):
    """Another change of the same adapter did not end in the time the caller gave."""

    status = 409
    type = "invalid_request_error"
    code = "adapter_busy"
    retry_after_s = 1


class NoPreviousVersion(LoramuxError):
    """There is nothing to roll back to."""

    status = 409
    type = "invalid_request_error"
    code = "no_previous_version"


class PreconditionFailed(LoramuxError):
    """The adapter is not at the version the caller expected."""

    status = 412
    type = "invalid_request_error"
    code = "precondition_failed"


class InvalidRequest(LoramuxError):
    """The request is malformed."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class AdapterNotBayesian(LoramuxError):
    """An uncertainty that only draws from a posterior can tell was asked of an adapter that has none."""

    status = 400
    type = "invalid_request_error"
    code = "adapter_not_bayesian"


class CalibrationNotFound(LoramuxError):
    """No calibration has this id."""

    status = 404
    type = "invalid_request_error"
    code = "calibration_not_found"


class AnswerNotFound(LoramuxError):
    """Feedback is about an answer that had no scores, or is not remembered."""

    status = 404
    type = "invalid_request_error"
    code = "answer_not_found"


class FeedbackConflict(LoramuxError):
    """Feedback says other than the feedback before it."""

    status = 409
    type = "invalid_request_error"
    code = "feedback_conflict"


class DrawsDoNotFit(LoramuxError):
    """The draws that a request asks for can never lie on the device together."""

    status = 400
    type = "invalid_request_error"
    code = "uncertainty_no_room"


class InvalidApiKey(LoramuxError):
    """There is no key where one is needed, or it is nobody's."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class AdminKeyRequired(LoramuxError):
    """The key is valid, but not for changing what is served."""

    status = 403
    type = "permission_error"
    code = "admin_key_required"


class RouteNotAllowed(LoramuxError):
    """The key is for some adapters, and this route is not among those where that can be checked."""

    status = 403
    type = "permission_error"
    code = "route_not_allowed"


class RouteNotFound(LoramuxError):
    """There is no such route."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class RequestTimeout(LoramuxError):
    """The body did not arrive in time."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class RequestTooLarge(LoramuxError):
    """The body is over --max-body."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class PathNotAllowed(LoramuxError):
    """The source lies outside every --adapter-root."""

    status = 403
    type = "permission_error"
    code = "adapter_path_not_allowed"


class PoolExhausted(LoramuxError):
    """No room in adapter memory for one more version. Bytes are 0 where they are not known."""

    status = 503
    type = "server_error"
    code = "adapter_memory_full"
    retry_after_s = 5

    def __init__(self, message: str, *, hint: str | None = None, needed_bytes: int = 0, free_bytes: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes

    @classmethod
    def of(cls, needed_bytes: int, free_bytes: int) -> PoolExhausted:
        """With numbers, and what to do."""
        pieces = ", in pieces that are too small" if needed_bytes <= free_bytes else ""
        return cls(
            f"Adapter memory is full: this adapter needs {needed_bytes / 2**20:.1f} MiB, {free_bytes / 2**20:.1f} MiB "
            f"are free{pieces}, and what else is there is in use or pinned.",
            hint="Try again later, unpin or remove an adapter (POST /v1/adapters/NAME/unpin, DELETE "
            "/v1/adapters/NAME), or restart with a larger --adapter-memory.",
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        )


class AdapterLoading(LoramuxError):
    """The adapter was still loading when the request's patience ended."""

    status = 503
    type = "server_error"
    code = "adapter_loading"
    retry_after_s = 5


class UncertaintyTimeout(LoramuxError):
    """The draws that a decision needs were not read within the request's `timeout_ms`."""

    status = 504
    code = "uncertainty_timeout"


class ItemsNotScored(LoramuxError):
    """An item of a calibration got no whole score from the engine; nothing was calibrated."""

    status = 503
    code = "items_not_scored"
    retry_after_s = 5


class StateNotWritten(LoramuxError):
    """The state file did not take a change, so the change was not made."""

    code = "state_not_written"
