"""Which language captions are in: a text tower that has never read it knows only the words it is tuned on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from lamplit.towers.texts.text_tower import TextTower

MULTILINGUAL = "hf:intfloat/multilingual-e5-small"
SAMPLE = 500  # captions that are looked at
_LEAST_LETTERS = 200  # fewer say little: of single short captions half are taken for another language
# Of captions looked at one by one, 0.16 and more are found English in each of the English data sets here, keywords
# among them, and at most 0.03 in each of the stamps' other 75 languages.
_MOST_ENGLISH = 0.1
_MANY_TOKENS = 100_000  # in vocabularies of many languages; those of one have 20,000 to 60,000
_NO_LANGUAGE = "zxx"  # numbers, file names
_UNKNOWN = "und"  # several languages, or one that the detector does not know


def sample(captions: Sequence[str]) -> list[str]:
    """Take at most `SAMPLE` captions at even distances, from the first to nearly the last."""
    return list(captions[:: max(1, math.ceil(len(captions) / SAMPLE))])


def find_language(captions: Sequence[str]) -> str | None:
    """Find the language of captions that are not English.

    Args:
        captions: M captions, of which some at even distances are looked at, together and one by one.

    Returns:
        Its code by ISO 639, which is `und` for several languages or an unknown one; None if they are English, in part
        or all, in no language, or too few to tell.
    """
    lower = [text.lower() for text in sample(captions)]  # names in capitals look like German
    together = "\n".join(lower)
    if sum(map(str.isalpha, together)) < _LEAST_LETTERS:
        return None
    identifier = _identifier()
    language: str = identifier.classify(together)[0]
    if language in ("en", _NO_LANGUAGE):
        return None
    alone = Counter(identifier.classify(text)[0] for text in lower)
    if alone["en"] > _MOST_ENGLISH * len(lower):
        return None
    return language if language == alone.most_common(1)[0][0] else _UNKNOWN


@cache  # reading it takes most of a second, and a comparison has many runs
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE)


def advise(captions: Sequence[str], tower: TextTower) -> str | None:
    """Say that captions are not English, and name a text tower that has read many languages.

    Args:
        captions: M captions that are tuned on.
        tower: the text tower; one with a vocabulary of many languages needs no advice.

    Returns:
        A plain sentence; None if the captions are English, or nothing can be told.
    """
    language = find_language(captions)
    if language is None:
        return None
    found = "the captions are not English: they are of several languages, or of one that is not known here"
    if language != _UNKNOWN:
        found = f"the captions are not English: they look like {language} (ISO 639)"
    if len(tower.tokenizer) >= _MANY_TOKENS:
        return found
    return (
        f"{found}. If {tower.spec} has not read such texts, a multilingual text tower needs far fewer pairs: "
        f"--text-tower {MULTILINGUAL}"
    )
