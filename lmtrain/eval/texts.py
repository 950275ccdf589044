"""Texts taken apart: words, sentences, passages; disturbed copies of them; how much they repeat themselves."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterable, Sequence

import numpy as np

from lmtrain.data.tokenizer import Tokenizer

# A sentence ends behind . ! or ? (and closing quotes) where a blank follows, or with its line.
_END = re.compile(r"[.!?][\"')\]\u201d\u2019]*\s+|\s*\n\s*")
_WORD = re.compile(r"\w+|[^\w\s]")
SHORT = 3  # a sentence of fewer words goes with the next one: a heading, a speaker's name
LONGEST = 512  # tokens of a passage, at most, whatever the model could see


@dataclasses.dataclass(frozen=True)
class Passage:
    """Some sentences in a row of one document: what comes first, and what goes on.

    Attributes:
      document, number: of the document, and of the passage within all.
      context: the first sentences, their blanks included.
      sentences: what follows, two or more; each with the blanks behind it.
    """

    document: int
    number: int
    context: str
    sentences: tuple[str, ...]

    @property
    def continuation(self) -> str:
        """The sentences that follow, without blanks at the end."""
        return "".join(self.sentences).rstrip()


def sentences(text: str) -> list[str]:
    """A text cut behind its sentences and lines; joined, they are the text."""
    ends = [m.end() for m in _END.finditer(text)]
    cut = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True) if a < b]
    out: list[str] = []
    for piece in cut:
        if out and len(out[-1].split()) < SHORT:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def passages(documents: Iterable[str], tokenizer: Tokenizer, longest: int) -> list[Passage]:
    """Every document cut into passages of at most `longest` tokens, of which about half is context.

    A passage has three sentences or more, two of them behind the context; where three do not fit, the cut moves on by a
    sentence.
    """
    found: list[Passage] = []
    room = min(longest, LONGEST)
    for number, text in enumerate(documents):
        pieces = sentences(text)
        lengths = [len(ids) for ids in tokenizer.encode_batch(pieces)]
        start = 0
        while start < len(pieces):
            stop, used = start, 0
            while stop < len(pieces) and used + lengths[stop] < room:
                used += lengths[stop]
                stop += 1
            if stop - start < 3:
                start += 1
                continue
            middle = start + 1
            while middle < stop - 2 and 2 * sum(lengths[start : middle + 1]) <= used:
                middle += 1
            made = Passage(number, len(found), "".join(pieces[start:middle]), tuple(pieces[middle:stop]))
            if made.context.strip() and len(made.continuation.split()) > 1:
                found.append(made)
            start = stop
    return found


# ----------------------------------------------------------------------------------------------------------- disturbed
def shuffle_sentences(pieces: Sequence[str], rng: random.Random) -> str:
    """The sentences in another order; the blanks between them stay where they are. "" where all orders read alike."""
    bare = [piece.rstrip() for piece in pieces]
    blanks = [piece[len(piece.rstrip()) :] for piece in pieces]
    return _shuffled(bare, [*blanks[:-1], ""], rng)


def shuffle_words(text: str, rng: random.Random) -> str:
    """The words in another order, in the same places between the same blanks. "" where all orders read alike."""
    parts = re.split(r"(\s+)", text.strip())
    return _shuffled(parts[0::2], [*parts[1::2], ""], rng)


def _shuffled(parts: Sequence[str], blanks: Sequence[str], rng: random.Random) -> str:
    if len(set(parts)) < 2:
        return ""
    mixed = list(parts)
    while mixed == list(parts):
        rng.shuffle(mixed)
    return "".join(part + blank for part, blank in zip(mixed, blanks, strict=True))


# -------------------------------------------------------------------------------------------------------- repetition
def words(text: str) -> list[str]:
    """Words and signs of punctuation, in lower case."""
    return _WORD.findall(text.casefold())


def ngrams(found: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Every n words in a row."""
    return list(zip(*(found[k:] for k in range(n)), strict=False))


def repetition(found: Sequence[str], n: int) -> float:
    """The share of a text's n-grams that stood in it before: 1 - distinct / all (Welleck et al. 2020, seq-rep-n,
    arXiv 1908.04319). 0 where it has none."""
    grams = ngrams(found, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class Distinct:
    """distinct-n (Li et al. 2016, arXiv 1510.03055): different n-grams of all texts over the number of their words.

    Called with numbers of texts, perhaps repeated, it gives the value of these.
    """

    def __init__(self, found: Sequence[Sequence[str]], n: int):
        where: dict[tuple[str, ...], list[int]] = {}
        for i, text in enumerate(found):
            for gram in set(ngrams(text, n)):
                where.setdefault(gram, []).append(i)
        self._texts = np.array([i for some in where.values() for i in some], np.int64)  # of every n-gram, side by side
        self._starts = np.cumsum([0, *map(len, where.values())])[:-1]
        self._words = np.array([len(text) for text in found], np.int64)

    def __call__(self, texts: np.ndarray) -> float:
        taken = np.zeros(len(self._words), bool)
        taken[texts] = True
        words = int(self._words[texts].sum())
        if not words or not len(self._starts):
            return 0.0
        return float(np.logical_or.reduceat(taken[self._texts], self._starts).sum() / words)
