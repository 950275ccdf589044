"""Contamination: which evaluation rows stand in the text that the model was trained on. Exact, nothing is sampled.

A row is found where any NGRAM words in a row of it stand in the training text, in one document or turn (Brown et al.
2020, appendix C, arXiv 2005.14165: 13-grams in lower case, without punctuation and blanks). A question of fewer words
is found where it stands there whole: all its words and the signs between them, in whatever case and with whatever
blanks; signs at its ends do not matter. Answers and choices of fewer words do not count by themselves.

NGRAM words that more than half of a task's rows share are its wording, not its problems, and do not count. Questions of
fewer than CHANCE words may stand in a text by chance, and are counted apart.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lmtrain.eval import estimates
from lmtrain.eval.subject import Missing, Result, Subject
from lmtrain.rollout import rewards

CHANCE = 8  # words; the fewest that GPT-3's authors would look for
_BLOCK = 1 << 20  # words that are looked through at once
# Scripts that write without blanks: a sign is a word.
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+")
_PIECE = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+|[^\w\s]")
_ODD = np.uint64(0x9E3779B97F4A7C15)  # of the rolling hash, which only picks candidates


@dataclasses.dataclass(frozen=True)
class Row:
    """An evaluation row.

    Attributes:
      of, number, where: the task's name, the row's number in it, its place in a file ("" where it has none).
      asks: what makes the problem; each is looked for, whole where it is short.
      says: what else belongs to it (answers, choices); only NGRAM words of these count.
    """

    of: str
    number: int
    where: str
    asks: tuple[str, ...]
    says: tuple[str, ...] = ()


def run(s: Subject) -> Result:
    """Looks for every row of the tasks and of --text; without either, of the run's tasks and its held-out documents."""
    record = s.needs_record("contamination")
    rows = evaluation_rows(s)
    if not rows:
        raise Missing(f"suite contamination needs evaluation rows, and {s.name} has none: give --tasks or --text.")
    index = Index(rows, s.settings.ngram)
    found: dict[int, dict[str, str]] = collections.defaultdict(dict)  # row -> stage -> how
    searched: dict[str, int] = {}
    for stage, size, pieces in record.learned():
        with s.progress(size, f"contamination: {stage}") as progress:
            for i, how in index.search(pieces, progress).items():
                found[i][stage] = how
        searched[stage] = size
    if not searched:
        raise Missing("suite contamination: no stage of this run keeps text to look through. " + " ".join(record.notes))
    result = Result(notes=list(record.notes))
    result.notes.append(f"looked through {', '.join(f'{name} ({size:,} bytes)' for name, size in searched.items())}"
                        f" for {s.settings.ngram} words in a row, shorter questions whole")  # fmt: skip
    _report(rows, index, found, s.settings.seed, result)
    if held := "" if s.settings.tasks or s.texts else "held-out documents":
        result.notes.append(f"{held}: near duplicates, which splitting by whole documents leaves, are what is found")
    return result


def _report(rows: Sequence[Row], index: Index, found: dict[int, dict[str, str]], seed: int, result: Result) -> None:
    for name in dict.fromkeys(row.of for row in rows):
        mine = [i for i, row in enumerate(rows) if row.of == name]
        hit = [i for i in mine if i in found]
        result.scores[f"{name}: rows found"] = estimates.share([i in found for i in mine], seed)
        short = sum(i in index.short for i in hit)
        said = f"{name}: {len(hit):,} of {len(mine):,} rows found"
        if short:
            said += f", {short:,} of them questions of fewer than {CHANCE} words, which may be chance"
        if empty := sum(i in index.empty for i in mine):
            said += f"; {empty:,} rows have no word to look for"
        if hit:
            places = [f"{rows[i].number}{f' ({rows[i].where})' * bool(rows[i].where)}" for i in hit[:10]]
            said += f": rows {', '.join(places)}{', ...' * (len(hit) > 10)}"
        result.notes.append(said)
        result.details[name] = {
            "rows": len(mine), "found": len(hit), "short": short, "without_words": empty,
            "which": [{"row": rows[i].number, "where": rows[i].where, "text": rows[i].asks[0][:200], "in": found[i]}
                      for i in hit],
        }  # fmt: skip


def evaluation_rows(s: Subject) -> list[Row]:
    """The rows that are looked for."""
    given = bool(s.settings.tasks or s.texts)
    specs = s.settings.tasks or (() if given or s.record is None else s.record.tasks())
    out = task_rows(rewards.get_tasks(specs), s.settings.rows) if specs else []
    if given:
        for name, documents in s.texts.items():
            out += text_rows(name, documents, s.settings.rows)
    elif s.record is not None:
        held = [d for d in s.record.heldout_texts() if d.strip()]
        out += [Row("held-out documents", i, "", (d,)) for i, d in enumerate(held[: s.settings.rows or None])]
    return out


