"""Messages as OpenAI's fine-tuning files have them, to lmtrain's; anything that the format does not have is named.

    {"role": "system" | "developer" | "user", "content": text or parts, "name": text}
    {"role": "assistant", "content": text or parts, "refusal": text, "tool_calls": [...], "function_call": {...},
     "weight": 0 | 1, "name": text}
    {"role": "tool", "content": text or parts, "tool_call_id": text}
    {"role": "function", "name": text, "content": text or parts}                          the older form of a result

A part is {"type": "text", "text": ...}, an assistant's also {"type": "refusal", "refusal": ...}. What an assistant
refuses with is what it says. What somebody is called (`name`) is checked and not written: lmtrain's messages have none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lmtrain.data.files import short
from lmtrain.data.messages import Message, Unusable
from lmtrain.data.openai_tools import Tools, call, calls, json_type, members, text
from lmtrain.types import nearest

_FIELDS = {
    "system": ("name",), "developer": ("name",), "user": ("name",), "function": (),
    "assistant": ("name", "refusal", "tool_calls", "function_call", "weight", "audio"),
    "tool": ("name",),
}  # fmt: skip
_NEEDED = {
    "system": ("role", "content"), "developer": ("role", "content"), "user": ("role", "content"),
    "assistant": ("role",), "tool": ("role", "content", "tool_call_id"), "function": ("role", "name", "content"),
}  # fmt: skip
_ROLES = {"developer": "system", "function": "tool"}  # lmtrain's word for it
_NOT_TEXT = ("image_url", "input_audio", "file")


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A message, with what lmtrain's form of it leaves out.

    Attributes:
      calls: ids of its calls; of a function_call, the function's name.
      answers: the id, or name, that a result belongs to; "" where it is none.
    """

    role: str
    message: Message
    calls: tuple[str, ...] = ()
    answers: str = ""


def conversation(given: Any, at: str, tools: Tools) -> list[Message]:
    """The messages of a line, each result behind its call in the order of the calls.

    Raises:
      Unusable: names the message, what it has and what it takes.
    """
    if not isinstance(given, list) or not given:
        got = "an empty list" if given == [] else json_type(given)
        raise Unusable("no messages", f"{at} is {got}, takes a list of messages")
    turns = [_turn(item, f"{at}[{i}]", tools) for i, item in enumerate(given)]
    return [turn.message for turn in _in_order(turns, at)]


def output(given: Any, at: str, tools: Tools) -> Message:
    """The one message of the assistant's that a preferred or non-preferred output is. Raises Unusable."""
    if not isinstance(given, list) or len(given) != 1:
        got = f"a list of {len(given)} messages" if isinstance(given, list) else json_type(given)
        raise Unusable("an output that is not one message", f"{at} is {got}, takes a list with one assistant message")
    turn = _turn(given[0], f"{at}[0]", tools)
    if turn.role != "assistant":
        raise Unusable("an output that is not the assistant's", f"{at}[0].role is {turn.role}, takes assistant")
    if "weight" in turn.message:
        raise Unusable("unusable weight", f"{at}[0] has a weight; an output is learned from or against as a whole")
    return turn.message


def _turn(item: Any, at: str, tools: Tools) -> _Turn:
    if not isinstance(item, Mapping):
        raise Unusable("a message is no object", f"{at} is {json_type(item)}, takes an object with role and content")
    role = item.get("role")
    if role is None:
        raise Unusable(
            "missing field", f"{at} has no role: it has {', '.join(item) or 'nothing'}.{nearest('role', item)}"
        )
    if not isinstance(role, str) or role not in _FIELDS:
        hint = nearest(role, _FIELDS) if isinstance(role, str) else ""
        raise Unusable("unknown role", f"{at}.role is {short(repr(role), 60)}, takes {', '.join(_FIELDS)}.{hint}")
    if role != "assistant" and "weight" in item:
        raise Unusable("unusable weight", f"{at} ({role}) has a weight; only an assistant's message is learned from")
    if role != "assistant" and (item.get("tool_calls") or item.get("function_call")):
        raise Unusable("unusable tool call", f"{at}: a {role} message cannot call tools, an assistant's can")
    needed = _NEEDED[role]
    fields = members(item, at, needed, (*_FIELDS[role], *(("content",) if role == "assistant" else ())))
    if "name" in fields and len(text(fields["name"], f"{at}.name").split()) != 1:
        raise Unusable("wrong type", f"{at}.name is {short(repr(fields['name']))}, takes a name without blanks")
    if role == "assistant":
        return _assistant(fields, at, tools)
    content = _content(fields["content"], f"{at}.content", ("text",))
    if not content.strip() and role not in ("tool", "function"):  # a tool may give nothing back
        raise Unusable("empty content", f"{at} ({role}) says nothing")
    answers = {"tool": "tool_call_id", "function": "name"}.get(role)
    key = f"{role} {text(fields[answers], f'{at}.{answers}')}" if answers else ""
    return _Turn(role, {"role": _ROLES.get(role, role), "content": content}, answers=key)


