"""Bodies of requests as checked objects, and errors as answers."""

import json
import logging
from typing import TypeVar

import python_multipart  # noqa: F401 (starlette reads forms with it; where it is missing, that is told at the start)
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from apps.server.failures import ApiError, misread, refused
from apps.server.leaving import Left
from apps.server.settings import Limits
from runtime.errors import EdgeOmniError

log = logging.getLogger("edgeomni.server")
Body = TypeVar("Body", bound=BaseModel)
GONE = 499  # a client that left is told nothing; this is for the log


async def read_body(request: Request, kind: type[Body]) -> Body:
    """The JSON object of a request. ApiError with every mistake in it."""
    content = await request.body()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise refused("the body is no JSON that can be read; expected one object") from None
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise misread(error) from None


class InMemory(MultiPartParser):
    """Keeps files of a form in memory: what a client sends is written to no disk."""

    spool_max_size = 1 << 62


async def read_form(request: Request, kind: type[Body], limits: Limits) -> tuple[Body, bytes]:
    """The fields of a form, and its one file. ApiError with every mistake in it."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise refused("expected multipart/form-data with a file")
    parser = InMemory(request.headers, request.stream(), max_files=1, max_fields=32, max_part_size=limits.body)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise refused(f"the form cannot be read: {error.message}") from None
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise refused("the file is missing", "file")
    content = await file.read()
    fields: dict[str, object] = {}
    for name, value in form.multi_items():
        if name.endswith("[]"):
            fields.setdefault(name[:-2], []).append(value)  # type: ignore[union-attr]
        elif name != "file":
            fields[name] = value
    try:
        return kind.model_validate(fields, strict=False), content
    except ValidationError as error:
        raise misread(error) from None


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error; of a fault of ours, only that there was one."""
    match error:
        case ApiError():
            return error
        case EdgeOmniError():
            return refused(str(error))
        case HTTPException(status_code=404):
            return ApiError(404, "there is nothing at this path; see /v1/models and /v1/chat/completions", "not_found")
        case HTTPException(status_code=status):
            return ApiError(status, error.detail, "method_not_allowed" if status == 405 else None)
    log_fault(error)
    return ApiError(500, "the server made a mistake; its log names the place")


def log_fault(error: BaseException) -> None:
    """The kind of an error and its place: its message, and the values around it, may hold what a client sent."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "no place" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    log.error("%s in %s", type(error).__name__, where)


def answer_error(_request: Request, error: Exception) -> Response:
    if isinstance(error, Left | ClientDisconnect):
        return Response(status_code=GONE)
    told = as_api_error(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else told.headers
    return JSONResponse(told.body, told.status, headers)
