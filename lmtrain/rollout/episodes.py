"""Conversations between the policy and a task: prompts in, whole conversations out, with the very tokens sampled.

One way to play them, for reinforcement learning and for evaluation. A conversation's next turn is asked for as soon as
its last one has ended, while the others go on: the engine never waits for the slowest.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lmtrain.data.chat import Template
from lmtrain.engine import Engine, Sampling
from lmtrain.types import LmtrainError, Params

Message = dict[str, Any]


@dataclasses.dataclass
class Episode:
    """One conversation.

    Attributes:
      task: what it is about (contract 5).
      row: of the task.
      seed: decides every draw of this conversation, and nothing else does.
      messages: the prompt, then replies and whatever the task answered.
      tokens: ids of all of it.
      own: for each token, whether the policy sampled it (its end-of-turn token included).
      logps: for each token, the sampler's log-probability; 0 where it sampled nothing.
      truncated: the last reply was cut by a limit.
      turns: replies of the policy; 0: the prompt left no room for any.
      shown: it is the task's demonstration, not sampled.
      scores: parts of the reward, filled in by who scores it.
    """

    task: Any
    row: dict[str, Any]
    seed: int
    messages: list[Message]
    tokens: list[int]
    own: list[bool]
    logps: list[float]
    truncated: bool = False
    turns: int = 0
    shown: bool = False
    scores: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def reply(self) -> str:
        """The text of the last assistant turn; "" where there is none."""
        replies = [m["content"] for m in self.messages if m["role"] == "assistant"]
        return replies[-1] if replies else ""

    @property
    def length(self) -> int:
        """Tokens that the policy sampled."""
        return sum(self.own)

    @property
    def last_reply_length(self) -> int:
        """Tokens of the last reply, its end-of-turn token included."""
        n = 0
        while n < len(self.own) and self.own[-1 - n]:
            n += 1
        return n


class User(Protocol):
    """Who answers the policy: takes conversations whose last message is the policy's, gives the messages that follow
    each, or None where the conversation is over."""

    def __call__(self, episodes: Sequence[Episode]) -> list[list[Message] | None]: ...


def versions(task: Any, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that several replies to one problem are to, in turn: for most tasks the row alone."""
    return task.versions(row) if hasattr(task, "versions") else [row]


def start(task: Any, row: dict[str, Any], template: Template, seed: int, number: int = 0) -> Episode:
    """A conversation before its first reply; the `number`-th of several about one row."""
    some = versions(task, row)
    row = some[number % len(some)]
    messages = list(task.messages(row))
    tokens = template.prompt(messages, tools_of(task, row))
    return Episode(task, row, seed, messages, tokens, [False] * len(tokens), [0.0] * len(tokens))


def tools_of(task: Any, row: dict[str, Any]) -> Sequence[dict[str, Any]]:
    """The tools that a prompt shows; most tasks show none."""
    return task.tools(row) if hasattr(task, "tools") else ()


def demonstrate(e: Episode, template: Template, longest: int) -> None:
    """Plays the task's own solution instead of sampling; its tokens count as the policy's, with log-probability 0.

    Raises:
      LmtrainError: the task has no solutions, or one does not fit into a row.
    """
    if not hasattr(e.task, "solution"):
        raise LmtrainError(f"task {e.task.name} has no solutions to show: set rollout.demonstrations=0.")
    e.messages += e.task.solution(e.row)
    ids, weights = template.encode(e.messages, tools_of(e.task, e.row))
    if len(ids) > longest:
        raise LmtrainError(f"task {e.task.name}: a solution of {len(ids)} tokens, in rows of {longest}: {e.row}")
    e.tokens, e.own, e.logps = ids.tolist(), (weights > 0).tolist(), [0.0] * len(ids)
    e.turns, e.shown = sum(m["role"] == "assistant" for m in e.messages), True


def scripted(episodes: Sequence[Episode]) -> list[list[Message] | None]:
    """The user that the task itself plays (`respond`); none where it has no such function."""
    return [e.task.respond(e.row, e.messages) if hasattr(e.task, "respond") else None for e in episodes]


def play(
    engine: Engine,
    params: Params,
    template: Template,
    episodes: Sequence[Episode],
    *,
    temperature: float = 1.0,
    max_tokens: int = 0,
    turns: int = 8,
    longest: int = 0,
    user: User = scripted,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Plays every conversation to its end, in place.

    Args:
      max_tokens: of one reply; 0: the task's own limit.
      turns: replies of the policy in one conversation, at most.
      longest: tokens of a whole conversation, at most; 0: no limit. A reply that reaches it is truncated.
      user: who answers the policy.
      progress: called with the number of conversations that have ended since the last call.

    A prompt that leaves no room for a reply is answered by nothing, which was cut: `turns` stays 0.

    Raises:
      LmtrainError: every prompt is so.
    """

    def ask(e: Episode) -> None:
        limit = max_tokens or e.task.max_tokens
        limit = min(limit, longest - len(e.tokens)) if longest else limit
        seed = seed_of(e.seed, e.turns)
        engine.submit(e.tokens, Sampling(limit, temperature, stop=template.stop, seed=seed), tag=e)

    left = 0
    for e in episodes:
        if longest and len(e.tokens) >= longest:
            e.truncated = True
            e.messages.append({"role": "assistant", "content": "", "truncated": True})
            for of_tokens in (e.tokens, e.own, e.logps):
                del of_tokens[longest:]
        else:
            ask(e)
            left += 1
    if episodes and not left:
        raise LmtrainError(
            f"task {episodes[0].task.name}: its prompts ({len(episodes)} of them) leave no room for a reply in rows of"
            f" {longest} tokens. Take a longer data.row_length."
        )
    if progress and left < len(episodes):
        progress(len(episodes) - left)
    while left:
        talking, ended = [], 0
        for e, reply in engine.step(params):
            e.tokens += reply.tokens
            e.logps += reply.logps
            e.own += [True] * len(reply.tokens)
            e.turns += 1
            e.truncated = reply.finish != "stop"
            e.messages.append({**template.parse(reply.reply), "truncated": e.truncated})
            if e.truncated or e.turns >= turns:
                ended += 1
            else:
                talking.append(e)
        for e, new in zip(talking, user(talking) if talking else (), strict=True):
            if new is None:
                ended += 1
                continue
            more = template.continuation(e.messages, new, tools_of(e.task, e.row))
            if longest and len(e.tokens) + len(more) >= longest:
                e.truncated = True  # no room for another turn: cut here, before the user's
                ended += 1
                continue
            e.messages += new
            e.tokens += more
            e.own += [False] * len(more)
            e.logps += [0.0] * len(more)
            ask(e)
        left -= ended
        if progress and ended:
            progress(ended)


def seed_of(*parts: int | str) -> int:
    """A seed of 32 bits from numbers and names; others give another."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big")


def transcript(e: Episode) -> str:
    """The conversation as text, for samples."""
    lines = []
    for m in e.messages:
        calls = "".join(f" [{c['name']} {c['arguments']}]" for c in m.get("tool_calls", ()))
        lines.append(f"{m['role']}: {m['content']}{calls}")
    if e.truncated:
        lines[-1] += " [cut]"
    if e.scores:
        lines.append("reward: " + ", ".join(f"{name} {value:.3g}" for name, value in e.scores.items()))
    return "\n".join(lines)