def _assistant(fields: dict[str, Any], at: str, tools: Tools) -> _Turn:
    if "audio" in fields:
        raise Unusable("content is no text", f"{at}.audio: lmtrain's models write text")
    if "tool_calls" in fields and "function_call" in fields:
        raise Unusable("unusable tool call", f"{at} has tool_calls and function_call; the second is the older form")
    content = _content(fields.get("content", ""), f"{at}.content", ("text", "refusal"))
    if "refusal" in fields:
        refusal = text(fields["refusal"], f"{at}.refusal")
        if content.strip():
            raise Unusable("wrong type", f"{at} has content and a refusal; it takes one of the two")
        content = refusal
    message: Message = {"role": "assistant", "content": content}
    keys: list[str] = []
    if "tool_calls" in fields:
        message["tool_calls"], ids = calls(fields["tool_calls"], f"{at}.tool_calls", tools)
        keys = [f"tool {i}" for i in ids]
    elif "function_call" in fields:
        made = call(fields["function_call"], f"{at}.function_call", tools.functions, "functions")
        message["tool_calls"], keys = [made], [f"function {made['name']}"]
    elif "content" not in fields and "refusal" not in fields:
        raise Unusable("missing field", f"{at} has no content and calls no tool")
    elif not content.strip():
        raise Unusable("empty content", f"{at} (assistant) says nothing")
    if "weight" in fields:
        weight = fields["weight"]
        if type(weight) is not int or weight not in (0, 1):
            raise Unusable("unusable weight", f"{at}.weight is {short(repr(weight), 60)}, takes 0 or 1")
        message["weight"] = weight
    return _Turn("assistant", message, calls=tuple(keys))


def _content(content: Any, at: str, kinds: tuple[str, ...]) -> str:
    """Text, or parts of it as one text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Unusable("content is no text", f"{at} is {json_type(content)}, takes text or a list of text parts")
    texts = []
    for k, part in enumerate(content):
        here = f"{at}[{k}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _NOT_TEXT:
            raise Unusable("content is no text", f"{here} is of type {kind}: lmtrain's models read text alone")
        if not isinstance(part, Mapping) or kind not in kinds:
            got = f"of type {short(repr(kind), 60)}" if isinstance(part, Mapping) else json_type(part)
            takes = " or ".join(f'{{"type": "{name}", "{name}": ...}}' for name in kinds)
            hint = nearest(kind, kinds) if isinstance(kind, str) else ""
            raise Unusable("content is no text", f"{here} is {got}, takes {takes}.{hint}")
        value = members(part, here, ("type", kind))[kind]
        if not isinstance(value, str):
            raise Unusable("content is no text", f"{here}.{kind} is {json_type(value)}, takes text")
        texts.append(value)
    return "".join(texts)


def _in_order(turns: list[_Turn], at: str) -> list[_Turn]:
    """Refuses an order that no template writes. Results come in the order of their calls, for lmtrain drops the ids."""
    out: list[_Turn] = []
    asked: tuple[str, ...] = ()  # by the assistant's last turn
    results: dict[str, _Turn] = {}
    for i, turn in enumerate(turns):
        here = f"{at}[{i}]"
        if turn.answers:
            if turn.answers in results:
                raise Unusable("a result twice", f"{here} is the second result of {_name(turn.answers)}")
            if turn.answers not in asked:
                calls_ = ", ".join(map(_name, asked)) or "none"
                hint = nearest(turn.answers, asked).replace("tool ", "").replace("function ", "")
                raise Unusable(
                    "a result without a call",
                    f"{here} answers {_name(turn.answers)}; the calls before it are {short(calls_)}.{hint}",
                )
            results[turn.answers] = turn
            continue
        out += _answered(asked, results, here)
        if turn.message["role"] == "system" and i:
            raise Unusable("a system message that is not the first", f"{here} follows {turns[i - 1].role}")
        if turn.role == "assistant" and i and turns[i - 1].role == "assistant":
            raise Unusable("two assistant messages in a row", f"{at}[{i - 1}] and {here}; make them one")
        out.append(turn)
        asked, results = turn.calls, {}
    # Calls that end a conversation are what is learned: nobody has answered yet.
    return out + (_answered(asked, results, "the end") if results else [])


def _answered(asked: tuple[str, ...], results: dict[str, _Turn], before: str) -> list[_Turn]:
    if missing := [key for key in asked if key not in results]:
        raise Unusable("a call without a result", f"{_name(missing[0])} has none before {before}")
    return [results[key] for key in asked]


def _name(key: str) -> str:
    """`call 'call_1'` of "tool call_1"."""
    role, _, name = key.partition(" ")
    return f"{'call' if role == 'tool' else 'function_call'} {short(name)!r}"
