"""Refusal: a request that is answered with an error, in the words and the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Refusal(Exception):
    """An error that the client is told.

    Args:
        status: of the HTTP answer.
        message: one line: what was wanted, what was found, the next step.
        code: a word for programs.
        param: the field of the request that is wrong.
        retry_after_s: when to come again, for 429 and 503.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """What is sent."""
        return error_body(self.status, self.message, self.code, self.param)

    def headers(self) -> dict[str, str]:
        """The headers that belong to it."""
        found = {}
        if self.retry_after_s is not None:
            found["Retry-After"] = str(max(1, round(self.retry_after_s)))
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found


def error_body(status: int, message: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API writes it."""
    return {
        "error": {"message": message, "type": KINDS.get(status, "server_error"), "param": param, "code": code},
    }


def wrong(message: str, param: str | None = None, code: str = "invalid_value") -> Refusal:
    """A request that cannot be done as it is."""
    return Refusal(400, message, code, param=param)
