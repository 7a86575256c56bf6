from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from lamplit.metrics.ranking import retrieval_metrics
from lamplit.towers.images.backbone import ClassHead
from lamplit.towers.texts.kernel_head import KernelHead, KnownTexts
from lamplit.towers.texts.scratch import Encoded
from lamplit.towers.texts.text_tower import TextTower
from lamplit.towers.tokens.tokenizers import PretrainedTokenizer
from lamplit.tuning.head import closed_form
from lamplit.tuning.head.closed_form import ClosedForm, count_anchors, fit_head

WORDS, FEATURES, WIDTH = 60, 24, 40


class WordVectors(nn.Module):
    """An encoder whose features of a text are the mean of its words' vectors; dropout shows if it is left on."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, FEATURES)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Encoded:
        return Encoded(self.dropout(self.table(input_ids)))


class World:
    """Texts of two words, and images whose vectors the texts' features determine linearly."""

    def __init__(self, width: int = WIDTH, anchors: int = 0) -> None:
        torch.manual_seed(0)
        tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0")
        self.tower = TextTower(
            "made:up", WordVectors(), PretrainedTokenizer(fast), pooling="mean", context_length=8,
            feature_width=FEATURES, width=width, config={},
        )  # fmt: skip
        if anchors:
            self.tower.head = KernelHead(FEATURES, width, anchors)
        self.texts = [f"w{i} w{j}" for i in range(WORDS) for j in range(i)]
        self.texts = [self.texts[i] for i in torch.randperm(len(self.texts)).tolist()][:400]
        with torch.no_grad():
            self.tower.eval()
            features = self.tower.features(self.tower.tokenize(self.texts))
        self.directions = features @ torch.randn(FEATURES, width)
        self.common = 8 * torch.randn(width)
        self.zimg = F.normalize(self.directions + self.common, dim=-1)
        self.tower.train()

    def recall(self, rows: slice) -> float:
        self.tower.eval()
        with torch.no_grad():
            ztxt = F.normalize(self.tower(self.tower.tokenize(self.texts[rows])), dim=-1)
        places = torch.arange(len(ztxt))
        return retrieval_metrics(self.zimg[rows], ztxt, places, places)["image_to_text/recall@1"]


TRAIN, HELD_OUT = slice(0, 300), slice(300, 400)


@pytest.mark.parametrize("anchors", [0, 300, 150])
def test_head_reads_texts_it_was_not_fitted_on(anchors: int) -> None:
    world = World(anchors=anchors)
    assert world.recall(HELD_OUT) < 0.1
    fit_head(world.tower, world.zimg[TRAIN], world.texts[TRAIN], None)
    assert world.recall(HELD_OUT) > 0.95


def test_kernel_head_is_ridge_regression() -> None:
    """Against the textbook: one row a pair, f(x) = k(x, X) (K + ridge / weight)^-1 y, in double precision."""
    world, rows = World(anchors=90), slice(0, 80)
    texts = world.texts[rows] + world.texts[:20]  # twenty texts have two images each
    zimg = torch.cat([world.zimg[rows], world.zimg[100:120]])
    classes = ClassHead([[f"{text} again"] for text in world.texts[200:210]], world.directions[200:210])
    assert count_anchors(texts, classes) == 90
    fit_head(world.tower, zimg, texts, classes)
    world.tower.eval()
    names = [name for [name] in classes.texts]
    with torch.no_grad():
        known, asked = (
            world.tower.features(world.tower.tokenize(each)).double() for each in (texts + names, world.texts[300:310])
        )
        known, asked = (F.normalize(features - known.mean(0), dim=-1) for features in (known, asked))
        found = F.normalize(world.tower(world.tower.tokenize(world.texts[300:310])), dim=-1)
    common = zimg.double().mean(0)
    centred = zimg.double() - common
    covariance = centred.T @ centred / len(centred)
    covariance += closed_form.SHRINKAGE * covariance.diagonal().mean() * torch.eye(WIDTH)
    vectors = classes.vectors.double() - classes.vectors.double().mean(0)
    targets = F.normalize(torch.cat([centred @ covariance.inverse(), vectors]), dim=-1)
    weights = torch.tensor([closed_form.PAIR_WEIGHT] * 100 + [1.0] * 10).double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(closed_form.SHARPNESS * (a @ b.T - 1))

    ridge = torch.diag(closed_form.KERNEL_RIDGE / weights)
    expected = kernel(asked, known) @ torch.linalg.solve(kernel(known, known) + ridge, targets)
    direction = F.normalize(common, dim=0)
    expected = F.normalize(expected - torch.outer(expected @ direction, direction), dim=-1)
    assert float((found - expected).abs().max()) < 1e-4


def test_anchors_are_distinct_texts_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = ClassHead([["an owl", "a bird"], ["a hat"]], torch.eye(2))
    assert count_anchors(["an owl", "an owl", "a cat"], None) == 2
    assert count_anchors(["an owl", "an owl", "a cat"], classes) == 4
    monkeypatch.setattr(closed_form, "MAX_ANCHORS", 3)
    assert count_anchors(["an owl", "an owl", "a cat"], classes) == 3


@pytest.mark.parametrize("anchors", [0, 400])
def test_names_have_the_vectors_that_the_tower_gives_them(anchors: int) -> None:
    world = World(anchors=anchors) if anchors else World()
    texts = [[text, f"{text} {text}"] for text in world.texts[200:220]]
    texts[3].append(texts[5][0])  # a word for two classes
    fit = ClosedForm(world.tower, world.texts[TRAIN], ClassHead(texts, world.directions[200:220]))
    fit.fit(world.zimg[TRAIN], torch.arange(len(world.texts[TRAIN])))
    names = list(dict.fromkeys(text for each in texts for text in each))
    with torch.no_grad():
        expected = F.normalize(world.tower.eval()(world.tower.tokenize(names)), dim=-1)
    assert torch.allclose(fit.name_vectors(), expected, atol=1e-5)


