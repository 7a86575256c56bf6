"""Bodies of requests: JSON, or a form with images, at one address."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

J = TypeVar("J", bound=BaseModel)
F = TypeVar("F", bound=BaseModel)
MAX_JSON = 4 * 2**20  # bytes; unlike the files of a form, JSON is in memory for all clients at once
MAX_FILES, MAX_FIELDS = 64, 2000  # of a form, before its values are validated
JSON, FORM = "application/json", "multipart/form-data"


def body_of(of_json: type[J], of_form: type[F]) -> Callable[[Request], AsyncIterator[J | F]]:
    """Make a dependency that reads JSON or a form; the files of a form stay open until the request is answered."""

    async def read(request: Request) -> AsyncIterator[J | F]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == JSON:
            body = await _json_of(request)
            yield _checked(lambda: of_json.model_validate_json(body))
        elif kind == FORM:
            async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS) as form:
                lists = {name for name, field in of_form.model_fields.items() if "list[" in str(field.annotation)}
                values = {name: form.getlist(name) if name in lists else form[name] for name in form}
                yield _checked(lambda: of_form.model_validate(values))
        else:
            raise HTTPException(415, f"send {JSON}, or {FORM} with images")

    return read


def describe_bodies(of_json: type[BaseModel], of_form: type[BaseModel]) -> dict[str, Any]:
    """Describe both bodies for the OpenAPI page."""
    content = {JSON: {"schema": of_json.model_json_schema()}, FORM: {"schema": of_form.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


async def _json_of(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_JSON:
            raise HTTPException(413, f"JSON may have {MAX_JSON // 2**20} MB")
        parts.append(part)
    return b"".join(parts)


def _checked(validate: Callable[[], Any]) -> Any:
    try:
        return validate()
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
