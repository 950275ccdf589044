"""Rows that hold conversations: where they come from, and which of the formats in use each is in.

    a conversation  messages (OpenAI) | conversations (ShareGPT) | prompt side + reply side:
                    prompt, question or instruction (with input) + completion, response, answer or output
    a pair          a prompt + chosen + rejected, each text or messages | input, preferred_output, non_preferred_output
    a labelled one  a conversation + label | a pair, which gives a good one and a bad one

`data.columns` renames: {"prompt": "problem"} takes the prompt from the field "problem". A row may also have `system`,
`tools` and (a pair) `margin`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lmtrain import flags
from lmtrain.data import formats, records, sources, strict
from lmtrain.data.messages import Message, Unusable, check
from lmtrain.schema import ConfigError, Data
from lmtrain.types import LmtrainError, nearest

TASK_ROWS = 10_000  # that a task gives where data.limit does not say: many make theirs without end

_READERS: dict[str, Callable[..., Iterator[tuple[str, Any]]]] = {
    "jsonl": records.jsonl,
    "json": records.json_file,
    "parquet": records.parquet,
    "arrayrecord": records.arrayrecord,
    "hf": records.hf,
    "openai": strict.lines,  # samples.py checks its rows (openai_rows.py)
}
_TAKES = ", ".join([*_READERS, "task or 'package.module:function'"])
_PROMPTS = ("prompt", "question", "instruction")
_REPLIES = ("completion", "response", "answer", "output")
_OTHERS = ("messages", "conversations", "input", "system", "tools", "chosen", "rejected", "margin", "label")
#: What `data.columns` may rename.
COLUMNS = (*_PROMPTS, *_REPLIES, *_OTHERS)


class Pair(NamedTuple):
    """Two replies to one prompt, the first preferred, by `margin` where that is known."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: float | None


class Labelled(NamedTuple):
    """A reply to a prompt, and whether it is a good one."""

    prompt: list[Message]
    completion: list[Message]
    desirable: bool


# --------------------------------------------------------------------------------------------------------------- rows
def rows(
    data: Data, field: str = "data", split: str = "train", bad: Callable[[LmtrainError], None] | None = None
) -> Iterator[tuple[str, dict]]:
    """(where, row) of every row of a source, of its first `data.limit` where that is set.

    Args:
      field: what errors call the settings.
      split: "train" or "heldout", for source task, whose rows know their side.
      bad: what gets the error of a single row that cannot be read (no JSON, no object); None: it is raised.

    Raises:
      ConfigError: a source that has no rows. LmtrainError: a file that is missing or broken, a task without solutions.
    """
    limit = data.limit or (TASK_ROWS if data.source == "task" else 0)
    for count, (where, row) in enumerate(_open(data, field, split), 1):
        error = row if isinstance(row, LmtrainError) else None
        if error is None and not isinstance(row, Mapping):
            error = Unusable("a row is no object", f"got {type(row).__name__}", where)
        if error is None:
            yield where, dict(row)
        elif bad is None:
            raise error
        else:
            bad(error)
        if count == limit:
            return


def _open(data: Data, field: str, split: str) -> Iterator[tuple[str, Any]]:
    if data.source in _READERS or data.source == "task":
        if not data.path:
            what = "a task's name" if data.source == "task" else "a file, folder, glob (hf: or name)"
            raise ConfigError(f"{field}.path: not set; source {data.source} takes {what}")
        if data.source == "task":
            yield from _task(data, field, split)
            return
        for where, row in _READERS[data.source](data, field):
            yield where, records.parse(row, where, "JSON") if data.source == "arrayrecord" else row
    elif ":" in data.source:
        function = flags.import_function(data.source, f"{field}.source")
        for number, row in enumerate(sources.call(function, data, field, "dicts"), 1):
            yield f"{data.source}#{number}", row
    elif data.source in sources.SOURCES:
        raise ConfigError(f"{field}.source: {data.source} holds text, no conversations; chat takes {_TAKES}")
    else:
        hint = nearest(data.source, [*_READERS, "task"])
        raise ConfigError(f"{field}.source: got {data.source!r}, takes {_TAKES}.{hint}")


