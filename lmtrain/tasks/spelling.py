"""How often a letter stands in a word: "r in strawberry", counted aloud."""

from __future__ import annotations

import random

from lmtrain.tasks import numbers, words
from lmtrain.tasks.generated import Generated, Message, Row, assistant, number, user


class Spelling(Generated):
    """Words of up to `syllables` syllables. The demonstration spells the word and counts: "s0t0r1a1w1b1e1r2r3y3 3".

    Every step of it copies a letter and a number, which a model of 1M parameters can learn. The last number counts; a
    slip (`sloppy`) is that it is one off.
    """

    name = "spelling"
    max_tokens = 40

    def __init__(self, syllables: int = 4, seed: int = 0, sloppy: float = 0.0):
        super().__init__(seed, sloppy)
        self.syllables = number("syllables", syllables, 1, 8)

    def draw(self, rng: random.Random) -> Row:
        word = words.word(rng, rng.randint(min(2, self.syllables), self.syllables))
        # Mostly letters that are there, often the most frequent one: a count of 0 or 1 could be guessed.
        kind = rng.random()
        often = max(word, key=lambda c: (word.count(c), c))
        letter = often if kind < 0.4 else rng.choice(word) if kind < 0.85 else rng.choice("abcdefghijklmnopqrstuvwxyz")
        return {"word": word, "letter": letter}

    def problem(self, row: Row) -> str:
        return row["word"]  # not the letter: a held-out word is new in every question

    def messages(self, row: Row) -> list[Message]:
        return user(f"How many {row['letter']} in {row['word']}?")

    def score(self, row: Row, reply: str) -> float:
        return float(self.answer(row, reply) == str(row["word"].count(row["letter"])))

    def answer(self, row: Row, reply: str) -> str:
        return numbers.last(reply)

    def solution(self, row: Row) -> list[Message]:
        count, spelled = 0, ""
        for letter in row["word"]:
            count += letter == row["letter"]
            spelled += f"{letter}{count}"
        if rng := self.slip(row):
            count += 1 if count == 0 else rng.choice((1, -1))
        return assistant(f"{spelled} {count}")
