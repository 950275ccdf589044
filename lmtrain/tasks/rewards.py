"""Rewards that need no task: plain functions of (row, messages), each giving 0 to 1, or a dict of parts that do.

`messages` is the whole conversation. `get` finds one by its name with settings, "length(low=20, high=80)", or your own
by "package.module:function"; what it gives is checked, so that a reward that breaks is named, with its row.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lmtrain.tasks import spec as spec_lib
from lmtrain.types import LmtrainError

Row = dict[str, Any]
Messages = Sequence[dict[str, Any]]
Reward = Callable[[Row, Messages], "float | dict[str, float]"]


def length(row: Row, messages: Messages, *, low: int = 10, high: int = 200) -> float:
    """Replies of `low` to `high` characters: 1 within, falling to 0 at no characters and at twice `high`."""
    return _mean(band(len(reply.strip()), low, high) for reply in replies(messages))


def no_repetition(row: Row, messages: Messages, *, n: int = 3) -> float:
    """Different runs of `n` words as a share of all, over all replies together. Fewer than `n` words repeat nothing."""
    runs: list[tuple[str, ...]] = []
    for reply in replies(messages):
        said = words(reply)
        runs += [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def on_topic(row: Row, messages: Messages, *, least: int = 1) -> float:
    """Share of the replies that use at least `least` different words of row["topic"] (a text, or a list of words)."""
    topic = set(words(" ".join(_listed(row, "topic"))))
    return _mean(float(len(topic.intersection(words(reply))) >= least) for reply in replies(messages))


def facts(row: Row, messages: Messages) -> float:
    """Share of row["facts"] (a list of texts, or a dict whose values are) that stand in some reply, as whole words."""
    wanted = _listed(row, "facts")
    said = [words(reply) for reply in replies(messages)]
    return _mean(float(any(_contains(reply, words(fact)) for reply in said)) for fact in wanted)


def ended(row: Row, messages: Messages) -> float:
    """1 where the last reply ended by itself, 0 where the limit cut it: the message's own word, "truncated"."""
    last = next((m for m in reversed(messages) if m["role"] == "assistant"), None)
    if last is None or "truncated" not in last:
        raise ValueError("the last reply does not say whether it was cut (no 'truncated' in its message)")
    return float(not last["truncated"])


def matches(row: Row, messages: Messages, *, pattern: str = r".*\S.*") -> float:
    """1 where the last reply matches a regular expression from its beginning to its end."""
    said = replies(messages)
    return float(bool(said) and re.fullmatch(pattern, said[-1].strip(), re.S) is not None)


# ---------------------------------------------------------------- finding one


def names() -> list[str]:
    """The rewards of this file, sorted."""
    return sorted(_functions())


def get(spec: str) -> Reward:
    """A reward by its name, with settings: "length", "length(low=20, high=80)", "package.module:function(n=3)".

    Raises:
      LmtrainError: names what is unknown or cannot be. The reward itself raises one where the function raises, or gives
        anything but numbers from 0 to 1; it names the reward and the row.
    """
    name, settings = spec_lib.parse(spec, "reward")
    if ":" in name:
        function = spec_lib.imported(name, spec, "reward")
        if not callable(function):
            raise LmtrainError(
                f"reward {spec!r}: {name} is {type(function).__name__}, but takes a function of (row, messages)."
            )
    else:
        known = _functions()
        if name not in known:
            raise spec_lib.unknown(name, known, "reward")
        function = known[name]
    spec_lib.check(function, settings, spec, "reward", given=2)
    return functools.partial(_checked, spec, functools.partial(function, **settings))


def _functions() -> dict[str, Callable[..., Any]]:
    found = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    return {n: f for n, f in found if list(inspect.signature(f).parameters)[:2] == ["row", "messages"] and n[0] != "_"}


def _checked(spec: str, function: Reward, row: Row, messages: Messages) -> float | dict[str, float]:
    try:
        value = function(row, messages)
    except Exception as error:
        raise LmtrainError(f"reward {spec}: raised {type(error).__name__}: {error}; {_about(row)}") from error
    if isinstance(value, dict):
        if not value:
            raise LmtrainError(f"reward {spec}: gave no parts; {_about(row)}")
        return {str(part): _number(spec, f", {part}", number, row) for part, number in value.items()}
    return _number(spec, "", value, row)


def _number(spec: str, part: str, value: Any, row: Row) -> float:
    found = float(value) if isinstance(value, numbers.Real) else math.nan
    if not 0 <= found <= 1:
        raise LmtrainError(f"reward {spec}{part}: gave {value!r:.80}, but takes a number from 0 to 1; {_about(row)}")
    return found


def _about(row: Row) -> str:
    text = repr(row)
    return f"row {text}" if len(text) <= 300 else f"row {text[:300]}..."


# ---------------------------------------------------------------- what they are made of


def replies(messages: Messages) -> list[str]:
    """What the assistant said, turn by turn; turns that only call tools left out."""
    return [m["content"] for m in messages if m["role"] == "assistant" and (m["content"] or not m.get("tool_calls"))]


def words(text: str) -> list[str]:
    """Lower-case words, without punctuation."""
    return re.findall(r"\w+", text.lower())


def band(count: int, low: int, high: int) -> float:
    """1 from `low` to `high`, falling to 0 at 0 and at twice `high`."""
    if count < low:
        return count / low
    return max(0.0, 1 - max(0, count - high) / high) if high else float(count == 0)


def _contains(said: list[str], wanted: list[str]) -> bool:
    return any(said[i : i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1)) if wanted else False


def _listed(row: Row, field: str) -> list[str]:
    value = row[field]
    found = [value] if isinstance(value, str) else list(value.values()) if isinstance(value, dict) else list(value)
    if not found:
        raise ValueError(f"row[{field!r}] is empty")
    return found


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0
