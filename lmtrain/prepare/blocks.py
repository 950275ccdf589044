"""Blocks for datatrove's pipelines that datatrove lacks, or has only with a download or a heavier package.

Words:          its word tokenizer is spaCy's (126 MB, .34 MB/s on the core that this was written on; this one 12 MB/s).
Language:       its language filter fetches a fastText model. Here py3langid's, which comes with the package (Lui and
                Baldwin 2012, langid.py), or a fastText model that is on disk already.
Decontaminate:  its index is built by lighteval, and knows no question shorter than its n-grams. Here the search of
                `lmtrain eval --suite contamination`, so that the one finds nothing that the other has dropped.
Anonymise:      its own, that counts.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.utils.lid import LID
from datatrove.utils.word_tokenizers import WhitespaceTokenizer, load_word_tokenizer

from lmtrain.eval import contamination
from lmtrain.prepare.dropped import Dropped
from lmtrain.types import LmtrainError, nearest

SURE = 0.65  # FineWeb's least score of a language
SEEN = 2000  # characters by which py3langid judges; more only cost time
#: Scripts without blanks between words; here datatrove's own choice of a tokenizer, each with its package.
UNSPACED = ("zh", "ja", "th", "lo", "km", "my", "bo", "dz")
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")


class Words(WhitespaceTokenizer):
    """Words as runs of letters and digits, with inner apostrophes; each other sign is one of its own."""

    def word_tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return _WORD.findall(text)

    # All are alike: datatrove keeps the words of the last texts by (text, tokenizer), and filters share them so.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Words)

    def __hash__(self) -> int:
        return hash(Words)


def words(language: str) -> Any:
    """The word tokenizer of a language ("" and "all": any that writes blanks).

    Raises:
      LmtrainError: its script has no blanks, and the package that finds words in it is not there.
    """
    if language not in UNSPACED:
        return Words()
    try:
        return load_word_tokenizer(language)
    except ImportError as error:
        raise LmtrainError(
            f"--language {language} is written without blanks; finding its words needs more: {error}"
        ) from None


# ------------------------------------------------------------------------------------------------------------- language
class Py3LangId(LID):
    """97 languages by ISO 639-1 codes."""

    def __init__(self) -> None:
        super().__init__()
        self._model: Any = None

    def predict(self, doc: Document) -> tuple[tuple[str, float], dict[str, float]]:
        """((best language, its probability), {it: that})."""
        if self._model is None:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier

            self._model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        language, score = self._model.classify(doc.text[:SEEN])
        return (language, float(score)), {language: float(score)}


class FastText(LID):
    """A fastText model file (lid.176.bin, GlotLID): its labels without __label__."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self._model: Any = None

    def predict(self, doc: Document) -> tuple[tuple[str, float], dict[str, float]]:
        """((best language, its probability), {it: that})."""
        if self._model is None:
            self._model = fasttext_model(self.path)
        labels, scores = self._model.predict(doc.text.replace("\n", " "))
        language = labels[0].removeprefix("__label__")
        return (language, float(scores[0])), {language: float(scores[0])}


class Language(BaseFilter):
    """Keeps documents whose likeliest language is wanted, with a score of at least SURE."""

    name = "language"

    def __init__(self, language: str, model: str, dropped: Dropped):
        super().__init__(dropped)
        self.language = language
        self.identify = FastText(model) if model else Py3LangId()

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Contract of datatrove's filters."""
        (language, score), _ = self.identify.predict(doc)
        if score < SURE:
            return False, "unsure"
        return (True, "") if language == self.language else (False, language)


def check_language(language: str, model: str) -> None:
    """Raises LmtrainError where no model says that a text is in this language."""
    if model:
        known = [label.removeprefix("__label__") for label in fasttext_model(model).labels]
        whose = model
    else:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        known, whose = list(LanguageIdentifier.from_model_file(MODEL_FILE).nb_classes), "py3langid"
    if language not in known:
        raise LmtrainError(f"--language {language}: {whose} knows no such language.{nearest(language, known)}"
                           f" (all, or one of {' '.join(sorted(known)[:200])})")  # fmt: skip


def fasttext_model(path: str) -> Any:
    """A fastText model from a file.

    Raises:
      LmtrainError: no such file, not a model, or fasttext is not there.
    """
    try:
        from fasttext.FastText import _FastText
    except ImportError as error:
        raise LmtrainError(f"--language-model takes fasttext ({error}): pip install fasttext-numpy2-wheel") from None
    try:
        return _FastText(path)
    except ValueError as error:
        raise LmtrainError(f"--language-model {path}: {error}") from None


# -------------------------------------------------------------------------------------------------------- contamination
class Decontaminate(BaseFilter):
    """Drops documents in which an evaluation row stands: --ngram of its words in a row, or a shorter question whole.

    Args:
      rows: a file of rows (evaluation.py).
      found: a folder; FOLDER/RANK.json gets the numbers of the rows that this task has found.
    """

    name = "decontaminate"

    def __init__(self, rows: str, ngram: int, found: str, dropped: Dropped):
        super().__init__(dropped)
        self.rows, self.ngram, self.found = rows, ngram, found
        self._index: contamination.Index | None = None
        self._of: list[str] = []
        self._seen: set[int] = set()

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Contract of datatrove's blocks."""
        self._seen = set()
        yield from super().run(data, rank, world_size)
        file = pathlib.Path(self.found, f"{rank:05d}.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(sorted(self._seen)))

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Contract of datatrove's filters."""
        if self._index is None:
            lines = pathlib.Path(self.rows).read_text().splitlines()
            rows = [contamination.Row(**row) for row in map(json.loads, lines)]
            self._of = [row.of for row in rows]
            self._index = contamination.Index(rows, self.ngram)
        hits = self._index.search([doc.text])
        self._seen.update(hits)
        return (False, self._of[min(hits)]) if hits else True


# ------------------------------------------------------------------------------------------------------------------ PII
class Anonymise(PIIFormatter):
    """E-mail addresses and public IP addresses replaced by ones that are nobody's."""

    name = "pii"

    def format(self, text: str) -> str:
        """The text without them; they are counted."""
        emails = sum(1 for _ in self.emails_replacer.regex.finditer(text)) if "@" in text else 0
        addresses = sum(map(self.ip_replacer.validator, (m[0] for m in self.ip_replacer.regex.finditer(text))))
        if not emails + addresses:
            return text
        self.stat_update("emails", value=emails)
        self.stat_update("addresses", value=addresses)
        self.stat_update("changed")
        return super().format(text)