def _task(data: Data, field: str, split: str) -> Iterator[tuple[str, dict]]:
    """A task's own demonstrations. What stands in its prompts, examples say, is read and not learned."""
    from lmtrain import tasks  # tasks may read data, so data reads them only here

    task = tasks.get(data.path)
    if not hasattr(task, "solution"):
        raise LmtrainError(
            f"{field}.path: task {data.path} has no solutions to learn from (no method `solution`); it can only reward"
        )
    problems = task.rows(split)
    for number in range(min(len(problems), data.limit or TASK_ROWS)):
        problem = problems[number]
        messages = [*unlearned(task.messages(problem)), *task.solution(problem)]
        row = {"messages": messages}
        if hasattr(task, "preference"):
            row |= {"prompt": task.messages(problem), **task.preference(problem)}
        yield f"task {data.path} ({split}), row {number}", row


def unlearned(messages: Sequence[Message]) -> list[Message]:
    """The messages, the assistant's with weight 0."""
    return [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages]


def unfold(row: dict) -> list[dict]:
    """A row with `instances` (Alpaca's seed tasks) as one row for each of them; any other as it is."""
    instances = row.get("instances")
    if "instruction" not in row or "output" in row or not isinstance(instances, list):
        return [row]
    rest = {name: value for name, value in row.items() if name != "instances"}
    return [
        {**rest, **instance} if isinstance(instance, dict) else {**rest, "output": instance} for instance in instances
    ]


# ------------------------------------------------------------------------------------------------------- conversations
def check_columns(columns: Mapping[str, str], field: str = "data") -> None:
    """Raises ConfigError where `data.columns` renames what there is not."""
    for name in columns:
        if name not in COLUMNS:
            raise ConfigError(f"{field}.columns: {name!r} is none of {', '.join(COLUMNS)}.{nearest(name, COLUMNS)}")


def conversation(row: Mapping[str, Any], columns: Mapping[str, str] | None = None, where: str = "") -> list[Message]:
    """The conversation that a row holds, in whichever format. Empty system messages are left out.

    Raises:
      Unusable: names the place, the reason and what was expected.
    """
    try:
        several = unfold(dict(row))
        if len(several) > 1:
            raise Unusable("several conversations in a row", "`unfold` makes each a row of its own")
        prompt, reply = _prompt_and_reply(_view(several[0], columns or {}), columns or {})
        messages = [*unlearned(prompt), *reply]
        check(messages, learn=True)
    except Unusable as error:
        raise error.at(where) from None
    return messages


def tools(row: Mapping[str, Any], columns: Mapping[str, str] | None = None, where: str = "") -> list[dict]:
    """The tools that a row says its conversation may call; [] where it says none. Raises Unusable."""
    try:
        view = _view(row, columns or {})
        given = view.get("tools")
        if given is None and isinstance(view.get("input"), Mapping):
            given = view["input"].get("tools")
        return formats.tools(given)
    except Unusable as error:
        raise error.at(where) from None


def pair(row: Mapping[str, Any], columns: Mapping[str, str] | None = None, where: str = "") -> Pair:
    """The pair that a row holds. Without a prompt, chosen and rejected are whole conversations that begin alike.

    Raises:
      Unusable: names the place, the reason and what was expected.
    """
    try:
        return _pair(_view(row, columns or {}))
    except Unusable as error:
        raise error.at(where) from None


def labelled(row: Mapping[str, Any], columns: Mapping[str, str] | None = None, where: str = "") -> list[Labelled]:
    """The labelled replies that a row holds: one with its label, or the two of a pair.

    Raises:
      Unusable: names the place, the reason and what was expected.
    """
    try:
        view = _view(row, columns or {})
        if "chosen" in view or "preferred_output" in view:
            p = _pair(view)
            return [Labelled(p.prompt, p.chosen, True), Labelled(p.prompt, p.rejected, False)]
        if "label" not in view:
            raise Unusable("no label", f"a field label, or chosen and rejected, was expected; {_fields(view)}")
        prompt, reply = _prompt_and_reply(view, columns or {})
        if not prompt:  # messages: the last turn is what the label is about
            prompt, reply = reply[:-1], reply[-1:]
        _check_reply(prompt, reply, "completion")
        return [Labelled(unlearned(prompt), reply, _label(view["label"]))]
    except Unusable as error:
        raise error.at(where) from None


def _prompt_and_reply(view: dict, columns: Mapping[str, str]) -> tuple[list[Message], list[Message]]:
    """What a row asks, and what it answers; a list of messages is all of it reply."""
    asks = next((name for name in _PROMPTS if name in view), None)
    answers = next((name for name in _REPLIES if name in view), None)
    both = asks is not None and answers is not None
    renamed = both and (asks in columns or answers in columns)
    for name in () if renamed else ("messages", "conversations"):
        if name in view:
            return [], _system(view, formats.messages(view[name], name))
    if asks is None or answers is None:
        raise Unusable(
            "no conversation in it",
            f"messages, conversations, or one of {', '.join(_PROMPTS)} with one of {', '.join(_REPLIES)} was expected"
            f" (data.columns renames fields); {_fields(view)}",
        )
    return _prompt(view), _reply(view[answers], answers)


