"""The lines of OpenAI's three fine-tuning formats, checked, as rows that the rest of lmtrain reads.

    supervised      {"messages": [...], "tools": [...], "parallel_tool_calls": true | false, "functions": [...]}
    preference      {"input": {"messages", "tools", "parallel_tool_calls"}, "preferred_output": [message],
                     "non_preferred_output": [message]}
    reinforcement   {"messages": [...], "tools": [...], and any further fields, for the grader}

What is accepted here can be trained on with lmtrain's own template; a line that cannot is named, whatever OpenAI
would say to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmtrain.data import openai_tools
from lmtrain.data.messages import Message, Unusable, weight
from lmtrain.data.openai_messages import conversation, output
from lmtrain.data.openai_tools import Tools, json_type, members
from lmtrain.types import nearest

KINDS = ("supervised", "preference", "reinforcement")
#: What a source's rows are read as (data/conversations.py) -> the format of its lines.
KIND_OF = {"chat": "supervised", "pairs": "preference", "labels": "preference"}

_SUPERVISED = ("tools", "parallel_tool_calls", "functions")
PREFERENCE = ("input", "preferred_output", "non_preferred_output")
#: Fields that say which other format a line is in.
_OTHERS = {
    "the preference format": PREFERENCE,
    "a preference format of others": ("chosen", "rejected"),
    "the older completions format": ("prompt", "completion"),
    "ShareGPT's format": ("conversations",),
}


def check(kind: str, row: Any) -> dict[str, Any]:
    """A line of a format as the row that data/rows.py reads.

    Args:
      kind: one of KINDS.

    Returns:
      supervised: messages, tools. preference: input (messages, tools), preferred_output, non_preferred_output.
      reinforcement: messages, tools, and `item`: the line as it is, for the grader. Messages are lmtrain's.

    Raises:
      Unusable: says what, where in the line, and what was expected.
    """
    if not isinstance(row, Mapping):
        raise Unusable("a line is no object", f"it is {json_type(row)}, takes an object")
    try:
        return {"supervised": _supervised, "preference": _preference, "reinforcement": _reinforcement}[kind](row)
    except RecursionError:
        raise Unusable("JSON nested too deeply to be read", "leave this row out") from None


def _supervised(row: Mapping[str, Any]) -> dict[str, Any]:
    _same_format(row, "messages", "the supervised format")
    fields = members(row, "", ("messages",), _SUPERVISED)
    tools = openai_tools.read(fields)
    messages = conversation(fields["messages"], "messages", tools)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise Unusable("no assistant message", f"the roles are {', '.join(roles)}; there is nothing to learn")
    if roles[-1] != "assistant":
        raise Unusable("the last message is not the assistant's", f"it is the {roles[-1]}'s")
    if "user" not in roles:
        raise Unusable("no user message", f"the roles are {', '.join(roles)}; nobody asks")
    if not any(weight(message) for message in messages):
        raise Unusable("nothing to learn", "every assistant message has weight 0")
    return {"messages": messages, "tools": list(tools.listed)}


def _preference(row: Mapping[str, Any]) -> dict[str, Any]:
    if "messages" in row and "input" not in row:
        raise Unusable("another format", "messages stand in input: {messages, tools, parallel_tool_calls}")
    _same_format(row, "input", "the preference format")
    fields = members(row, "", PREFERENCE)
    asked = members(fields["input"], "input", ("messages",), ("tools", "parallel_tool_calls"))
    tools = openai_tools.read(asked, "input.")
    prompt = conversation(asked["messages"], "input.messages", tools)
    _ends_with(prompt, ("user", "tool"), "input.messages", "the outputs answer it")
    chosen, rejected = (output(fields[name], name, tools) for name in PREFERENCE[1:])
    if chosen == rejected:
        raise Unusable("the two outputs are the same", "a pair without a difference teaches nothing")
    return {
        "input": {"messages": prompt, "tools": list(tools.listed)},
        "preferred_output": [chosen],
        "non_preferred_output": [rejected],
    }


def _reinforcement(row: Mapping[str, Any]) -> dict[str, Any]:
    if "messages" not in row:
        _same_format(row, "messages", "the reinforcement format")
        has = ", ".join(list(row)[:20]) or "nothing"
        raise Unusable("missing field", f"the line has no messages: it has {has}.{nearest('messages', row)}")
    tools: Tools = openai_tools.read({name: row.get(name) for name in ("tools",)})
    messages = conversation(row["messages"], "messages", tools)
    _ends_with(messages, ("user",), "messages", "the model answers it")
    return {"messages": messages, "tools": list(tools.listed), "item": dict(row)}


def _ends_with(messages: list[Message], roles: tuple[str, ...], at: str, why: str) -> None:
    last = messages[-1]["role"]
    if last not in roles:
        takes = " or ".join(f"a {role}'s" for role in roles)
        raise Unusable("the last message is not a user's", f"{at} ends with the {last}'s, takes {takes}: {why}")


def _same_format(row: Mapping[str, Any], needed: str, expected: str) -> None:
    """Says that a line is in another format, rather than which of its fields are unknown."""
    if needed in row:
        return
    for name, fields in _OTHERS.items():
        found = [field for field in fields if field in row]
        if name != expected and len(found) >= min(2, len(fields)):  # one alone may be a field of a grader's
            raise Unusable("another format", f"{', '.join(found)}: {name}; {expected} has {needed}")
