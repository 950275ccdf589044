"""Questions about Python's own library, of the Python that runs this: which module has a function, or does a thing.

What there is to know stands in the embedded corpus (data source "stdlib"): a test of what pretraining on it has left.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

from lmtrain.data import stdlib
from lmtrain.tasks import listed
from lmtrain.tasks.generated import Message, Row, assistant, number, user
from lmtrain.types import LmtrainError, nearest

ABOUT = ("", "function", "module")


class Pydocs(listed.Listed):
    """ "Which module has dedent?" and "Which module: Text wrapping and filling."

    Args:
      about: "function" (public functions and classes that one module alone has), "module" (by the first line of its
        documentation), or "" for both.
      choices: answers to choose from, A, B, ...; 0: none are shown, the name is asked for.
    """

    name = "pydocs"
    max_tokens = 24

    def __init__(self, about: str = "", choices: int = 4):
        super().__init__()
        if about not in ABOUT:
            raise LmtrainError(f"about is {about!r}, but takes 'function', 'module' or ''.{nearest(about, ABOUT)}")
        self.about, self.choices = about, number("choices", choices, 0, 26)
        if choices == 1:
            raise LmtrainError("choices is 1, but takes 0 or 2 to 26.")

    def load(self) -> Iterable[tuple[Row, bool | None]]:
        modules = [
            (name, *_read(stdlib.render(name, path.read_bytes()))) for name, path in stdlib.files() if _public(name)
        ]
        known = [name for name, summary, members in modules if summary or members]
        owners: dict[str, list[str]] = {}
        for name, summary, members in modules:
            for member in members:
                owners.setdefault(member, []).append(name)
            if self.about != "function" and 10 <= len(summary) <= 70 and name.lower() not in summary.lower():
                yield self._row("module", name, f"Which module: {summary}", name, known), None
        for member, found in sorted(owners.items()):
            if self.about != "module" and len(found) == 1 and len(member) > 3 and found[0] not in member.lower():
                yield self._row("function", member, f"Which module has {member}?", found[0], known), None

    def _row(self, kind: str, subject: str, question: str, right: str, known: list[str]) -> Row:
        rng = random.Random(f"pydocs {kind} {subject}")
        wrong = rng.sample([name for name in known if name != right], self.choices - 1) if self.choices else []
        names = [right, *wrong] if self.choices else []
        rng.shuffle(names)
        return {"kind": kind, "subject": subject, "question": question, "module": right, "choices": names}

    def problem(self, row: Row) -> str:
        return f"{row['kind']} {row['subject']}"

    def messages(self, row: Row) -> list[Message]:
        lines = [f"{letter} {name}" for letter, name in zip(_letters(row), row["choices"], strict=True)]
        return user("\n".join([row["question"], *lines]))

    def score(self, row: Row, reply: str) -> float:
        return float(self.answer(row, reply) == row["module"])

    def answer(self, row: Row, reply: str) -> str:
        """The module that the reply names, by its letter or its name, and nothing else beside it; "" for none."""
        said = reply.strip().rstrip(".")
        letter, _, rest = said.partition(" ")
        letters = _letters(row)
        if letter in letters and rest in ("", row["choices"][letters.index(letter)]):
            return row["choices"][letters.index(letter)]
        return said if re.fullmatch(r"\w{1,60}", said) and said in (row["choices"] or [said]) else ""

    def solution(self, row: Row) -> list[Message]:
        letters = _letters(row)
        return assistant(letters[row["choices"].index(row["module"])] if letters else row["module"])


def _letters(row: Row) -> list[str]:
    return [chr(ord("A") + i) for i in range(len(row["choices"]))]


def _public(name: str) -> bool:
    return "." not in name and not name.startswith("_") and name not in ("antigravity", "this", "idlelib")


def _read(text: str) -> tuple[str, list[str]]:
    """(first line, names of classes and functions) of a module's rendered documentation."""
    head = re.search(r"^NAME\n    \w+ - (.+)$", text, re.M)
    return (head[1].strip() if head else ""), re.findall(r"^    (?:class |async )?([a-zA-Z]\w*)\(", text, re.M)
