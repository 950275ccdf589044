"""Texts taken apart: words, sentences, passages; disturbed copies of them; how much they repeat themselves."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence

import numpy as np

from lmtrain.data.tokenizer import Tokenizer

# A sentence ends behind . ! or ? (and closing quotes) where a blank follows, or with its line.
_END = re.compile(r"[.!?][\"')\]\u201d\u2019]*\s+|\s*\n\s*")
_WORD = re.compile(r"\w+|[^\w\s]")
SHORT = 3  # a sentence of fewer words goes with the next one: a heading, a speaker's name
CUT = "sentences are cut into pieces of a quarter of a row, since whole ones seldom fit the model's short rows"
COVERED = 0.25  # of a text that should lie in passages of whole sentences
LONGEST = 512  # tokens of a passage, at most, whatever the model could see


@dataclasses.dataclass(frozen=True)
class Passage:
    """Some sentences in a row of one document: what comes first, and what goes on.

    Attributes:
      document, number: of the document, and of the passage within all.
      pieces: the sentences, three or more; each with the blanks behind it.
      first: how many of them are the context; two or more follow.
    """

    document: int
    number: int
    pieces: tuple[str, ...]
    first: int

    @property
    def context(self) -> str:
        """The first sentences, their blanks included."""
        return "".join(self.pieces[: self.first])

    @property
    def sentences(self) -> list[str]:
        """Those that follow, the last without blanks at its end."""
        return [*self.pieces[self.first : -1], self.pieces[-1].rstrip()]

    @property
    def continuation(self) -> str:
        """The same as one text."""
        return "".join(self.sentences)


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


def passages(documents: Sequence[str], tokenizer: Tokenizer, longest: int) -> tuple[list[Passage], bool]:
    """Every document cut into passages of at most `longest` tokens, of which about half is context.

    Where three sentences do not fit, the cut moves on by one. So a model of short rows might see little of the text:
    where less than COVERED of it lies in passages, sentences are cut between words into pieces of a quarter of a row.

    Returns:
      the passages, and whether sentences were cut.
    """
    room = min(longest, LONGEST)
    cut = [sentences(text) for text in documents]
    found, covered = _passages(cut, tokenizer, room)
    if covered >= COVERED:
        return found, False
    shorter = [[part for piece in pieces for part in _parts(piece, tokenizer, room // 4)] for pieces in cut]
    return _passages(shorter, tokenizer, room)[0], True


def _passages(documents: Sequence[Sequence[str]], tokenizer: Tokenizer, room: int) -> tuple[list[Passage], float]:
    """(passages of documents' pieces, the share of all tokens that lies in them)."""
    found: list[Passage] = []
    covered = total = 0
    for number, pieces in enumerate(documents):
        lengths = [len(ids) for ids in tokenizer.encode_batch(pieces)]
        total += sum(lengths)
        start = 0
        while start < len(pieces):
            stop, used = start, 0
            while stop < len(pieces) and used + lengths[stop] < room:
                used += lengths[stop]
                stop += 1
            if stop - start < 3:
                start += 1
                continue
            first = 1
            while first < stop - start - 2 and 2 * sum(lengths[start : start + first + 1]) <= used:
                first += 1
            made = Passage(number, len(found), tuple(pieces[start:stop]), first)
            if made.context.strip() and len(made.continuation.split()) > 1:
                found.append(made)
                covered += used
            start = stop
    return found, covered / max(total, 1)


def _parts(sentence: str, tokenizer: Tokenizer, most: int) -> list[str]:
    """A sentence cut behind words into parts of at most so many tokens, where words are no longer."""
    out, size = [""], 0
    for word in re.findall(r"\s*\S+\s*|\s+", sentence):
        length = len(tokenizer.encode(word))
        if size and size + length > most:
            out.append("")
            size = 0
        out[-1] += word
        size += length
    return out


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
