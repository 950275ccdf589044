"""Conversations to batches: encoded, cut to fit a row, packed. In memory, at every start."""

from __future__ import annotations

import collections
import dataclasses
import datetime
from collections.abc import Iterator

import numpy as np

from lmtrain import log
from lmtrain.data import jinja
from lmtrain.data import rows as rows_lib
from lmtrain.data.chat import Encoded, Template
from lmtrain.data.messages import Message, Unusable
from lmtrain.data.pipeline import Heldout, Pipeline
from lmtrain.data.samples import Report, Sample, as_json, collect, samples, track
from lmtrain.data.split import field, members
from lmtrain.data.table import Conversations, Units
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.schema import ConfigError, Data
from lmtrain.types import LmtrainError, nearest

KINDS = {"chat": "conversations", "pairs": "pairs", "labels": "labelled replies"}
TRUNCATE = ("right", "left", "drop", "refuse")
MALFORMED = ("skip", "refuse")

#: The day that a template is told, where it asks: rows must be the same tomorrow, when the run goes on. (It is the one
#: that Llama 3.1's template writes where it is told none.)
DAY = datetime.date(2024, 7, 26)
_CHUNK = 512  # units that one call of the tokenizer gets
_NO_LESSON = "nothing to learn"


def build(
    kind: str,
    data: Data,
    tokenizer: Tokenizer,
    batch_size: int,
    seed: int,
    share: tuple[int | None, int | None] = (None, None),
    progress: bool = True,
) -> tuple[Pipeline, Heldout]:
    """Training batches of conversations, and the fixed held-out ones.

    Args:
      kind: "chat" | "pairs" | "labels", what the rows are read as and how they are laid out (types.py).
      share: (index, count), which of how many equal parts of each batch this process reads; see `pipeline.build`.

    Returns:
      source, heldout: `source.table` and `heldout.table` are table.Conversations.

    Raises:
      ConfigError, LmtrainError: settings, files or rows that cannot be, each in one message.
    """
    check_settings(kind, data)
    template = Template(tokenizer, data.template, today=DAY)
    report = Report(data.malformed)
    sides = collect(kind, data, report, progress)
    identity = {"kind": kind, "tokenizer": tokenizer.fingerprint, "template": template.fingerprint}
    identity |= {"truncate": data.truncate}
    parts = members(data)

    def table(side: str) -> Conversations:
        units = [encode(kind, sides[name][side], template, data, report, progress) for name in parts]
        weights = [member.weight for member in parts.values()]
        return Conversations(units, data.row_length, tokenizer.pad, data.pack, list(parts), weights, identity)

    train, heldout = table("train"), table("heldout")
    if report.reasons:
        log.say(f"data: {report.text()}")
    _check_tables(kind, data, train, heldout, report)
    train.said = summary(kind, train, heldout, report)
    source = Pipeline(train, batch_size, seed, data.workers, *share)
    return source, Heldout(heldout, data.heldout_rows, batch_size, tokenizer, *share)


def check_settings(kind: str, data: Data) -> None:
    """Raises ConfigError for settings of Data that chat rows do not take."""
    for name, got, takes in (
        ("data.truncate", data.truncate, TRUNCATE),
        ("data.malformed", data.malformed, MALFORMED),
        ("kind", kind, tuple(KINDS)),
    ):
        if got not in takes:
            raise ConfigError(f"{name}: got {got!r}, takes {', '.join(takes)}.{nearest(str(got), takes)}")
    if data.groups or data.outcomes or data.reweigh:
        raise ConfigError(
            "data.groups, data.outcomes and data.reweigh are for documents; conversations take data.augment"
        )
    for name, member in members(data).items():
        rows_lib.check_columns(member.columns, field(name))
        if member.columns and member.source == "openai":
            raise ConfigError(
                f"{field(name)}.columns: fields of source openai have OpenAI's names; source jsonl renames"
            )


