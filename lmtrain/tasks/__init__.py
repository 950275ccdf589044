"""Tasks: problems, how they are asked, and what an answer is worth. An evaluation and a reward in one.

A task is a class with

    name, max_tokens   its name; the longest reply
    rows(split)        "train" or "heldout": a Sequence of JSON-able dicts, the same on every machine; no held-out
                       problem is ever in train, whatever the settings and the seed
    messages(row)      the prompt: [{"role": "user", "content": "12+34"}]
    score(row, reply)  0 to 1

and, where it can,

    solution(row)            a demonstration: the messages that follow the prompt
    answer(row, reply)       the answer, normalised, for a majority vote; "" for none
    tools(row)               what may be called, as OpenAI defines tools; the prompt shows them
    respond(row, messages)   what others say after an assistant's turn; None: the conversation is over
    score_conversation(row, messages)   parts, each 0 to 1
    versions(row)            rows that are one problem: several replies to it are to these in turn, and
    alike(row, reply, other, theirs)    0 to 1, how alike two of them are: makes a part, "consistent"

One file each; your own is "package.module:Class". docs/tasks.md shows how.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from lmtrain.tasks import spec as spec_lib
from lmtrain.types import LmtrainError

_NEEDED = ("name", "max_tokens", "rows", "messages", "score")


def names() -> list[str]:
    """The tasks of this package, sorted."""
    return sorted(_classes())


def get(spec: str) -> Any:
    """Makes a task: "addition", "addition(digits=2, reversed=True)" or "package.module:Class(n=3)".

    Raises:
      LmtrainError: names what is unknown or cannot be, and what it takes.
    """
    name, settings = spec_lib.parse(spec, "task")
    if ":" in name:
        found = spec_lib.imported(name, spec, "task")
        if not callable(found):
            raise LmtrainError(f"task {spec!r}: {name} is {type(found).__name__}, but takes a class.")
    else:
        classes = _classes()
        if name not in classes:
            raise spec_lib.unknown(name, classes, "task")
        found = classes[name]
    spec_lib.check(found, settings, spec, "task")
    try:
        task = found(**settings)
    except LmtrainError as error:
        raise LmtrainError(f"task {spec!r}: {error}") from None
    except Exception as error:
        raise LmtrainError(f"task {spec!r}: cannot be made: {type(error).__name__}: {error}") from error
    if missing := [part for part in _NEEDED if not hasattr(task, part)]:
        raise LmtrainError(
            f"task {spec!r}: {type(task).__name__} has no {', '.join(missing)}; a task has {', '.join(_NEEDED)}."
        )
    return task


def _classes() -> dict[str, type]:
    """The class of each task by its name: the one whose `name` is that of its file."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        for _, kind in inspect.getmembers(loaded, inspect.isclass):
            if getattr(kind, "name", None) == module.name and kind.__module__ == loaded.__name__:
                found[module.name] = kind
    return found
