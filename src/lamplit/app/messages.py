"""Requests and answers of the API, with their bounds; the OpenAPI page is made of these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

MAX_BODY = 32 * 2**20  # bytes of one request; counted while it comes in
MAX_IMAGES = 16  # in one request
MAX_PROMPTS = 5000  # classes times templates

Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=1000)]
Id = Annotated[str, StringConstraints(max_length=4096)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Page(_Request):
    """A part of the hits."""

    k: int = Field(20, ge=1, le=200, description="Number of images.")
    offset: int = Field(0, ge=0, le=100_000, description="Number of better images to leave out, for pages.")
    where: Annotated[str, StringConstraints(strip_whitespace=True, max_length=500)] | None = Field(
        None, description="A condition on the metadata, such as: category = 'animals' and year > 2019. No functions."
    )

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


class Point(BaseModel):
    """An image on the map; both axes run from -1 to 1."""

    id: str
    x: float
    y: float
    text: str
    value: str | int | float | bool | None = Field(description="Colour of the point: a cell of a column, or a cosine.")


class MapAnswer(BaseModel):
    """A sample of the store in two dimensions."""

    images: int = Field(description="In the whole store.")
    explained: float = Field(description="Part of the variance of the vectors that the two axes hold.")
    points: list[Point]


class RunAnswer(BaseModel):
    """The tuning run behind the model."""

    settings: dict[str, Any]
    report: dict[str, Any]
    steps: list[dict[str, float]] = Field(description="step, loss, lr and logit_scale, at evenly spaced steps.")
    held_out: list[dict[str, float]] = Field(description="step and recall at every evaluation.")
