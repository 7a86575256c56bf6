"""Samples of webdataset tars; what is damaged is reported, and reading goes on behind it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from lamplit.data.archives.tar_members import CutError, TarMember, read_members
from lamplit.data.places.image_files import MAX_IMAGE_BYTES, is_image
from lamplit.data.places.image_places import TarPlace
from lamplit.data.places.sidecars import MAX_TEXT_BYTES, TEXT_ENDINGS, Sidecars, last_ending
from lamplit.data.skipped import Skipped
from lamplit.data.tables.columns import Cells
from lamplit.data.valid_text import valid_id

# Of one key, while it is not known whether more belongs to it.
_MAX_GROUP_FILES = 200
_MAX_GROUP_BYTES = 2**26


class TarSample(NamedTuple):
    """A sample: its key, the ending of its image and the image as it is encoded, its other cells, and its place.

    Without an image both are empty. A text is a str by its ending, an object in a `.json` gives its own keys, and a
    file that is neither image nor text is an empty bytes, because it was not read. The place is where the image lies in
    its tar, as `image_places` writes it; empty if that is compressed.
    """

    key: str
    ending: str
    image: bytes
    cells: Cells
    place: str = ""


class _Part(NamedTuple):
    """A file of a tar that belongs to a sample."""

    key: str  # its path up to the first dot of its name
    stem: str  # its path up to the last dot of its name
    ending: str  # what is behind the key, in lower case
    content: bytes | None  # None if it is neither image nor text, and so was not read
    place: str = ""


class TarSamples:
    """The samples of tars, in their order; iterating again reads them again.

    Neighbours that share their path up to the first dot of the file name are one sample, as in webdataset. If these
    have several images, each image is a sample of its own, with the files that share its path up to the *last* dot,
    and with those that belong to all (`0.txt` beside `0.left.jpg` and `0.right.jpg`).

    Args:
        files: the tars, compressed or not.
        image: the ending of the images (`jpg`, `input.jpg`); None for every usual one.
        texts: endings of texts beside the usual ones.
        notes: filled while reading: what was left out on purpose, each kind once.
        problems: filled while reading: shards and files in them that could not be read.

    Example:
        >>> [sample.key for sample in TarSamples([Path("shards/000.tar")])]
        ['000000', '000001']
    """

    def __init__(
        self,
        files: Sequence[Path],
        image: str | None = None,
        texts: Iterable[str] = (),
        *,
        notes: list[str],
        problems: list[Skipped],
    ) -> None:
        self._files, self._image = files, image.lower() if image else None
        self._texts = {text.strip().lower() for text in texts}
        self._sidecars, self._problems = Sidecars(notes, problems), problems

    def __iter__(self) -> Iterator[TarSample]:
        return self.of(self._files)

    def of(self, files: Sequence[Path]) -> Iterator[TarSample]:
        """Yield the samples of some of the tars."""
        return chain.from_iterable(map(self._samples_of, files))

    def _samples_of(self, file: Path) -> Iterator[TarSample]:
        count, reason = 0, ""
        group: list[_Part] = []
        try:
            for member in read_members(file):
                if (part := self._part(member, file)) is None:
                    continue
                done, group = self._done(group, part)
                for sample in done:
                    count += 1
                    yield sample
                group.append(part)
        except CutError as cut:
            reason = str(cut)
            if group and cut.member and _names(cut.member)[0] == group[0].key:  # the cut goes through this sample
                group = []
        for sample in self._split(group):
            count += 1
            yield sample
        if reason:
            self._report(file.name, str(file), f"{reason}; samples read before that: {count:,}")

    def _done(self, group: list[_Part], part: _Part) -> tuple[list[TarSample], list[_Part]]:
        """Return the samples to which nothing is added any more when `part` has come, and what is left of the group."""
        if group and part.key != group[0].key:
            return self._split(group), []
        size = sum(len(one.content or b"") for one in group)
        if len(group) < _MAX_GROUP_FILES and (size < _MAX_GROUP_BYTES or len(self._images(group)) < 2):
            return [], group
        done = [one for one in group if one.stem != part.stem]
        return self._by_stem(done), [one for one in group if one.stem == part.stem]

    def _part(self, member: TarMember, file: Path) -> _Part | None:
        """Read a file if it is image or text; None if it belongs to no sample."""
        key, stem, ending = _names(member.name)
        base = member.name.rpartition("/")[2]
        if base.startswith("."):
            return None
        if not ending:
            self._sidecars.note("files without an ending are left out", base)
            return None
        is_text = self._is_text(ending)
        if not is_text and not self._is_image(ending):
            return _Part(key, stem, ending, None)
        most = MAX_TEXT_BYTES if is_text else MAX_IMAGE_BYTES
        if member.is_link:
            reason = "not a file but a link; write the tar with --dereference --hard-dereference"
        elif member.size > most:
            reason = f"{member.size / 2**20:,.0f} MiB, more than the bound of {most / 2**20:,.0f}"
        else:
            return _Part(key, stem, ending, member.read(), "" if is_text else _place(member, file, base))
        self._report(member.name, f"{file}/{member.name}", reason)
        return None

    def _is_text(self, ending: str) -> bool:
        last = last_ending(ending)
        if self._image in (ending, last):
            return False
        return last == "json" or last in TEXT_ENDINGS or not self._texts.isdisjoint((ending, last))

    def _is_image(self, ending: str) -> bool:
        last = last_ending(ending)
        return self._image in (ending, last) if self._image else is_image(f"0.{last}") and not self._is_text(ending)

    def _images(self, group: list[_Part]) -> list[_Part]:
        images = [one for one in group if one.content is not None and self._is_image(one.ending)]
        return [one for one in images if one.ending == self._image] or images

    def _split(self, group: list[_Part]) -> list[TarSample]:
        """Make the samples of neighbours that share a key: one, or one for each image."""
        if len(images := self._images(group)) < 2:
            return [self._sample(group[0].key, images, [(one.ending, one) for one in group])] if group else []
        return self._by_stem(group)

    def _by_stem(self, group: list[_Part]) -> list[TarSample]:
        by_stem: dict[str, list[_Part]] = {}
        for one in group:
            by_stem.setdefault(one.stem, []).append(one)
        images = {stem: self._images(parts) for stem, parts in by_stem.items()}
        # What has no image of its own belongs to all images whose names begin with its name.
        shared = {stem for stem in by_stem if not images[stem]}
        above = {stem: [other for other in shared if stem.startswith(f"{other}.")] for stem in by_stem if images[stem]}
        used = {other for others in above.values() for other in others}
        if len(above) > 1:
            self._sidecars.note(
                "images that share their name up to a dot are each an image of its own", next(iter(above))
            )
        samples = []
        for stem in by_stem:
            if stem not in used:
                stems = [*sorted(above.get(stem, ()), key=len), stem]
                parts = [(last_ending(one.ending), one) for other in stems for one in by_stem[other]]
                samples.append(self._sample(stem, images[stem], parts))
        return samples

    def _sample(self, key: str, images: list[_Part], parts: list[tuple[str, _Part]]) -> TarSample:
        for other in images[1:]:
            name = f"{other.key}.{other.ending}"
            self._report(name, name, f"a second image of sample {key}, of which the .{images[0].ending} is read")
        files: Cells = {}
        columns: Cells = {}
        for name, one in parts:
            if one.content is None:
                files[name] = b""
            elif self._is_text(one.ending):
                (columns if last_ending(name) == "json" else files).update(
                    self._sidecars.cells(name, one.content, file=f"{one.key}.{one.ending}")
                )
        cells = {f"json.{name}" if name in files else name: value for name, value in columns.items()} | files
        return (
            TarSample(key, images[0].ending, images[0].content or b"", cells, images[0].place)
            if images
            else TarSample(key, "", b"", cells)
        )

    def _report(self, name: str, path: str, reason: str) -> None:
        if (problem := Skipped(name, path, reason)) not in self._problems:
            self._problems.append(problem)


def text_names(sample: TarSample, columns: Sequence[str]) -> list[str]:
    """Return the names of the cells that are a sample's texts.

    A column is a name, or else the last ending of names (`txt` of `outputs.txt`); of several, those that belong to the
    image itself come before all others.

    Example:
        >>> text_names(TarSample("0", "input.jpg", b"", {"outputs.txt": "a cat"}), ["txt"])
        ['outputs.txt']
    """
    names: list[str] = []
    own = sample.ending.rpartition(".")[0]
    for column in columns:
        if column in sample.cells:
            names.append(column)
            continue
        alike = [name for name, value in sample.cells.items() if isinstance(value, str) and last_ending(name) == column]
        names += [name for name in alike if name.rpartition(".")[0] == own] or alike
    return names


def _place(member: TarMember, file: Path, name: str) -> str:
    """Write where a file of a tar lies; "" if it cannot be read there."""
    if member.start is None:
        return ""
    return str(TarPlace(str(file), member.start, member.start + member.size - 1, valid_id(name)))


def _names(path: str) -> tuple[str, str, str]:
    """Return the key, the stem and the ending of a path in a tar."""
    folder, slash, base = path.rpartition("/")
    first, _, ending = base.partition(".")
    return f"{folder}{slash}{first}", f"{folder}{slash}{base.rpartition('.')[0]}", ending.lower()
