"""Tasks whose problems are a list: read from a file, or collected. A hash of each problem says which side it is on."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterable, Iterator, Sequence

from lmtrain.data import records
from lmtrain.schema import Data
from lmtrain.tasks.generated import Row, check_split, held_out
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
