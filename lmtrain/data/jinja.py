"""Hugging Face chat templates: Jinja programs that write a conversation as one text (`transformers` documents them).

Three things `transformers` does otherwise, each for a reason:
- A message that spells a special token gives text, never the token: spellings in contents are replaced by private
  characters while the template runs, and put back behind it. (A template that glues a message's text to its own
  characters, "<|" + content, can still make one.)
- The ids are cut where the assistant begins and ends, so that `prompt` is a prefix of what is trained on, as when
  sampling. Within a stretch the whole text is encoded at once, as `transformers` does.
- Without {% generation %} blocks the assistant's turns are found by rendering what stands before each.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lmtrain.data.messages import Message, Span, Unusable, weight
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.types import LmtrainError, nearest

Tools = Sequence[dict[str, Any]]

#: What other vocabularies call the tokens that a template may ask for, where no tokenizer_config.json says.
_BOS = ("<|begin_of_text|>", "<bos>", "<s>", "<|startoftext|>", "<|endoftext|>")
_EOS = ("</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>")
_PRIVATE = range(0xF0000, 0x10FFFE)  # characters that mean nothing by themselves (Unicode planes 15 and 16)
_MARKS = "lmtrain_generation_marks"


class Jinja:
    """A Hugging Face chat template, as a form of `chat.Template`.

    Attributes:
      name: the file, or "data.template" where the template itself is given.
      text: the template.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, today: datetime.date | None = None) -> None:
        self.name, self.text, config = read(source)
        self._variables = _variables(tokenizer, config)
        self._template = _compile(self.text, self.name, today)
        self._blocks = bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.text))
        self._tokenizer = tokenizer
        names = sorted(tokenizer.specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        spec = json.dumps([self.text, self._variables], sort_keys=True)
        self.fingerprint = hashlib.sha256(spec.encode()).hexdigest()
        self._stop = self._find_stop()

    @property
    def stop(self) -> tuple[str, ...]:
        """The special token that ends an assistant's turn; () where the template writes none."""
        return (self._stop,) if self._stop else ()

    def spans(self, messages: Sequence[Message], tools: Tools) -> list[Span]:
        """A whole conversation, what is learned of it marked."""
        run = _Run(self, messages, tools)
        turns = run.blocks(messages) if self._blocks else run.turns(messages)
        return run.spans(run.text, turns)

    def prompt(self, messages: Sequence[Message], tools: Tools) -> list[Span]:
        """A conversation and the assistant's header."""
        run = _Run(self, messages, tools)
        return run.spans(run.render(messages, ask=True))

    def continuation(self, before: Sequence[Message], new: Sequence[Message], tools: Tools) -> list[Span]:
        """What follows the end-of-turn token of `before`, up to another header."""
        whole = [*before, *new]
        run = _Run(self, whole, tools)
        try:
            sampled = run.render(before)
            _, end = run.turn(sampled, before, len(before) - 1)
        except Unusable as error:
            raise LmtrainError(f"template {self.name}: cannot go on with a sampled conversation: {error}") from None
        text = run.render(whole, ask=True)
        if not text.startswith(sampled[:end]):
            same = len(os.path.commonprefix([text, sampled[:end]]))
            raise LmtrainError(
                f"template {self.name}: cannot go on with a sampled conversation: once messages follow, it writes"
                f" {text[same : same + 40]!r} where it wrote {sampled[same : same + 40]!r}. Take a template that never"
                " rewrites earlier turns (many drop earlier reasoning: remove that), or lmtrain's own"
            )
        return run.spans(text[end:])

    def head(self, messages: Sequence[Message], tools: Tools) -> list[Span]:
        """What a conversation begins with: its system message, or what stands before any."""
        if messages:
            run = _Run(self, messages, tools)
            return run.spans(run.text)
        bos = self._variables.get("bos_token", "")
        return [Span(bos, True)] if bos in self._tokenizer.specials else []

    def parse(self, ids: Sequence[int]) -> Message:
        """Reads calls as most templates write them: <tool_call>{...}</tool_call>, or a reply that is one JSON call."""
        text = self._tokenizer.decode(ids)
        calls = [call for body in _CALLS.findall(text) if (call := _call(body))]
        content = _CALLS.sub("", text).strip() if calls else text
        if not calls and (call := _call(text)):
            calls, content = [call], ""
        return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}

    def render(self, messages: list[dict], tools: list | None, ask: bool, marks: tuple[str, str]) -> str:
        """What the template writes; `ask` adds the assistant's header, `marks` stand around generation blocks."""
        import jinja2

        values = {**self._variables, "tools": tools, "documents": None, _MARKS: marks}
        try:
            return self._template.render(messages=messages, add_generation_prompt=ask, **values)
        except _Refused as error:
            raise Unusable("the template refuses it", f"{self.name}: {error}") from None
        except jinja2.TemplateError as error:
            raise Unusable("the template fails on it", f"{self.name}: {type(error).__name__}: {error}") from None
        except Exception as error:  # whatever a template's own expressions can raise
            raise Unusable("the template fails on it", f"{self.name}: {type(error).__name__}: {error}") from None

    def _find_stop(self) -> str:
        """The special token behind an assistant's text, found by writing a short conversation."""
        mark = chr(_PRIVATE[-1])
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
        for probe in (talk, [{"role": "system", "content": "a"}, *talk]):
            try:
                after = self.render(probe, None, False, ("", "")).rpartition(mark)[2]
            except Unusable:
                continue
            found = self._special.search(after)
            return found[0] if found else ""
        return ""


