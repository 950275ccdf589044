"""Does a model answer alike whoever it is asked about? A task's problems, each asked twice, the second time swapped."""

from __future__ import annotations

from collections.abc import Sequence

from lmtrain import tasks as tasks_lib
from lmtrain.data.swaps import Swaps
from lmtrain.tasks import rewards
from lmtrain.tasks.generated import Message, Row, Rows
from lmtrain.types import LmtrainError


class Counterfactual:
    """Conversations of two turns: a problem of `of`, and the same with the words of `pairs` exchanged.

    `score` is what `of` gives the first reply. `consistent` is how alike the first reply and the second, its words
    exchanged back, are: 1 where nothing but they differ (rewards.consistent). As a reward in RL it falls
    with every other difference (counterfactual fairness: Kusner et al. 2017, arXiv 1703.06856, for replies). A problem
    without such a word is asked twice as it is. The second reply sees the first turn: keep `of`'s own score in the
    reward, or saying the same to everything is worth as much as answering.

    Args:
      of: a task of one question and one answer, such as "questions(path='about.jsonl')".
      pairs: words, as data.augment takes them.
    """

    name = "counterfactual"

    def __init__(self, of: str = "spelling", pairs: Sequence[str] = ("gender",)):
        self.of, self.swap = tasks_lib.get(of), Swaps((pairs,) if isinstance(pairs, str) else pairs, "pairs")
        if self.of.name == self.name or hasattr(self.of, "respond"):
            raise LmtrainError(f"of is {of!r}, but takes a task of one question and one answer.")
        self.pairs = tuple(f"{first}/{second}" for first, second in self.swap.pairs)
        self.max_tokens = self.of.max_tokens

    def rows(self, split: str) -> Sequence[Row]:
        found = self.of.rows(split)
        return Rows(len(found), lambda i: {**found[i], "counterfactual_pairs": list(self.pairs)})

    def messages(self, row: Row) -> list[Message]:
        asked: list[Message] = self.of.messages(row)
        return asked

    def respond(self, row: Row, messages: Sequence[Message]) -> list[Message] | None:
        """The same question about the others; then it is over."""
        if sum(m["role"] == "assistant" for m in messages) > 1:
            return None
        return [{"role": "user", "content": self.swap(self.of.messages(row)[-1]["content"])}]

    def score(self, row: Row, reply: str) -> float:
        return float(self.of.score(row, reply))

    def score_conversation(self, row: Row, messages: Sequence[Message]) -> dict[str, float]:
        """The two parts; 0 where the conversation was cut before its second reply."""
        said = [m for m in messages if m["role"] == "assistant"]
        if len(said) < 2 or any(m.get("truncated") for m in said):
            return {"score": 0.0, "consistent": 0.0}
        return {"score": self.score(row, said[0]["content"]), "consistent": rewards.consistent(row, messages)}
