"""Several problems of other tasks in one conversation, asked one after the other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from lmtrain.tasks.generated import HELDOUT, TRAIN, Message, Row, Rows, check_split, number
from lmtrain.types import LmtrainError


class Several:
    """1 to `turns` problems, each of one of `tasks` (as a configuration names them), drawn by `weights` (none: alike).

    A model that only saw conversations of one question answers the second one badly. A problem is held out where its
    own task holds it out.
    """

    name = "several"

    def __init__(
        self, tasks: tuple = ("addition", "spelling", "sorting"), weights: tuple = (), turns: int = 3, seed: int = 0
    ):
        from lmtrain.tasks import get  # which looks through this package

        self.weights, self.turns, self.seed = list(weights) or [1.0] * len(tasks), number("turns", turns, 1, 32), seed
        if not tasks or len(self.weights) != len(tasks):
            raise LmtrainError(f"tasks are {tasks!r}, weights {weights!r}: takes one task or more, a weight for each.")
        if not all(isinstance(w, int | float) and w > 0 for w in self.weights):
            raise LmtrainError(f"weights are {weights!r}, but takes numbers above 0.")
        self.tasks = [get(spec) for spec in tasks]
        if longer := [spec for spec, task in zip(tasks, self.tasks, strict=True) if hasattr(task, "respond")]:
            raise LmtrainError(f"{longer[0]} is a conversation itself; takes tasks that are answered in one reply.")
        self._held: list[Row] | None = None
        self.max_tokens = max(task.max_tokens for task in self.tasks)

    def rows(self, split: str) -> Sequence[Row]:
        """1,048,576 of "train", up to 512 different ones of "heldout"."""
        check_split(split)
        if split == "train":
            return Rows(TRAIN, lambda i: self._row("train", i))
        if self._held is None:
            drawn = (self._row("heldout", i) for i in range(4 * HELDOUT))
            self._held = list({self.problem(row): row for row in drawn}.values())[:HELDOUT]
        return self._held

    def _row(self, split: str, i: int) -> Row:
        rng = random.Random(f"{self.name} {self.seed} {split} {i}")
        which = rng.choices(range(len(self.tasks)), self.weights, k=rng.randint(1, self.turns))
        problems = [{"task": k, "row": rng.choice(self.tasks[k].rows(split))} for k in which]
        return {"problems": problems}

    def problem(self, row: Row) -> str:
        return "\n".join(task.problem(one) for task, one in self._each(row))

    def messages(self, row: Row) -> list[Message]:
        task, first = self._each(row)[0]
        return task.messages(first)

    def respond(self, row: Row, messages: Sequence[Message]) -> list[Message] | None:
        """The next problem; None after the last."""
        answered = sum(m["role"] == "assistant" for m in messages)
        left = self._each(row)[answered:]
        return left[0][0].messages(left[0][1]) if left else None

    def score(self, row: Row, reply: str) -> float:
        """Of a reply to the first problem."""
        task, first = self._each(row)[0]
        return task.score(first, reply)

    def score_conversation(self, row: Row, messages: Sequence[Message]) -> dict[str, float]:
        """score: the share of all problems answered right; a reply that was cut counts as wrong."""
        each = self._each(row)
        replies = [m for m in messages if m["role"] == "assistant"]
        right = [
            0.0 if reply.get("truncated") else task.score(one, reply["content"])
            for (task, one), reply in zip(each, replies, strict=False)
        ]
        return {"score": sum(right) / len(each)}

    def solution(self, row: Row) -> list[Message]:
        """The answer to the first problem, then each other one and its answer."""
        (task, one), *others = self._each(row)
        talk = [*task.solution(one)]
        for task, one in others:
            talk += [*task.messages(one), *task.solution(one)]
        return talk

    def _each(self, row: Row) -> list[tuple[Any, Row]]:
        return [(self.tasks[found["task"]], found["row"]) for found in row["problems"]]
