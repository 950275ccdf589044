"""Grade-school maths (GSM8K, arXiv 2110.14168) from a JSON Lines file: question, answer with "#### NUMBER" last."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lmtrain.tasks import listed, numbers
from lmtrain.tasks.generated import Message, Row, assistant, number, user
from lmtrain.types import LmtrainError


class Gsm8k(listed.Listed):
    """The number on the reply's last "####" line must be right; commas, units and a currency sign do not matter.

    Args:
      path: the training file. Where heldout_path is not set, an eighth of it is held out.
      heldout_path: the test file.
      format_score: what a wrong number is worth on a well-formed line, "#### 12". For the start of RL.
      instruction: what follows the question, on a line of its own.
    """

    name = "gsm8k"

    def __init__(
        self,
        path: str = "",
        heldout_path: str = "",
        format_score: float = 0.0,
        instruction: str = "",
        max_tokens: int = 400,
    ):
        super().__init__()
        self.path, self.heldout_path, self.instruction = path, heldout_path, instruction
        self.format_score, self.max_tokens = float(format_score), number("max_tokens", max_tokens, 1, 1 << 20)
        if not 0 <= format_score <= 1:
            raise LmtrainError(f"format_score is {format_score}, but takes a share from 0 to 1.")

    def load(self) -> Iterable[tuple[Row, bool | None]]:
        for where, row, held in listed.file_rows(self.name, self.path, self.heldout_path):
            listed.text_fields(row, ("question", "answer"), where)
            right = self.answer(row, row["answer"])
            if not right:
                raise LmtrainError(f"{where}: the answer has no line '#### NUMBER'.")
            yield {"question": row["question"], "answer": row["answer"], "number": right}, held

    def problem(self, row: Row) -> str:
        return " ".join(row["question"].split())

    def messages(self, row: Row) -> list[Message]:
        return user(row["question"] + (f"\n{self.instruction}" if self.instruction else ""))

    def answer(self, row: Row, reply: str) -> str:
        """The number behind the last "####"."""
        _, mark, behind = reply.rpartition("####")
        return numbers.first(behind.split("\n")[0]) if mark else ""

    def score(self, row: Row, reply: str) -> float:
        if self.answer(row, reply) == row["number"]:
            return 1.0
        formed = re.search(r"^#### -?[\d,]*\.?\d+$", reply.strip().rpartition("\n")[2], re.ASCII)
        return self.format_score if formed else 0.0

    def solution(self, row: Row) -> list[Message]:
        """The file's answer, without its notes for a calculator: <<48/2=24>>."""
        return assistant(re.sub(r"<<[^<>\n]*>>", "", row["answer"]))
