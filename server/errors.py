"""One error tree: each class knows its HTTP status, and its type and code in OpenAI's words.

The envelope around them is each dialect's own.

ServerError                        500 server_error
├── InvalidRequestError            400 invalid_request_error; `param` names the field: input[17]
│   ├── ContextLengthExceededError     context_length_exceeded
│   └── DeviceMemoryError              input_too_large: it alone does not fit into memory
├── InvalidKeyError                401 invalid_api_key
├── NotFoundError                  404 not_found
│   └── ModelNotFoundError             model_not_found
├── MethodNotAllowedError          405
├── RequestTimeoutError            408
├── OtherVectorsError              409 not_these_vectors; not worth a retry
├── BodyTooLargeError              413
├── UnsupportedMediaTypeError      415
├── OverloadedError                429 with Retry-After
├── HeadersTooLargeError           431
├── InternalError                  500 nothing internal in the message
│   ├── BatchFailedError           500 the forward failed; not worth a retry
│   └── NonFiniteVectorError       500 the model gave NaN; not worth a retry
├── UnavailableError               503 with Retry-After: starting, draining, or no worker
└── DeadlineExceededError          504 the client's own time-out has passed

SettingsError and StartError are no answers to a client: they end the start.
"""

from __future__ import annotations

import math
from typing import ClassVar, Self


class SettingsError(Exception):
    """A setting is unknown, malformed or contradicts another; the message names the flag."""


class StartError(Exception):
    """The engine cannot start, and trying again would not help."""


class ServerError(Exception):
    """Base of everything that is answered with an error."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    retry: ClassVar[bool | None] = None
    """False: tell SDKs that a retry is useless, where the status alone would invite one."""

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.retry_after = message, param, retry_after

    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:  # between 1 and 60 s: SDKs ignore longer ones
            seconds = min(max(self.retry_after, 1.0), 60.0)
            headers["retry-after"] = str(math.ceil(seconds))
            headers["retry-after-ms"] = str(math.ceil(seconds * 1000))
        if self.retry is False:
            headers["x-should-retry"] = "false"
        return headers


class InvalidRequestError(ServerError):
    status = 400
    type = "invalid_request_error"


class ContextLengthExceededError(InvalidRequestError):
    code = "context_length_exceeded"


class DeviceMemoryError(InvalidRequestError):
    code = "input_too_large"

    @classmethod
    def of(cls, index: int, num_tokens: int) -> Self:
        """Of the input with this index."""
        param = f"input[{index}]"
        return cls(
            f"{param} has {num_tokens} tokens, which do not fit into the device's memory: "
            "shorten it",
            param=param,
        )


class InvalidKeyError(InvalidRequestError):
    status = 401
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class NotFoundError(InvalidRequestError):
    status = 404
    code = "not_found"


class ModelNotFoundError(NotFoundError):
    code = "model_not_found"


class MethodNotAllowedError(InvalidRequestError):
    status = 405
    code = "method_not_allowed"


class RequestTimeoutError(InvalidRequestError):
    status = 408
    code = "request_timeout"


class OtherVectorsError(ServerError):
    status = 409
    type = "invalid_request_error"
    code = "not_these_vectors"
    retry = False


class BodyTooLargeError(InvalidRequestError):
    status = 413
    code = "body_too_large"

    def headers(self) -> dict[str, str]:
        return {"connection": "close"}  # the rest of the body is not read


class UnsupportedMediaTypeError(InvalidRequestError):
    status = 415
    code = "unsupported_media_type"


class OverloadedError(ServerError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class HeadersTooLargeError(InvalidRequestError):
    status = 431
    code = "headers_too_large"


class InternalError(ServerError):
    code = "internal_error"


class BatchFailedError(InternalError):
    code = "batch_failed"
    retry = False


class NonFiniteVectorError(InternalError):
    code = "non_finite_vector"
    retry = False

    @classmethod
    def of(cls, index: int) -> Self:
        """Of the input with this index."""
        param = f"input[{index}]"
        return cls(f"the model's vector for {param} is not finite", param=param)


class UnavailableError(ServerError):
    status = 503
    type = "service_unavailable_error"
    code = "service_unavailable"


class DeadlineExceededError(ServerError):
    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"
    retry = False
