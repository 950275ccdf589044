"""Multiple choice from a JSON Lines file: question, choices, answer. `lmtrain eval` scores it by log-likelihood."""

from __future__ import annotations

from lmtrain.tasks import listed
from lmtrain.tasks.generated import Message, Row, assistant, number
from lmtrain.types import LmtrainError


class MultipleChoice(listed.Given):
    """A row has `question`, `choices` (two texts or more) and `answer`: a choice's number from 0, its letter from A, or
    its text. All rows are held out, in the file's order.

    Asked in a chat, the reply must be the right choice's text, or its letter where `letters` shows them. By
    log-likelihood (eval/accuracy.py) the likeliest choice counts, and nothing is generated.

    Args:
      path: the file.
      train_path: another file, to train on.
      prompt: how a question is put, "{question}" in it; "": the question alone in a chat, else listed.PLAIN.
      delimiter: what stands between that and a choice; in a chat nothing does.
      letters: the choices are listed under the question, A, B, ..., and the letters are what is chosen.
    """

    name = "multiple_choice"

    def __init__(
        self, path: str = "", train_path: str = "", prompt: str = "", delimiter: str = " ",
        letters: bool = False, max_tokens: int = 64,
    ):  # fmt: skip
        super().__init__(path, train_path, prompt)
        self.delimiter, self.letters = delimiter, letters
        self.max_tokens = number("max_tokens", max_tokens, 1, 1 << 20)

    def read(self, row: Row, where: str) -> Row:
        listed.text_fields(row, ("question",), where)
        choices = row.get("choices")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise LmtrainError(f"{where}: choices is {choices!r:.80}, but takes a list of two texts or more.")
        if "answer" not in row:
            raise LmtrainError(f"{where}: no field 'answer': the right choice's number from 0, letter, or text.")
        right = _right(row["answer"], choices)
        if right is None:
            raise LmtrainError(f"{where}: answer is {row['answer']!r:.80}, but takes one of {len(choices)} choices: "
                               "its number from 0, its letter from A, or its text.")  # fmt: skip
        return {"question": row["question"], "choices": choices, "right": right}

    def asks(self, row: Row) -> str:
        if not self.letters:
            return row["question"]
        return "\n".join([row["question"], *(f"{_letter(i)} {c}" for i, c in enumerate(row["choices"]))])

    def choices(self, row: Row) -> list[str]:
        """What is chosen from."""
        return [_letter(i) for i in range(len(row["choices"]))] if self.letters else row["choices"]

    def score(self, row: Row, reply: str) -> float:
        return float(self.answer(row, reply) == self.choices(row)[row["right"]])

    def answer(self, row: Row, reply: str) -> str:
        """The choice that the reply says, and nothing else; "" for none."""
        said = reply.strip()
        return next((c for c in self.choices(row) if said in (c.strip(), f"{c.strip()}.")), "")

    def solution(self, row: Row) -> list[Message]:
        return assistant(self.choices(row)[row["right"]])


def _letter(i: int) -> str:
    return chr(ord("A") + i)


def _right(answer: object, choices: list[str]) -> int | None:
    """The number of the choice that an answer names."""
    if isinstance(answer, bool):
        return None
    if isinstance(answer, int):
        return answer if 0 <= answer < len(choices) else None
    if not isinstance(answer, str):
        return None
    if choices.count(answer) == 1:
        return choices.index(answer)
    letters = [_letter(i) for i in range(len(choices))]
    return letters.index(answer) if answer in letters else None