def task_rows(tasks: Mapping[str, Any], limit: int = 0) -> list[Row]:
    """The held-out rows of tasks, by the names of these; at most `limit` of each, 0: all."""
    out: list[Row] = []
    for name, task in tasks.items():
        held = task.rows("heldout")
        for i in range(min(limit or len(held), len(held))):
            asks = tuple(m["content"] for m in task.messages(held[i]) if m["role"] == "user")
            says = [m["content"] for m in task.solution(held[i])] if hasattr(task, "solution") else []
            says += task.choices(held[i]) if hasattr(task, "choices") else []
            out.append(Row(name, i, held[i].get("where", ""), asks, tuple(says)))
    return out


def text_rows(name: str, documents: Iterable[str], limit: int = 0) -> list[Row]:
    """The paragraphs of a text, each a row; at most `limit`, 0: all."""
    pieces = [p for d in documents for p in re.split(r"\n\s*\n", d) if p.strip()]
    return [Row(name, i, "", (piece,)) for i, piece in enumerate(pieces[: limit or None])]


def words(text: str) -> int:
    """How many words a text has, as they are counted here."""
    return len(_WORD.findall(text))


class Index:
    """What is looked for.

    Attributes:
      short: rows whose every question is shorter than CHANCE words.
      empty: rows without a word.
    """

    def __init__(self, rows: Sequence[Row], n: int):
        self.short: set[int] = set()
        self.empty: set[int] = set()
        grams: dict[tuple[str, ...], set[int]] = collections.defaultdict(set)
        whole: dict[tuple[str, ...], set[int]] = collections.defaultdict(set)
        for i, row in enumerate(rows):
            asks = [_WORD.findall(text.casefold()) for text in row.asks]
            for text, found in zip(row.asks, asks, strict=True):
                if 0 < len(found) < n:
                    whole[tuple(_trimmed(_PIECE.findall(text.casefold())))].add(i)
            for found in [*asks, *(_WORD.findall(text.casefold()) for text in row.says)]:
                for k in range(len(found) - n + 1):
                    grams[tuple(found[k : k + n])].add(i)
            if not any(asks):
                self.empty.add(i)
            elif max(map(len, asks)) < CHANCE:
                self.short.add(i)
        size = collections.Counter(row.of for row in rows)
        for gram, owners in list(grams.items()):
            of = collections.Counter(rows[i].of for i in owners)
            wording = {name for name, count in of.items() if count > max(3, size[name] / 2)}
            grams[gram] = {i for i in owners if rows[i].of not in wording}
        self._words = _Grams(_WORD, {gram: owners for gram, owners in grams.items() if owners}, f"{n} words")
        self._pieces = _Grams(_PIECE, whole, "whole")

    def search(self, texts: Iterable[str], progress: Any = None) -> dict[int, str]:
        """The rows that texts hold, and how: "13 words" or "whole"."""
        found: dict[int, str] = {}
        block: list[str] = []
        size = 0
        for text in texts:
            block.append(text)
            size += len(text.encode("utf-8", "surrogatepass"))
            if size >= _BLOCK:
                self._look(block, found)
                if progress:
                    progress(size)
                block, size = [], 0
        self._look(block, found)
        if progress and size:
            progress(size)
        return found

    def _look(self, block: Sequence[str], found: dict[int, str]) -> None:
        folded = [text.casefold() for text in block]
        for grams in (self._pieces, self._words):  # the longer match is the one that is told
            for i in grams.inside(folded):
                found[i] = grams.how


class _Grams:
    """Sequences of words to look for, of whatever lengths. Candidates are picked by a hash, then compared."""

    def __init__(self, pattern: re.Pattern[str], owners: dict[tuple[str, ...], set[int]], how: str):
        self.how, self._pattern = how, pattern
        self._ids = {word: k for k, word in enumerate({w for gram in owners for w in gram}, start=1)}
        self._owners = {tuple(self._ids[w] for w in gram): rows for gram, rows in owners.items()}
        by_length: dict[int, list[tuple[int, ...]]] = collections.defaultdict(list)
        for gram in self._owners:
            by_length[len(gram)].append(gram)
        self._hashes = {n: np.unique(_hash(np.array(g).ravel(), n)[::n]) for n, g in by_length.items()}

    def inside(self, texts: Sequence[str]) -> set[int]:
        """The owners of all sequences that stand in the texts, none across two."""
        ids: list[int] = []
        if not self._owners:
            return set()
        for text in texts:
            ids += [self._ids.get(word, 0) for word in self._pattern.findall(text)]
            ids.append(0)
        ids_W = np.array(ids)
        found: set[int] = set()
        for n, hashes in self._hashes.items():
            if len(ids_W) >= n:
                for at in np.flatnonzero(np.isin(_hash(ids_W, n), hashes)):
                    found |= self._owners.get(tuple(ids_W[at : at + n].tolist()), set())
        return found


def _hash(ids_W: np.ndarray, n: int) -> np.ndarray:
    """A hash of every n ids in a row, uint64[W - n + 1]."""
    count = len(ids_W) - n + 1
    out = np.zeros(count, np.uint64)
    for k in range(n):
        out = out * _ODD + ids_W[k : k + count].astype(np.uint64)
    return out


def _trimmed(pieces: list[str]) -> list[str]:
    """Without signs at the ends."""
    words = [i for i, piece in enumerate(pieces) if _WORD.fullmatch(piece)]
    return pieces[words[0] : words[-1] + 1] if words else []