def preflight(kind: str, data: Data) -> None:
    """Refuses what can be refused quickly: settings, a template or sources that do not open, no usable row at all.

    Raises:
      ConfigError, LmtrainError: each in one message.
    """
    check_settings(kind, data)
    if data.template:
        jinja.read(data.template)
    for name, member in members(data).items():
        report = Report(data.malformed)
        if next(samples(kind, member, field(name), "train", report), None) is None:
            raise LmtrainError(f"{field(name)}: {_nothing(kind, report)}")


def texts(kind: str, data: Data) -> Iterator[str]:
    """The text of all messages that are trained on, none held out: what a tokenizer may learn from."""
    check_settings(kind, data)
    report = Report(data.malformed)
    for member in collect(kind, data, report, progress=False).values():
        for sample in member["train"]:
            for message in (m for talk in sample.talks for m in talk):
                yield message["content"]
                yield from (f"{call['name']} {call['arguments']}" for call in message.get("tool_calls") or ())


# ------------------------------------------------------------------------------------------------------------ encoding
def encode(
    kind: str, found: list[Sample], template: Template, data: Data, report: Report, progress: bool = False
) -> Units:
    """Samples to tokens, cut to fit a row. What has nothing to learn, or does not fit, is left out and counted."""
    if kind == "labels":
        found = mismatched(found, report)
    encoded: list[Encoded] = []
    values: list[float] = []
    for first in track(range(0, len(found), _CHUNK), "tokenising", progress):
        kept, spans = [], []
        for sample in found[first : first + _CHUNK]:
            try:
                spans.append([template.spans(talk, sample.tools) for talk in _learned(sample)])
                kept.append(sample)
            except Unusable as error:
                report(error.at(sample.where))
        tokenised = iter(template.tokenise([talk for talks in spans for talk in talks]))
        for sample in kept:
            talks = fit(sample, [next(tokenised) for _ in sample.talks], template, data, report)
            if talks:
                encoded += talks
                values.append(sample.value or 0.0)
    name = {"pairs": "margins_BT", "labels": "labels_BT"}.get(kind)
    has_values = kind == "labels" or any(sample.value is not None for sample in found)
    return Units.of(encoded, 1 if kind == "chat" else 2, {name: values} if name and has_values else {})


def _learned(sample: Sample) -> list[list[Message]]:
    """The conversations, of whose prompt nothing is learned."""
    return [[*rows_lib.unlearned(talk[: sample.prompt]), *talk[sample.prompt :]] for talk in sample.talks]


def mismatched(found: list[Sample], report: Report) -> list[Sample]:
    """Gives every labelled reply a second conversation: its prompt with the reply to another one (KTO's z).

    The next reply is taken that no row has under this prompt, so that none is paired with a reply of its own.
    """
    own: dict[bytes, set[bytes]] = collections.defaultdict(set)
    asked = [as_json(sample.talks[0][: sample.prompt]) for sample in found]
    said = [as_json(sample.talks[0][sample.prompt :]) for sample in found]
    for prompt, reply in zip(asked, said, strict=True):
        own[prompt].add(reply)
    out = []
    for i, sample in enumerate(found):
        others = ((i + step) % len(found) for step in range(1, min(len(found), 1 << 10)))
        other = next((j for j in others if said[j] not in own[asked[i]] and asked[j] != asked[i]), None)
        if other is None:
            report.drop(Unusable("no other prompt's reply to mismatch", "kto needs replies that differ", sample.where))
        else:
            second = [*sample.talks[0][: sample.prompt], *found[other].talks[0][found[other].prompt :]]
            out.append(dataclasses.replace(sample, talks=(sample.talks[0], second)))
    return out


