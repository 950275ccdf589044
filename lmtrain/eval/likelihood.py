"""log p(continuation | context) by the forward pass of training, many at a time.

B rows, T positions, V vocabulary, C positions of a chunk, R rows of a table, n tokens of one continuation

Each continuation has a row of its own; what fills the row up is in no segment, so it is neither seen nor counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lmtrain import mesh as mesh_lib
from lmtrain import schema
from lmtrain.data.pipeline import Table
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.engine import power_of_two
from lmtrain.models.transformer import Forward
from lmtrain.types import Batch, LmtrainError, Params

BATCH_TOKENS = {"cpu": 1 << 12}  # positions of one batch, by platform
OTHER_TOKENS = 1 << 15
NARROWEST = 32  # rows are padded to a power of two from here up, so that a few compiled programs serve all

#: (context, continuation), token ids. The context has at least one token: what begins a document, where nothing else.
Pair = tuple[Sequence[int], Sequence[int]]


class Scored(NamedTuple):
    """What a model makes of one continuation.

    Attributes:
      logps: float64[n], each token's log-probability.
      greedy: each token was the likeliest in its place.
    """

    logps: np.ndarray
    greedy: bool

    @property
    def total(self) -> float:
        """log p(continuation | context)."""
        return float(self.logps.sum())

    @property
    def mean(self) -> float:
        """Nats a token; the sign is that of a log-probability."""
        return float(self.logps.mean())


def begin(tokenizer: Tokenizer) -> list[int]:
    """What every text begins with, in training and here."""
    return [tokenizer.begin]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """A context and what follows it as ids, the border between them handled as lm-evaluation-harness does.

    Blanks at the end of the context go to the continuation (most vocabularies keep a blank with the word after it);
    both are encoded as one text, which is split behind as many ids as the context alone has. (Its api/model.py,
    TemplateLM._encode_pair, version 0.4.13.) Where the last word of the context swallows the continuation whole, the
    two are encoded apart.
    """
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    whole, first = tokenizer.encode(context + continuation), tokenizer.encode(context)
    rest = whole[len(first) :] or tokenizer.encode(continuation)
    return [*begin(tokenizer), *first], rest


class Likelihood:
    """Scores continuations.

    Args:
      model: resolved. One with a scalar head will do; the head is not read.
      pad: the id that rows are filled up with.
      longest: positions that the model sees at once, those of its training: longer contexts lose their beginning, as
        in lm-evaluation-harness. A continuation longer than that is scored in pieces of half as many.
      mesh: where the parameters lie; None: one device. The rows of a batch are split over it.

    Attributes:
      cut: how many contexts have lost their beginning so far.
    """

    def __init__(self, model: schema.Model, params: Params, pad: int, longest: int, mesh: Mesh | None = None):
        if longest < 2:
            raise LmtrainError(f"--row-length is {longest}, but takes at least 2 positions.")
        self.forward, self.params, self.pad, self.longest, self.cut = Forward(model, mesh), params, pad, longest, 0
        self._ways = 1 if mesh is None else mesh_lib.batch_shards(mesh)

    def __call__(self, pairs: Sequence[Pair], progress: Callable[[int], None] | None = None) -> list[Scored]:
        """Scores every pair, in order. What one gets does not depend on the others, up to the rounding of sums.

        Args:
          progress: called with how many rows have been scored since the last call.
        """
        rows: list[tuple[int, list[int], int]] = []  # (pair, ids, how many of the last are scored)
        for number, (context, continuation) in enumerate(pairs):
            rows += [(number, ids, n) for ids, n in self._rows(list(context), list(continuation))]
        scored: dict[int, tuple[np.ndarray, bool]] = {}
        for group in self._groups([len(ids) - 1 for _, ids, _ in rows]):
            logps_BT, greedy_BT = self._score([(rows[k][1], rows[k][2]) for k in group])
            for b, k in enumerate(group):
                _, ids, n = rows[k]
                here = slice(len(ids) - 1 - n, len(ids) - 1)
                scored[k] = logps_BT[b, here].astype(np.float64), bool(greedy_BT[b, here].all())
            if progress:
                progress(len(group))
        parts: list[list[tuple[np.ndarray, bool]]] = [[] for _ in pairs]
        for k, (number, _, _) in enumerate(rows):
            parts[number].append(scored[k])
        return [
            Scored(np.concatenate([np.empty(0), *(logps for logps, _ in p)]), all(greedy for _, greedy in p))
            for p in parts
        ]

    def table(
        self, table: Table, picks: Sequence[tuple[int, int]], progress: Callable[[int], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The training loss of rows of a table, as training packs and weighs them.

        Returns:
          nats_R, tokens_R: float64, the summed cross entropy of the targets that count, and how many they are.
        """
        nats, tokens = [], []
        width = len(table.batch([None])["tokens_BT"][0])
        size = self._rows_of(max(1, self._budget() // width))
        size = max(self._ways, size // 2) if size * width > self._budget() else size
        for first in range(0, len(picks), size):
            some: list[tuple[int, int] | None] = list(picks[first : first + size])
            batch = table.batch([*some, *[None] * (min(size, self._rows_of(len(picks))) - len(some))])
            names = ("tokens_BT", "targets_BT", "segments_BT", "positions_BT")
            logps_BT, _ = self._run({name: batch[name] for name in names})
            weights_BT = batch["weights_BT"][: len(some)].astype(np.float64)
            nats.append(-(np.asarray(logps_BT, np.float64)[: len(some)] * weights_BT).sum(1))
            tokens.append(weights_BT.sum(1))
            if progress:
                progress(len(some))
        return np.concatenate([np.empty(0), *nats]), np.concatenate([np.empty(0), *tokens])

    def _rows(self, context: list[int], continuation: list[int]) -> list[tuple[list[int], int]]:
        """(ids, scored) of the row or rows that one pair needs."""
        if not context:
            raise LmtrainError("a continuation without a context: begin it with what begins every document.")
        ids, room = context + continuation, self.longest + 1
        self.cut += len(ids) > room
        if len(continuation) <= self.longest:
            return [(ids[-room:], len(continuation))] if continuation else []
        half = self.longest // 2
        stops = range(len(context) + half, len(ids) + half, half)
        return [(ids[max(0, stop - room) : stop], half - max(0, stop - len(ids))) for stop in stops]

    def _groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows that make a batch: of one width, the longest first."""
        groups: list[list[int]] = []
        width = 0
        for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
            mine = self._width(lengths[k])
            if not groups or mine != width or len(groups[-1]) == max(1, self._budget() // width):
                groups.append([])
                width = mine
            groups[-1].append(k)
        return groups

    def _width(self, length: int) -> int:
        return power_of_two(length, NARROWEST)

    def _budget(self) -> int:
        return BATCH_TOKENS.get(jax.default_backend(), OTHER_TOKENS)

    def _score(self, rows: Sequence[tuple[list[int], int]]) -> tuple[np.ndarray, np.ndarray]:
        B, T = self._rows_of(len(rows)), self._width(len(rows[0][0]) - 1)
        batch = {name: np.full((B, T), self.pad, np.int32) for name in ("tokens_BT", "targets_BT")}
        batch |= {name: np.zeros((B, T), np.int32) for name in ("segments_BT", "positions_BT")}
        for b, (ids, _) in enumerate(rows):
            n = len(ids) - 1
            batch["tokens_BT"][b, :n], batch["targets_BT"][b, :n] = ids[:-1], ids[1:]
            batch["segments_BT"][b, :n], batch["positions_BT"][b, :n] = 1, np.arange(n)
        return self._run(batch)

    def _rows_of(self, count: int) -> int:
        """Rows of a batch that has to hold `count`: a power of two times the ways that the mesh splits them."""
        return power_of_two(-(-count // self._ways), 1) * self._ways

    def _run(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        mesh = self.forward.mesh
        placed = batch if mesh is None else mesh_lib.put(mesh_lib.own_rows(batch, mesh), mesh)
        logps_BT, greedy_BT = _scores(self.forward)(self.params, placed)
        return np.asarray(logps_BT), np.asarray(greedy_BT)


@functools.lru_cache(maxsize=8)  # compiled once, however many suites ask
def _scores(forward: Forward) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The jitted (params, batch) -> (log p(target), whether the target is the likeliest token), [B, T] each."""

    def run(params: Params, batch: Batch) -> Any:
        def part(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
            return -forward.cross_entropy(logits_BCV, targets_BC)[0], logits_BCV.argmax(-1) == targets_BC

        hidden_BTD, _ = forward.hidden(params, batch)
        return forward.map_logits(params, part, hidden_BTD, batch["targets_BT"])

    # Whole on every device, so that each of several processes can read all of it.
    whole = None if forward.mesh is None else mesh_lib.replicated(forward.mesh)
    return jax.jit(run, out_shardings=whole)
