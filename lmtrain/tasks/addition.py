"""Sums of two numbers: 123+456."""

from __future__ import annotations

import random

from lmtrain.tasks.generated import Generated, Message, Row, assistant, number, user


class Addition(Generated):
    """`digits`-digit numbers. With `reversed` the answer is written from its last digit to its first.

    A model that writes backwards has each digit and its carry at hand when it needs them, and learns in minutes;
    forwards it must know the carries of all digits that follow. A slip (`sloppy`) is one digit, one off.
    """

    name = "addition"
    max_tokens = 16

    def __init__(self, digits: int = 3, reversed: bool = False, seed: int = 0, sloppy: float = 0.0):
        super().__init__(seed, sloppy)
        self.digits, self.reversed = number("digits", digits, 1, 12), reversed

    def draw(self, rng: random.Random) -> Row:
        low = 10 ** (self.digits - 1) if self.digits > 1 else 0
        return {"a": rng.randrange(low, 10**self.digits), "b": rng.randrange(low, 10**self.digits)}

    def problem(self, row: Row) -> str:
        return f"{min(row['a'], row['b'])}+{max(row['a'], row['b'])}"

    def messages(self, row: Row) -> list[Message]:
        return user(f"{row['a']}+{row['b']}")

    def score(self, row: Row, reply: str) -> float:
        """1 for the sum and nothing else."""
        return float(reply.strip() == self._right(row))

    def answer(self, row: Row, reply: str) -> str:
        return text if (text := reply.strip()).isascii() and text.isdecimal() else ""

    def solution(self, row: Row) -> list[Message]:
        said = self._right(row)
        if rng := self.slip(row):
            i = rng.randrange(len(said))
            said = f"{said[:i]}{(int(said[i]) + rng.choice((1, 9))) % 10}{said[i + 1 :]}"
        return assistant(said)

    def _right(self, row: Row) -> str:
        text = str(row["a"] + row["b"])
        return text[::-1] if self.reversed else text