def fit(sample: Sample, talks: list[Encoded], template: Template, data: Data, report: Report) -> list[Encoded] | None:
    """The conversations of a unit, cut as data.truncate says where they are longer than a row; None: left out."""
    T, total = data.row_length, sum(len(ids) for ids, _ in talks)
    cut = total > T
    if cut:
        too_long = f"{total:,} tokens, a row has data.row_length={T}"
        if data.truncate == "refuse":
            raise LmtrainError(f"{sample.where}: {too_long}. Lengthen it, or set data.truncate to right, left or drop")
        if data.truncate == "drop":
            report.drop(Unusable("longer than a row", too_long, sample.where))
            return None
        room = [T] if len(talks) == 1 else _shares(T, *(len(ids) for ids, _ in talks))
        messages = _learned(sample)
        if data.truncate == "right":
            talks = [(ids[:n], weights[:n]) for (ids, weights), n in zip(talks, room, strict=True)]
        else:
            talks = [
                _cut_left(talk, n, template.head(said, talk[0], sample.tools))
                for talk, n, said in zip(talks, room, messages, strict=True)
            ]
    if not all(weights[1:].any() for _, weights in talks):
        why = "no token of the assistant's is left after the cut" if cut else "no turn of the assistant's counts"
        report.drop(Unusable(_NO_LESSON, why, sample.where))
        return None
    if len(talks) == 2 and np.array_equal(talks[0][0], talks[1][0]):
        report.drop(Unusable(_NO_LESSON, "the two conversations are the same after the cut", sample.where))
        return None
    report.cut += cut
    return talks


def _shares(room: int, first: int, second: int) -> list[int]:
    """How the room of a row is split between two conversations: evenly, what one leaves goes to the other."""
    a = min(first, max(room - room // 2, room - second))
    return [a, min(second, room - a)]


def _cut_left(talk: Encoded, room: int, head: int) -> Encoded:
    """The end of a conversation; its beginning and system message (`head` tokens) stay if they leave half the room."""
    ids, weights = talk
    head = head if len(ids) > room and head <= room // 2 else 0
    rest = len(ids) - min(len(ids), room - head)
    return tuple(np.concatenate([x[:head], x[max(rest, head) :]]) for x in (ids, weights))  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------ what there is
def summary(kind: str, train: Conversations, heldout: Conversations, report: Report) -> str:
    """One line: what there is to train on, how full its rows are, and what was left out."""
    units, held = (sum(map(len, table.members)) for table in (train, heldout))
    full = train.tokens / (len(train) * train.row_length)
    said = [
        f"{units:,} {KINDS[kind]} ({_short(train.tokens)} tokens, {_short(train.learned)} to learn) in {len(train):,}"
        f" rows of {train.row_length} ({int(100 * full)} % full)",
        f"{held:,} held out",
    ]
    for count, what in (
        (report.cut, "cut"),
        (report.skipped, "skipped"),
        (report.duplicates, "duplicates dropped"),
        (report.leaks, "dropped for a held-out prompt"),
    ):
        said += [f"{count:,} {what}"] if count else []
    return ", ".join(said)


def _check_tables(kind: str, data: Data, train: Conversations, heldout: Conversations, report: Report) -> None:
    for name, rows, member in zip(train.names, train.rows, members(data).values(), strict=True):
        if not rows:
            raise LmtrainError(
                f"{field(name)} (source={member.source!r}, path={member.path!r}): {_nothing(kind, report)}"
            )
    if not sum(heldout.rows):
        raise LmtrainError(
            f"data.heldout_fraction={data.heldout_fraction} (data.heldout={data.heldout}) holds out none of"
            f" {sum(map(len, train.members)):,} {KINDS[kind]}: raise the fraction, or give more of them"
        )


def _nothing(kind: str, report: Report) -> str:
    what = f"no {KINDS[kind]} to train on"
    return f"{what}: {report.text()}" if report.reasons else f"{what}: no rows, or all of them held out"


def _short(count: int) -> str:
    return f"{count / 1e6:,.1f}M" if count >= 100_000 else f"{count:,}"
