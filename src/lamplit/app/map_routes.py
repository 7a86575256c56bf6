"""The part of the HTTP API that the map is drawn from: arrays as bytes, and what they mean as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import numpy as np
from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from lamplit.app import messages as m
from lamplit.app.bodies import describe_bodies, json_of
from lamplit.app.collection_map import STEPS
from lamplit.app.encoding import run
from lamplit.app.kept_rows import plain
from lamplit.app.live import Live
from lamplit.app.service import Service

_BYTES = "application/octet-stream"
_ARRAY: dict[int | str, dict[str, object]] = {200: {"content": {_BYTES: {}}}}
Column = Annotated[str | None, Query(max_length=1000, description="Column to colour by.")]
Words = Annotated[str | None, Query(max_length=1000, description="Words to colour by: their cosine with each image.")]
RowsBody = Annotated[m.MapRows, Depends(json_of(m.MapRows))]
AreaBody = Annotated[m.Area, Depends(json_of(m.Area))]


def add_map(app: FastAPI, live: Live) -> None:
    """Add the routes below `/map`."""
    _add_points(app, live)
    _add_colours(app, live)
    _add_regions(app, live)


def _add_points(app: FastAPI, live: Live) -> None:
    def described(service: Service) -> bytes:
        found = service.map.projection
        answer = m.MapAnswer(
            tag=service.map.tag(found), images=len(found.points), explained=found.explained,
            advice=service.map.advice(found),
        )  # fmt: skip
        return answer.model_dump_json().encode()

    @app.get("/map", response_model=m.MapAnswer)
    async def map_() -> Response:
        """Describe the map: all images of the store in two dimensions."""
        service = live.now.service
        return Response(await run(service.mapping, described, service), media_type="application/json")

    def points(service: Service) -> tuple[str, bytes]:
        found = service.map.projection
        return service.map.tag(found), np.ascontiguousarray(found.points.T, "<f4").tobytes()

    @app.get("/map/points", response_class=Response, responses=_ARRAY)
    async def points_(request: Request) -> Response:
        """Return the points: little-endian float32, x of all images in the order of their ids, then y of all."""
        service = live.now.service
        tag, content = await run(service.mapping, points, service)
        headers = {"etag": f'"{tag}"'}
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=_BYTES, headers=headers)


def _add_colours(app: FastAPI, live: Live) -> None:
    def coloured(service: Service, column: str | None, query: str | None) -> bytes:
        legend, numbers = service.map.coloured(column, query)
        entries = [m.MapEntry(name=name, images=images) for name, images in legend.entries]
        # The legend, a byte of zero that no JSON has, and the numbers.
        shown = m.MapLegend(kind=legend.kind, entries=entries, steps=STEPS, low=legend.low, high=legend.high)  # type: ignore[arg-type]
        return shown.model_dump_json().encode() + b"\0" + numbers.tobytes()

    async def parts(column: str | None, query: str | None) -> tuple[bytes, bytes]:
        service = live.now.service
        if column is not None and column not in service.store.metadata_columns:
            raise HTTPException(404, f"the store has no column {column[:100]!r}")
        question = (column, (query or "").strip() or None)
        kept = await live.now.maps.get(service.mapping, partial(coloured, service), *question)
        legend, _, numbers = kept.partition(b"\0")
        return legend, numbers

    @app.get("/map/legend", response_model=m.MapLegend)
    async def legend_(column: Column = None, query: Words = None) -> Response:
        """Say what the numbers of /map/colours mean, for the same column or words."""
        return Response((await parts(column, query))[0], media_type="application/json")

    @app.get("/map/colours", response_class=Response, responses=_ARRAY)
    async def colours_(column: Column = None, query: Words = None) -> Response:
        """Return a byte for each image, in the order of the points: the number of its value, or a step of a scale."""
        return Response((await parts(column, query))[1], media_type=_BYTES)


def _add_regions(app: FastAPI, live: Live) -> None:
    def items(service: Service, rows: Sequence[int]) -> list[m.MapItem]:
        return [
            m.MapItem(row=row, id=shown["id"], text=plain(" ".join(shown["texts"][:1]) or shown["name"], 200))
            for row, shown in zip(rows, service.items(rows), strict=True)
        ]

    def regions(service: Service, tag: str) -> bytes:
        found = [
            m.MapRegion(
                x=region.x, y=region.y, level=region.level, images=region.images, name=name,
                typical=items(service, typical),
            )
            for region, name, typical in service.map.regions(tag)
        ]  # fmt: skip
        return m.MapRegions(tag=tag, regions=found).model_dump_json().encode()

    @app.get("/map/regions", response_model=m.MapRegions)
    async def regions_() -> Response:
        """Return where the points lie dense, with names: words that fit a region better than they fit the others."""
        service = live.now.service
        tag = await run(service.mapping, lambda: service.map.tag(service.map.projection))
        kept = await live.now.maps.get(service.classifying, partial(regions, service), tag)
        return Response(kept, media_type="application/json")

    @app.post("/map/items", response_model=m.MapItems, openapi_extra=describe_bodies(m.MapRows))
    async def items_(body: RowsBody) -> Response:
        """Return ids and texts of some points."""
        service = live.now.service

        def answer() -> Response:
            service.map.require(body.tag)
            if any(row >= len(service.store) for row in body.rows):
                raise HTTPException(404, f"the map has {len(service.store)} points")
            return _json(m.MapItems(items=items(service, body.rows)))

        return await run(service.showing, answer)

    @app.post("/map/area", response_model=m.MapCount, openapi_extra=describe_bodies(m.Area))
    async def area_(body: AreaBody) -> Response:
        """Count the images in an area of the map; `/search` takes it as a condition."""
        service = live.now.service

        def answer() -> Response:
            return _json(m.MapCount(images=int(service.map.inside(body.tag, tuple(body.corners)).sum())))

        return await run(service.mapping, answer)


def _json(message: BaseModel) -> Response:
    return Response(message.model_dump_json(), media_type="application/json")
