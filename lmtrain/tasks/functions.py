"""Small functions to be written in Python, scored by running them: made without a file, as many as one wants.

    Write solve(xs): keep the even ones, add 3 to each, return their sum.

A problem is a few steps on a list of whole numbers, one after the other, so those held out are compositions that no
training problem has. Programs run in the sandbox; see tasks/code.py, which takes problems from files.
"""

from __future__ import annotations

import functools
import random

from lmtrain import sandbox
from lmtrain.tasks import code
from lmtrain.tasks.generated import Generated, Message, Row, assistant, number, user

#: What a step is called, and the expression that it is. One with {k} has a number.
STEPS = {
    "keep the even ones": "[x for x in xs if x % 2 == 0]",
    "keep the odd ones": "[x for x in xs if x % 2 == 1]",
    "keep those above {k}": "[x for x in xs if x > {k}]",
    "keep those below {k}": "[x for x in xs if x < {k}]",
    "add {k} to each": "[x + {k} for x in xs]",
    "multiply each by {k}": "[x * {k} for x in xs]",
    "take the first {k}": "xs[:{k}]",
    "leave out the first {k}": "xs[{k}:]",
    "reverse them": "xs[::-1]",
    "sort them": "sorted(xs)",
}
ENDS = {"return them": "xs", "return their sum": "sum(xs)", "return how many": "len(xs)"}
_LISTS = 12  # that a program is tried on


class Functions(Generated):
    """One to `steps` steps, then what is to be returned. A reply scores 1 where its `solve` is right for twelve lists.

    A slip (`sloppy`) is a missing colon, a misspelt name, or the wrong thing returned.
    """

    name = "functions"
    max_tokens = 176

    def __init__(self, steps: int = 3, seed: int = 0, sloppy: float = 0.0):
        super().__init__(seed, sloppy)
        self.steps = number("steps", steps, 1, 6)
        self.max_tokens = 50 + 42 * steps
        limits = sandbox.Limits(seconds=5.0, cpu_seconds=2, memory=256 << 20)
        sandbox.run("", limits=limits)  # refuses here, not after an hour, where programs cannot be locked in

        @functools.lru_cache(maxsize=1 << 14)  # the replies to one prompt are often alike
        def passes(program: str, tests: str) -> bool:
            return code.parses(program) and sandbox.check(program, tests, "solve", limits).ok

        self._passes = passes

    def draw(self, rng: random.Random) -> Row:
        kinds = rng.sample(sorted(STEPS), rng.randint(1, self.steps))
        steps = [[kind, rng.randint(2, 5) if "{k}" in kind else 0] for kind in kinds]
        return {"steps": steps, "end": rng.choice(sorted(ENDS))}

    def problem(self, row: Row) -> str:
        return ", ".join([*(kind.format(k=k) for kind, k in row["steps"]), row["end"]])

    def messages(self, row: Row) -> list[Message]:
        return user(f"Write solve(xs): {self.problem(row)}.")

    def score(self, row: Row, reply: str) -> float:
        """
        Raises:
          LmtrainError: this machine cannot lock a program in.
        """
        return float(self._passes(code.extract(reply, "solve"), self.tests(row)))

    def tests(self, row: Row) -> str:
        """The right function beside the program's, on lists that are a function of the problem."""
        rng = random.Random(f"functions {self.problem(row)}")
        lists = [[], *([rng.randint(-9, 20) for _ in range(rng.randint(1, 9))] for _ in range(_LISTS - 2)), [*range(9)]]
        right = written(row).replace("solve", "right")
        return f"{right}\nfor xs in {lists}:\n    assert solve(list(xs)) == right(list(xs)), xs"

    def solution(self, row: Row) -> list[Message]:
        rng = self.slip(row)
        if not rng:
            return assistant(written(row))
        slip = rng.choice(("colon", "name", "end"))
        if slip == "end":  # a number where a list is asked for, or the list: never right by chance
            other = "return how many" if row["end"] == "return them" else "return them"
            return assistant(written({**row, "end": other}))
        head, lines, last = written(row).partition(":\n")
        return assistant(head + "\n" + last if slip == "colon" else head + lines + last.replace("xs", "x"))


def written(row: Row) -> str:
    """The function that a row asks for."""
    lines = [f"    xs = {STEPS[kind].format(k=k)}" for kind, k in row["steps"]]
    return "\n".join(["def solve(xs):", *lines, f"    return {ENDS[row['end']]}"])
