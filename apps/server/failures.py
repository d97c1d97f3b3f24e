"""Errors as the OpenAI API words them: a status, and a JSON object that says what is wrong with which parameter."""

from typing import Any

from pydantic import ValidationError

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}  # status -> the API's type; all others are errors of the request


class ApiError(Exception):
    """What a client is told; `status` is that of HTTP."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        match self.status:
            case 429:
                return {"retry-after": "1"}
            case 401:
                return {"www-authenticate": "Bearer"}
        return {}


class Busy(ApiError):
    """As many replies are being made as this server makes at once."""

    def __init__(self, sessions: int):
        super().__init__(
            429, f"all {sessions} places of this server are taken; try again in a moment", "rate_limit_exceeded"
        )


class Closing(ApiError):
    """The server is being shut down."""

    def __init__(self) -> None:
        super().__init__(503, "the server is shutting down; try again when it is back", "server_shutting_down")


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be served as it is."""
    return ApiError(400, message, code, param)


def misread(error: ValidationError) -> ApiError:
    """All mistakes of a body, the first one's place as the parameter; values that were sent are not repeated."""
    found = [(_place(one["loc"]), one["msg"]) for one in error.errors(include_url=False, include_input=False)]
    message = "; ".join(f"{place}: {said}" if place else said for place, said in found[:8])
    more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
    unknown = all(one["type"] == "extra_forbidden" for one in error.errors(include_url=False, include_input=False))
    return refused(message + more, found[0][0] or None, "unknown_parameter" if unknown else "invalid_value")


def _place(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` for ("messages", 0, "content")."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
