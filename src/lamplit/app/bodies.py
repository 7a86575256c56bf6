"""Bodies of requests: JSON, or a form with images, at one address."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

J = TypeVar("J", bound=BaseModel)
F = TypeVar("F", bound=BaseModel)
MAX_JSON = 4 * 2**20  # bytes; unlike the files of a form, JSON is in memory for all clients at once
ALL_JSON = 64 * 2**20  # of all clients
MAX_FILES, MAX_FIELDS = 20, 2000  # of a form, before its values are validated
JSON, FORM = "application/json", "multipart/form-data"


def body_of(of_json: type[J], of_form: type[F]) -> Callable[[Request], AsyncIterator[J | F]]:
    """Make a dependency that reads JSON or a form; the files of a form stay open until the request is answered."""

    async def read(request: Request) -> AsyncIterator[J | F]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == JSON:
            body = await _json_of(request)
            yield _checked(lambda: of_json.model_validate_json(body))
        elif kind == FORM:
            async with _form_of(request) as form:
                lists = {name for name, field in of_form.model_fields.items() if "list[" in str(field.annotation)}
                values = {name: form.getlist(name) if name in lists else form[name] for name in form}
                yield _checked(lambda: of_form.model_validate(values))
        else:
            raise HTTPException(415, f"send {JSON}, or {FORM} with images")

    return read


def json_of(of_json: type[J]) -> Callable[[Request], Awaitable[J]]:
    """Make a dependency that reads JSON alone."""

    async def read(request: Request) -> J:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            raise HTTPException(415, f"send {JSON}")
        body = await _json_of(request)
        found: J = _checked(lambda: of_json.model_validate_json(body))
        return found

    return read


def describe_bodies(of_json: type[BaseModel], of_form: type[BaseModel] | None = None) -> dict[str, Any]:
    """Describe both bodies, or JSON alone, for the OpenAPI page."""
    content = {JSON: {"schema": of_json.model_json_schema()}}
    if of_form is not None:
        content[FORM] = {"schema": of_form.model_json_schema()}
    return {"requestBody": {"required": True, "content": content}}


class _Parser(MultiPartParser):
    """Keeps files on the disk, so that memory does not grow with those who send."""

    spool_max_size = 2**16


@asynccontextmanager
async def _form_of(request: Request) -> AsyncIterator[FormData]:
    try:
        form = await _Parser(request.headers, request.stream(), max_files=MAX_FILES, max_fields=MAX_FIELDS).parse()
    except (MultiPartException, KeyError) as error:  # a KeyError without a boundary
        raise HTTPException(400, getattr(error, "message", "this form names no boundary")) from error
    try:
        yield form
    finally:
        await form.close()


class _Memory:
    """Bytes of JSON that are in memory now."""

    taken = 0


async def _json_of(request: Request) -> bytes:
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            _Memory.taken += len(part)
            if size > MAX_JSON:
                raise HTTPException(413, f"JSON may have {MAX_JSON // 2**20} MB")
            if _Memory.taken > ALL_JSON:
                raise HTTPException(503, "too many send much at once; ask again", {"retry-after": "5"})
            parts.append(part)
        return b"".join(parts)
    finally:
        _Memory.taken -= size


def _checked(validate: Callable[[], Any]) -> Any:
    try:
        return validate()
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
