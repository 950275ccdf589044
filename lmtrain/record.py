"""What a run keeps of its own training, opened again for evaluation: metrics, tokenised text, rows, tasks.

Documents come from the shards in the run's folder, found by the hash that the checkpoint keeps of them, so the source
files need not be there any more. Conversations are read again from where config.json says, and must still be the same.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lmtrain import checkpoint, config, feeds, origins, runs, scattered, schema, storage
from lmtrain.data import conversations, pipeline, store
from lmtrain.data.pipeline import Heldout, Pipeline, Table
from lmtrain.data.table import Conversations
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.eval.subject import Missing, Side
from lmtrain.types import LmtrainError, nearest

_READ = 1 << 20  # tokens that are read at once
ROWS = ("documents", "chat")  # kinds whose loss is a sum over tokens
FED = ("documents", "chat", "pairs", "labels")  # kinds of a stage whose text can be opened again


@dataclasses.dataclass
class Stage:
    """One training stage whose folder is there."""

    folder: pathlib.Path
    cfg: schema.Stage
    seed: int
    tokenizer: Tokenizer

    @property
    def kind(self) -> str:
        """What feeds it: documents, chat, pairs, labels, rollout or a dotted path."""
        return feeds.kind(self.cfg)

    @functools.cached_property
    def source(self) -> dict[str, Any]:
        """The state of its source at the newest sound checkpoint."""
        state: dict[str, Any] = checkpoint.read_meta(self.folder / "checkpoints")["source"]
        return state

    @functools.cached_property
    def corpus(self) -> store.Shards:
        """The tokenised documents that it was trained on. Raises LmtrainError where they are gone."""
        data = self.cfg.data
        if (copy := scattered.of(self.folder)) is not None:
            storage.again(copy.pull_text)
        root = pathlib.Path(data.cache or self.folder.parent / "data").expanduser()
        for file in sorted(root.glob("*/manifest.json")):
            if origins.read_json(file).get("identity") == self.source.get("corpus"):
                return store.load(file.parent, data, self.tokenizer.vocab_size)
        raise LmtrainError(
            f"{self.folder}: the tokenised text that it was trained on is not in {root}. `lmtrain run` with the same"
            " --config and --workdir makes it again."
        )

    @functools.cached_property
    def sides(self) -> tuple[Pipeline, Heldout]:
        """Its training rows and its held-out ones, as it reads them; of several processes each has all of them."""
        data, tok = self.cfg.data, self.tokenizer
        whole = (0, 1)
        if self.kind == "documents":
            train, held = (pipeline.Documents(self.corpus, data, tok, side) for side in ("train", "heldout"))
            return Pipeline(train, 1, self.seed, 0, *whole), Heldout(held, data.heldout_rows, 1, tok, *whole)
        try:
            source, heldout = conversations.build(self.kind, data, tok, 1, self.seed, progress=False, share=whole)
        except LmtrainError as error:
            raise LmtrainError(f"{self.folder}: the conversations that it was trained on: {error}") from None
        if source.table.identity["corpus"] != self.source.get("corpus"):
            raise LmtrainError(
                f"{self.folder}: {data.path or data.source} is no longer what it was trained on: its rows have another"
                " hash than the checkpoint keeps. Put the first file back."
            )
        return source, heldout


class Record:
    """The record of the run that a stage belongs to, from the first stage up to this one."""

    def __init__(self, run: runs.Run):
        self.run = run
        self.notes: list[str] = []
        self.stages: list[Stage] = []  # oldest first, the run's own last
        self._follow(run.folder / run.stage)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl up to the step that is evaluated."""
        return [row for row in self.run.metrics if row["step"] <= self.run.step]

    def tasks(self) -> tuple[str, ...]:
        """The tasks of the newest stage that has some: those it is rewarded for, or learns demonstrations of."""
        for stage in reversed(self.stages):
            if stage.cfg.rollout.tasks:
                return tuple(stage.cfg.rollout.tasks)
            if stage.kind == "chat" and stage.cfg.data.source == "task":
                return (stage.cfg.data.path,)
        return ()

    def heldout_texts(self) -> list[str]:
        """The held-out documents of the newest stage that has documents, whole; [] where none has."""
        for stage in reversed(self.stages):
            if stage.kind == "documents":
                streams = [member.heldout for member in stage.corpus.members]
                return [text for stream in streams for text in _pieces(stream, self.run.tokenizer) if text.strip()]
        return []

    def heldout_rows(self, count: int) -> list[Side]:
        """The held-out rows that training scores, of every stage that has some, the newest first: with `count` as many
        as it scored, the very same."""
        sides = []
        for stage in reversed(self.stages):
            if stage.kind in ROWS:
                table = stage.sides[1].table
                picks = _all(table)
                kept = min(count or len(picks), len(picks))
                sides.append(Side(stage.folder.name, table, [picks[i * len(picks) // kept] for i in range(kept)]))
        return sides

    def drawn_rows(self, count: int, seed: int) -> tuple[Side, Side]:
        """`count` rows that the stage has learned from, drawn from those given out so far, and as many held-out ones.

        Raises:
          Missing: the stage has no rows of text: reinforcement learning makes its own, pairs are not summed by token.
        """
        stage = self.stages[-1]
        if stage.kind not in ROWS:
            others = next((f", such as {s.folder}" for s in self.stages[-2::-1] if s.kind in ROWS), "")
            raise Missing(
                f"suite overfitting compares rows of documents or conversations, and {stage.folder} is fed by"
                f" {stage.kind}: give the folder of a stage that has such rows{others}."
            )
        source, heldout = stage.sides
        rng = np.random.default_rng(seed)
        given = int(stage.source["next_index"])
        if given >= source.rows:
            picks = _all(source.table)
            chosen = [picks[i] for i in rng.permutation(len(picks))[: count or None]]
        else:  # not all have been read
            order = rng.choice(given, min(given, 2 * count or given), replace=False)
            chosen = list(dict.fromkeys(source.pick(int(k)) for k in order))[: count or None]
        picks = _all(heldout.table)
        held = [picks[i] for i in sorted(rng.permutation(len(picks))[: count or None])]
        return Side(stage.folder.name, source.table, sorted(chosen)), Side(stage.folder.name, heldout.table, held)

    def learned(self) -> Iterator[tuple[str, int, Iterator[str]]]:
        """(stage, bytes of its text, its pieces) of every stage that the model has learned text from: documents, and
        turns of conversations. Nothing runs across two pieces."""
        for stage in self.stages:
            name = stage.folder.name if stage.folder.parent == self.run.folder else str(stage.folder)
            if stage.kind not in FED:
                what = "rollouts: prompts of its tasks" if stage.kind == "rollout" else f"{stage.kind}"
                self.notes.append(f"not looked through: stage {name}, which is fed by {what}")
            elif stage.kind == "documents":
                size = sum(part["bytes"] for part in stage.corpus.manifest["members"])
                yield name, size, self._documents(stage)
            else:
                table = stage.sides[0].table
                assert isinstance(table, Conversations)
                ids = np.concatenate([member.ids for member in table.members])
                yield name, int(self.run.tokenizer.byte_lengths[ids].sum()), _split(ids, self.run.tokenizer)

    def _documents(self, stage: Stage) -> Iterator[str]:
        for member in stage.corpus.members:
            yield from _pieces(member.train, self.run.tokenizer)

    def _follow(self, folder: pathlib.Path) -> None:
        """Adds a stage behind those that it starts from."""
        stored = origins.read_json(folder / "config.json")
        kept = {name: stored[name] for name in ("seed", "mesh", "tensorboard", "stages")}
        e = config.build(ConfigDict(kept))
        cfg = e.stages[folder.name]
        before = [n for n in stored.get("stages_before", ()) if (folder.parent / n / "checkpoints").is_dir()]
        try:
            if cfg.init_from:
                self._follow(origins.locate(cfg.init_from, folder.parent))
            elif before:
                self._follow(folder.parent / before[-1])
        except LmtrainError as error:
            self.notes.append(f"what {folder} starts from is not known here: {error}")
        self.stages.append(Stage(folder, cfg, e.seed, self.run.tokenizer))


def of_stage(run: runs.Run, stage: str) -> Record:
    """What another stage of a run holds out, it alone.

    Raises:
      LmtrainError: the run has no such stage with a checkpoint.
    """
    known = [here.name for here in origins.stages(run.folder) if (here / "checkpoints").is_dir()]
    if stage not in known:
        has = ", ".join(known) or "none"
        raise LmtrainError(f"heldout: {stage!r} is no stage of {run.folder}.{nearest(stage, known)} (stages: {has})")
    record = Record(dataclasses.replace(run, stage=stage))
    record.stages = record.stages[-1:]
    return record


def open_record(run: runs.Run) -> Record | None:
    """The record of a run that `lmtrain run` made; None of a model from elsewhere."""
    if not (run.folder / run.stage / "checkpoints").is_dir() or run.stage not in run.config.get("stages", {}):
        return None
    return Record(run)


def _all(table: Table) -> list[tuple[int, int]]:
    return [(member, row) for member, rows in enumerate(table.rows) for row in range(rows)]


def _pieces(stream: store.Stream, tokenizer: Tokenizer) -> Iterator[str]:
    """The documents of a stream as text, one after the other."""
    rest, start = np.empty(0, np.int64), 0
    while start < len(stream):
        ids = np.concatenate([rest, stream.read(start, start + _READ)])
        start += _READ
        begins = np.flatnonzero(ids == tokenizer.begin)
        cut = len(ids) if start >= len(stream) else int(begins[-1]) if len(begins) else 0
        rest = ids[cut:]
        yield from _split(ids[:cut], tokenizer)


def _split(ids: np.ndarray, tokenizer: Tokenizer) -> Iterator[str]:
    """The texts between special tokens."""
    at = np.flatnonzero(np.isin(ids, list(tokenizer.specials.values())))
    for first, stop in zip([0, *(at + 1)], [*at, len(ids)], strict=True):
        if first < stop:
            yield tokenizer.decode(ids[first:stop].tolist())
