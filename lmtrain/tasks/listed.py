"""Tasks whose problems are a list: read from a file, or collected. A hash of each problem says which side it is on."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterable, Iterator, Sequence

from lmtrain.data import records
from lmtrain.schema import Data
from lmtrain.tasks.generated import Message, Row, check_split, held_out, user
from lmtrain.types import LmtrainError, nearest


class Listed(abc.ABC):
    """A subclass gives `name`, `max_tokens`, `load`, `problem` and the rest of the contract.

    Rows of a split come in an order that is random and always the same. A problem that is listed twice counts once.
    """

    name = ""
    max_tokens = 32

    def __init__(self) -> None:
        self._rows: dict[str, list[Row]] = {}

    @abc.abstractmethod
    def load(self) -> Iterable[tuple[Row, bool | None]]:
        """(row, is it held out?) of every problem; None: its hash decides."""

    @abc.abstractmethod
    def problem(self, row: Row) -> str:
        """What makes two rows the same problem."""

    def rows(self, split: str) -> Sequence[Row]:
        """All of a split, read once.

        Raises:
          LmtrainError: there are none, or the file cannot be read.
        """
        check_split(split)
        if not self._rows:
            sides: dict[str, dict[str, Row]] = {"train": {}, "heldout": {}}
            for row, held in self.load():
                problem = self.problem(row)
                sides["heldout" if (held_out(problem) if held is None else held) else "train"].setdefault(problem, row)
            self._rows = {
                side: _shuffled(found, sides["heldout"] if side == "train" else {}) for side, found in sides.items()
            }
        if not self._rows[split]:
            raise LmtrainError(f"task {self.name}: no row is on the side {split!r}; give it more.")
        return self._rows[split]


PLAIN = "Question: {question}\nAnswer:"


class Given(abc.ABC):
    """A task whose evaluation is a file: all its rows are held out, in the file's order, repeated ones too.

    A subclass gives `name`, `max_tokens`, `read`, `score` and the rest of the contract.

    Args:
      path: the file, JSON Lines (.gz too).
      train_path: another file, to train on; a problem of `path` is left out of it.
      prompt: how a question is put, "{question}" in it; "": the question alone in a chat, else PLAIN.
    """

    name = ""
    max_tokens = 32

    def __init__(self, path: str, train_path: str, prompt: str) -> None:
        if prompt and "{question}" not in prompt:
            raise LmtrainError(f"prompt is {prompt!r}, but takes a text with {{question}} in it.")
        self.path, self.train_path, self.prompt = path, train_path, prompt
        self._rows: dict[str, list[Row]] = {}

    @abc.abstractmethod
    def read(self, row: Row, where: str) -> Row:
        """The row that a line of the file makes. Raises LmtrainError with `where` in it for one that makes none."""

    def asks(self, row: Row) -> str:
        """What is asked."""
        return row["question"]

    def plain(self, row: Row) -> str:
        """The text that a model which does not chat goes on from."""
        return (self.prompt or PLAIN).replace("{question}", self.asks(row))

    def messages(self, row: Row) -> list[Message]:
        """What the user says in a chat."""
        return user((self.prompt or "{question}").replace("{question}", self.asks(row)))

    def problem(self, row: Row) -> str:
        """What makes two rows the same problem."""
        return " ".join(row["question"].split())

    def rows(self, split: str) -> Sequence[Row]:
        """All of a split, read once; each row has the place it comes from in "where".

        Raises:
          LmtrainError: a file that is missing, empty or broken, a row that cannot be used.
        """
        check_split(split)
        if split not in self._rows:
            path = self.path if split == "heldout" else self.train_path
            if not path and split == "train":
                raise LmtrainError(f"task {self.name}: train_path is not set, and path is for evaluation alone.")
            made = [{**self.read(row, where), "where": where} for where, row, _ in file_rows(self.name, path, "")]
            if split == "train":
                held = {self.problem(row) for row in self.rows("heldout")}
                made = [row for row in made if self.problem(row) not in held]
            if not made:
                raise LmtrainError(f"task {self.name}: {path} has no row{' of its own' if split == 'train' else ''}.")
            self._rows[split] = made
        return self._rows[split]


def _shuffled(found: dict[str, Row], without: dict[str, Row]) -> list[Row]:
    """The rows by a hash of their problems, without those that are on the other side too."""
    order = sorted(found.keys() - without.keys(), key=lambda p: hashlib.blake2b(p.encode(), digest_size=16).digest())
    return [found[problem] for problem in order]


def file_rows(task: str, path: str, heldout_path: str) -> Iterator[tuple[str, Row, bool | None]]:
    """(where, row, is it held out?) of JSON Lines (.gz too). With `heldout_path`, its rows are held out, no others.

    Raises:
      LmtrainError: no such file, a line that is no JSON object.
    """
    if not path:
        raise LmtrainError(f"task {task}: path is not set; it takes a JSON Lines file: {task}(path='FILE.jsonl').")
    files = [(path, False if heldout_path else None)] + ([(heldout_path, True)] if heldout_path else [])
    for file, held in files:
        for where, row in records.jsonl(Data(path=file), f"task {task}"):
            if isinstance(row, LmtrainError):
                raise row
            if not isinstance(row, dict):
                raise LmtrainError(f"{where}: a JSON object was expected, got {type(row).__name__}.")
            yield where, row, held


def text_fields(row: Row, fields: Sequence[str], where: str) -> None:
    """Raises LmtrainError where a field is missing or holds no text."""
    for field in fields:
        if not isinstance(row.get(field), str):
            got = f"{field} is {type(row[field]).__name__}" if field in row else f"no field {field!r}"
            hint = "" if field in row else nearest(field, row)
            raise LmtrainError(f"{where}: {got}, but takes text.{hint} (fields: {', '.join(list(row)[:20])})")