class _Run:
    """One conversation's way through a template: escapes, and turns found in the text. `text` is all of it."""

    def __init__(self, form: Jinja, messages: Sequence[Message], tools: Tools) -> None:
        self._form = form
        strings = list(_strings([[_for_jinja(m) for m in messages], list(tools)]))
        taken = set().union(*strings)
        spelt = sorted({found for text in strings for found in form._special.findall(text)})
        free = (chr(c) for c in _PRIVATE if chr(c) not in taken)
        begin, end, *escapes = itertools.islice(free, 2 + len(spelt))  # 131,070 there are
        self._marks = (begin, end)
        self._escape = dict(zip(spelt, escapes, strict=True))
        self._tools = self._escaped(list(tools)) or None
        self.text = self.render(messages)

    def render(self, messages: Sequence[Message], ask: bool = False, marks: bool = False) -> str:
        written = [self._escaped(_for_jinja(m)) for m in messages]
        return self._form.render(written, self._tools, ask, self._marks if marks else ("", ""))

    def blocks(self, messages: Sequence[Message]) -> list[tuple[int, int, bool]]:
        """(start, end, learned) of the template's generation blocks, in `text`."""
        marked = self.render(messages, marks=True)
        begin, end = self._marks
        turns: list[tuple[int, int]] = []
        clean = ""
        for part in re.split(f"({begin}|{end})", marked):
            if part == begin:
                turns.append((len(clean), len(clean)))
            elif part == end:
                turns[-1] = (turns[-1][0], len(clean))
            else:
                clean += part
        if clean != self.text:
            raise Unusable("the template fails on it", f"{self._form.name}: it changes the text of generation blocks")
        learned = [weight(m) for m in messages if m["role"] == "assistant"]
        if len(learned) != len(turns):
            if not all(learned):
                raise Unusable(
                    "unusable weight",
                    f"{self._form.name} has {len(turns)} generation blocks for {len(learned)} assistant turns, so that"
                    " weight 0 belongs to none of them",
                )
            learned = [True] * len(turns)
        return [(*turn, learn) for turn, learn in zip(turns, learned, strict=True)]

    def turns(self, messages: Sequence[Message]) -> list[tuple[int, int, bool]]:
        """(start, end, learned) of every assistant turn in `text`, found by rendering what stands before each."""
        own = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        return [(*self.turn(self.text, messages, i), weight(messages[i])) for i in own]

    def turn(self, text: str, messages: Sequence[Message], i: int) -> tuple[int, int]:
        """Where the assistant's message i starts and ends (its end-of-turn token included) in the text of all."""
        before = self.render(messages[:i], ask=True)
        stop = self._form._stop
        found = text.startswith(before)
        if found and stop:
            end = text.find(stop, len(before)) + len(stop)
            found = end >= len(before) + len(stop)
        elif found:
            upto = self.render(messages[: i + 1])
            end = len(upto)
            found = text.startswith(upto)
        if not found:
            raise Unusable(
                "the template hides where a turn begins",
                f"{self._form.name}: what it writes up to messages[{i}] changes with what follows; put {{% generation"
                " %} and {% endgeneration %} around what the assistant writes, its end-of-turn token included",
            )
        return len(before), end

    def spans(self, text: str, turns: Iterable[tuple[int, int, bool]] = ()) -> list[Span]:
        """The text cut where turns begin and end and at special tokens, escapes put back."""
        turns = list(turns)
        cuts = sorted({0, len(text), *(at for start, end, _ in turns for at in (start, end))})
        spans: list[Span] = []
        for a, b in itertools.pairwise(cuts):
            learn = any(start <= a and b <= end and on for start, end, on in turns)
            at = a
            for found in self._form._special.finditer(text, a, b):
                spans += [Span(text[at : found.start()], False, learn), Span(found[0], True, learn)]
                at = found.end()
            spans.append(Span(text[at:b], False, learn))
        back = {private: spelt for spelt, private in self._escape.items()}
        restored = str.maketrans(back)
        spans = [s if s.special else s._replace(text=s.text.translate(restored)) for s in spans if s.text]
        return [s for s in _stripped(spans, self._form._tokenizer.strips) if s.text]

    def _escaped(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._form._special.sub(lambda found: self._escape[found[0]], value) if self._escape else value
        if isinstance(value, dict):
            return {self._escaped(key): self._escaped(item) for key, item in value.items()}
        return [self._escaped(item) for item in value] if isinstance(value, list | tuple) else value


def held(folder: Path) -> bool:
    """Whether a folder holds a chat template that `read` can read."""
    try:
        return bool(read(str(folder)))
    except LmtrainError:
        return False


def read(source: str) -> tuple[str, str, dict]:
    """(name, template, tokenizer_config.json or {}) of what `data.template` names.

    Raises:
      LmtrainError: no such file, or none with a template in it.
    """
    if "{{" in source or "{%" in source:
        return "data.template", source, {}
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        names = [name for name in ("chat_template.jinja", "tokenizer_config.json") if (path / name).is_file()]
        if not names:
            raise LmtrainError(f"data.template: {path} holds no chat_template.jinja and no tokenizer_config.json")
        path = path / names[0]
    try:
        text = path.read_text(encoding="utf-8")
        beside = path.with_name("tokenizer_config.json")
        config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    except FileNotFoundError:
        others = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise LmtrainError(f"data.template: no file {path}.{nearest(path.name, others)}") from None
    except (OSError, ValueError) as error:
        raise LmtrainError(f"data.template: {path}: cannot be read: {error}") from None
    if path.suffix == ".json":
        found = config.get("chat_template") if isinstance(config, dict) else None
        if isinstance(found, list):  # several, by name
            found = {item.get("name"): item.get("template") for item in found}.get("default")
        if not isinstance(found, str):
            raise LmtrainError(f"data.template: {path} holds no chat_template")
        text = found
    return str(path), text, config if isinstance(config, dict) else {}


class _Refused(Exception):
    """What `raise_exception` raises within a template."""


def _compile(text: str, name: str, today: datetime.date | None) -> Any:
    """The template, in the environment that `transformers` gives one."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.nodes
        import jinja2.sandbox
    except ImportError as error:
        raise LmtrainError(
            f"data.template needs jinja2 ({error}), of the extra `chat` (pip install -e '.[chat]' in a checkout)"
        ) from None

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}: what the assistant writes, between the marks of this rendering."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("marked", [jinja2.nodes.ContextReference()])
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def marked(self, context: Any, caller: Callable[[], str]) -> str:
            begin, end = context.resolve(_MARKS)
            return f"{begin}{caller()}{end}"

    def refuse(message: str) -> None:
        raise _Refused(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
               sort_keys: bool = False) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    now = datetime.datetime.now() if today is None else datetime.datetime.combine(today, datetime.time())
    environment.globals["strftime_now"] = now.strftime
    try:
        return environment.from_string(text)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise LmtrainError(f"{name}{f':{line}' if line else ''}: not a Jinja template: {error}") from None


def _variables(tokenizer: Tokenizer, config: dict) -> dict[str, str]:
    """bos_token, eos_token and the like: from tokenizer_config.json, else by the names in use."""
    found: dict[str, str] = {}
    for name, usual in (("bos_token", _BOS), ("eos_token", _EOS)):
        guess = next((token for token in usual if token in tokenizer.specials), None)
        if guess is not None:
            found[name] = guess
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found


def _for_jinja(message: Message) -> dict[str, Any]:
    """A message as `transformers` hands it to templates: calls under "function", arguments as an object."""
    written: dict[str, Any] = {"role": message["role"], "content": message["content"]}
    calls = message.get("tool_calls")
    if calls:
        written["tool_calls"] = [
            {"type": "function", "function": {"name": call["name"], "arguments": _arguments(call["arguments"])}}
            for call in calls
        ]
    return written


def _arguments(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


_CALLS = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.S)


def _call(text: str) -> dict[str, str] | None:
    """{"name", "arguments"} of {"name": ..., "arguments" or "parameters": ...}; None where a text is no such thing."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if arguments is None:
        return None
    return {"name": value["name"], "arguments": arguments if isinstance(arguments, str) else _dump(arguments)}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(_strings(part) for item in value.items() for part in item)
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(_strings, value))


def _stripped(spans: list[Span], strips: dict[str, tuple[bool, bool]]) -> list[Span]:
    """Some vocabularies' special tokens swallow the blanks beside them (lstrip, rstrip)."""
    out = list(spans)
    for i, span in enumerate(spans):
        before, after = strips.get(span.text, (False, False)) if span.special else (False, False)
        if before and i and not out[i - 1].special:
            out[i - 1] = out[i - 1]._replace(text=out[i - 1].text.rstrip())
        if after and i + 1 < len(spans) and not out[i + 1].special:
            out[i + 1] = out[i + 1]._replace(text=out[i + 1].text.lstrip())
    return out
