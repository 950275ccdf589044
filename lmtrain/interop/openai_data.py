"""Checks fine-tuning files of OpenAI's: which lines lmtrain will train on, and what is wrong with each of the others.

What is said here is what training does: data.source="openai" and the task openai read lines by the same rules
(data/openai_rows.py) and leave out the same ones.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmtrain.data import openai_rows, strict
from lmtrain.data.messages import Unusable
from lmtrain.schema import Data
from lmtrain.tasks import graders
from lmtrain.tasks import openai as task_lib
from lmtrain.types import LmtrainError, nearest

KINDS = openai_rows.KINDS


@dataclasses.dataclass(frozen=True)
class Report:
    """What a file has.

    Attributes:
      kind: one of KINDS.
      guessed: nobody said the kind; its lines did.
      good: "FILE:LINE" of each line that can be trained on.
      bad: an Unusable for each other one, by "FILE:LINE".
    """

    path: str
    kind: str
    guessed: bool
    good: tuple[str, ...]
    bad: Mapping[str, Unusable]

    @property
    def lines(self) -> int:
        return len(self.good) + len(self.bad)

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> how many bad lines have it, the most frequent first."""
        return dict(collections.Counter(error.reason for error in self.bad.values()).most_common())

    def text(self) -> str:
        """A line for each bad line, then counts."""
        said = [str(error) for error in self.bad.values()]
        how = f"{self.kind}{' (by its fields; --kind says otherwise)' if self.guessed else ''}"
        said.append(f"{self.path}: {how}: {self.lines:,} lines, {len(self.good):,} good, {len(self.bad):,} bad")
        if self.bad:
            said.append("bad: " + ", ".join(f"{count:,} x {reason}" for reason, count in self.reasons.items()))
        return "\n".join(said)

    def as_json(self) -> dict[str, Any]:
        """The same, for programs."""

        def place(where: str) -> dict[str, Any]:
            file, _, line = where.rpartition(":")
            return {"file": file, "line": int(line)}

        return {
            "path": self.path, "kind": self.kind, "lines": self.lines, "reasons": self.reasons,
            "good": [place(where) for where in self.good],
            "bad": [place(w) | {"reason": e.reason, "detail": e.detail} for w, e in self.bad.items()],
        }  # fmt: skip

    def write(self, path: str) -> None:
        """`as_json`, to a file. Raises LmtrainError where it cannot be written."""
        try:
            Path(path).write_text(json.dumps(self.as_json(), indent=1) + "\n")
        except OSError as error:
            raise LmtrainError(f"--json {path}: cannot be written: {error.strerror}") from None


def check(path: str, kind: str = "auto", grader: str = "") -> Report:
    """Reads a file (.gz too, or a folder, or a glob) and judges each of its lines.

    Args:
      kind: one of KINDS; auto: what most lines look like.
      grader: the file of a grader, whose fields each line of a reinforcement file must have.

    Raises:
      LmtrainError: no such file, a grader that is none, no line at all, or none that says which kind it is.
    """
    if kind not in ("auto", *KINDS):
        raise LmtrainError(f"kind is {kind!r}, takes auto, {', '.join(KINDS)}.{nearest(kind, ('auto', *KINDS))}")
    if grader and kind not in ("auto", "reinforcement"):
        raise LmtrainError(f"a grader scores replies of a reinforcement file; for a {kind} file leave --grader out")
    found = "reinforcement" if grader else guess(path) if kind == "auto" else kind
    scorer = graders.load(grader) if grader else None
    good, bad = [], {}
    for where, line in strict.lines(Data(path=path), "file"):
        try:
            if isinstance(line, Unusable):
                raise line
            if found == "reinforcement":
                task_lib.usable(line, scorer, where)
            else:
                _check(found, line, where)
            good.append(where)
        except Unusable as error:
            bad[where] = error
    if not good and not bad:
        raise LmtrainError(f"{path}: no line in it; a JSON object on every line was expected")
    return Report(path, found, kind == "auto" and not grader, tuple(good), bad)


def _check(kind: str, line: Any, where: str) -> None:
    try:
        openai_rows.check(kind, line)
    except Unusable as error:
        raise error.at(where) from None


def guess(path: str) -> str:
    """The kind that most lines of a file look like. LmtrainError where none looks like any."""
    votes: collections.Counter[str] = collections.Counter()
    lines = 0
    for _, line in strict.lines(Data(path=path), "file"):
        lines += 1
        if isinstance(line, Mapping) and (found := _looks_like(line)):
            votes[found] += 1
    if not lines:
        raise LmtrainError(f"{path}: no line in it; a JSON object on every line was expected")
    if not votes:
        raise LmtrainError(
            f"{path}: no line has messages or input, by which its kind is told; say it: --kind {'|'.join(KINDS)}"
        )
    return max(KINDS, key=lambda kind: votes[kind])  # of equals the first


def _looks_like(line: Mapping[str, Any]) -> str:
    """A prompt for the model to answer ends with a user's message; what is imitated with the assistant's."""
    if any(field in line for field in openai_rows.PREFERENCE):
        return "preference"
    messages = line.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], Mapping):
        return ""
    if messages[-1].get("role") == "user" and not any(field in line for field in ("functions", "parallel_tool_calls")):
        return "reinforcement"
    return "supervised"
