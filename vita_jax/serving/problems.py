"""What is answered to a request that cannot be served: the error objects of the API."""

from __future__ import annotations

import math
from typing import Any

from vita_jax.errors import UserError

INVALID, UNAUTHORISED, LIMITED, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)


class Problem(Exception):
    """A request is refused.

    Attributes:
      status: of HTTP.
      message: what is wrong and what to do.
      kind: `type` of the error object.
      code: a word for programs, or None.
      param: the field of the request that it is about, or None.
      retry_after: seconds after which it may work, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What HTTP says of it besides."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def invalid(message: str, param: str | None = None, code: str | None = None) -> Problem:
    """Something in the request is wrong."""
    return Problem(400, message, param=param, code=code)


def not_supported(message: str, param: str) -> Problem:
    """Something that the API has and this server does not."""
    return Problem(400, message, param=param, code="unsupported_parameter")


def overloaded(message: str, retry_after: float) -> Problem:
    """There is no room at the moment."""
    return Problem(503, message, kind=SERVER, code="overloaded", retry_after=retry_after)


def as_problem(error: Exception) -> Problem:
    """What to answer for any exception: a `UserError` is about the request, an unknown one is a bug of the server."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, UserError):
        return invalid(str(error))
    return Problem(500, "the server has made a mistake; its log says which", kind=SERVER, code="internal_error")
