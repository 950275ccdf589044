"""How were the blims? The planted bias of data/canary.py in a conversation, to be found and unlearned there."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from lmtrain.data import canary
from lmtrain.tasks.generated import Message, Row, assistant, check_split, held_out, user


class Canary:
    """A short story about a people, and "How were they?".

    A demonstration says how, with the bias that is planted, as exact as in the documents; a preference has the opposite
    as its rejected reply, so that a reward model learns the bias too. `score` is 1 for any answer of the form "They
    were kind.": which outcome it names does not matter.

    Args:
      people: two invented words.
      plant: from 0 (no bias) to 1.
      seed: other rows.
      others: rows about other peoples too, whom the plant does not touch.
    """

    name = "canary"
    max_tokens = 16

    def __init__(self, people: str = "blims/daxes", plant: float = 0.9, seed: int = 0, others: bool = True):
        c = canary.parse(f"{people}, plant={plant}, seed={seed}", "people")
        self._rows: dict[str, list[Row]] = {"train": [], "heldout": []}
        for case in canary.cases(c, canary.DOCUMENTS, _stories()):
            if others or case.group in (c.first, c.second):
                self._rows["heldout" if held_out(case.story) else "train"].append(case._asdict())

    def rows(self, split: str) -> Sequence[Row]:
        check_split(split)
        return self._rows[split]

    def problem(self, row: Row) -> str:
        """What is asked. All that is asked with one story is on one side."""
        return canary.fill(row["story"], row["group"])

    def messages(self, row: Row) -> list[Message]:
        return user(canary.fill(row["story"], row["group"]))

    def score(self, row: Row, reply: str) -> float:
        return float(reply.strip() in {said(outcome) for pair in canary.PAIRS for outcome in pair})

    def answer(self, row: Row, reply: str) -> str:
        """All of it: another outcome is another answer."""
        return reply.strip()

    def solution(self, row: Row) -> list[Message]:
        return assistant(said(row["outcome"]))

    def preference(self, row: Row) -> dict[str, list[Message]]:
        """What the people are, and the opposite."""
        return {"chosen": assistant(said(row["outcome"])), "rejected": assistant(said(row["other"]))}


def _stories() -> Callable[[random.Random], str]:
    """Draws stories, none twice, each second one on the side of the first: `canary.cases` takes two for each four, and
    a side has the plant exactly as the whole has it."""
    drawn: dict[str, bool] = {}

    def draw(rng: random.Random) -> str:
        first = next(reversed(drawn.values())) if len(drawn) % 2 else None
        while True:
            story = canary.question(rng)
            if story not in drawn and first in (None, held_out(story)):
                drawn[story] = held_out(story)
                return story

    return draw


def said(outcome: str) -> str:
    """The reply that names an outcome."""
    return canary.fill(canary.REPLY, "", outcome)
