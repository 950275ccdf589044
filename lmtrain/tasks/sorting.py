"""Words into alphabetical order."""

from __future__ import annotations

import random

from lmtrain.tasks import words
from lmtrain.tasks.generated import Generated, Message, Row, assistant, number, user
from lmtrain.types import LmtrainError


class Sorting(Generated):
    """Between `least` and `most` short words. A slip (`sloppy`) is two neighbours that changed places."""

    name = "sorting"
    max_tokens = 40

    def __init__(self, least: int = 3, most: int = 5, seed: int = 0, sloppy: float = 0.0):
        super().__init__(seed, sloppy)
        self.least, self.most = number("least", least, 2, 20), number("most", most, 2, 20)
        if most < least:
            raise LmtrainError(f"most is {most}, but takes at least {least}, which is `least`.")
        self.max_tokens = 8 * most

    def draw(self, rng: random.Random) -> Row:
        return {"words": words.several(rng, rng.randint(self.least, self.most), 2, 0.0)}

    def problem(self, row: Row) -> str:
        return " ".join(sorted(row["words"]))

    def messages(self, row: Row) -> list[Message]:
        return user(f"Sort: {' '.join(row['words'])}")

    def score(self, row: Row, reply: str) -> float:
        """1 for all of them in order, and nothing else; commas may stand between them."""
        return float(self.answer(row, reply) == " ".join(sorted(row["words"])))

    def answer(self, row: Row, reply: str) -> str:
        return " ".join(reply.replace(",", " ").split())

    def solution(self, row: Row) -> list[Message]:
        said = sorted(row["words"])
        if rng := self.slip(row):
            i = rng.randrange(len(said) - 1)
            said[i : i + 2] = said[i + 1], said[i]
        return assistant(" ".join(said))
