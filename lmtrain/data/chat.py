"""Conversations to token ids and back: lmtrain's own template, or a Hugging Face one (jinja.py).

The own template, which is what the tokenizer's special tokens are there for:

    <|endoftext|> <|system|>Be brief.<|end|> <|user|>Hi<|end|> <|assistant|>Hello.<|end|>
    an assistant's turn with a tool call:  <|assistant|>Let me see. <|tool_call|>NAME ARGUMENTS<|end|>
    and what the tool gives back:          <|tool_result|>...<|end|>

(without the blanks between tokens that are shown here). What the assistant produced is learned: its text, its calls and
the <|end|> of its turn, never the <|assistant|> before it. Text that spells a special token stays text.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from lmtrain.data import jinja as jinja_lib
from lmtrain.data.messages import Message, Span, Unusable, check, weight
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.types import LmtrainError

#: A conversation's ids int32[n], and float32[n]: 1 where the assistant produced the token itself and it counts.
Encoded = tuple[np.ndarray, np.ndarray]
Tools = Sequence[dict[str, Any]]

_MARK = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>", "tool": "<|tool_result|>"}
_BEGIN, _CALL, _END = "<|endoftext|>", "<|tool_call|>", "<|end|>"


class Form(Protocol):
    """How a template writes; `Own` and `jinja.Jinja` are two. Messages are checked, escapes are its own business."""

    fingerprint: str

    def spans(self, messages: Sequence[Message], tools: Tools) -> list[Span]:
        """A whole conversation, what is learned of it marked."""

    def prompt(self, messages: Sequence[Message], tools: Tools) -> list[Span]:
        """A conversation and the assistant's header."""

    def continuation(self, before: Sequence[Message], new: Sequence[Message], tools: Tools) -> list[Span]:
        """What follows the end-of-turn token of `before`, up to another header."""

    def head(self, messages: Sequence[Message], tools: Tools) -> list[Span]:
        """What a conversation begins with: `messages` is its system message, or nothing."""

    def parse(self, ids: Sequence[int]) -> Message:
        """A sampled reply."""

    @property
    def stop(self) -> tuple[str, ...]:
        """The special tokens that end a turn."""


class Template:
    """Writes conversations for a model.

    Args:
      tokenizer: the model's. The own template needs lmtrain's special tokens.
      jinja: a Hugging Face chat template: its file, a tokenizer_config.json that holds one, the folder of either, or
        the template itself; "": lmtrain's own.
      today: what a template that asks for the date is told; None: the day it is.

    Attributes:
      stop: ids that end a turn; the first is the one that the template writes.
      fingerprint: sha256 of all that decides what is written, the tokenizer aside.

    Raises:
      LmtrainError: no such file, a template that Jinja does not read, a tokenizer without the special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, jinja: str = "", today: datetime.date | None = None) -> None:
        self.tokenizer = tokenizer
        self._form: Form = jinja_lib.Jinja(jinja, tokenizer, today) if jinja else Own(tokenizer)
        ids = [tokenizer.specials[name] for name in self._form.stop] + [tokenizer.end]
        self.stop: tuple[int, ...] = tuple(dict.fromkeys(ids))
        self.fingerprint = self._form.fingerprint
        self._special = {name: np.array([i], np.int32) for name, i in tokenizer.specials.items()}

    def encode(self, messages: Sequence[Message], tools: Tools = ()) -> Encoded:
        """A whole conversation, and which of its tokens are learned.

        Returns:
          ids int32[n], weights float32[n]: weights[i] is 1 where the assistant produced token i and it counts.

        Raises:
          Unusable: says what, and in which message.
        """
        return self.tokenise([self.spans(messages, tools)])[0]

    def spans(self, messages: Sequence[Message], tools: Tools = ()) -> list[Span]:
        """What `encode` tokenises, so that many conversations can be tokenised in one call. Raises as `encode`."""
        check(messages, learn=True)
        return self._form.spans(messages, tools)

    def tokenise(self, conversations: Sequence[Iterable[Span]]) -> list[Encoded]:
        """The ids and weights of conversations' spans, all texts encoded in one call of the tokenizer."""
        talks = [list(spans) for spans in conversations]
        texts = [span.text for spans in talks for span in spans if not span.special]
        inside = [self._inside(spans, k) for spans in talks for k, span in enumerate(spans) if not span.special]
        encoded = iter(self.tokenizer.encode_batch(texts, inside=inside))
        out = []
        for spans in talks:
            ids = [self._special[span.text] if span.special else next(encoded) for span in spans]
            learn = np.array([span.learn for span in spans], np.float32)
            weights = np.repeat(learn, [len(part) for part in ids])
            out.append((np.concatenate([np.empty(0, np.int32), *ids]), weights))
        return out

    def _inside(self, spans: Sequence[Span], k: int) -> bool:
        """Whether span k goes on with a text before it, as the tokenizer sees it, so that it gets no blank."""
        return k > 0 and (not spans[k - 1].special or self.tokenizer.blank == "first")

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """The ids that a model is asked to go on from; they end behind the assistant's header."""
        check(messages, learn=False)
        return self._ids(self._form.prompt(messages, tools))

    def continuation(self, before: Sequence[Message], new: Sequence[Message], tools: Tools = ()) -> list[int]:
        """The ids that follow a conversation whose last turn the model has just sampled, end-of-turn included.

        Args:
          before: the conversation; its last message is the assistant's.
          new: what follows. The ids end behind another assistant's header.

        Raises:
          LmtrainError: the template would write `before` another way now that messages follow.
        """
        check(before, learn=False)
        check(new, learn=False)
        if before[-1]["role"] != "assistant":
            raise LmtrainError(f"continuation: the last message before is {before[-1]['role']}'s, not the assistant's")
        return self._ids(self._form.continuation(before, new, tools))

    def parse(self, ids: Iterable[int]) -> Message:
        """A sampled reply as a message: {"role": "assistant", "content", "tool_calls" where it has some}.

        Special tokens, that of its end among them, stand for no text.
        """
        return self._form.parse(list(ids))

    def head(self, messages: Sequence[Message], ids: np.ndarray, tools: Tools = ()) -> int:
        """How many of a conversation's first ids are its beginning and its system message: what a left cut keeps."""
        try:
            start = self._ids(self._form.head([m for m in messages[:1] if m["role"] == "system"], tools))
        except Unusable:  # a template that writes no system message on its own
            return 0
        n = min(len(start), len(ids))
        differ = np.flatnonzero(np.array(start[:n]) != ids[:n])
        return int(differ[0]) if len(differ) else n

    def _ids(self, spans: list[Span]) -> list[int]:
        return self.tokenise([spans])[0][0].tolist()