def test_class_head_teaches_what_no_image_shows() -> None:
    world = World()
    few = slice(0, 2)
    fit_head(world.tower, world.zimg[few], world.texts[few], None)
    alone = world.recall(HELD_OUT)
    # A classifier's vectors lack what all images share.
    classes = ClassHead([[text, f"{text} {text}"] for text in world.texts[TRAIN]], world.directions[TRAIN])
    fit_head(world.tower, world.zimg[few], world.texts[few], classes)
    assert alone < 0.2
    assert world.recall(HELD_OUT) > 0.8


def test_what_another_head_knew_is_known_too() -> None:
    base, few, rest = World(anchors=300), slice(0, 4), slice(20, 300)
    fit_head(base.tower, base.zimg[rest], base.texts[rest], None)
    assert isinstance(base.tower.head, KernelHead)
    known = base.tower.head.known()
    assert (len(known), known.directions.shape, known.vectors.shape) == (280, (280, FEATURES), (280, WIDTH))
    base.tower.eval()
    with torch.no_grad():
        features = base.tower.features(base.tower.tokenize(base.texts[rest]))
        expected = F.normalize(base.tower.head(features), dim=-1)
    order = (F.normalize(features - known.mean, dim=-1) @ known.directions.T).argmax(1)
    assert float((known.vectors[order] - expected).abs().max()) < 1e-5

    def recall(carried: KnownTexts | None) -> float:
        base.tower.head = KernelHead(FEATURES, WIDTH, count_anchors(base.texts[few], None, carried))
        base.tower.carried = carried
        fit_head(base.tower, base.zimg[few], base.texts[few], None)
        return base.recall(HELD_OUT)

    alone, carried = recall(None), recall(known)
    assert alone < 0.3
    assert carried > alone + 0.2


def test_images_and_classes_together_beat_either() -> None:
    world = World()
    pairs, named = slice(0, 12), slice(12, 24)
    classes = ClassHead([[text] for text in world.texts[named]], world.directions[named])
    recalls = []
    for rows, class_head in ((slice(0, 2), classes), (pairs, None), (pairs, classes)):
        fit_head(world.tower, world.zimg[rows], world.texts[rows], class_head)
        recalls.append(world.recall(HELD_OUT))
    assert recalls[2] > max(recalls[:2])


@pytest.mark.parametrize("anchors", [0, 200])
def test_no_text_points_to_what_all_images_share(anchors: int) -> None:
    world = World(anchors=anchors)
    fit_head(world.tower, world.zimg[TRAIN], world.texts[TRAIN], None)
    with torch.no_grad():
        vectors = world.tower(world.tower.tokenize(world.texts))
    shared = F.normalize(world.zimg[TRAIN].mean(0), dim=0)
    assert float((vectors @ shared).abs().max()) < 1e-5 * float(vectors.norm(dim=-1).mean())


@pytest.mark.parametrize("anchors", [0, 200])
def test_length_of_the_fitted_vectors_is_one_on_average(anchors: int) -> None:
    world = World(anchors=anchors)
    fit_head(world.tower, world.zimg[TRAIN], world.texts[TRAIN], None)
    world.tower.eval()
    with torch.no_grad():
        lengths = world.tower(world.tower.tokenize(world.texts[TRAIN])).norm(dim=-1)
    assert float(lengths.mean()) == pytest.approx(1, rel=1e-4)


def test_only_the_head_changes_and_the_mode_stays() -> None:
    world = World()
    before = {name: tensor.clone() for name, tensor in world.tower.state_dict().items()}
    state = torch.get_rng_state()
    fit_head(world.tower, world.zimg[TRAIN], world.texts[TRAIN], None)
    assert world.tower.training
    assert torch.equal(torch.get_rng_state(), state)
    changed = {name for name, tensor in world.tower.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert all(parameter.requires_grad for parameter in world.tower.parameters())


@pytest.mark.parametrize("rows", [2, 3, FEATURES - 1])
@pytest.mark.parametrize("identical", [False, True])
@pytest.mark.parametrize("same_text", [False, True])
@pytest.mark.parametrize("anchors", [0, FEATURES])
def test_few_or_identical_pairs_give_numbers(rows: int, identical: bool, same_text: bool, anchors: int) -> None:
    world = World(anchors=anchors)
    zimg = world.zimg[:1].expand(rows, -1) if identical else world.zimg[:rows]
    texts = [world.texts[0]] * rows if same_text else world.texts[:rows]
    fit_head(world.tower, zimg, texts, None)
    assert all(bool(parameter.isfinite().all()) for parameter in world.tower.head.parameters())


def test_only_so_many_pairs_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, world = World(), World()
    torch.manual_seed(0)
    chosen = torch.randperm(len(expected.texts))[:50]
    fit_head(expected.tower, expected.zimg[chosen], [expected.texts[i] for i in chosen.tolist()], None)
    monkeypatch.setattr(closed_form, "MAX_PAIRS", 50)
    torch.manual_seed(0)
    fit_head(world.tower, world.zimg, world.texts, None)
    assert torch.equal(world.tower.head.weight, expected.tower.head.weight)


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.data())
def test_anchors_are_chosen_among_pairs_first(has_image: list[bool], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(has_image)))
    chosen = closed_form.choose_anchors(torch.tensor(has_image), count).tolist()
    assert len(set(chosen)) == len(chosen) == count
    others = sum(not has_image[text] for text in chosen)
    if len(has_image) - sum(has_image) >= count // 4:
        assert others == max(count // 4, count - sum(has_image))
    else:
        assert others == len(has_image) - sum(has_image)
