"""Refusals in OpenAI's shape, and reading a body that may deserve one."""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bascule.serve.bodies import Body, NamedTool
from bascule.serve.door import error_body

AnyBody = TypeVar("AnyBody", bound=Body)
BRANCHES = {"str", NamedTool.__name__}


class ApiError(Exception):
    """Becomes a response in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"Retry-After": str(retry_after_s)} if retry_after_s is not None else None
        self.body = error_body(
            message, KINDS.get(status, "invalid_request_error"), code=code, param=param
        )


KINDS = {
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


async def read(request: Request, kind: type[AnyBody]) -> AnyBody:
    """The body, checked. Raises ApiError that names the field."""
    data = await request.body()
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first, where, message = _told(error)
        raise ApiError(
            400,
            f"{where}: {message}" if where else message,
            code=first,
            param=where or None,
        ) from None


def _told(error: ValidationError) -> tuple[str, str, str]:
    """Kind, field and words of the first error; of a field that may have several types, of the branch that was understood furthest."""
    found = error.errors()
    of_field = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
    first = max(of_field, key=lambda one: len(one["loc"]))
    where = _path(first["loc"])
    words = [
        one["msg"].removeprefix("Value error, ")
        for one in of_field
        if len(one["loc"]) == len(first["loc"]) and _path(one["loc"]) == where
    ]
    return first["type"], where, ", or: ".join(dict.fromkeys(words))


def _path(loc: tuple[int | str, ...]) -> str:
    """pydantic names the type it tried between the fields: `messages.0.content.list[TextPart].0.type`."""
    parts = [str(part) for part in loc]
    return ".".join(part for part in parts if part not in BRANCHES and "[" not in part)


async def answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {
        404: f"There is nothing at {request.method} {request.url.path}.",
        405: f"{request.url.path} does not take {request.method}.",
    }
    body = error_body(
        words.get(error.status_code, str(error.detail)),
        "not_found_error" if error.status_code == 404 else "invalid_request_error",
    )
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def answer_crash(request: Request, error: Exception) -> Response:
    """Starlette has logged it with its traceback; the client learns that it is our fault, not what is inside."""
    return JSONResponse(
        error_body("The server failed on this request; its log says why.", "server_error"),
        status_code=500,
    )
