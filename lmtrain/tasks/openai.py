"""Reinforcement fine-tuning files of OpenAI's: prompts, and a grader that says what a reply to one is worth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

from lmtrain import log, sandbox
from lmtrain.data import openai_rows, strict
from lmtrain.data.messages import Unusable
from lmtrain.data.samples import Report
from lmtrain.schema import Data
from lmtrain.tasks import generated, graders, listed
from lmtrain.tasks.generated import Message, Row, number
from lmtrain.types import LmtrainError, nearest

_MALFORMED = ("skip", "refuse")


class OpenAI(listed.Listed):
    """A reply's score is its grade, cut to 0 to 1. A prompt may have several turns, and tools.

    Args:
      path: the file. Where heldout_path is not set, an eighth of its prompts is held out, of two or more at least one.
      heldout_path: a second file, held out whole.
      grader: a file with the grader, as JSON; see graders.py.
      malformed: lines that cannot be used: skip (named and counted) | refuse.
      seconds, cpu_seconds, memory_mb: limits of one run of a python grader.
    """

    name = "openai"

    def __init__(
        self,
        path: str = "",
        heldout_path: str = "",
        grader: str = "",
        malformed: str = "skip",
        seconds: float = 10.0,
        cpu_seconds: int = 5,
        memory_mb: int = 512,
        max_tokens: int = 512,
    ):
        super().__init__()
        self.path, self.heldout_path, self.malformed = path, heldout_path, malformed
        self.max_tokens = number("max_tokens", max_tokens, 1, 1 << 20)
        if malformed not in _MALFORMED:
            raise LmtrainError(
                f"malformed is {malformed!r}, takes {' or '.join(_MALFORMED)}.{nearest(malformed, _MALFORMED)}"
            )
        limits = sandbox.Limits(float(seconds), cpu_seconds, number("memory_mb", memory_mb, 64, 1 << 20) << 20)
        self._faults: set[str] = set()
        if not path:  # said where its rows are asked for, as by every task with a file
            return
        if not grader:
            raise LmtrainError("grader is not set; write openai(path='FILE.jsonl', grader='GRADER.json')")
        self.grader = graders.load(grader, limits)
        for file in filter(None, (path, heldout_path)):  # refuses here, not after a stage that comes before
            report = Report(malformed)
            if next(self._usable(file, report), None) is None:
                raise LmtrainError(f"{file}: no line that can be used. {report.text()}".rstrip())

    def load(self) -> Iterable[tuple[Row, bool | None]]:
        if not self.path:
            raise LmtrainError("task openai: path is not set; write openai(path='FILE.jsonl', grader='GRADER.json')")
        report = Report(self.malformed)
        rows = list(self._usable(self.path, report))
        prompts = {_prompt(row) for row in rows}
        if self.heldout_path:
            tests = list(self._usable(self.heldout_path, report))
            held = {_prompt(row) for row in tests}
            yield from ((row, True) for row in tests)
            rows = [row for row in rows if _prompt(row) not in held]
        else:
            held = {prompt for prompt in prompts if generated.held_out(prompt)}
            if len(prompts) > 1 and len(held) in (0, len(prompts)):  # of a few prompts, chance may leave a side empty
                held ^= {min(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())}
        yield from ((row, _prompt(row) in held) for row in rows)
        if report.reasons:
            log.say(f"task {self.name}: {report.text()}")

    def _usable(self, file: str, report: Report) -> Iterator[Row]:
        for where, line in strict.lines(Data(path=file), f"task {self.name}"):
            try:
                if isinstance(line, Unusable):
                    raise line
                yield usable(line, self.grader, where)
            except Unusable as error:
                report(error)

    def problem(self, row: Row) -> str:
        """All of the line: one prompt may stand with several answers. `load` keeps them on one side."""
        return json.dumps(row["item"], sort_keys=True)

    def messages(self, row: Row) -> list[Message]:
        return list(row["messages"])

    def tools(self, row: Row) -> list[dict]:
        return row["tools"]

    def score(self, row: Row, reply: str) -> float:
        """
        Raises:
          LmtrainError: a python grader, and this machine cannot lock a program in.
        """
        return self._grade(row, {"role": "assistant", "content": reply})

    def score_conversation(self, row: Row, messages: Sequence[Message]) -> dict[str, float]:
        """The grade of the last message, calls of tools included; 0 for one that was cut."""
        last = messages[-1]
        return {"score": 0.0 if last.get("truncated") else self._grade(row, last)}

    def _grade(self, row: Row, message: Message) -> float:
        value, fault = self.grader.score(message, row["item"])
        if (
            fault and fault not in self._faults and len(self._faults) < 5
        ):  # once each: a broken grader is seen, not read
            self._faults.add(fault)
            log.say(f"task {self.name}: the grader gave no grade, which counts as 0: {fault}")
        return value


def _prompt(row: Row) -> str:
    """What decides the side of a line: what is said in its messages."""
    return json.dumps([[m["role"], " ".join(m["content"].split())] for m in row["messages"]])


def usable(line: object, grader: graders.Grader | None, where: str) -> Row:
    """A line of a reinforcement file as a row of the task.

    Raises:
      Unusable: says where, what and what was expected; also where it lacks a field that the grader reads.
    """
    try:
        row = openai_rows.check("reinforcement", line)
        if grader is not None:
            grader.check(row["item"])
    except Unusable as error:
        raise error.at(where) from None
    return row
