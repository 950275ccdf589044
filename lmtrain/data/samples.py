"""Rows to samples: read, deduplicated, split into those to train on and those held out.

A sample is held out by the hash of the prompt it opens with (messages.opening), whatever follows: so the turns of one
prompt, the two replies of a pair, and all replies to one question are on one side. The rule is that of split.py.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from lmtrain.data import openai_rows, swaps
from lmtrain.data import rows as rows_lib
from lmtrain.data.messages import Message, Unusable, opening
from lmtrain.data.split import AUTO_HASH, digest, field, held_out, members
from lmtrain.schema import Data
from lmtrain.types import LmtrainError

_SHOWN = 5  # unusable rows that are shown, of all that are counted


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one row gives, before it is encoded.

    Attributes:
      where: the row, for messages.
      talks: one conversation, or two: chosen and rejected; a labelled reply gets its second, a mismatched one, later.
      prompt: how many messages of each are the prompt (0: the whole conversation is learned from).
      value: a pair's margin, a label (+1 or -1), else None.
    """

    where: str
    talks: tuple[list[Message], ...]
    prompt: int = 0
    tools: tuple[dict, ...] = ()
    value: float | None = None
    like: bytes = b""  # the key that it has, where not its own: that of what it is the counterfactual of

    @functools.cached_property
    def key(self) -> bytes:
        """What decides its side: the prompt that it opens with."""
        return self.like or digest(as_json([[m["role"], m["content"]] for m in opening(self.talks[0])]))

    @functools.cached_property
    def digest(self) -> bytes:
        """What repeats of it share."""
        return digest(as_json([self.talks, self.tools, self.value]))


class Report:
    """What could not be used, counted by reason, and what was cut."""

    def __init__(self, malformed: str = "skip") -> None:
        self.refuse = malformed == "refuse"
        self.reasons: collections.Counter[str] = collections.Counter()
        self.shown: list[str] = []
        self.cut = self.duplicates = self.leaks = 0

    def __call__(self, error: LmtrainError) -> None:
        """A row that is malformed."""
        if self.refuse:
            raise error
        self.drop(error)

    def drop(self, error: LmtrainError) -> None:
        """A row that is left out whatever data.malformed says."""
        self.reasons[getattr(error, "reason", "cannot be read")] += 1
        if len(self.shown) < _SHOWN:
            self.shown.append(str(error))

    @property
    def skipped(self) -> int:
        return self.reasons.total()

    def text(self) -> str:
        """One line of counts, and one for each of the first rows; "" where all could be used."""
        if not self.reasons:
            return ""
        counts = ", ".join(f"{count:,} x {reason}" for reason, count in self.reasons.most_common())
        return "\n".join([f"left out: {counts}", *(f"    {line}" for line in self.shown)])


def samples(kind: str, data: Data, here: str, split: str, report: Report) -> Iterator[Sample]:
    """Every usable sample of a source; the others go to `report`."""
    for where, folded in rows_lib.rows(data, here, split, bad=report):
        for row in [folded] if data.source == "openai" else rows_lib.unfold(folded):
            try:
                if data.source == "openai":
                    row = _openai(kind, row, where)
                swap = swaps.swaps(data.augment, f"{here}.augment")
                if kind == "pairs" and data.augment:
                    found = _even(row, data.columns, where, swap)
                else:
                    found = list(_samples(kind, row, data.columns, where))
                    found += [other for sample in found if (other := swapped(sample, swap)) is not None]
            except Unusable as error:
                report(error)
                continue
            yield from found


def _openai(kind: str, row: dict, where: str) -> dict:
    try:
        return openai_rows.check(openai_rows.KIND_OF[kind], row)
    except Unusable as error:
        raise error.at(where) from None


