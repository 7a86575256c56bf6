"""Which pairs and images a model may be measured on, by what it keeps of what it was tuned on."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lamplit.data.caption_hash import hash_captions
from lamplit.data.split_record import Part, SplitRecord, is_in
from lamplit.errors import UsageError
from lamplit.model import LiT
from lamplit.store.lance_store import Store
from lamplit.tuning.split import Links, content_hashes, link

logger = logging.getLogger(__name__)
Split = Literal["auto", "held_out", "test", "all"]
_MEASURED: tuple[Part, ...] = ("test", "held_out")  # the one that the run did not look at first
_PARTS = {"test": "captions kept for the run's test", "held_out": "captions held out of the run that made the model"}
_CHOSEN = "the run chose its best checkpoint by these captions, so the figures are slightly optimistic"


@dataclass(frozen=True)
class Choice:
    """What is to be measured.

    Attributes:
        links: the pairs; rows of one content are one image. None are left if all of them were tuned on.
        rows: the images whose classes are told apart: those of the pairs, and those that no run has seen, ascending.
        split: held_out, test, unseen (neither held out nor tuned on) or all.
        words: the same for readers, with numbers.
        notes: what else a reader must know, a sentence each.
    """

    links: Links
    rows: NDArray[np.int64]
    split: str
    words: str
    notes: list[str] = field(default_factory=list)


def choose(model: LiT, store: Store, split: Split, text_column: str) -> Choice:
    """Choose the captions that a model is measured on.

    Args:
        model: keeps what it was tuned on, if a run of lamplit made it.
        store: the pairs.
        split: which are asked for; `auto` leaves out what was tuned on.
        text_column: the column with the captions.

    Raises:
        UsageError: held-out captions are asked for, and there are none.
    """
    texts, contents, record = store.texts(text_column), content_hashes(store), model.tuned_on
    everything = Choice(link(range(len(texts)), texts, contents), np.arange(len(texts)), "all", "all captions")
    if split == "all":
        tuned_on = 0 if record is None else int(is_in(contents, record.contents("train")).sum())
        return replace(everything, notes=[f"{tuned_on:,} of {len(texts):,} images were tuned on"] if tuned_on else [])
    if record is None:
        return _choose_without_record(model, split, everything)
    seen_rows = is_in(contents, record.contents("train"))
    if not seen_rows.any() and not any(is_in(contents, record.contents(part)).any() for part in _MEASURED):
        return _choose_of_others(model, store, split, everything, record)
    asked = [part for part in _MEASURED if split in ("auto", part)]
    for part in asked:
        rows = is_in(contents, record.contents(part)) & ~seen_rows
        links = _link_untuned(rows, texts, contents, record)
        if len(links):
            words = f"{_PARTS[part]} ({_numbers(links, everything.links, record)})"
            [other] = set(_MEASURED) - {part}
            unseen = np.flatnonzero(~seen_rows & ~is_in(contents, record.contents(other)))
            return Choice(links, unseen, part, words, [_CHOSEN] if part == "held_out" else [])
    if split != "auto":
        raise UsageError(
            f"{model.name} was tuned on pairs of {store.path}, and none of the others were kept for {split!r}; measure "
            "all of them: --split all (in Python: split='all')"
        )
    links = _link_untuned(~seen_rows, texts, contents, record)
    words = f"captions that the model was not tuned on ({_numbers(links, everything.links, record)})"
    return Choice(links, np.flatnonzero(~seen_rows), "unseen", words)


@dataclass(frozen=True)
class ChosenPairs:
    """Pairs that one model is measured on, by their contents, so that another is measured on the same.

    Attributes:
        choice: the pairs, as rows of the store that they were chosen in.
        contents: hashes of the contents of the pairs' images.
        captions: hashes of the captions.
        row_contents: hashes of the contents of the images whose classes are told apart.
    """

    choice: Choice
    contents: NDArray[np.uint64]
    captions: NDArray[np.uint64]
    row_contents: NDArray[np.uint64]

    @classmethod
    def of(cls, choice: Choice, store: Store) -> ChosenPairs:
        """Remember what was chosen in a store."""
        contents = content_hashes(store)
        of_pairs, captions = contents[choice.links.image_index.numpy()], hash_captions(choice.links.texts)
        return cls(choice, np.unique(of_pairs), np.unique(captions), np.unique(contents[choice.rows]))

    def find_in(self, model: LiT, store: Store, text_column: str) -> Choice:
        """Choose the same pairs in a store that another tower embedded, or in the same store.

        A note says how many of the captions `model` was tuned on.
        """
        texts, contents = store.texts(text_column), content_hashes(store)
        rows = np.flatnonzero(is_in(contents, self.contents)).tolist()
        kept = [
            [text for text, is_kept in zip(texts[row], self._holds(texts[row]), strict=True) if is_kept] for row in rows
        ]
        links = link(rows, kept, contents[rows])
        known = 0 if model.tuned_on is None else int(is_in(self.captions, model.tuned_on.captions("train")).sum())
        notes = [f"{model.name} was tuned on {known:,} of the {len(self.captions):,} captions"] if known else []
        return replace(self.choice, links=links, rows=np.flatnonzero(is_in(contents, self.row_contents)), notes=notes)

    def _holds(self, texts: list[str]) -> NDArray[np.bool_]:
        return is_in(hash_captions(texts), self.captions)


def no_captions_left(model: LiT, store: Store) -> str:
    """Say that a model was tuned on all captions of a store."""
    return (
        f"{model.name} was tuned on all captions of {store.path}, so what is measured there says nothing of others; "
        "give other pairs, or measure these all the same: --split all (in Python: split='all')"
    )


def _numbers(links: Links, everything: Links, record: SplitRecord) -> str:
    """Say how many of all captions are measured, and what the others are."""
    total = len(everything.texts)
    tuned_on = int(is_in(hash_captions(everything.texts), record.captions("train")).sum())
    others = total - len(links.texts) - tuned_on
    parts = [f"{len(links.texts):,} of {total:,}"]
    parts += [f"{tuned_on:,} were tuned on"] if tuned_on else []
    parts += [f"{others:,} are in no part that is measured"] if others > 0 else []
    return ", ".join(parts)


def _choose_without_record(model: LiT, split: Split, everything: Choice) -> Choice:
    if split != "auto":
        raise UsageError(
            f"nothing is known of what {model.name} was tuned on, so no captions are known to be held out; measure all "
            "of them: --split all (in Python: split='all')"
        )
    if model.run_folder is None:
        return everything
    note = (
        f"{model.name} was tuned by an earlier lamplit, which did not keep what it was tuned on: if that was these "
        "pairs, most of the captions are not new to it"
    )
    logger.warning("%s", note)
    return replace(everything, notes=[note])


def _choose_of_others(model: LiT, store: Store, split: Split, everything: Choice, record: SplitRecord) -> Choice:
    """Choose among pairs none of whose images the model was tuned on."""
    if split != "auto":
        raise UsageError(
            f"{model.name} was not tuned on {store.path}: it shares no image with what it was tuned on, so no captions "
            "of it are held out; measure all of them: --split all (in Python: split='all')"
        )
    captions = everything.links.texts
    known = int(is_in(hash_captions(captions), record.captions("train")).sum())
    if not known:
        return everything
    return replace(everything, notes=[f"{known:,} of {len(captions):,} captions were tuned on, with other images"])


def _link_untuned(
    rows: NDArray[np.bool_], texts: list[list[str]], contents: NDArray[np.uint64], record: SplitRecord
) -> Links:
    """Link some rows to those of their captions that were not tuned on."""
    chosen = np.flatnonzero(rows).tolist()
    seen = record.captions("train")
    kept = [
        [
            text
            for text, was_seen in zip(texts[row], is_in(hash_captions(texts[row]), seen), strict=True)
            if not was_seen
        ]
        for row in chosen
    ]
    return link(chosen, kept, contents[rows])
