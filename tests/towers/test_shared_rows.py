from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lamplit.towers.texts import shared_rows
from lamplit.towers.texts.length_groups import PASS_COST, length_groups, padded_tokens
from lamplit.towers.texts.scratch import Encoded, ScratchEncoder
from lamplit.towers.texts.shared_rows import find_sight, row_inputs, share_rows
from lamplit.towers.texts.text_tower import TextTower, open_text_tower

lengths_of = st.lists(st.integers(1, 64), min_size=1, max_size=120)
captions_of = st.lists(st.integers(9, 17), min_size=16, max_size=300)


def encoder(**options: object) -> BertModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(**(sizes | {"intermediate_size": 32, "max_position_embeddings": 80} | options)))


@given(lengths_of)
def test_every_text_has_one_row_and_fits(lengths: list[int]) -> None:
    rows = share_rows(lengths)
    assert sorted(place for row in rows.texts for place in row) == list(range(len(lengths)))
    used = [sum(lengths[place] for place in row) for row in rows.texts]
    assert max(used) == rows.length
    assert min(used) > 0


@given(captions_of)
@settings(max_examples=40)
def test_captions_fill_their_rows(lengths: list[int]) -> None:
    rows = share_rows(lengths)
    assert len(rows.texts) * rows.length < 1.1 * sum(lengths)


@given(lengths_of.map(sorted), st.integers(0, 60))
def test_padded_tokens_by_hand(lengths: list[int], pass_cost: int) -> None:
    sizes, start, total = length_groups(lengths, pass_cost), 0, 0
    for size in sizes:
        total += size * max(lengths[start : start + size])
        start += size
    assert padded_tokens(lengths[::-1], sizes) == total


def test_rows_by_hand() -> None:
    tokens = [[11, 12], [13], [14, 15, 16]]
    rows = shared_rows.SharedRows([[2], [0, 1]], 3)
    given = row_inputs(tokens, rows, encoder(), sight="all", pad_id=7)
    assert given.ids.tolist() == [[14, 15, 16], [11, 12, 13]]
    assert given.positions.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert given.first.tolist() == [3, 5, 0]
    assert given.mask[0, 0].tolist() == [[0, 0, 0]] * 3
    far = -torch.inf
    assert given.mask[1, 0].tolist() == [[0, 0, far], [0, 0, far], [far, far, 0]]
    before = row_inputs(tokens, rows, encoder(), sight="before", pad_id=7).mask
    assert before[0, 0].tolist() == [[0, far, far], [0, 0, far], [0, 0, 0]]
    hidden = torch.arange(6.0)[:, None]
    assert given.pool(hidden, "cls").flatten().tolist() == [3, 5, 0]
    assert given.pool(hidden, "last").flatten().tolist() == [4, 5, 2]
    assert given.pool(hidden, "mean").flatten().tolist() == [3.5, 5, 1]


def test_what_fills_a_row_is_seen_by_no_text() -> None:
    tokens = [[11, 12, 13], [14]]
    rows = shared_rows.SharedRows([[0], [1]], 3)
    model = encoder().eval()
    with torch.no_grad():
        one, other = (
            given.pool(given.read(model), "mean")
            for given in (row_inputs(tokens, rows, model, sight="all", pad_id=pad) for pad in (0, 50))
        )
    assert torch.equal(one, other)


def test_sight_is_the_same_whenever_it_is_asked() -> None:
    """A run that goes on asks in the middle of a step in bfloat16, where an encoder of this width is less exact."""
    model = encoder(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    with torch.autocast("cpu", torch.bfloat16):
        assert find_sight(model, 80, 60, 0) == "all"
    assert find_sight(model, 80, 60, 0) == "all"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sight_is_found_and_the_modes_stay(attention: str) -> None:
    model = encoder(attn_implementation=attention)
    model.train()
    model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert find_sight(model, 80, 60, 0) == "all"
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


class Misled(nn.Module):
    """An encoder that takes both, and does not do what it is told: one of the two."""

    def __init__(self, ignored: str) -> None:
        super().__init__()
        self.model, self.ignored = encoder(), ignored

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Encoded:
        if self.ignored == "mask":
            attention_mask = None
        if self.ignored == "positions":
            position_ids = None
        return Encoded(self.model(input_ids, attention_mask, position_ids=position_ids).last_hidden_state)


def test_encoders_that_cannot_are_found_out() -> None:
    assert find_sight(Misled("nothing"), 40, 60, 0) == "all"
    assert find_sight(Misled("mask"), 40, 60, 0) is None
    assert find_sight(Misled("positions"), 40, 60, 0) is None
    assert find_sight(ScratchEncoder(60, 16, 1, 2, 40), 40, 60, 0) is None, "it takes no positions"


def test_tower_uses_rows_where_they_cost_less(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = open_text_tower(f"hf:{text_folder}", width=16).eval()
    texts = ["A small red circle.", "A red ring.", "green", "A large blue cross, and a small one."] * 3
    tokens = tower.tokenize(texts)
    passes = count_passes(tower)
    with torch.no_grad():
        shared = tower(tokens)
        assert len(passes) == 1
        assert passes[0].dim() == 4
        monkeypatch.setitem(PASS_COST, "cpu", 0)  # each length has a pass of its own
        apart = tower(tokens)
    assert len(passes) == 1 + len({len(ids) for ids in tokens})
    assert (shared - apart).abs().max() < 1e-6


def test_long_texts_share_none(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamplit.towers.texts.text_tower.MOST_SHARING", 5)
    tower = open_text_tower(f"hf:{text_folder}", width=16).eval()
    passes = count_passes(tower)
    tower(tower.tokenize(["A small red circle, and a ring.", "A red ring."]))
    assert all(mask is None or mask.dim() == 2 for mask in passes)


def count_passes(tower: TextTower) -> list[Tensor]:
    """The masks of the passes to come; what is found out about the encoder is not counted."""
    assert tower._sight is not None
    masks: list[Tensor] = []
    tower.encoder.register_forward_pre_hook(
        lambda _, arguments, options: masks.append(options["attention_mask"]), with_kwargs=True
    )
    return masks
