"""ImageNet in other languages: Babel-ImageNet, and class names that were translated by others.

Both are names for images that someone else's reader has read: ImageNet's validation split. Neither list comes with
lamplit: Babel-ImageNet's names are under BabelNet's licence, which allows no commercial use, and the licences of the
translations are not all known. Their files are read from the folder that the user puts them into.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lamplit.errors import PairsError
from lamplit.evaluation.protocols.classification import note_shared_names
from lamplit.evaluation.protocols.listings import expecting, list_of, read_json
from lamplit.evaluation.protocols.tasks import Classification, Labelled, Task

BABEL_NAMES = "babel_imagenet.json"
BABEL_PROMPTS = "nllb_dist13b_prompts.json"
# How clip_benchmark begins the names of its files.
TRANSLATIONS = {"ar": "ar", "it": "it", "ja": "jp", "zh": "cn"}
_CLASSES = 1000


def babel_tasks(validation: Labelled, folder: str | Path) -> list[Task]:
    """Make the tasks of Babel-ImageNet (Geigle et al., 2023), one for each of its 92 languages.

    A language names 18 to 973 of the classes; only these and their images count, so that figures of two languages
    are not of the same task. English is left out: it is ImageNet itself. Three languages (Breton, Western Frisian,
    Latin) have no prompts; there the name alone is the prompt, and `notes` say so.

    Args:
        validation: ImageNet's validation split, its labels from 0 to 999.
        folder: with the authors' `babel_imagenet.json` and `nllb_dist13b_prompts.json`.

    Raises:
        PairsError: a file is missing, or is not what it should be.
    """
    names_file, prompts_file = (Path(folder) / name for name in (BABEL_NAMES, BABEL_PROMPTS))
    _require(names_file, prompts_file, "the folder data/ of https://github.com/gregor-ge/Babel-ImageNet")
    languages, prompts = read_json(names_file), read_json(prompts_file)
    tasks: list[Task] = []
    for language in sorted(_keys(names_file, languages) - {"EN"}):
        with expecting(names_file, "{LANGUAGE: [[classes], [names]]}"):
            classes, names = languages[language]
            _check_classes(list_of(classes, int), list_of(names, str))
        with expecting(prompts_file, "{LANGUAGE: [prompts with {}]}"):
            templates = _filled(prompts.get(language, ["{}"]), "{}")
        notes = () if language in prompts else ("there are no prompts in this language: the names alone",)
        tasks.append(
            _task(
                ("babel-imagenet", "Babel-ImageNet", "babel-nllb" if language in prompts else "name"),
                validation, language.lower(), classes, names, templates, notes,
            )
        )  # fmt: skip
    return tasks


def translated_tasks(validation: Labelled, folder: str | Path) -> list[Task]:
    """Make the tasks of ImageNet with all 1,000 class names and prompts translated: Arabic, Italian, Japanese, Chinese.

    A task for each language whose two files are there.

    Args:
        validation: ImageNet's validation split, its labels from 0 to 999.
        folder: with clip_benchmark's `jp_classnames.json`, `jp_zeroshot_classification_templates.json` and so on.

    Raises:
        PairsError: there are no such files, or one is not what it should be.
    """
    tasks: list[Task] = []
    for language, begin in TRANSLATIONS.items():
        names_file = Path(folder) / f"{begin}_classnames.json"
        prompts_file = Path(folder) / f"{begin}_zeroshot_classification_templates.json"
        if not names_file.is_file():
            continue
        _require(names_file, prompts_file, "the Python package clip_benchmark")
        with expecting(names_file, '{"imagenet1k": [names]}'):
            names = list_of(read_json(names_file)["imagenet1k"], str)
            _check_classes(range(_CLASSES), names)
        with expecting(prompts_file, '{"imagenet1k": [prompts with {c}]}'):
            templates = _filled(read_json(prompts_file)["imagenet1k"], "{c}")
        title = ("imagenet-translated", "ImageNet, translated", f"clip_benchmark-{begin}")
        tasks.append(_task(title, validation, language, range(_CLASSES), names, templates, ()))
    if not tasks:
        wanted = ", ".join(f"{begin}_classnames.json" for begin in TRANSLATIONS.values())
        raise PairsError(f"{folder} has none of {wanted}; copy them there from the Python package clip_benchmark")
    return tasks


def _require(names: Path, prompts: Path, source: str) -> None:
    missing = [file.name for file in (names, prompts) if not file.is_file()]
    if missing:
        raise PairsError(
            f"{names.parent} has no {' and no '.join(missing)}; copy {names.name} and {prompts.name} there "
            f"from {source}"
        )


def _keys(file: Path, value: object) -> set[str]:
    if not isinstance(value, dict) or not value:
        raise PairsError(f"{file} is not laid out as expected, {{LANGUAGE: ...}}")
    return set(value)


def _check_classes(classes: Sequence[int], names: Sequence[str]) -> None:
    if len(classes) != len(names) or not names:
        raise ValueError(f"{len(classes)} classes with {len(names)} names")
    if len(set(classes)) != len(classes) or not 0 <= min(classes) <= max(classes) < _CLASSES:
        raise ValueError(f"classes must be different ones from 0 to {_CLASSES - 1}")


def _filled(prompts: object, place: str) -> list[str]:
    for prompt in list_of(prompts, str):
        if place not in prompt:
            raise ValueError(f"the prompt {prompt!r} has no {place}")
    return [prompt.replace(place, "{}") for prompt in list_of(prompts, str)]


def _task(
    names_of_task: tuple[str, str, str],
    validation: Labelled,
    language: str,
    classes: Sequence[int],
    names: Sequence[str],
    templates: Sequence[str],
    notes: tuple[str, ...],
) -> Classification:
    benchmark, title, template_set = names_of_task
    number = {label: index for index, label in enumerate(classes)}
    labels = {
        image: tuple(number[label] for label in right if label in number)
        for image, right in validation.labels.items()
        if not number.keys().isdisjoint(right)
    }
    if not labels:
        raise PairsError(f"no image of {validation.images.root} has a class of {title} in language {language}")
    return Classification(
        benchmark,
        title,
        Labelled(validation.images, labels),
        [(name,) for name in names],
        template_set,
        f"validation, {len(labels):,} images of {len(names):,} classes",
        language=language,
        template_texts=templates,
        notes=(*notes, *note_shared_names(names)),
    )
