"""Does a chat model agree with itself? One question asked twice, and a fact that is asked for later."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lmtrain.tasks import questions
from lmtrain.tasks.generated import Generated, Message, Row, assistant, user
from lmtrain.tasks.words import word
from lmtrain.types import LmtrainError


class Consistency(Generated):
    """Scripted conversations of three turns, of two kinds:

    again   a problem of `about`, another one, and the first again: `again` is 1 where the first and the last reply are
            the same once normalised (questions.py) and not empty. Whether they are right does not matter.
    recall  "My cat is called tewi.", a problem of `about`, "What is my cat called?": `recall` is 1 where the last reply
            has the name in it.

    Args:
      about: the task whose problems are asked, those of its training side: one that the model knows.
    """

    name = "consistency"
    max_tokens = 48

    def __init__(self, seed: int = 0, about: str = "addition"):
        super().__init__(seed)
        from lmtrain import tasks  # which lists this one

        self.about = tasks.get(about)
        if self.about.name == self.name or hasattr(self.about, "respond"):
            raise LmtrainError(f"about is {about!r}, but takes a task of one question and one answer.")
        self.max_tokens = self.about.max_tokens

    def draw(self, rng: random.Random) -> Row:
        pool = self.about.rows("train")
        (first, says), (second, between) = (self._problem(pool[rng.randrange(len(pool))]) for _ in range(2))
        if rng.random() < 0.5:
            return {"kind": "again", "asks": [first, second, first], "says": [says, between, says]}
        thing, name = rng.choice(THINGS), word(rng, 2)
        asks = [f"My {thing} is called {name}.", second, f"What is my {thing} called?"]
        return {"kind": "recall", "name": name, "asks": asks, "says": ["Yes.", between, name]}

    def problem(self, row: Row) -> str:
        return "\n".join(row["asks"])

    def messages(self, row: Row) -> list[Message]:
        return user(row["asks"][0])

    def respond(self, row: Row, messages: Sequence[Message]) -> list[Message] | None:
        """The next line of the script."""
        said = sum(m["role"] == "user" for m in messages)
        return user(row["asks"][said]) if said < len(row["asks"]) else None

    def score_conversation(self, row: Row, messages: Sequence[Message]) -> dict[str, float]:
        """The part that the row's kind has; 0 where the conversation was cut before its last reply."""
        replies = [questions.normalised(m["content"]) for m in messages if m["role"] == "assistant"]
        if len(replies) < len(row["asks"]) or any(m.get("truncated") for m in messages):
            return {row["kind"]: 0.0}
        if row["kind"] == "again":
            return {"again": float(replies[0] == replies[-1] != "")}
        return {"recall": float(row["name"] in replies[-1].split())}

    def score(self, row: Row, reply: str) -> float:
        """Of one reply by itself, which cannot be consistent: whether it says anything."""
        return float(questions.normalised(reply) != "")

    def solution(self, row: Row) -> list[Message]:
        out: list[Message] = []
        for i, (ask, says) in enumerate(zip(row["asks"], row["says"], strict=True)):
            out += [*(user(ask) if i else []), *assistant(says)]
        return out

    def _problem(self, row: Row) -> tuple[str, str]:
        """What is asked, and what a demonstration answers."""
        known = hasattr(self.about, "solution")
        return self.about.messages(row)[-1]["content"], self.about.solution(row)[-1]["content"] if known else "Yes."


THINGS = ("cat", "dog", "boat", "house", "garden", "friend", "teacher", "village")
