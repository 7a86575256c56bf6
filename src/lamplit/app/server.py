"""The HTTP API and the page: routes, and how errors become sentences."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection as Names
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import Depends, FastAPI, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, TypeAdapter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor

from lamplit._version import __version__
from lamplit.app import messages as m
from lamplit.app.bodies import body_of, describe_bodies
from lamplit.app.encoding import run
from lamplit.app.guard import Guard
from lamplit.app.kept_rows import typical_text
from lamplit.app.live import Live
from lamplit.app.map_routes import add_map
from lamplit.app.measures import Measures
from lamplit.app.run_view import read_run
from lamplit.app.service import Among, Service
from lamplit.app.static_file import StaticFile
from lamplit.errors import ImageError, LamplitError
from lamplit.inspection import describe
from lamplit.model import LiT
from lamplit.store.lance_store import Store
from lamplit.towers.model_folder import CONFIG, names_model, saved_folder
from lamplit.towers.texts.word_reader import WordReader
from lamplit.zeroshot.class_list import ClassList
from lamplit.zeroshot.prompts import DEFAULT_TEMPLATES

logger = logging.getLogger(__name__)
STATIC = Path(__file__).parent / "static"
THUMBNAIL, WHERE, IMAGE = 320, 640, 1600  # longest sides, in pixels
_ANY: TypeAdapter[Any] = TypeAdapter(Any)
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": m.Problem, "description": text}
    for status, text in {
        400: "A request for another server",
        403: "A cross-origin request",
        404: "Not found",
        413: "The request is too large",
        415: "Neither JSON nor a form",
        422: "The request cannot be understood",
    }.items()
}
_MESSAGES = {
    "Not Found": "there is nothing at this address; the page is at /, and /docs describes the API",
    "Method Not Allowed": "this address does not take this method; see /docs for the API",
}
_PNG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}}}
_JPEG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/jpeg": {}}}}
Id = Annotated[str, Query(max_length=4096, description="The id of an image of the store.")]
SearchBody = Annotated[m.SearchWords | m.SearchImage, Depends(body_of(m.SearchWords, m.SearchImage))]
ClassifyBody = Annotated[m.ClassifyIds | m.ClassifyImages, Depends(body_of(m.ClassifyIds, m.ClassifyImages))]
EmbedBody = Annotated[m.EmbedTexts | m.EmbedImages, Depends(body_of(m.EmbedTexts, m.EmbedImages))]


def make_app(
    model: LiT,
    store: Store,
    *,
    name: str | None = None,
    classes: ClassList | Sequence[str] | None = None,
    hosts: Names[str] = (),
    allow_hosts: Names[str] = (),
    root_path: str = "",
    max_body: int = m.MAX_BODY,
    words: WordReader | None = None,
    relevance: bool = False,
) -> FastAPI:
    """Make the ASGI application; `serve` runs it.

    Args:
        model: an open model; without its image tower, images that are sent are refused with the reason.
        store: an open store, embedded with the image tower that the model reads.
        name: folder of the model, which may hold its run, or a name that `load` takes; by default the name of the
            model alone.
        classes: the classes that the page begins with: names, or a class list, which keeps its calibration.
        hosts: names of this server, besides localhost and addresses in digits.
        allow_hosts: names of a reverse proxy in front of it, with the port if it is not the usual one.
        root_path: path of the page behind that proxy.
        max_body: largest request, in bytes.
        words: the model's text tower for ONNX Runtime, if it has one; else torch reads words.
        relevance: measure what score is an answer to words, if that is not known yet; it takes some seconds.

    Raises:
        StoreError: another tower embedded the store than the model reads.
        TowerError: the class list is for images of another tower.
        UsageError: the class list is a multi-label one, or a name is given twice.
    """
    app = FastAPI(
        title="lamplit", version=__version__, docs_url=None, redoc_url=None, responses=_PROBLEMS,
        summary="Search and classify images by words, and embed both.",
    )  # fmt: skip
    folder = None if name is None else saved_folder(name)
    run_shown = None if folder is None else read_run(folder)
    text_column = None if run_shown is None else run_shown["settings"].get("text_column")
    service = Service(model, store, classes, words, text_column)
    if relevance:
        service.measure_relevance()
    live = Live(service, lambda service: _about(service, name, text_column).model_dump_json())
    app.router.lifespan_context = live.watched
    _add_pages(app)
    _add_questions(app, live)
    _add_descriptions(app, live, run_shown)
    _add_images(app, live)
    add_map(app, live)
    _add_errors(app)
    _add_health(app, live)
    app.add_middleware(Guard, hosts=hosts, allow_hosts=allow_hosts, root_path=root_path, max_body=max_body)
    return app


def _add_pages(app: FastAPI) -> None:
    """Answer the page and its files from memory, without a thread that might wait behind a search."""
    kinds = (".css", ".html", ".js", ".svg", ".txt")
    files = {
        file.relative_to(STATIC).as_posix(): StaticFile(file) for file in STATIC.rglob("*") if file.suffix in kinds
    }

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return files["index.html"].answer(request.headers)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:  # FastAPI's own pages load their scripts from elsewhere
        return files["docs.html"].answer(request.headers)

    @app.get("/static/{name:path}", include_in_schema=False)
    async def static(name: str, request: Request) -> Response:
        if name not in files:
            raise HTTPException(404)
        return files[name].answer(request.headers)


def _add_images(app: FastAPI, live: Live) -> None:
    def jpeg(service: Service, name: str, side: int) -> bytes:
        with _showing():
            return service.jpeg(_row_of(service, name), side)

    def drawn(service: Service, name: str, query: str) -> bytes:
        with _showing():
            return service.where(_row_of(service, name), query, WHERE)

    def shown(data: bytes, kind: str = "jpeg") -> Response:
        return Response(data, media_type=f"image/{kind}", headers={"cache-control": "private, max-age=600"})

    @app.get("/thumbnail", response_class=Response, responses=_JPEG)
    async def thumbnail(id: Id) -> Response:
        """Return an image of the store as a JPEG of at most 320 pixels a side."""
        service = live.now.service
        return shown(await live.now.thumbnails.get(service.showing, partial(jpeg, service), id, THUMBNAIL))

    @app.get("/image", response_class=Response, responses=_JPEG)
    async def image(id: Id) -> Response:
        """Return an image of the store as a JPEG of at most 1600 pixels a side."""
        service = live.now.service
        return shown(await run(service.showing, jpeg, service, id, IMAGE))

    @app.get("/where", response_class=Response, responses=_PNG)
    async def where(
        id: Id,
        query: Annotated[str, Query(min_length=1, max_length=1000, description="Words, or a sum of words in quotes.")],
    ) -> Response:
        """Return an image of the store as a PNG of at most 640 pixels a side: orange where the words are read most."""
        service = live.now.service
        found = await live.now.wheres.get(service.locating, partial(drawn, service), id, query.strip())
        return shown(found, "png")

    @app.get("/item", response_model=m.Item)
    async def item(id: Id) -> Response:
        """Return the texts and the metadata of an image of the store."""
        service = live.now.service
        return await run(service.showing, lambda: _answer(m.Item(**service.item(_row_of(service, id)))))


def _add_questions(app: FastAPI, live: Live) -> None:
    @app.post("/search", response_model=m.SearchAnswer, openapi_extra=describe_bodies(m.SearchWords, m.SearchImage))
    async def search(body: SearchBody) -> Response:
        """Find images by words, by an image of the store, or by an image that is sent."""
        service = live.now.service
        area = None if body.area is None else (body.area.tag, tuple(body.area.corners))
        part = (body.k, body.offset, Among(body.where, area))
        vector = await service.embed_image(body.image.file) if isinstance(body, m.SearchImage) else None

        def answer() -> Response:
            if vector is not None:
                hits = service.by_vector(vector, *part)
            elif isinstance(body, m.SearchWords) and body.query is not None:
                hits = service.by_words(body.query, *part)
            else:
                hits = service.neighbours(_row_of(service, str(getattr(body, "like", ""))), *part)
            # A model of each hit would take twice as long; tests hold that this is a SearchAnswer.
            least = service.least(body.query) if isinstance(body, m.SearchWords) and body.query is not None else None
            found = {"hits": [{**shown, "score": score} for score, shown in hits], "min_score": least}
            content = _ANY.dump_json(found)
            return Response(content, media_type="application/json")

        return await run(service.searching, answer)

    @app.post(
        "/classify", response_model=m.ClassifyAnswer, openapi_extra=describe_bodies(m.ClassifyIds, m.ClassifyImages)
    )
    async def classify(body: ClassifyBody) -> Response:
        """Classify images of the store, or images that are sent."""
        service = live.now.service
        images: list[tuple[str, Tensor | str]] = []  # name, and vector or why there is none
        if isinstance(body, m.ClassifyIds):
            images = [(name, service.vectors([_row_of(service, name)])) for name in body.ids]
        else:
            sent = await asyncio.gather(*(_vector_of(service, image) for image in body.images))
            images = [(image.filename or "image", vector) for image, vector in zip(body.images, sent, strict=True)]

        def classified(name: str, zimg: Tensor | str) -> m.Classified:
            if isinstance(zimg, str):
                return m.Classified(name=name, error=zimg)
            [guesses], [none] = service.classify(zimg, body.classes, body.templates)
            shares = [m.ClassShare(**vars(guess)) for guess in guesses[: body.top]]
            return m.Classified(name=name, classes=shares, none_of_these=none)

        def answer() -> Response:
            return _answer(m.ClassifyAnswer(images=[classified(*image) for image in images]))

        return await run(service.classifying, answer)

    @app.post("/embed", response_model=m.EmbedAnswer, openapi_extra=describe_bodies(m.EmbedTexts, m.EmbedImages))
    async def embed(body: EmbedBody) -> Response:
        """Return the vectors of texts, or of images that are sent."""
        service = live.now.service
        if isinstance(body, m.EmbedTexts):
            vectors = await run(service.embedding, service.embed_texts, body.texts)
        else:
            sent = await asyncio.gather(*(service.embed_image(image.file) for image in body.images))
            vectors = torch.stack(sent).numpy()
        return _answer(m.EmbedAnswer(width=vectors.shape[1], vectors=vectors.tolist()))


async def _vector_of(service: Service, image: UploadFile) -> Tensor | str:
    """(1, D) vector of an image that was sent, or the reason why there is none."""
    try:
        return (await service.embed_image(image.file))[None]
    except ImageError as error:
        return str(error)


def _add_descriptions(app: FastAPI, live: Live, run_shown: dict[str, Any] | None) -> None:
    @app.get("/about", response_model=m.About)
    async def about() -> Response:
        """Describe the open model and store."""
        return Response(live.now.described, media_type="application/json")

    @app.get("/run")
    async def run_() -> m.RunAnswer:
        """Return the curves and the report of the tuning run behind the model."""
        if run_shown is None:
            raise HTTPException(404, "this model has no finished tuning run beside it")
        return m.RunAnswer(**run_shown)


def _add_health(app: FastAPI, live: Live) -> None:
    measures = Measures()
    app.add_middleware(measures.around)

    @app.get("/health")
    async def health() -> m.Health:
        """Say that the server answers, and how many images the store has that it has open."""
        return m.Health(images=len(live.now.service.store))

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Return counts and times of requests in Prometheus' text format."""
        return Response(measures.text(len(live.now.service.store)), media_type=measures.media_type)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(LamplitError)
    async def explained(_: Request, error: LamplitError) -> JSONResponse:
        return _problem(422, str(error))

    @app.exception_handler(RequestValidationError)
    async def refused(_: Request, error: RequestValidationError) -> JSONResponse:
        return _problem(422, "; ".join(_sentence(each) for each in error.errors()[:3]))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return _problem(error.status_code, _MESSAGES.get(error.detail, str(error.detail)), error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        logger.debug("a client went away before its request had come")
        return Response(status_code=400)

    @app.exception_handler(Exception)  # Starlette raises it again, for the log
    async def unexpected(_: Request, __: Exception) -> JSONResponse:
        return _problem(500, "an unexpected error; the terminal of lamplit app shows what went wrong")


def _answer(message: BaseModel) -> Response:
    """Write an answer; FastAPI would check it once more, and in the thread that all requests share."""
    return Response(message.model_dump_json(), media_type="application/json")


def _problem(status: int, sentence: str, headers: Any = None) -> JSONResponse:
    return JSONResponse({"error": sentence}, status, headers)


def _sentence(error: dict[str, Any]) -> str:
    parts = [str(part) for part in error["loc"]]
    where = ".".join(parts[1:] if len(parts) > 1 and parts[0] == "query" else parts)  # FastAPI names where it looked
    message = str(error["msg"]).removeprefix("Value error, ")
    if message.startswith("Expected UploadFile"):  # FastAPI's own words name classes of Python
        message = "expected a file with a name, as curl -F 'image=@cat.jpg' sends it"
    return f"{where}: {message}" if where else message


@contextmanager
def _showing() -> Iterator[None]:
    """Answer with the reason if an image of the store cannot be read any more."""
    try:
        yield
    except ImageError as error:
        raise HTTPException(404, f"this image cannot be shown: {error}") from error


def _row_of(service: Service, name: str) -> int:
    row = service.row_of(name)
    if row is None:
        raise HTTPException(404, "the store has no image of this id")
    return row


def _about(service: Service, name: str | None, text_column: str | None) -> m.About:
    classes, texts = service.classes, service.sampled["texts"].to_pylist()
    hidden = {"model", "store", "file", "files", "some pairs"}  # paths of this machine among them
    is_name = name is not None and names_model(name)
    has_config = name is not None and (Path(name) / CONFIG).is_file()
    of_model = describe(service.model if is_name else name) if name and (is_name or has_config) else {}
    details = {"model": of_model, "store": describe(service.store.path)}
    return m.About(
        model=service.model.name if name is None or is_name else Path(name).resolve().name,
        store=Path(service.store.path).name,
        text_column=text_column,
        example=typical_text([found[0] for found in texts if found and found[0]]),
        images=len(service.store),
        reads_images=service.model.image_tower is not None,
        locates=service.locates,
        columns=[
            m.Column(name=name, kind=kind, values=values, colours=colours)
            for name, kind, values, colours in service.columns
        ],
        classes=[] if classes is None else classes.names,
        templates=list(DEFAULT_TEMPLATES) if classes is None else classes.templates,
        calibrated=classes is not None and classes.thresholds is not None,
        details={what: {k: v for k, v in of.items() if k not in hidden} for what, of in details.items()},
    )
