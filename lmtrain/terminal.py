"""`lmtrain chat`: talk to a trained model in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from lmtrain import engine, runs
from lmtrain.types import LmtrainError

HELP = "(/reset forgets the conversation, /quit or Ctrl-D ends it)"


class Conversation:
    """A conversation with a run's model: what was said, and what it says next.

    Args:
      tools: a task whose `respond` answers tool calls (calculator), or None.
    """

    def __init__(self, run: runs.Run, system: str = "", tools: Any = None, **sampling: Any):
        self.run, self.system, self.tools, self.sampling = run, system, tools, sampling
        self.template = run.template
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system line."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, text: str) -> Iterator[str]:
        """Adds what the user says and yields the reply, piece by piece; tools that it calls are run."""
        self.messages.append({"role": "user", "content": text})
        for _ in range(8):  # tool calls in a row
            ids: list[int] = []
            yield from self.run.tokenizer.pieces(self._reply(ids))
            reply = self.template.parse(ids)
            self.messages.append(reply)
            answers = self.tools.respond({}, self.messages) if self.tools and reply.get("tool_calls") else None
            if not answers:
                return
            for call, answer in zip(reply["tool_calls"], answers, strict=False):
                yield f"[{call['name']} {call['arguments']} = {answer['content']}] "
            self.messages += answers

    def _reply(self, ids: list[int]) -> Iterator[int]:
        """The reply's tokens as they come; `ids` keeps them."""
        how = engine.Sampling(stop=self.template.stop, **self.sampling)
        prompt = self.template.prompt(self.messages)
        for token in engine.stream(self.run.model, self.run.params, prompt, how):
            ids.append(token)
            yield token


def chat(run: runs.Run, system: str = "", tools: Any = None, **sampling: Any) -> int:
    """Reads lines from the terminal (or a pipe) and answers each, until the end. Returns the number of replies."""
    talk = Conversation(run, system, tools, **sampling)
    asked = sys.stdin.isatty()
    if asked:
        import readline  # noqa: F401  # line editing and history for input()

        print(f"{run.folder / run.stage}, step {run.step} {HELP}")
    replies = 0
    while True:
        try:
            text = input("you> " if asked else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return replies
        if text in ("/quit", "/exit"):
            return replies
        if text == "/reset":
            talk.reset()
            continue
        if not text:
            continue
        if not asked:
            print(f"you> {text}")
        print("model> ", end="", flush=True)
        try:
            for piece in talk.say(text):
                print(piece, end="", flush=True)
        except LmtrainError as error:  # the conversation has grown too long, say
            print(f"[{error}]", end="")
            talk.reset()
        print(flush=True)
        replies += 1
