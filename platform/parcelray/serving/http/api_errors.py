"""Error responses of the endpoint, in the format that OpenAI's clients understand.

No message contains a path, a key, or internal details.
"""

from collections.abc import Mapping
from typing import Any

from parcelray.serving.engine.engine import EngineRefusal

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "server_error",
    500: "server_error",
}
_ENGINE_STATUS = {
    "context_length_exceeded": 400,
    "unsupported_budget": 422,
    "queue_full": 429,
    "deadline_exceeded": 503,
    "cancelled": 499,
    "shutting_down": 503,
    "engine_error": 503,
    "no_replica": 503,
}
_ENGINE_PARAM = {"context_length_exceeded": "messages", "unsupported_budget": "visual_tokens"}


class ApiError(Exception):
    """An error response.

    Args:
        status: HTTP status.
        message: the wrong value, the legal values, and what to do.
        code: short constant identifier for programs.
        param: path of the wrong field, such as `messages.0.content`.
        headers: additional headers, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        """Returns the JSON body of the response."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def too_many(message: str, *, code: str, retry_after_s: int) -> ApiError:
    """Returns a 429 error with the seconds after which the client should retry."""
    return ApiError(429, message, code=code, headers={"retry-after": str(retry_after_s)})


def from_refusal(refusal: EngineRefusal, retry_after_s: int) -> ApiError:
    """Converts a refusal of the engine into an HTTP error."""
    status = _ENGINE_STATUS.get(refusal.code, 503)
    headers = {"retry-after": str(retry_after_s)} if status in (429, 503) else {}
    return ApiError(status, refusal.message, code=refusal.code, param=_ENGINE_PARAM.get(refusal.code), headers=headers)
