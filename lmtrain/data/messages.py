"""What a conversation is: messages, what makes one unusable, and the spans that a template turns it into.

A message is {"role": "system" | "user" | "assistant" | "tool", "content": str}, where an assistant's may have
"tool_calls": [{"name": str, "arguments": str}] and "weight": 0 or 1 (0: it is read, not learned from).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lmtrain.types import LmtrainError, nearest

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")


class Unusable(LmtrainError):
    """A row or conversation that cannot be used.

    Attributes:
      reason: the same words for the same kind of fault, so that rows can be counted by it.
      detail: what of it, and what was expected.
    """

    def __init__(self, reason: str, detail: str = "", where: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(": ".join(part for part in (where, reason, detail) if part))

    def at(self, where: str) -> Unusable:
        """The same, with the place it was found in: "chat.jsonl:17"."""
        return Unusable(self.reason, self.detail, where)


class Span(NamedTuple):
    """A piece of a conversation as it is written for the model.

    Attributes:
      text: the text, or the name of a special token.
      special: whether it is one; other text never gives a special id, even where it spells one.
      learn: whether the assistant produced it, in a message that counts.
    """

    text: str
    special: bool = False
    learn: bool = False


def check(messages: Sequence[Message], learn: bool) -> None:
    """Refuses what no template can write.

    Args:
      learn: the conversation is learned from, so that it must hold an assistant's turn, and none that says nothing. A
        conversation that goes on may hold anything that a model can sample, an empty turn too.

    Raises:
      Unusable: names the message, what it has and what it takes.
    """
    if not isinstance(messages, list | tuple) or not messages:
        got = "an empty list" if isinstance(messages, list | tuple) else type(messages).__name__
        raise Unusable("no messages", f"a list of messages was expected, got {got}")
    for i, message in enumerate(messages):
        _check_message(message, f"messages[{i}]", learn)
    if learn and not any(message["role"] == "assistant" for message in messages):
        raise Unusable("no assistant turn", f"the roles are {', '.join(message['role'] for message in messages)}")


def _check_message(message: Any, at: str, learn: bool) -> None:
    if not isinstance(message, dict):
        raise Unusable("a message is no object", f"{at} is {type(message).__name__}; it takes role and content")
    role = message.get("role")
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise Unusable("unknown role", f"{at}.role is {role!r}, takes {', '.join(ROLES)}.{hint}")
    content = message.get("content")
    if not isinstance(content, str):
        raise Unusable("content is no text", f"{at}.content is {type(content).__name__}, takes a string")
    calls = message.get("tool_calls") or ()
    may_be_empty = role == "tool" or (role == "assistant" and (calls or not learn))
    if not content.strip() and not may_be_empty:
        raise Unusable("empty content", f"{at} ({role}) says nothing")
    if calls and role != "assistant":
        raise Unusable("unusable tool call", f"{at}: a {role} message cannot call tools, an assistant's can")
    if not isinstance(calls, list | tuple):
        raise Unusable("unusable tool call", f"{at}.tool_calls is {type(calls).__name__}, takes a list")
    for k, call in enumerate(calls):
        _check_call(call, f"{at}.tool_calls[{k}]", learn)
    if message.get("weight", 1) not in (0, 1):
        raise Unusable("unusable weight", f"{at}.weight is {message['weight']!r}, takes 0 or 1")


def _check_call(call: Any, at: str, learn: bool) -> None:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise Unusable("unusable tool call", f"{at} takes an object with a name and arguments, got {call!r:.80}")
    if learn and (not call["name"] or len(call["name"].split()) != 1):
        raise Unusable("unusable tool call", f"{at}.name is {call['name']!r}, takes a name without blanks")
    if not isinstance(call.get("arguments"), str):
        kind = type(call.get("arguments")).__name__
        raise Unusable("unusable tool call", f"{at}.arguments is {kind}, takes a string (mostly JSON)")


def weight(message: Message) -> bool:
    """Whether a message is learned from: an assistant's, unless its weight is 0."""
    return message["role"] == "assistant" and bool(message.get("weight", 1))


def opening(messages: Sequence[Message]) -> Sequence[Message]:
    """The prompt that a conversation begins with: what stands before the first assistant turn that answers somebody.

    It decides whether a conversation is held out: all that begin alike are on one side.
    """
    asked = False
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and asked:
            return messages[:i]
        asked = asked or message["role"] in ("user", "tool")
    return messages
