"""Messages as others write them, OpenAI's and ShareGPT's, to lmtrain's.

OpenAI    {"role": ..., "content": text or [{"type": "text", "text": ...}], "tool_calls": [{"function": {...}}]}
ShareGPT  {"from": "human" | "gpt" | "system" | "function_call" | "observation", "value": text}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lmtrain.data import records
from lmtrain.data.messages import Message, Unusable

_OPENAI_ROLES = {"developer": "system", "function": "tool"}
_SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool", "function": "tool",
}  # fmt: skip


def messages(value: Any, name: str) -> list[Message]:
    """A field of messages as lmtrain's; system messages that say nothing are left out. `name` is the field, in errors.

    What is no message, call or text raises Unusable; roles and contents are left for `messages.check`.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise Unusable("no messages", f"{name} is {type(value).__name__}, takes a list of messages")
    found = [_message(item, f"{name}[{i}]") for i, item in enumerate(value)]
    return [m for m in found if m["role"] != "system" or not isinstance(m["content"], str) or m["content"].strip()]


def _message(item: Any, at: str) -> Message:
    if not isinstance(item, Mapping):
        raise Unusable("a message is no object", f"{at} is {type(item).__name__}; it takes role and content")
    item = {key: value for key, value in item.items() if value is not None}
    sharegpt = "from" in item and "role" not in item
    role = item.get("from" if sharegpt else "role")
    content = item.get("value" if sharegpt else "content", "")
    calls = item.get("tool_calls") or []
    if role == "function_call" or "function_call" in item:
        calls = [content if role == "function_call" else item["function_call"]]
        content = "" if role == "function_call" else content
    if isinstance(role, str):
        role = (_SHAREGPT_ROLES if sharegpt else _OPENAI_ROLES).get(role, role)
    message: Message = {"role": role, "content": _text(content, at)}
    if calls:
        if isinstance(calls, str) or not isinstance(calls, Sequence):
            raise Unusable("unusable tool call", f"{at}.tool_calls is {type(calls).__name__}, takes a list")
        message["tool_calls"] = [_call(call, f"{at}.tool_calls[{k}]") for k, call in enumerate(calls)]
    if "weight" in item:
        message["weight"] = item["weight"]
    return message


def _text(content: Any, at: str) -> Any:
    """Text, or OpenAI's list of parts where all are text; anything else as it is, for `check` to name."""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return content
    texts = []
    for k, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise Unusable("content is no text", f"{at}.content[{k}] is {kind}, takes text")
        texts.append(part["text"])
    return "".join(texts)


def _call(call: Any, at: str) -> dict[str, str]:
    """{"name", "arguments"} of OpenAI's {"function": {...}}, or of either as JSON text."""
    if isinstance(call, str):
        call = records.parse(call.encode("utf-8", "surrogatepass"), at, "JSON")
    call = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise Unusable("unusable tool call", f"{at} takes an object with a name and arguments")
    arguments = call.get("arguments", "{}")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {"name": call["name"], "arguments": arguments}


def tools(given: Any) -> list[dict]:
    """A field of tools, a list of objects or its JSON; None gives none. Raises Unusable."""
    if isinstance(given, str):
        given = records.parse(given.encode("utf-8", "surrogatepass"), "tools", "JSON") if given.strip() else []
    if given is None:
        return []
    if not isinstance(given, Sequence) or not all(isinstance(tool, Mapping) for tool in given):
        raise Unusable("unusable tools", "tools takes a list of objects, or its JSON")
    return [dict(tool) for tool in given]
