"""Tasks whose problems are drawn, not read: as many as one wants, and a fixed eighth of them never in training."""

from __future__ import annotations

import abc
import hashlib
import operator
import random
from collections.abc import Callable, Sequence
from typing import Any, overload

from lmtrain.types import LmtrainError, nearest

Row = dict[str, Any]
Message = dict[str, Any]

TRAIN, HELDOUT = 1 << 20, 512  # rows of a split
SHARE = 8  # one problem in so many is held out
_TRIES = 1 << 15  # draws after which no further problem is looked for


def held_out(problem: str) -> bool:
    """Whether a problem is held out: by a hash of itself alone, so the same under every seed and setting."""
    return hashlib.blake2b(problem.encode(), digest_size=4).digest()[0] % SHARE == 0


class Rows(Sequence[Row]):
    """Rows that are made when they are read."""

    def __init__(self, length: int, make: Callable[[int], Row]):
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        if isinstance(i, slice):
            return [self._make(k) for k in range(*i.indices(self._length))]
        k = operator.index(i)
        if not -self._length <= k < self._length:
            raise IndexError(f"row {k} of {self._length}")
        return self._make(k % self._length)


class Generated(abc.ABC):
    """A task that draws its problems. A subclass gives `name`, `max_tokens`, `draw`, `problem` and what a task has.

    Row i of a split is a function of (name, seed, split, i).
    """

    name = ""
    max_tokens = 32

    def __init__(self, seed: int = 0, sloppy: float = 0.0):
        if not 0 <= sloppy <= 1:
            raise LmtrainError(f"sloppy is {sloppy}, but takes a share from 0 to 1.")
        self.seed, self.sloppy = seed, float(sloppy)
        self._held: list[Row] | None = None

    @abc.abstractmethod
    def draw(self, rng: random.Random) -> Row:
        """A row of either split."""

    @abc.abstractmethod
    def problem(self, row: Row) -> str:
        """What makes two rows the same problem, in whichever wording or order: rows with one text are on one side."""

    def slip(self, row: Row) -> random.Random | None:
        """What a wrong demonstration of a row is drawn from; None where its demonstration is right.

        A share `sloppy` of the problems is demonstrated wrongly, as people's demonstrations are. Supervised
        fine-tuning imitates that too; a reward tells it from a right answer.
        """
        rng = random.Random(f"{self.name} {self.seed} slip {self.problem(row)}")
        return rng if rng.random() < self.sloppy else None

    def rows(self, split: str) -> Sequence[Row]:
        """1,048,576 rows of "train" (a problem may come again), up to 512 different ones of "heldout"."""
        check_split(split)
        if split == "train":
            return Rows(TRAIN, self._train)
        if self._held is None:
            self._held = self._draw_held()
        return self._held

    def _train(self, i: int) -> Row:
        rng = random.Random(f"{self.name} {self.seed} train {i}")
        for _ in range(_TRIES):
            row = self.draw(rng)
            if not held_out(self.problem(row)):
                return row
        raise LmtrainError(f"task {self.name}: every problem that these settings give is held out; give it more.")

    def _draw_held(self) -> list[Row]:
        rng = random.Random(f"{self.name} {self.seed} heldout")
        found: dict[str, Row] = {}
        for _ in range(_TRIES):
            row = self.draw(rng)
            problem = self.problem(row)
            if held_out(problem):
                found.setdefault(problem, row)
            if len(found) == HELDOUT:
                break
        if not found:
            raise LmtrainError(f"task {self.name}: no problem that these settings give is held out; give it more.")
        return list(found.values())


def check_split(split: str) -> None:
    """Raises LmtrainError where it is neither "train" nor "heldout"."""
    if split not in ("train", "heldout"):
        raise LmtrainError(f"split is {split!r}, but takes 'train' or 'heldout'.{nearest(split, ('train', 'heldout'))}")


def number(what: str, value: int, low: int, high: int) -> int:
    """`value` where it lies between `low` and `high`, else LmtrainError."""
    if not low <= value <= high:
        raise LmtrainError(f"{what} is {value}, but takes {low} to {high}.")
    return value


def user(text: str) -> list[Message]:
    """A prompt of one user turn."""
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[Message]:
    """A demonstration of one reply."""
    return [{"role": "assistant", "content": text}]
