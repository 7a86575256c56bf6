"""Class names of the image tower: what a text tower knows before it is tuned, and forgets if nothing holds it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamplit.towers.images.backbone import ClassHead
from lamplit.towers.images.image_tower import ImageTower
from lamplit.towers.texts.text_tower import TextTower
from lamplit.tuning.settings import TuneSettings

SHARE = 1 / 4  # as many names a step as a quarter of its pairs


class KnownNames(nn.Module):
    """Class names of an image tower's classifier, and the vectors that the start gave them.

    A head that starts in closed form reads them. Captions seldom have these words, and a tower that is tuned on
    captions alone forgets them: a few in each step keep them in their places.

    Args:
        text_tower: whose tokenizer reads the names.
        class_head: the image tower's classifier.

    Attributes:
        tokens: token ids of C texts, all that the classifier has for its classes.
        vectors: (C, D) unit vectors, 0 until the start is fitted; a buffer, so that checkpoints hold them.
    """

    vectors: Tensor

    def __init__(self, text_tower: TextTower, class_head: ClassHead) -> None:
        super().__init__()
        self.tokens = text_tower.tokenize(class_head.distinct_texts())
        size = len(self.tokens), class_head.vectors.shape[1]
        self.register_buffer("vectors", torch.zeros(size, device=text_tower.device))

    @staticmethod
    def of_run(settings: TuneSettings, text_tower: TextTower, image_tower: ImageTower | None) -> KnownNames | None:
        """Return the names that a run holds; None unless it starts in closed form, and the text tower alone trains."""
        if image_tower is None or image_tower.class_head is None or settings.image_trains or settings.image_head:
            return None
        if not settings.text_trains or not settings.starts_in_closed_form or text_tower.trained_scale is not None:
            return None
        return KnownNames(text_tower, image_tower.class_head)

    def draw(self, pairs: int, seed: int) -> Tensor:
        """Return which names a step of so many pairs holds in place, (n,); the same for one seed."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(self.tokens), generator=generator)[: max(1, round(SHARE * pairs))]

    def loss(self, ztxt: Tensor, names: Tensor, scale: Tensor, total: int) -> Tensor:
        """Return how far names are from their places, in logits: the mean of `scale * (1 - cosine)`.

        Args:
            ztxt: (n, D) unit vectors as the text tower gives them now.
            names: (n,) which names these are.
            scale: the logit multiplier, which is not tuned by this.
            total: how many names all processes have in this step.
        """
        cosines = (ztxt * self.vectors[names.to(ztxt.device)]).sum(-1)
        return scale.detach() * (1 - cosines).sum() / total