def _samples(kind: str, row: dict, columns: dict[str, str], where: str) -> Iterator[Sample]:
    tools = tuple(rows_lib.tools(row, columns, where))
    if kind == "chat":
        yield Sample(where, (rows_lib.conversation(row, columns, where),), 0, tools)
    elif kind == "pairs":
        p = rows_lib.pair(row, columns, where)
        yield Sample(where, (p.prompt + p.chosen, p.prompt + p.rejected), len(p.prompt), tools, p.margin)
    else:
        for prompt, reply, desirable in rows_lib.labelled(row, columns, where):
            yield Sample(where, (prompt + reply,), len(prompt), tools, 1.0 if desirable else -1.0)


def swapped(sample: Sample, swap: swaps.Swaps) -> Sample | None:
    """The counterfactual of a sample, every message of it; None where no word is exchanged."""
    talks = tuple([{**m, "content": swap(m["content"])} for m in talk] for talk in sample.talks)
    if talks == sample.talks:
        return None
    return dataclasses.replace(sample, where=f"{sample.where}, swapped", talks=talks, like=sample.key)


def _even(row: dict, columns: dict[str, str], where: str, swap: swaps.Swaps) -> list[Sample]:
    """A pair of a conversation and the same with its words exchanged, of which the last replies count
    (objectives/fair.py, even): [] where there is nothing to exchange."""
    tools = tuple(rows_lib.tools(row, columns, where))
    talk = rows_lib.conversation(row, columns, where)
    other = [{**m, "content": swap(m["content"])} for m in talk]
    if talk[-1]["role"] != "assistant" or other == talk or len(talk) < 2:
        return []
    return [Sample(where, (talk, other), len(talk) - 1, tools)]


def collect(kind: str, data: Data, report: Report, progress: bool) -> dict[str, dict[str, list[Sample]]]:
    """{member: {"train": samples, "heldout": samples}}: distinct ones, no opening prompt on both sides."""
    seen: set[bytes] = set()

    def distinct(found: Iterable[Sample]) -> Iterator[Sample]:
        for sample in found:
            if sample.digest in seen:
                report.duplicates += 1
            else:
                seen.add(sample.digest)
                yield sample

    sides = {}
    for name, member in members(data).items():
        read = functools.partial(samples, kind, member, field(name), report=report)
        label = f"reading {name or member.path or member.source}"
        held = list(distinct(read(split="heldout"))) if member.source == "task" else None
        every = list(distinct(track(read(split="train"), label, progress)))
        sides[name] = _split(every, data) if held is None else {"train": every, "heldout": held}
    held_keys = {sample.key for side in sides.values() for sample in side["heldout"]}
    for side in sides.values():  # members may split differently, by hash or by tail, so the rule is enforced
        kept = [sample for sample in side["train"] if sample.key not in held_keys]
        report.leaks += len(side["train"]) - len(kept)
        side["train"] = kept
    return sides


def _split(every: list[Sample], data: Data) -> dict[str, list[Sample]]:
    """By hash of the opening prompt; by tail: the last prompts to appear, with all that belongs to them."""
    keys = list(dict.fromkeys(sample.key for sample in every))
    if data.heldout == "hash" or (data.heldout == "auto" and len(keys) >= AUTO_HASH):
        held = {key for key in keys if held_out(key, data.heldout_fraction)}
    else:
        cut = int(len(keys) * (1 - data.heldout_fraction))
        held = set(keys[max(1, min(cut, len(keys) - 1)) :])
    return {
        "train": [sample for sample in every if sample.key not in held],
        "heldout": [sample for sample in every if sample.key in held],
    }


def as_json(value: Any) -> bytes:
    """JSON that is equal where values are; ASCII, for text may hold lone surrogates."""
    return json.dumps(value, sort_keys=True).encode()


def track(items: Iterable[Any], label: str, show: bool) -> Iterator[Any]:
    """The items, with a bar on a terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    hide = not (show and console.is_terminal and jax.process_index() == 0)
    return iter(progress.track(items, label, console=console, transient=True, disable=hide))