class Own:
    """lmtrain's own template, as the top of this file shows it.

    Tools that a conversation may call stand in its system message, one JSON object a line, behind its text.
    """

    fingerprint = hashlib.sha256(b"lmtrain 1").hexdigest()
    stop = (_END,)

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        begin = tokenizer.special(_BEGIN)  # by whichever name
        self._begin = next(name for name, i in tokenizer.specials.items() if i == begin)
        missing = [name for name in (*_MARK.values(), _CALL, _END) if name not in tokenizer.specials]
        if missing:
            raise LmtrainError(
                f"{tokenizer.source}: no special token {missing[0]}, which lmtrain's chat template needs. Set"
                " data.template to the chat template that belongs to this tokenizer (chat_template.jinja or"
                " tokenizer_config.json)"
            )

    def spans(self, messages: Sequence[Message], tools: Tools) -> list[Span]:
        """A whole conversation, what is learned of it marked."""
        _check_order(messages)
        return [Span(self._begin, True), *self._written(_with_tools(messages, tools))]

    def prompt(self, messages: Sequence[Message], tools: Tools) -> list[Span]:
        """A conversation and the assistant's header."""
        return [Span(self._begin, True), *self._written(_with_tools(messages, tools)), Span(_MARK["assistant"], True)]

    def continuation(self, before: Sequence[Message], new: Sequence[Message], tools: Tools) -> list[Span]:
        """What follows the end-of-turn token of `before`, up to another header."""
        return [*self._written(new), Span(_MARK["assistant"], True)]

    def head(self, messages: Sequence[Message], tools: Tools) -> list[Span]:
        """What a conversation begins with: its system message, or what stands before any."""
        return [Span(self._begin, True), *self._written(_with_tools(messages, tools))]

    def parse(self, ids: Sequence[int]) -> Message:
        """A sampled reply: its text, and the calls behind <|tool_call|> tokens."""
        parts: list[list[int]] = [[]]
        call = self._tokenizer.specials[_CALL]
        for i in ids:
            if i == call:
                parts.append([])
            else:
                parts[-1].append(i)
        content, *calls = [self._tokenizer.decode(part) for part in parts]
        message: Message = {"role": "assistant", "content": content}
        if calls:
            split = [text.partition(" ") for text in calls]
            message["tool_calls"] = [{"name": name, "arguments": arguments} for name, _, arguments in split]
        return message

    def _written(self, messages: Sequence[Message]) -> list[Span]:
        spans = []
        for message in messages:
            learn = weight(message)
            spans.append(Span(_MARK[message["role"]], True))
            if message["content"]:
                spans.append(Span(message["content"], False, learn))
            for call in message.get("tool_calls") or ():
                spans.append(Span(_CALL, True, learn))
                spans.append(Span(f"{call['name']} {call['arguments']}", False, learn))
            spans.append(Span(_END, True, learn))
        return spans


def _check_order(messages: Sequence[Message]) -> None:
    """What the own template takes: a system message first, tool results after a call, turns of the assistant apart."""
    called = False
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "system" and i:
            raise Unusable("a system message that is not the first", f"messages[{i}] follows {messages[i - 1]['role']}")
        if role == "tool" and not called:
            raise Unusable("a tool result without a tool call", f"messages[{i}] follows no tool_calls")
        if role == "assistant" and i and messages[i - 1]["role"] == "assistant":
            raise Unusable("two assistant turns in a row", f"messages[{i - 1}] and messages[{i}]; make them one")
        called = bool(message.get("tool_calls")) or (called and role == "tool")


def _with_tools(messages: Sequence[Message], tools: Tools) -> list[Message]:
    if not tools:
        return list(messages)
    lines = [json.dumps(tool, ensure_ascii=False) for tool in tools]
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": "\n".join([messages[0]["content"], "", *lines])}, *messages[1:]]
    return [{"role": "system", "content": "\n".join(lines)}, *messages]
