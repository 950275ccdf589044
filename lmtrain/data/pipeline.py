"""Batches, forever: shuffle by seed, mix by weight, this process's rows, prefetch. Grain underneath.

The order of rows is a function of (corpus, row length, weights, seed) alone. Process p of P takes the p-th block of
every global batch, so the state, the number of rows given out so far, suits any number of processes and any batch size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain
import jax
import numpy as np

from lmtrain.data import groups, pack, shards
from lmtrain.data.store import Shards, Stream
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.schema import ConfigError, Data
from lmtrain.types import Batch, LmtrainError, Params


class Table(Protocol):
    """A fixed table of rows: what batches are made of.

    Attributes:
      names: of the members of a mixture; [""] where there is none.
      weights: the members' shares of a mixture.
      rows: how many rows each member has.
      tokens: how many tokens a pass over all of them reads.
      identity: what makes another table, by name: an iterator's state is good for an equal one only.
    """

    names: list[str]
    weights: list[float]
    rows: list[int]
    tokens: int
    identity: dict[str, Any]

    def batch(self, picks: Sequence[tuple[int, int] | None]) -> Batch:
        """One row for each (member, row); None gives padding. NumPy [len(picks), T]."""

    def targets(self, member: int, row: int) -> np.ndarray:
        """int32[n]: the targets of a row that count in the loss."""

    def summary(self) -> str:
        """One line: what there is, and how it is split."""


def build(
    data: Data,
    tokenizer: Tokenizer,
    batch_size: int,
    seed: int,
    folder: str | os.PathLike[str],
    progress: bool = True,
    share: tuple[int | None, int | None] = (None, None),
) -> tuple[Pipeline, Heldout]:
    """Prepares the corpus in `folder` (once) and opens it: training batches, and the fixed held-out ones.

    Args:
      share: (index, count), which of how many equal parts of each batch this process reads (`mesh.share`); without it,
        every process reads a part of its own.

    Raises:
      ConfigError, LmtrainError: settings, files or sizes that cannot be, each in one message.
    """
    prepared = shards.prepare(data, tokenizer, folder, progress)
    train, heldout = (Documents(prepared, data, tokenizer, side) for side in ("train", "heldout"))
    pipeline = Pipeline(train, batch_size, seed, data.workers, *share)
    return pipeline, Heldout(heldout, data.heldout_rows, batch_size, tokenizer, *share)


class Pipeline:
    """Training batches: contract 4 (Source). `process_index` and `process_count` are for tests; else JAX's.

    Attributes:
      table: the rows it gives.
      rows, tokens: how many rows a pass over all of them has, and how many tokens it reads.
    """

    def __init__(
        self,
        table: Table,
        batch_size: int,
        seed: int,
        workers: int = 0,
        process_index: int | None = None,
        process_count: int | None = None,
    ) -> None:
        self.table = table
        self.shards = getattr(table, "shards", None)  # of a corpus of documents
        self.rows, self.tokens = sum(table.rows), table.tokens
        self.batch_size = batch_size
        self._p, self._rows = _share(batch_size, process_index, process_count)
        self._threads = workers or 2
        self._next_index = 0
        self._batches: Iterator[Batch] | None = None
        orders = []
        for member, rows in enumerate(table.rows):
            order = grain.MapDataset.range(rows).shuffle(seed=_seed(seed, member)).repeat()  # shuffled anew every epoch
            orders.append(order.map(lambda row, member=member: (member, row)))
        self._order = orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, table.weights)
        self._identity = {**table.identity, "seed": seed, "weights": table.weights}

    def summary(self) -> str:
        """One line: what there is to train on, and what is held out."""
        return self.table.summary()

    def next(self, params: Params | None = None) -> Batch:
        """This process's rows of the next global batch, NumPy [B / P, T]. `params` is for sources that roll out."""
        if self._batches is None:
            self._batches = iter(self._open())
        batch = next(self._batches)
        self._next_index += self.batch_size
        return batch

    @property
    def epochs(self) -> float:
        """How often the rows given out so far cover the corpus (a mixture's: that of all its members together)."""
        return self._next_index / self.rows

    def pick(self, k: int) -> tuple[int, int]:
        """(member, row) of the k-th row that is given out, over all processes."""
        member, row = self._order[k]
        return member, int(row)

    def report(self) -> dict[str, float]:
        """Numbers of the batch given last, for metrics.jsonl: none."""
        return {}

    def state(self) -> dict:
        """What `restore` needs: `next_index`, the rows given out over all processes, and what they were rows of."""
        return {"next_index": self._next_index, **self._identity}

    def restore(self, state: dict) -> None:
        """Goes on behind the last batch of the pipeline that gave `state`, with whatever number of processes.

        Raises:
          LmtrainError: the state is one of other rows, so that some would be repeated and others lost.
        """
        for name, now in self._identity.items():
            if name in state and state[name] != now:
                raise LmtrainError(
                    f"data: the checkpoint's {name} is {state[name]}, this run's {now}: rows would be repeated or lost."
                    " Go back to the data and settings it was trained with, or start another --workdir with init_from"
                )
        self._move(int(state["next_index"]))

    def skip(self, batches: int) -> None:
        """Leaves out the next global batches."""
        self._move(self._next_index + batches * self.batch_size)

    def close(self) -> None:
        """Stops reading ahead."""
        if self._batches is not None and hasattr(self._batches, "close"):
            self._batches.close()
        self._batches = None

    def _move(self, index: int) -> None:
        self.close()
        self._next_index = index

    def _open(self) -> grain.IterDataset:
        batches = _Batches(self._order, self.table, self._next_index, self.batch_size, self._p, self._rows)
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=2 * self._threads)
        return grain.MapDataset.source(batches).to_iter_dataset(options)


