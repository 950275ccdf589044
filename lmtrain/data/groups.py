"""Which group a text is about, and with which outcome: by the words in it. For reweighing and for group-DRO.

    data.groups=("he/his/him", "she/her")     data.outcomes=("rich/famous", "poor/unknown")

A text belongs to the first group of which a word stands in it, and likewise to an outcome. Cell 0 is all text that
lacks either; the others are numbered group by group: 1 + group * outcomes + outcome.

Reweighing (Kamiran & Calders 2012, Data preprocessing techniques for classification without discrimination, algorithm
1): a text of group g with outcome y weighs P(g) P(y) / P(g, y), so that in the weighted text group and outcome are
independent, while either is as frequent as before. Cell 0 weighs 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator

import numpy as np

from lmtrain.data.store import Stream
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.schema import ConfigError, Data

_READ = 1 << 20  # tokens that are read at once


class Cells:
    """The cells that data.groups and data.outcomes describe.

    Attributes:
      count: of cells, cell 0 included.
    """

    def __init__(self, data: Data, field: str = "data"):
        if not data.groups and (data.outcomes or data.reweigh):
            raise ConfigError(f"{field}.outcomes and {field}.reweigh go with {field}.groups, which is empty.")
        if data.reweigh and (len(data.outcomes) < 2 or len(data.groups) < 2):
            raise ConfigError(f"{field}.reweigh takes two {field}.groups and two {field}.outcomes, or more of either.")
        self._groups = _patterns(data.groups, f"{field}.groups")
        self._outcomes = _patterns(data.outcomes, f"{field}.outcomes")
        self.shape = (len(data.groups), max(1, len(data.outcomes)))
        self.count = 1 + self.shape[0] * self.shape[1]

    def __call__(self, text: str) -> int:
        """The cell of a text."""
        group = _first(self._groups, text)
        outcome = _first(self._outcomes, text) if self._outcomes else 0
        return 0 if group is None or outcome is None else 1 + group * self.shape[1] + outcome

    def weights(self, cells: Iterable[int]) -> np.ndarray:
        """float32[count]: what texts of each cell weigh, from the cells of all of them."""
        n_GY = np.bincount(np.fromiter(cells, int), minlength=self.count)[1:].reshape(self.shape).astype(float)
        total = max(n_GY.sum(), 1)
        want_GY = n_GY.sum(1, keepdims=True) * n_GY.sum(0, keepdims=True) / total
        w_GY = np.divide(want_GY, n_GY, out=np.ones_like(n_GY), where=n_GY > 0)
        return np.concatenate([[1.0], w_GY.ravel()]).astype(np.float32)

    def balance(self, share_K: np.ndarray) -> np.ndarray:
        """float32[count]: what makes every cell's share of the text the same, from the shares of all cells, cell 0's
        (which weighs 1) included. Together they keep their weight; a cell without text weighs 0."""
        own_K = np.asarray(share_K[1:], float)
        there = max((own_K > 0).sum(), 1)
        w_K = np.divide(own_K.sum() / there, own_K, out=np.zeros_like(own_K), where=own_K > 0)
        return np.concatenate([[1.0], w_K]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Labels:
    """The cells of a stream's documents, which begin at `starts`; the stream has `length` tokens."""

    starts: np.ndarray
    cells: np.ndarray
    length: int

    @classmethod
    def of(cls, stream: Stream, tokenizer: Tokenizer, cells: Cells) -> Labels:
        """Reads every document of a stream."""
        starts, found = [0], [0]  # what comes before the first document, if anything
        for start, ids in _documents(stream, tokenizer.begin):
            starts.append(start)
            found.append(cells(tokenizer.decode(ids.tolist())))
        return cls(np.array(starts, np.int64), np.array(found, np.int32), len(stream))

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """float64[count]: each cell's share of the stream's tokens, where those of a cell weigh so much."""
        sizes = np.diff(self.starts, append=self.length)
        tokens = np.bincount(self.cells, sizes, minlength=len(weights)) * weights
        return tokens / max(tokens.sum(), 1)

    def at(self, start: int, length: int) -> np.ndarray:
        """int32[length]: the cell of every token from `start` on."""
        return self.cells[np.searchsorted(self.starts, np.arange(start, start + length), "right") - 1]


def _documents(stream: Stream, begin: int) -> Iterator[tuple[int, np.ndarray]]:
    """(where it begins, its tokens without the one that begins it) of every document."""
    rest, at = np.empty(0, np.int64), 0
    for start in range(0, len(stream), _READ):
        rest = np.concatenate([rest, stream.read(start, start + _READ)])
        begins = [int(i) for i in np.flatnonzero(rest == begin)]
        if start + _READ >= len(stream):
            begins.append(len(rest))
        for a, b in itertools.pairwise(begins):
            yield at + a, rest[a + 1 : b]
        kept = begins[-1] if begins else 0
        rest, at = rest[kept:], at + kept


def _patterns(lists: tuple[str, ...], field: str) -> list[re.Pattern[str]]:
    out = []
    for some in lists:
        words = [word.strip() for word in some.split("/")]
        if not all(words):
            raise ConfigError(f"{field}: got {some!r}, takes words such as 'she/her'.")
        out.append(re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.I))
    return out


def _first(patterns: list[re.Pattern[str]], text: str) -> int | None:
    return next((i for i, pattern in enumerate(patterns) if pattern.search(text)), None)
