"""The one error tree.

    PenstockError
    ├── ConfigError                 a flag, variable or file is wrong; start-up prints it as one line with the fix
    ├── ModelFormatError            a checkpoint, tokenizer or template cannot be used
    ├── IntegrityError              an invariant of ours is broken: a bug, never the client's fault
    └── RequestError                one request ends with this; rendered as OpenAI's error object
        ├── InvalidRequestError     400  the request is wrong; `param` names the field
        │   └── ContextLengthError  400  prompt and max_tokens do not fit the model or the cache
        ├── AuthenticationError     401  no identity, or not a valid one
        ├── PermissionDeniedError   403  the route exists, but not for this caller
        ├── NotFoundError           404  no such model or route
        ├── PayloadTooLargeError    413  body above the limit
        ├── RateLimitError          429  a limit of the key or tenant is reached; carries Retry-After
        ├── AbortedError            499  the client went away
        ├── EngineError             500  this request failed inside the engine
        ├── StoreUnavailableError   503  a database or Redis that this request needs is away
        ├── OverloadedError         503  a bounded queue is full or the server drains; carries Retry-After
        ├── EngineDeadError         503  the engine is not there
        └── DeadlineExceededError   504  the request's deadline passed

What a client is told is the exception's message; what the log says is the exception's cause. The two are written apart, so
that a 500 never carries internals.
"""

from __future__ import annotations

import msgspec


class PenstockError(Exception):
    """Base of everything that Penstock raises on purpose."""


class ConfigError(PenstockError):
    """A setting cannot be used. The message is one line and says what to change."""


class ModelFormatError(PenstockError):
    """A model folder, checkpoint, tokenizer or chat template cannot be used. The message names the file and the fix."""


class IntegrityError(PenstockError):
    """An internal invariant does not hold."""


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request's error on the wire; the fields of OpenAI's error object plus the HTTP status."""

    message: str
    status: int = 500
    type: str = "server_error"
    param: str | None = None
    code: str | None = None


class RequestError(PenstockError):
    """One request ends with this. Subclasses fix status and type; `param` and `code` are OpenAI's."""

    status = 500
    type = "server_error"
    default_code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code

    @property
    def info(self) -> ErrorInfo:
        """The wire form."""
        return ErrorInfo(message=self.message, status=self.status, type=self.type, param=self.param, code=self.code)


class InvalidRequestError(RequestError):
    status = 400
    type = "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    default_code = "context_length_exceeded"


class AuthenticationError(RequestError):
    """The message never says which part of a credential was wrong."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class PermissionDeniedError(RequestError):
    status = 403
    type = "permission_error"
    default_code = "permission_denied"


class NotFoundError(RequestError):
    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class PayloadTooLargeError(RequestError):
    status = 413
    type = "invalid_request_error"
    default_code = "payload_too_large"


class RateLimitError(RequestError):
    """`retry_after_s`: after how many seconds a client alone on its key succeeds; None: no retry helps (a budget is spent). `headers`:
    response headers that show the state of the limits."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None,
        headers: dict[bytes, bytes] | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s
        self.headers = {} if headers is None else headers


class AbortedError(RequestError):
    status = 499
    type = "aborted"
    default_code = "aborted"


class EngineError(RequestError):
    status = 500
    default_code = "engine_error"


class OverloadedError(RequestError):
    """`retry_after_s`: after how many seconds a retry makes sense."""

    status = 503
    type = "overloaded_error"
    default_code = "overloaded"

    def __init__(
        self, message: str, *, retry_after_s: float = 1.0, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s


class StoreUnavailableError(RequestError):
    """A store that is away is looked for all the time, so that a retry makes sense after `retry_after_s`."""

    status = 503
    default_code = "store_unavailable"
    retry_after_s = 1.0


class EngineDeadError(RequestError):
    status = 503
    default_code = "engine_dead"


class DeadlineExceededError(RequestError):
    status = 504
    type = "timeout_error"
    default_code = "deadline_exceeded"


_BY_STATUS: dict[int, type[RequestError]] = {
    cls.status: cls
    for cls in (
        InvalidRequestError,
        PermissionDeniedError,
        NotFoundError,
        PayloadTooLargeError,
        AbortedError,
        EngineError,
        EngineDeadError,
        DeadlineExceededError,
    )
}


def error_from_info(info: ErrorInfo) -> RequestError:
    """The exception that `info` was made from, for raising on this side of the wire."""
    if info.code == ContextLengthError.default_code:
        return ContextLengthError(info.message, param=info.param)
    if info.code == OverloadedError.default_code:
        return OverloadedError(info.message, param=info.param)
    cls = _BY_STATUS.get(info.status, EngineError)
    return cls(info.message, param=info.param, code=info.code)