@dataclasses.dataclass(frozen=True, repr=False)
class _Batches:
    """Batch i of process p, by number: what Grain's threads read ahead from."""

    order: grain.MapDataset
    table: Table
    start: int
    batch_size: int
    p: int
    rows: int

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, i: int) -> Batch:
        first = self.start + int(i) * self.batch_size + self.p * self.rows
        return self.table.batch([self.order[k] for k in range(first, first + self.rows)])


class Documents:
    """All rows of one side ("train" or "heldout") of a tokenised corpus: a Table."""

    def __init__(self, prepared: Shards, data: Data, tokenizer: Tokenizer, side: str = "train") -> None:
        self.shards = prepared
        self.streams: list[Stream] = [getattr(member, side) for member in prepared.members]
        self.names = [member.name for member in prepared.members]
        self.weights = [member.weight for member in prepared.members]
        self.row_length = data.row_length
        self.begin, self.end, self.pad = tokenizer.begin, tokenizer.end, tokenizer.pad
        self.rows = [pack.count(len(stream), data.row_length) for stream in self.streams]
        self.tokens = sum(map(len, self.streams))
        self._labels: list[groups.Labels] = []
        self._reweigh = self._balance = np.ones(1, np.float32)
        if data.groups or data.outcomes or data.reweigh:
            cells = groups.Cells(data)
            self._labels = [groups.Labels.of(stream, tokenizer, cells) for stream in self.streams]
            self._reweigh = np.ones(cells.count, np.float32)
            if data.reweigh and side == "train":  # held-out text is scored as it is
                self._reweigh = cells.weights(int(c) for labels in self._labels for c in labels.cells)
            shares = [labels.shares(self._reweigh) for labels in self._labels]
            self._balance = cells.balance(np.average(shares, axis=0, weights=self.weights))
        self.identity = {"corpus": prepared.identity, "row_length": data.row_length}
        empty = [name for name, rows in zip(self.names, self.rows, strict=True) if not rows]
        if side == "train" and empty:
            raise LmtrainError(
                f"data{f'.mixture.{empty[0]}' * bool(empty[0])}: every document is held out, none is left to train on;"
                f" lower data.heldout_fraction={data.heldout_fraction} or give more text"
            )
        if side == "heldout" and self.tokens < data.row_length:
            raise LmtrainError(
                f"data.heldout_fraction={data.heldout_fraction} (data.heldout={data.heldout}) holds out {self.tokens}"
                f" tokens, fewer than one row of data.row_length={data.row_length}: raise the fraction, shorten the"
                " rows, or give more text"
            )

    def batch(self, picks: Sequence[tuple[int, int] | None]) -> Batch:
        """One row for each pick; None gives padding. With data.groups also groups_BT and balance_BT (types.py)."""
        empty = np.empty(0, np.int32)
        windows = [empty if pick is None else self._window(*pick) for pick in picks]
        batch = pack.pack(windows, self.row_length, self.begin, self.end, self.pad)
        if self._labels:
            batch["groups_BT"] = np.zeros_like(batch["tokens_BT"])
            for b, pick in enumerate(picks):
                if pick is not None:
                    batch["groups_BT"][b] = self._labels[pick[0]].at(int(pick[1]) * self.row_length, self.row_length)
            batch["weights_BT"] *= self._reweigh[batch["groups_BT"]]
            batch["balance_BT"] = self._balance[batch["groups_BT"]]
        return batch

    def targets(self, member: int, row: int) -> np.ndarray:
        """Every target of a row counts."""
        return self._window(member, row)[1:]

    def summary(self) -> str:
        """One line: what there is, and how it is split."""
        return self.shards.summary()

    def _window(self, member: int, row: int) -> np.ndarray:
        return pack.window(self.streams[member], int(row), self.row_length, self.begin)


