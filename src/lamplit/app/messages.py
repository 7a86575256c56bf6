"""Requests and answers of the API, with their bounds; the OpenAPI page is made of these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from lamplit.data.json_text import parse_json

MAX_BODY = 32 * 2**20  # bytes of one request; counted while it comes in
MAX_IMAGES = 16  # in one request
MAX_PROMPTS = 5000  # classes times templates

Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=1000)]
Id = Annotated[str, StringConstraints(max_length=4096)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


Place = Annotated[float, Field(allow_inf_nan=False)]
MapTag = Annotated[str, StringConstraints(max_length=100)]


class Area(_Request):
    """A polygon on the map."""

    tag: MapTag = Field(description="Of the map that it was drawn on.")
    corners: list[tuple[Place, Place]] = Field(min_length=3, max_length=100, description="Its corners, in turn.")


class MapRows(_Request):
    """Points of the map."""

    tag: MapTag = Field(description="Of the map.")
    rows: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(
        max_length=200, description="Their places in the arrays of the map."
    )


class _Page(_Request):
    """A part of the hits."""

    k: int = Field(20, ge=1, le=200, description="Number of images.")
    offset: int = Field(0, ge=0, le=100_000, description="Number of better images to leave out, for pages.")
    where: Annotated[str, StringConstraints(strip_whitespace=True, max_length=500)] | None = Field(
        None, description="A condition on the metadata, such as: category = 'animals' and year > 2019. No functions."
    )

    area: Area | None = Field(None, description="Only images inside this area of the map; in a form, as JSON.")

    @field_validator("area", mode="before")
    @classmethod
    def _of_form(cls, area: object) -> object:
        return parse_json(area) if isinstance(area, str) else area

    @field_validator("where")
    @classmethod
    def _not_blank(cls, where: str | None) -> str | None:
        return where or None


class SearchWords(_Page):
    """Search by words, or by an image of the store; one of them."""

    query: Words | None = Field(
        None, description='Words in the language of the model, or a sum such as "beach" - "people".'
    )
    like: Id | None = Field(None, description="The id of an image of the store, which is left out of the answer.")

    @model_validator(mode="after")
    def _one(self) -> SearchWords:
        if (self.query is None) == (self.like is None):
            raise ValueError("give `query` or `like`, one of them")
        return self


class SearchImage(_Page):
    """Search by an image that is sent."""

    image: UploadFile


class _Classes(_Request):
    classes: list[Words] = Field(min_length=1, max_length=1000, description="Names of the classes.")
    templates: list[Words] | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="Prompts with {} for the name; by default lamplit's own, or those of the page's class list.",
    )
    top: int = Field(10, ge=1, le=1000, description="Number of classes to return for each image.")

    @model_validator(mode="after")
    def _not_too_many(self) -> _Classes:
        if len(self.classes) * len(self.templates or ()) > MAX_PROMPTS:
            raise ValueError(f"classes times templates may be {MAX_PROMPTS}")
        return self


class ClassifyIds(_Classes):
    """Classify images of the store."""

    ids: list[Id] = Field(min_length=1, max_length=MAX_IMAGES)


class ClassifyImages(_Classes):
    """Classify images that are sent."""

    images: list[UploadFile] = Field(min_length=1, max_length=MAX_IMAGES)


class EmbedTexts(_Request):
    """Texts to embed."""

    texts: list[Words] = Field(min_length=1, max_length=256)


class EmbedImages(_Request):
    """Images to embed, which are sent."""

    images: list[UploadFile] = Field(min_length=1, max_length=MAX_IMAGES)


class Problem(BaseModel):
    """An error, in a sentence."""

    error: str


class Item(BaseModel):
    """An image of the store; its folder on this machine is left out."""

    id: str
    name: str
    texts: list[str]
    metadata: dict[str, Any]


class FoundItem(Item):
    """An image that was found."""

    score: float = Field(description="Cosine of query and image.")


class SearchAnswer(BaseModel):
    """Images, best first."""

    hits: list[FoundItem]
    min_score: float | None = Field(
        None,
        description="Cosine that the best image reaches for 5 % of the words that nothing in the store shows; images "
        "below it are probably no answer. None if the search was not by words, or it was not measured.",
    )


class ClassShare(BaseModel):
    """One class of one image."""

    name: str
    probability: float = Field(description="Among all classes asked for.")
    cosine: float


class Classified(BaseModel):
    """The classes of one image, best first; or why it could not be used."""

    name: str
    classes: list[ClassShare] = []
    none_of_these: bool | None = Field(
        default=None, description="Whether no class is near enough; null if these classes were not calibrated."
    )
    error: str | None = None


class ClassifyAnswer(BaseModel):
    """The images, in the order of the request."""

    images: list[Classified]


class EmbedAnswer(BaseModel):
    """Unit vectors in the joint space, in the order of the request."""

    width: int
    vectors: list[list[float]]


class Column(BaseModel):
    """A column of metadata, as a sample of the store shows it."""

    name: str
    kind: str = Field(description="text, number or other.")
    colours: bool = Field(description="Whether its values tell the images of the map apart.")
    values: list[str | int | float | bool] = Field(
        description="All values in the sample; none if there are too many to list."
    )


class About(BaseModel):
    """The open model and store."""

    model: str
    store: str
    text_column: str | None = Field(description="Column with the texts that the model was tuned on, if known.")
    example: str | None = Field(description="A text of the store.")
    images: int
    reads_images: bool = Field(description="Whether the model has its image tower, to read images that are sent.")
    locates: bool = Field(description="Whether the model can show where in an image it reads words.")
    columns: list[Column]
    classes: list[str]
    templates: list[str]
    calibrated: bool
    details: dict[str, dict[str, Any]]


class Health(BaseModel):
    """The server answers."""

    status: Literal["ok"] = "ok"
    images: int = Field(description="Images of the store as it is open now.")


class MapAnswer(BaseModel):
    """The store in two dimensions; both axes run from -1 to 1."""

    tag: str = Field(description="Of this map; its points are at /map/points.")
    images: int
    explained: float | None = Field(
        description="Part of the variance of the vectors that the two axes hold; None for a map of neighbours."
    )
    advice: str | None = Field(description="How to get a map of neighbours, if this is none.")


class MapEntry(BaseModel):
    """A value that points have."""

    name: str
    images: int


class MapLegend(BaseModel):
    """What the numbers of /map/colours mean."""

    kind: Literal["values", "scale"]
    entries: list[MapEntry] = Field(
        description="Values by their number; of a scale, what has no value, numbered after its last step."
    )
    steps: int = Field(description="Of the scale.")
    low: float | None
    high: float | None


class MapItem(BaseModel):
    """A point of the map."""

    row: int
    id: str
    text: str


class MapRegion(BaseModel):
    """Where the points of the map lie dense."""

    x: float
    y: float
    level: int = Field(description="0 for the whole map; each further level is for a map seen at half the width.")
    images: int
    name: str = Field(description="The words of its captions that fit it best; empty if there are none.")
    typical: list[MapItem] = Field(description="Its most typical images.")


class MapRegions(BaseModel):
    """The dense regions of the map, the largest of each level first."""

    tag: str
    regions: list[MapRegion]


class MapItems(BaseModel):
    """Points of the map, in the order of the request."""

    items: list[MapItem]


class MapCount(BaseModel):
    """The images in an area of the map."""

    images: int


class RunAnswer(BaseModel):
    """The tuning run behind the model."""

    settings: dict[str, Any]
    report: dict[str, Any]
    steps: list[dict[str, float]] = Field(description="step, loss, lr and logit_scale, at evenly spaced steps.")
    held_out: list[dict[str, float]] = Field(description="step and recall at every evaluation.")
