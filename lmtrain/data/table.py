"""Conversations as a fixed table of rows, in memory: several to a row, each with its own segment.

A unit is what must stand in one row: a conversation (chat), or two of them (pairs: chosen and rejected; labels: the
real reply and a mismatched one). All tokens of a conversation are read; the last position of each has no target.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lmtrain.data import pack
from lmtrain.types import Batch, LmtrainError


@dataclasses.dataclass(frozen=True)
class Units:
    """Encoded conversations, end to end. S conversations of N tokens make U units.

    Attributes:
      ids: int32[N].
      learn: bool[N], where the assistant produced the token and it counts.
      starts: int64[S + 1], where each conversation begins.
      each: conversations of a unit, 1 or 2; those of unit u are u * each and, where there are two, the next.
      values: name -> float32[U]: "margins_BT" (over both conversations of a unit), "labels_BT" (over the first).
    """

    ids: np.ndarray
    learn: np.ndarray
    starts: np.ndarray
    each: int = 1
    values: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, encoded: Sequence[tuple[np.ndarray, np.ndarray]], each: int = 1, values: dict[str, Any] | None = None
    ) -> Units:
        """From (ids, weights) of every conversation, those of a unit side by side."""
        ids = np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in encoded)])
        learn = np.concatenate([np.empty(0, np.float32), *(weights for _, weights in encoded)]) > 0
        starts = np.cumsum([0, *(len(ids) for ids, _ in encoded)])
        return cls(ids, learn, starts, each, {n: np.array(v, np.float32) for n, v in (values or {}).items()})

    def __len__(self) -> int:
        return (len(self.starts) - 1) // self.each

    @property
    def lengths(self) -> np.ndarray:
        """int64[U]: tokens of every unit."""
        return np.diff(self.starts[:: self.each])

    @property
    def learned(self) -> int:
        """Targets that count: learned tokens, but for the first of a conversation, which nothing predicts."""
        return int(self.learn.sum() - self.learn[self.starts[:-1]].sum())

    def hash(self) -> str:
        """sha256 of all of it."""
        h = hashlib.sha256(f"{self.each} {sorted(self.values)}".encode())
        for array in (self.ids, self.learn, self.starts, *(self.values[name] for name in sorted(self.values))):
            h.update(np.ascontiguousarray(array).data)
        return h.hexdigest()


class Conversations:
    """A Table (see pipeline.py) of units.

    Attributes:
      rows: how many rows each member has.
      tokens, learned: how many tokens a pass over all rows reads, and how many of them are targets that count.
      extra: further columns by name, float32 [all rows of all members in order, T]; see `attach`.
    """

    def __init__(
        self,
        members: Sequence[Units],
        row_length: int,
        pad: int,
        packed: bool = True,
        names: Sequence[str] = ("",),
        weights: Sequence[float] = (1.0,),
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.members, self.row_length, self.pad = list(members), row_length, pad
        self.names, self.weights = list(names), list(weights)
        self._units: list[list[list[int]]] = [
            pack.best_fit(m.lengths, row_length) if packed else [[u] for u in range(len(m))] for m in self.members
        ]
        self.rows = [len(rows) for rows in self._units]
        self.tokens = sum(len(m.ids) for m in self.members)
        self.learned = sum(m.learned for m in self.members)
        self.identity: dict[str, Any] = {
            **(identity or {}),
            "row_length": row_length,
            "pack": packed,
            "corpus": hashlib.sha256(" ".join(m.hash() for m in self.members).encode()).hexdigest(),
        }
        self._values = sorted(set().union(*(m.values for m in self.members)))
        self.extra: dict[str, np.ndarray] = {}
        self.said = ""

    def __len__(self) -> int:
        return sum(self.rows)

    def batch(self, picks: Sequence[tuple[int, int] | None]) -> Batch:
        """One row for each (member, row); None gives padding.

        Returns:
          tokens_BT, targets_BT, segments_BT, positions_BT int32, weights_BT float32, the units' values and `extra`.
        """
        B, T = len(picks), self.row_length
        batch: Batch = {name: np.full((B, T), self.pad, np.int32) for name in ("tokens_BT", "targets_BT")}
        batch |= {"weights_BT": np.zeros((B, T), np.float32)}
        batch |= {name: np.zeros((B, T), np.int32) for name in ("segments_BT", "positions_BT")}
        batch |= {name: np.zeros((B, T), np.float32) for name in (*self._values, *self.extra)}
        for b, pick in enumerate(picks):
            if pick is not None:
                self._fill({name: array[b] for name, array in batch.items()}, int(pick[0]), int(pick[1]))
        return batch

    def all_batches(self, batch_size: int, share: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Every row of every member in order, the last batch filled up with padding: to compute a column of `extra`.

        Args:
          share: (index, count), which part of each batch to give.
        """
        picks: list[tuple[int, int] | None] = [(m, row) for m, rows in enumerate(self.rows) for row in range(rows)]
        mine = batch_size // share[1]
        for first in range(0, len(picks), batch_size):
            some = picks[first : first + batch_size]
            some += [None] * (batch_size - len(some))
            yield self.batch(some[share[0] * mine : (share[0] + 1) * mine])

    def attach(self, name: str, rows: np.ndarray) -> None:
        """Adds a column that batches give from now on: float [all rows, T] in the order of `all_batches`."""
        if rows.shape != (len(self), self.row_length):
            raise LmtrainError(f"{name} has shape {rows.shape}, but the table's rows are {len(self)}x{self.row_length}")
        self.extra[name] = np.asarray(rows, np.float32)

    def targets(self, member: int, row: int) -> np.ndarray:
        """int32[n]: the targets of a row that count."""
        batch = self.batch([(member, row)])
        return batch["targets_BT"][batch["weights_BT"] > 0]

    def summary(self) -> str:
        """What `conversations.build` has to say of it."""
        return self.said

    def _fill(self, row_T: dict[str, np.ndarray], member: int, row: int) -> None:
        units = self.members[member]
        at = segment = 0
        for u in self._units[member][row]:
            begin = at
            for s in range(u * units.each, (u + 1) * units.each):
                ids = units.ids[units.starts[s] : units.starts[s + 1]]
                here = slice(at, at + len(ids))
                segment += 1
                row_T["tokens_BT"][here] = ids
                row_T["targets_BT"][at : here.stop - 1] = ids[1:]
                row_T["weights_BT"][at : here.stop - 1] = units.learn[units.starts[s] + 1 : units.starts[s + 1]]
                row_T["segments_BT"][here] = segment
                row_T["positions_BT"][here] = np.arange(len(ids))
                at = here.stop
                if "labels_BT" in units.values and s == u * units.each:
                    row_T["labels_BT"][here] = units.values["labels_BT"][u]
            if "margins_BT" in units.values:
                row_T["margins_BT"][begin:at] = units.values["margins_BT"][u]
        number = sum(self.rows[:member]) + row
        for name, rows in self.extra.items():
            row_T[name][:] = rows[number]