class Heldout:
    """The held-out rows that are scored: `limit` of them, evenly spread over all (0: every one), always the same.

    Attributes:
      table: all held-out rows.
      rows: how many rows are scored.
      tokens: how many targets they ask for, each document's <|endoftext|> (a turn's <|end|>) included.
      bytes: how many bytes of text those targets stand for (special tokens for none): bits per byte is the
        summed loss of the targets in nats / ln 2 / bytes.
    """

    def __init__(
        self,
        table: Table,
        limit: int,
        batch_size: int,
        tokenizer: Tokenizer,
        process_index: int | None = None,
        process_count: int | None = None,
    ) -> None:
        self.table = table
        self.batch_size = batch_size
        self._p, self._share = _share(batch_size, process_index, process_count)
        self._tokenizer = tokenizer
        picks = [(member, row) for member, rows in enumerate(table.rows) for row in range(rows)]
        self.rows = min(limit or len(picks), len(picks))
        self._picks = [picks[i * len(picks) // self.rows] for i in range(self.rows)]
        self.tokens = self.bytes = 0
        for targets in self._targets():
            self.tokens += len(targets)
            self.bytes += int(tokenizer.byte_lengths[targets].sum())

    def summary(self) -> str:
        """One line: how much is scored."""
        return f"{self.rows:,} held-out rows ({self.tokens:,} targets, {self.bytes:,} bytes) are scored"

    def batches(self) -> Iterator[Batch]:
        """This process's rows of every batch, NumPy [B / P, T]; the last is filled up with padding (weights 0)."""
        for first in range(0, self.rows, self.batch_size):
            picks: list = self._picks[first : first + self.batch_size]
            picks += [None] * (self.batch_size - len(picks))
            yield self.table.batch(picks[self._p * self._share : (self._p + 1) * self._share])

    def bytes_text(self) -> bytes:
        """The text that the scored targets stand for, to measure gzip or xz on."""
        return b"".join(self._tokenizer.decode_bytes(targets) for targets in self._targets())

    def _targets(self) -> Iterator[np.ndarray]:
        for member, row in self._picks:
            yield self.table.targets(member, row)


def _share(batch_size: int, index: int | None, count: int | None) -> tuple[int, int]:
    """(this process, its rows of a global batch)."""
    p = jax.process_index() if index is None else index
    P = jax.process_count() if count is None else count
    if batch_size < 1 or batch_size % P:
        raise ConfigError(f"batch_size: got {batch_size}, takes a multiple of the {P} processes")
    return p, batch_size // P


def _seed(seed: int, member: int) -> int:
    """Grain shuffles epoch e by seed + e: seeds apart at random, so that no member or run repeats another's orders."""
    return int.from_bytes(hashlib.sha256(f"{seed} {member}".encode()).digest()[:4], "big")
