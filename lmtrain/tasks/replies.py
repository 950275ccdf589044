"""The assistant's next turn in conversations from a file, scored by its likeness to what stands there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from lmtrain import log
from lmtrain.data import samples
from lmtrain.schema import Data
from lmtrain.tasks import listed, similarity
from lmtrain.tasks.generated import Message, Row, number
from lmtrain.types import LmtrainError, nearest

TURNS = ("any", "last")


class Replies(listed.Listed):
    """One turn of each conversation. The prompt is all that stands before it; a reply's score is `metric` of the two.

    Held out are the conversations that a stage of SFT holds out of the same file, with the same source and
    heldout_fraction: by the hash of the prompt they open with (data/samples.py).

    Args:
      path: the file, in any format that SFT reads.
      source: jsonl | json | openai and so on, as data.source.
      metric: rouge_l, bleu, meteor ...: a name of tasks/similarity.py.
      turn: "any": one of the assistant's turns, by a hash of the conversation; "last": its last one.
      heldout_fraction: as data.heldout_fraction.
    """

    name = "replies"

    def __init__(
        self, path: str = "", source: str = "jsonl", metric: str = "rouge_l", turn: str = "any",
        heldout_fraction: float = 0.05, max_tokens: int = 64,
    ):  # fmt: skip
        super().__init__()
        metrics = similarity.metrics()
        if metric not in metrics:
            raise LmtrainError(f"metric is {metric!r}, but takes {', '.join(metrics)}.{nearest(metric, metrics)}")
        if turn not in TURNS:
            raise LmtrainError(f"turn is {turn!r}, but takes {' or '.join(TURNS)}.{nearest(turn, TURNS)}")
        if not 0 < heldout_fraction < 1:
            raise LmtrainError(f"heldout_fraction is {heldout_fraction}, but takes a share between 0 and 1.")
        self.metric, self.turn, self.path = metrics[metric], turn, path
        self.max_tokens = number("max_tokens", max_tokens, 1, 1 << 20)
        self.data = Data(source=source, path=path, heldout_fraction=heldout_fraction)
        if path:  # refuses here, not after a stage that comes before
            self._usable()

    def _usable(self) -> None:
        report = samples.Report()
        found = samples.samples("chat", self.data, f"task {self.name}", "train", report)
        if not any(_turns(sample.talks[0]) for sample in found):
            raise LmtrainError(f"{self.path}: no reply to anything that was said. {report.text()}".rstrip())

    def load(self) -> Iterable[tuple[Row, bool | None]]:
        if not self.path:
            raise LmtrainError("task replies: path is not set; write replies(path='DIALOGUES.jsonl').")
        report = samples.Report()
        for sides in samples.collect("chat", self.data, report, progress=False).values():
            for side, found in sides.items():
                for sample in found:
                    if at := _turns(sample.talks[0]):
                        yield self._row(sample, at), side == "heldout"
        if report.reasons:
            log.say(f"task {self.name}: {report.text()}")

    def _row(self, sample: samples.Sample, at: list[int]) -> Row:
        drawn = int.from_bytes(hashlib.blake2b(sample.digest, digest_size=4).digest(), "big")
        k = at[-1] if self.turn == "last" else at[drawn % len(at)]
        return {"messages": sample.talks[0][:k], "reply": sample.talks[0][k]["content"], "tools": list(sample.tools)}

    def problem(self, row: Row) -> str:
        return json.dumps([[m["role"], m["content"]] for m in row["messages"]])

    def messages(self, row: Row) -> list[Message]:
        return list(row["messages"])

    def tools(self, row: Row) -> list[dict]:
        return row["tools"]

    def score(self, row: Row, reply: str) -> float:
        return min(1.0, float(self.metric(reply.strip(), row["reply"].strip())))

    def solution(self, row: Row) -> list[Message]:
        """What stands in the file."""
        return [{"role": "assistant", "content": row["reply"]}]


def _turns(talk: list[Message]) -> list[int]:
    """Where the assistant says something after somebody else did, and not with a tool or not to be learned."""
    heard = [k for k, m in enumerate(talk) if m["role"] in ("user", "tool")]
    said = (k for k, m in enumerate(talk) if m["role"] == "assistant" and m["content"] and not m.get("tool_calls"))
    return [k for k in said if heard and heard[0] < k and talk[k].get("weight", 1)]
