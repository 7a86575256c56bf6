"""How the head of a run is fitted in closed form: before the first step, and again where texts are left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from lamplit.model import LiT
from lamplit.store.arrays.caption_arrays import CaptionTexts
from lamplit.store.arrays.row_vectors import RowVectors
from lamplit.towers.images.backbone import ClassHead
from lamplit.towers.lock import weights_digest
from lamplit.towers.texts.text_tower import TextTower
from lamplit.tuning.head.closed_form import ClosedForm, sample_pairs
from lamplit.tuning.head.kept_start import fit_or_read, start_key
from lamplit.tuning.head.known_names import KnownNames
from lamplit.tuning.head.left_out import LeftOut
from lamplit.tuning.head.scale_fit import fit_scale_apart
from lamplit.tuning.ranks import Ranks
from lamplit.tuning.split import Links
from lamplit.tuning.tokens import tokenizer_digest

KEPT_PAIRS = 4_000  # of fewer, a fit takes seconds


@dataclass(frozen=True)
class HeadFit:
    """Fits a model's head to what its encoder says of the pairs.

    Attributes:
        model: has a text tower; its head is fitted in place.
        train: the pairs that are tuned on.
        texts: the texts of these pairs.
        zimg: (N, D) unit vectors of all rows of the store.
        class_head: the image tower's classifier, or None.
        names: class names that the steps hold to what the start says of them, or None.
        left_out: how the steps read each text as if it was left out of the fit, or None if the head trains.
    """

    model: LiT
    train: Links
    texts: CaptionTexts
    zimg: RowVectors
    class_head: ClassHead | None
    names: KnownNames | None = None
    left_out: LeftOut | None = None

    @property
    def _tower(self) -> TextTower:
        assert self.model.text_tower is not None
        return self.model.text_tower

    def start(
        self,
        held_out: Links,
        measure: Callable[[], dict[str, float]],
        *,
        mode: str,
        goes_on: bool,
        progress: bool = False,
    ) -> dict[str, float]:
        """Fit the head and the logit scale, and measure the model; read both where a run has begun like this before.

        Args:
            held_out: the pairs that are measured.
            measure: gives metrics of the fitted model.
            mode: of the run: an image tower that trains is measured by what it says itself.
            goes_on: steps will follow.
            progress: show bars on stderr.

        Returns:
            The metrics.
        """
        model = self.model
        scale = [model.log_scale, *([] if model.logit_bias is None else [model.logit_bias])]
        changed = [*self._tower.head.parameters(), *scale, *([] if self.names is None else [self.names.vectors])]
        changed += [] if self.left_out is None else [self.left_out.own, self.left_out.weights]

        def fit() -> dict[str, float]:
            self._fit(is_start=True, goes_on=goes_on, progress=progress)
            return measure()

        keeps = len(self.train) >= KEPT_PAIRS
        return fit_or_read(self.texts.captions.store, self._key(held_out, mode), changed, fit, keeps=keeps)

    def again(self, ranks: Ranks, *, goes_on: bool) -> None:
        """Fit a head that does not train to what the encoder says now; all processes get what the first one fitted."""
        assert self.left_out is not None
        self.left_out.corrections = None  # the fit needs as much memory
        ranks.first(partial(self._fit, is_start=False, goes_on=goes_on))
        ranks.copy(self.left_out.buffers())
        if goes_on:
            self.recover()

    def recover(self) -> None:
        """Compute the corrections that steps need, if texts are left out and the fit was not made by this process."""
        if self.left_out is not None and self.left_out.corrections is None:
            self.left_out.recover()

    def _fit(self, *, is_start: bool, goes_on: bool, progress: bool = False) -> None:
        pairs, used, text_index = sample_pairs(self.train.text_index)
        rows = self.train.image_index[pairs]
        zimg = self.zimg[rows]
        texts = self.texts.take(used.numpy())
        fit = ClosedForm(self._tower, texts, self.class_head, keeps_names=is_start, progress=progress)
        if is_start:
            image_ids = torch.from_numpy(self.texts.captions.images)[rows]
            fit_scale_apart(self.model, fit, zimg, image_ids, text_index)
        anchors = fit.fit(zimg, text_index, leaves_out=self.left_out is not None and goes_on)
        if self.names is not None:
            self.names.vectors.copy_(fit.name_vectors())
        if self.left_out is not None and anchors is not None:
            self.left_out.take(used, anchors)

    def _key(self, held_out: Links, mode: str) -> str:
        """Digest all that the start depends on."""
        model, tower, class_head = self.model, self._tower, self.class_head
        reading = [tokenizer_digest(tower), tower.context_length, tower.pooling]
        names = [] if class_head is None else class_head.texts
        words = json.dumps([*reading, names, mode, self.left_out is not None])
        numbers = [links for part in (self.train, held_out) for links in (part.image_index, part.text_index)]
        numbers += [] if self.zimg.center is None else [self.zimg.center]
        numbers += [] if class_head is None else [class_head.vectors]
        numbers += [] if tower.carried is None else vars(tower.carried).values()
        numbers += [model.log_scale, *([] if model.logit_bias is None else [model.logit_bias])]
        return start_key(weights_digest(tower), words, model.device.type, self.texts.captions.column, *numbers)
