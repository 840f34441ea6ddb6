"""Every error a user can meet, as one tree. Each leaf knows its HTTP status, its OpenAI code and its advice.

HybridError
├── BadRequest            400  invalid_request_error
│   ├── ContextTooLong    400  context_length_exceeded
│   └── DataError         400  invalid_data            (a task folder, a training file)
├── Unauthorized          401  invalid_api_key
├── Forbidden             403  permission_denied
├── NotFound              404  not_found
│   └── ModelNotFound     404  model_not_found
├── Conflict              409  conflict
│   └── HomeInUse         409  home_in_use
├── TooLarge              413  request_too_large
├── Refused               422  artifact_refused        (adapters, indexes, gates: the reason says which check)
├── HeadersTooLarge       431  headers_too_large
├── RateLimited           429  rate_limit_exceeded     (+ Retry-After)
├── EngineError           502  engine_error
│   └── EngineRejected    4xx  passed through from the engine
├── NotReady              503  not_ready               (+ Retry-After)
│   ├── Overloaded        503  overloaded              (+ Retry-After)
│   ├── EngineFailing     503  engine_failing          (+ Retry-After)
│   └── Draining          503  draining                (+ Retry-After)
├── EngineTimeout         504  engine_timeout
├── StorageError          507  storage_error           (a disk that is full, failing or read-only; a damaged file)
└── SetupError            exit code 3: something on this machine is missing
"""

from __future__ import annotations

from typing import Any


class HybridError(Exception):
    """The root. `message` is one or two sentences: what is wrong, and what to do next."""

    status = 500
    code = "internal_error"
    type = "server_error"
    exit_code = 1
    retry_after: float | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later without being changed."""
        return self.retry_after is not None

    def wire(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class BadRequest(HybridError):
    """The request is malformed or asks for something that cannot be."""

    status = 400
    code = "invalid_request_error"
    type = "invalid_request_error"
    exit_code = 2


class ContextTooLong(BadRequest):
    """Prompt and answer do not fit the model's context."""

    code = "context_length_exceeded"


class DataError(BadRequest):
    """A data file or task folder is not usable; the message names file, line and remedy."""

    code = "invalid_data"
    exit_code = 1


class Unauthorized(HybridError):
    """No key, or an unknown one."""

    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class Forbidden(HybridError):
    """The key is known and may not do this."""

    status = 403
    code = "permission_denied"
    type = "permission_error"


class NotFound(HybridError):
    """No such thing, or none that this caller may see."""

    status = 404
    code = "not_found"
    type = "invalid_request_error"


class ModelNotFound(NotFound):
    """The `model` names nothing; never a silent fallback."""

    code = "model_not_found"


class Conflict(HybridError):
    """The thing exists already, or changed under the caller."""

    status = 409
    code = "conflict"
    type = "invalid_request_error"


class HomeInUse(Conflict):
    """Another server works in this home."""

    code = "home_in_use"
    exit_code = 3


class TooLarge(HybridError):
    """The body is larger than the limit."""

    status = 413
    code = "request_too_large"
    type = "invalid_request_error"


class Refused(HybridError):
    """An artefact failed a check before it was used; the engine never saw it."""

    status = 422
    code = "artifact_refused"
    type = "invalid_request_error"


class HeadersTooLarge(HybridError):
    """Too many headers, or too long."""

    status = 431
    code = "headers_too_large"
    type = "invalid_request_error"


class RateLimited(HybridError):
    """This caller is over its own quota."""

    status = 429
    code = "rate_limit_exceeded"
    type = "rate_limit_error"
    retry_after = 1.0


class EngineError(HybridError):
    """The engine broke off or answered nonsense. Nothing was retried after the first byte."""

    status = 502
    code = "engine_error"


class EngineRejected(EngineError):
    """The engine refused the request itself (4xx): passed through, since a retry cannot mend it."""

    type = "invalid_request_error"

    def __init__(
        self, message: str, *, status: int = 400, code: str = "invalid_request_error", param: str | None = None
    ) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.code = code


class NotReady(HybridError):
    """The engine is starting, restarting or gone; the gateway lives."""

    status = 503
    code = "not_ready"
    type = "service_unavailable"
    exit_code = 3
    retry_after = 2.0


class Overloaded(NotReady):
    """The shared queue is full."""

    code = "overloaded"
    retry_after = 1.0


class EngineFailing(NotReady):
    """The engine failed one request after another: it is spared for a moment, and then tried with a single one."""

    code = "engine_failing"
    retry_after = 2.0


class Draining(NotReady):
    """The server is shutting down and takes no new work."""

    code = "draining"
    retry_after = 5.0


class EngineTimeout(HybridError):
    """The engine did not answer in time."""

    status = 504
    code = "engine_timeout"
    retry_after = 1.0


class StorageError(HybridError):
    """The disk is full, fails or cannot be written, or a file is not what was written. What was committed stays."""

    status = 507
    code = "storage_error"


class SetupError(HybridError):
    """Something on this machine is missing: a model, a package, memory, a free port."""

    exit_code = 3
    code = "setup_error"
