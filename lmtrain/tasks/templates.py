"""Texts with places for what a row and a reply hold: "{{item.answer}}", "{{ sample.output_json.steps[0].name }}"."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from lmtrain.data.files import short
from lmtrain.data.openai_tools import json_type
from lmtrain.types import LmtrainError, nearest

SAMPLE = ("output_text", "output_json", "output_tools", "choices")
_PLACE = re.compile(r"\{\{(.*?)\}\}", re.S)
_STEP = re.compile(r"""\.([A-Za-z_][\w-]*)|\[(\d+)\]|\[(?:"([^"]*)"|'([^']*)')\]""")


class Missing(Exception):
    """There is no value at a path; its text says where the way ends."""


@dataclasses.dataclass(frozen=True)
class Path:
    """The way to a value: names and numbers of items."""

    space: str  # item | sample
    steps: tuple[str | int, ...]

    def __str__(self) -> str:
        return self.space + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.steps)

    def find(self, value: Any) -> Any:
        """What stands there in `value`. Raises Missing where nothing does, or null."""
        at = self.space
        for step in self.steps:
            inside = (
                isinstance(value, list) and step < len(value)
                if isinstance(step, int)
                else isinstance(value, Mapping) and step in value
            )
            if not inside:
                names = list(value) if isinstance(value, Mapping) else []
                has = f"it has {short(', '.join(names[:20])) or 'nothing'}"
                if not isinstance(value, Mapping):
                    has = f"it is a list of {len(value)}" if isinstance(value, list) else f"it is {json_type(value)}"
                hint = nearest(step, names) if isinstance(step, str) else ""
                raise Missing(f"{at} has no {f'[{step}]' if isinstance(step, int) else step}: {has}.{hint}")
            value = value[step]
            at += f"[{step}]" if isinstance(step, int) else f".{step}"
        if value is None:
            raise Missing(f"{at} is null")
        return value


class Template:
    """A text with places.

    Raises:
      LmtrainError: a place that is neither item.FIELD nor one of the sample's.
    """

    def __init__(self, text: str, at: str) -> None:
        self.parts: list[str | Path] = []
        end = 0
        for found in _PLACE.finditer(text):
            self.parts += [text[end : found.start()], _path(found[1].strip(), at)]
            end = found.end()
        if "{{" in text[end:]:
            raise LmtrainError(f"{at}: {{{{ without }}}}: {short(text[end:])!r}")
        self.parts.append(text[end:])

    @property
    def paths(self) -> list[Path]:
        return [part for part in self.parts if isinstance(part, Path)]

    def fill(self, sample: Mapping[str, Any], item: Mapping[str, Any]) -> str:
        """The text with values in its places; what is no text stands as JSON. Raises Missing."""
        spaces = {"sample": sample, "item": item}
        values = (part if isinstance(part, str) else part.find(spaces[part.space]) for part in self.parts)
        return "".join(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values)


def _path(text: str, at: str) -> Path:
    space = re.match(r"\w*", text)
    assert space is not None
    name, rest, steps = space[0], text[space.end() :], []
    while rest:
        step = _STEP.match(rest)
        if step is None:
            raise LmtrainError(
                f"{at}: {{{{{short(text)}}}}} is not read; write item.FIELD, item.a.b[0] or sample.output_text"
            )
        named, number, *quoted = step.groups()
        steps.append(int(number) if number is not None else next(s for s in (named, *quoted) if s is not None))
        rest = rest[step.end() :]
    if name not in ("item", "sample"):
        hint = nearest(name, ("item", "sample"))
        raise LmtrainError(f"{at}: {{{{{short(text)}}}}}: {name!r} is neither item nor sample.{hint}")
    if not steps or isinstance(steps[0], int):
        raise LmtrainError(f"{at}: {{{{{short(text)}}}}} names no field; write {name}.FIELD")
    if name == "sample" and steps[0] not in SAMPLE:
        hint = nearest(str(steps[0]), SAMPLE)
        raise LmtrainError(f"{at}: sample has no {steps[0]!r}, but {', '.join(SAMPLE)}.{hint}")
    if name == "sample" and steps[0] == "output_text" and len(steps) > 1:
        raise LmtrainError(f"{at}: {{{{{short(text)}}}}}: output_text is text, which has no parts; output_json has")
    return Path(name, tuple(steps))
