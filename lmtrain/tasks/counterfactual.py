"""Does a model answer alike whoever it is asked about? A task's problems, each asked in two versions, apart."""

from __future__ import annotations

from collections.abc import Sequence

from lmtrain import tasks as tasks_lib
from lmtrain.data.swaps import Swaps
from lmtrain.tasks import similarity
from lmtrain.tasks.generated import Message, Row, Rows
from lmtrain.types import LmtrainError


class Counterfactual:
    """The problems of `of`; half of the replies to each are to it with the words of `pairs` exchanged.

    `score` is what `of` gives a reply, its words exchanged back. `consistent` is how alike (the same
    answer; similarity.py's fuzzy_match where `of` has no `answer`) a reply is to those to the other version, words
    exchanged back, against those to its own: 1/2 where nothing but they differ, less where more does
    (rollout/rewards.py). As a reward in RL it asks that the two versions'
    replies are drawn alike (counterfactual fairness: Kusner et al. 2017, arXiv 1703.06856, for replies). The versions
    are asked in conversations of their own: in one conversation, a model would learn to repeat itself and stay as
    biased as it was.

    Args:
      of: a task of one question and one answer, such as "questions(path='about.jsonl')".
      pairs: words, as data.augment takes them.
    """

    name = "counterfactual"

    def __init__(self, of: str = "spelling", pairs: Sequence[str] = ("gender",)):
        self.of, self.swap = tasks_lib.get(of), Swaps((pairs,) if isinstance(pairs, str) else pairs, "pairs")
        if self.of.name == self.name or hasattr(self.of, "respond"):
            raise LmtrainError(f"of is {of!r}, but takes a task of one question and one answer.")
        self.max_tokens = self.of.max_tokens

    def rows(self, split: str) -> Sequence[Row]:
        found = self.of.rows(split)
        return Rows(len(found), lambda i: {"of": found[i], "swapped": False})

    def versions(self, row: Row) -> list[Row]:
        """The problem as it is, and exchanged: what the replies of a group are to, in turn."""
        return [{**row, "swapped": swapped} for swapped in (False, True)]

    def messages(self, row: Row) -> list[Message]:
        asked: list[Message] = self.of.messages(row["of"])
        return [{**m, "content": self.swap(m["content"])} for m in asked] if row["swapped"] else asked

    def score(self, row: Row, reply: str) -> float:
        return float(self.of.score(row["of"], self._back(row, reply)))

    def alike(self, row: Row, reply: str, other: Row, theirs: str) -> float:
        """Of two replies, to two versions of a problem: 1 or 0 where `of` says which answers are the same."""
        said = [(row, self._back(row, reply)), (other, self._back(other, theirs))]
        if hasattr(self.of, "answer"):
            first, second = (self.of.answer(r["of"], text) for r, text in said)
            return float(first == second)
        return similarity.fuzzy_match(*(text.strip() for _, text in said))

    def _back(self, row: Row, reply: str) -> str:
        return self.swap(reply) if row["swapped"] else reply
