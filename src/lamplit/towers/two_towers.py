"""Two towers that encode images and texts into one joint space; nothing here knows of files or stores."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lamplit.data.decoding.preprocessing import Preprocessing
from lamplit.data.inputs import ImageInput, decode_input, decode_nth, list_images, list_texts
from lamplit.errors import TowerError, UsageError
from lamplit.progress import progress_bar
from lamplit.towers.identity import TowerIdentity
from lamplit.towers.lock import Locked, evaluating
from lamplit.towers.texts.text_tower import TextTower
from lamplit.unit_vectors import as_array

# Images in one pass on a CPU. The C library gives large tensors back to the system and zeroes new pages for the next:
# an EfficientNet-Lite0 takes 130 ms for each of 64 images in one pass, and 37 ms for each of 8.
_CPU_IMAGES = 8


_HINTS = {  # what other libraries call it
    "encode": 'type model.encode_texts("a dog") or model.encode_images("dog.png")',
    "encode_image": 'type model.encode_images("dog.png")',
    "encode_text": 'type model.encode_texts("a dog")',
    "from_pretrained": 'type lamplit.load("lit:NAME"), or a folder',
    "logit_scale": "model.logit_multiplier is open_clip's logit_scale.exp()",
    "similarity": "vectors have length 1, so cosines are model.encode_images(images) @ model.encode_texts(texts).T",
    "tokenize": "model.encode_texts takes the texts themselves",
}


class LiTOutput(NamedTuple):
    """What `model(images, texts)` returns: unit vectors and the multiplier of their cosines, with gradients.

    Attributes:
        zimg: unit vectors of N images, (N, D) float32; of one image that is not in a list, (D,).
        ztxt: unit vectors of M texts, (M, D) float32; of one text that is not in a list, (D,).
        logit_multiplier: what cosines are multiplied by, a scalar.
    """

    zimg: Tensor
    ztxt: Tensor
    logit_multiplier: Tensor


class _Hinting(type):
    def __getattr__(cls, name: str) -> Any:
        raise _no_attribute(cls.__name__, name)


class TwoTowers(nn.Module, metaclass=_Hinting):
    """What encodes: a text tower, an image tower, what is behind it, and the scalars. `LiT` says what each is."""

    def __init__(
        self,
        text_tower: TextTower | None,
        identity: TowerIdentity,
        image_tower: nn.Module | None = None,
        *,
        center: Tensor | None = None,
        image_head: nn.Linear | None = None,
        logit_multiplier: float = 10.0,
        logit_bias: float | None = None,
        trainable_image_tower: bool = False,
    ) -> None:
        super().__init__()
        self.name = "unnamed"  # display name in results; set by load()
        self.identity = identity
        self.text_tower = text_tower
        if image_tower is not None and not isinstance(image_tower, Locked) and not trainable_image_tower:
            image_tower = Locked(image_tower)
        self.image_tower: nn.Module | None = image_tower
        self.image_head = image_head
        self.log_scale = nn.Parameter(torch.tensor(math.log(logit_multiplier)))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(logit_bias))
        self.register_buffer("center", center, persistent=False)
        self.center: Tensor | None

    def __repr__(self) -> str:
        towers = f"{self.text_tower.spec if self.text_tower else 'no text tower'} reads {self.identity.spec}"
        missing = "" if self.image_tower is not None else " (not opened)"
        return f"<{type(self).__name__} {self.name}: {towers}{missing}, {self.width} wide, on {self.device}>"

    def __getattr__(self, name: str) -> Any:
        if name in _HINTS:
            raise _no_attribute(type(self).__name__, name)
        return super().__getattr__(name)

    def attach_trainable_image_tower(self, image_tower: nn.Module) -> None:
        """Use an unlocked image tower, which trains with the text tower. A saved model is loaded locked again."""
        self.image_tower = image_tower.requires_grad_(True)

    @property
    def unlocked_image_tower(self) -> nn.Module | None:
        """The image tower itself, without its lock."""
        return self.image_tower.tower if isinstance(self.image_tower, Locked) else self.image_tower

    @property
    def logit_multiplier(self) -> Tensor:
        """The multiplier of cosines, a scalar: `logits = model.logit_multiplier * zimg @ ztxt.T`.

        If `model.logit_bias` is not None (the sigmoid loss), it is added. open_clip's `logit_scale` is the logarithm.
        """
        return self.log_scale.exp()

    @property
    def device(self) -> torch.device:
        """Where the model is, and where its outputs are."""
        return self.log_scale.device

    @property
    def width(self) -> int:
        """Width of the joint space."""
        return self.identity.width if self.image_head is None else self.image_head.out_features

    @property
    def space(self) -> str:
        """Fingerprint of the joint space: that of the image tower, and of the center and the image head if any."""
        parts = [] if self.center is None else [self.center]
        parts += [] if self.image_head is None else list(self.image_head.parameters())
        return self.identity.space([as_array(part) for part in parts])

    def forward(self, images: ImageInput | Iterable[ImageInput], texts: str | Iterable[str]) -> LiTOutput:
        """Encode images and texts with gradients, all in one pass, in the mode (train or eval) that the model is in.

        Args:
            images: one or several, as `encode_images` takes them. A locked tower has no gradients; an image head has.
            texts: one or several, as `encode_texts` takes them.

        Raises:
            TowerError: the model is open without one of its towers.
            ImageError: an image cannot be used.
            UsageError: something is no image or no text.

        Example:
            >>> zimg, ztxt, logit_multiplier = model(["owl.png", "hat.png"], ["an owl", "a hat"])
            >>> logits = logit_multiplier * zimg @ ztxt.T
        """
        resize = self.image_preprocessing().resize
        given, is_one_image = list_images(images)
        written, is_one_text = list_texts(texts)
        if not given or not written:
            raise UsageError("model(images, texts) needs at least one image and one text")
        pixels = torch.stack([resize(decode_nth(given, row)) for row in range(len(given))])
        zimg = self._encode_pixels(pixels)
        ztxt = self._encode_tokens(self._text_tower().tokenize(written))
        return LiTOutput(zimg[0] if is_one_image else zimg, ztxt[0] if is_one_text else ztxt, self.logit_multiplier)

    def project(self, zimg: Tensor) -> Tensor:
        """Bring unit vectors of the image tower into the joint space: (N, D) in, (N, E) unit vectors out."""
        if self.center is not None:
            zimg = F.normalize(zimg - self.center, dim=-1)
        if self.image_head is None:
            return zimg
        return F.normalize(self.image_head(zimg.to(self.image_head.weight.dtype)).float(), dim=-1)

    @torch.no_grad()
    def project_all(self, zimg: Tensor) -> Tensor:
        """As `project`, of vectors that may be on another device, and without gradients."""
        return self.project(zimg.to(self.device))

    def project_rows(self, zimg: NDArray[np.float32]) -> NDArray[np.float32]:
        """As `project_all`, from a float32 array to a float32 array, which search keeps in memory."""
        return as_array(self.project_all(torch.from_numpy(zimg)))

    def preprocess(self, image: ImageInput) -> Tensor:
        """Scale, crop and normalise one image as the image tower takes it: (3, height, width) float32 on the CPU.

        No method of lamplit takes the result: `encode_images` does this itself. It is for looking at an image as the
        tower sees it, and for other libraries.

        Raises:
            TowerError: the model reads imported vectors, whose preprocessing is unknown.
            ImageError: the image cannot be used.
            UsageError: it is no image.
        """
        preprocessing = self.identity.preprocessing
        if preprocessing is None:
            raise without_image_tower(self.identity)
        return preprocessing.normalize(preprocessing.resize(decode_input(image))[None])[0]

    @overload
    def encode_images(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int = ...,
        progress: bool = ...,
        as_numpy: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def encode_images(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int = ...,
        progress: bool = ...,
        as_numpy: Literal[True],
    ) -> NDArray[np.float32]: ...
    @torch.no_grad()
    def encode_images(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int = 64,
        progress: bool = False,
        as_numpy: bool = False,
    ) -> Tensor | NDArray[np.float32]:
        """Embed images as float32 unit vectors: one gives (D,), N give (N, D).

        Args:
            images: a path, encoded bytes, a PIL image, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W); or a list
                of these; or a batch of shape (N, H, W, 3) as an array, (N, 3, H, W) as a tensor.
            batch_size: images that are decoded and encoded together.
            progress: show a bar on stderr.
            as_numpy: return an array instead of a tensor on the model's device.

        Raises:
            TowerError: the model is open without its image tower.
            ImageError: an image cannot be used.
            UsageError: something is no image.

        Example:
            >>> model.encode_images("owl.png").shape
            torch.Size([1280])
        """
        resize = self.image_preprocessing().resize
        given, is_one = list_images(images)
        parts = [torch.empty(0, self.width, device=self.device)]
        with progress_bar("images", len(given), shown=progress) as advance:
            for start in _starts(len(given), batch_size):
                rows = range(start, min(start + batch_size, len(given)))
                pixels = torch.stack([resize(decode_nth(given, row)) for row in rows])
                parts.append(self.encode_pixels(pixels))
                advance(len(pixels), "")
        zimg = torch.cat(parts)
        zimg = zimg[0] if is_one else zimg
        return as_array(zimg) if as_numpy else zimg

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Embed images that are scaled and cropped already: (B, 3, height, width) uint8 in, (B, D) unit vectors out.

        Raises:
            TowerError: the model is open without its image tower.
            UsageError: the pixels have another type or shape; `encode_images` takes files and whole images.
        """
        height, width = self.image_preprocessing().image_size
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, height, width):
            raise UsageError(
                f"pixels are a {str(pixels.dtype).removeprefix('torch.')} tensor of shape {tuple(pixels.shape)}; "
                f"expected uint8, (B, 3, {height}, {width}), before they are normalised. encode_images takes files "
                "and whole images"
            )
        size = _CPU_IMAGES if self.device.type == "cpu" else len(pixels)
        with evaluating(self):
            return torch.cat([self._encode_pixels(part) for part in torch.split(pixels, size)])

    @overload
    def encode_texts(
        self,
        texts: str | Iterable[str],
        *,
        batch_size: int = ...,
        progress: bool = ...,
        as_numpy: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def encode_texts(
        self,
        texts: str | Iterable[str],
        *,
        batch_size: int = ...,
        progress: bool = ...,
        as_numpy: Literal[True],
    ) -> NDArray[np.float32]: ...
    @torch.no_grad()
    def encode_texts(
        self, texts: str | Iterable[str], *, batch_size: int = 512, progress: bool = False, as_numpy: bool = False
    ) -> Tensor | NDArray[np.float32]:
        """Embed texts as float32 unit vectors: a str gives (D,), N of them give (N, D).

        The log says how many texts are longer than the tower reads, if any are.

        Args:
            texts: a str, or a list of them.
            batch_size: texts that are encoded together.
            progress: show a bar on stderr.
            as_numpy: return an array instead of a tensor on the model's device.

        Raises:
            TowerError: the model is open without its text tower.
            UsageError: something is no text.

        Example:
            >>> model.encode_texts(["an owl", "a hat"]).shape
            torch.Size([2, 1280])
        """
        text_tower = self._text_tower()
        given, is_one = list_texts(texts)
        tokens = text_tower.tokenize(given)
        text_tower.count_truncated(given, tokens)
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        ztxt = torch.empty(len(tokens), self.width, device=self.device)
        with evaluating(self), progress_bar("texts", len(given), shown=progress) as advance:
            for start in _starts(len(order), batch_size):
                chosen = order[start : start + batch_size]
                ztxt[chosen] = self._encode_tokens([tokens[i] for i in chosen])
                advance(len(chosen), "")
        ztxt = ztxt[0] if is_one else ztxt
        return as_array(ztxt) if as_numpy else ztxt

    def image_preprocessing(self) -> Preprocessing:
        """Return how the image tower takes its images.

        Raises:
            TowerError: the model is open without its image tower.
        """
        if self.image_tower is None or self.identity.preprocessing is None:
            raise without_image_tower(self.identity)
        return self.identity.preprocessing

    def _text_tower(self) -> TextTower:
        if self.text_tower is None:
            raise TowerError("this model is open without its text tower; load it with towers='both'")
        return self.text_tower

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        if self.image_tower is None:
            raise without_image_tower(self.identity)
        # Half precision or autocast may run the towers; vectors are float32, and of length 1 in float32.
        return self.project(F.normalize(self.image_tower(pixels.to(self.device)).float(), dim=-1))

    def _encode_tokens(self, tokens: list[list[int]]) -> Tensor:
        return F.normalize(self._text_tower()(tokens).float(), dim=-1)


def _no_attribute(owner: str, name: str) -> AttributeError:
    return AttributeError(f"{owner} has no {name}" + (f"; {_HINTS[name]}" if name in _HINTS else ""), name=name)


def without_image_tower(identity: TowerIdentity) -> TowerError:
    """Say why images cannot be encoded, and what to do."""
    if identity.imported:
        return TowerError(
            f"this model was tuned on imported vectors, made by {identity.spec}, and has no image tower to open "
            "images with. If you have that tower, give it in Python: "
            "lamplit.load(FOLDER, image_tower=lamplit.open_image_tower(...))"
        )
    return TowerError(f"this model is open without its image tower ({identity.spec}); load it with towers='both'")


def _starts(count: int, batch_size: int) -> range:
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; expected at least 1")
    return range(0, count, batch_size)