def _pair(view: dict) -> Pair:
    asked = view.get("input")
    if "preferred_output" in view and isinstance(asked, Mapping):  # OpenAI's preference format
        view = {**view, "prompt": asked.get("messages"), "chosen": view["preferred_output"]}
        view["rejected"] = view.pop("non_preferred_output", None)
    for name in ("chosen", "rejected"):
        if view.get(name) is None:
            raise Unusable(f"no {name} reply", _fields(view))
    chosen, rejected = (_reply(view[name], name) for name in ("chosen", "rejected"))
    if any(name in view for name in _PROMPTS):
        prompt = _prompt(view)
        chosen, rejected = _behind(prompt, chosen), _behind(prompt, rejected)
    else:
        alike = itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
        same = len(list(alike))
        prompt, chosen, rejected = _system(view, chosen[:same]), chosen[same:], rejected[same:]
    if chosen == rejected:
        raise Unusable("chosen and rejected are the same", "a pair without a difference teaches nothing")
    _check_reply(prompt, chosen, "chosen")
    _check_reply(prompt, rejected, "rejected")
    margin = view.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float) or margin != margin):
        raise Unusable("unusable margin", f"{margin!r}, takes a number")
    return Pair(unlearned(prompt), chosen, rejected, None if margin is None else float(margin))


def _check_reply(prompt: list[Message], reply: list[Message], name: str) -> None:
    """A prompt that asks something, and a reply that the assistant begins."""
    if not any(message.get("role") in ("user", "tool") for message in prompt):
        raise Unusable("no prompt", f"nobody has said anything that {name} could answer")
    try:
        check([*unlearned(prompt), *reply], learn=True)
    except Unusable as error:
        raise Unusable(error.reason, f"{name}: {error.detail}") from None
    if not reply or reply[0]["role"] != "assistant":
        got = reply[0]["role"] if reply else "nothing"
        raise Unusable("a reply that is not the assistant's", f"{name} begins with {got}")


# -------------------------------------------------------------------------------------------------------------- fields
def _view(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row's fields under the names of this file. None is no field: Parquet and `datasets` fill up with it."""
    view = {name: value for name, value in row.items() if value is not None and name not in columns.values()}
    for name, own in columns.items():
        if own not in row:
            hint = nearest(own, [str(key) for key in row])
            raise Unusable("no such field", f"{own!r}, which data.columns takes for {name}.{hint} {_fields(row)}")
        if row[own] is not None:
            view[name] = row[own]
    return view


def _fields(view: Mapping[str, Any]) -> str:
    return f"it has the fields {', '.join(map(str, list(view)[:20])) or 'none'}"


def _prompt(view: dict) -> list[Message]:
    """The prompt side: text, instruction with its input, or messages."""
    name = next(name for name in _PROMPTS if name in view)
    value = view[name]
    if isinstance(value, str):
        if not value.strip():
            raise Unusable("empty prompt", f"{name} says nothing")
        extra = view.get("input")
        if isinstance(extra, str) and extra.strip() and name == "instruction":
            value = f"{value}\n\n{extra}"
        value = [{"role": "user", "content": value}]
    elif not value:
        raise Unusable("empty prompt", f"{name} is {value!r}")
    return _system(view, formats.messages(value, name))


def _reply(value: Any, name: str) -> list[Message]:
    """The reply side: text, a message, or messages."""
    if isinstance(value, str):
        if not value.strip():
            raise Unusable("empty reply", f"{name} says nothing")
        return [{"role": "assistant", "content": value}]
    return formats.messages([value] if isinstance(value, Mapping) else value, name)


def _behind(prompt: list[Message], reply: list[Message]) -> list[Message]:
    """A reply without the prompt, where it repeats that before itself."""
    asked = [m for m in prompt if m["role"] != "system"]
    talk = [m for m in reply if m["role"] != "system"]
    return talk[len(asked) :] if talk[: len(asked)] == asked else reply


def _system(view: dict, messages: list[Message]) -> list[Message]:
    text = view.get("system")
    if not isinstance(text, str) or not text.strip() or (messages and messages[0].get("role") == "system"):
        return messages
    return [{"role": "system", "content": text}, *messages]


def _label(value: Any) -> bool:
    if value not in (0, 1, -1):
        raise Unusable("unusable label", f"{value!r}, takes true or false")
    return value == 1
