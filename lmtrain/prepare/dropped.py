"""What a filter dropped: how many documents, how many bytes, for which reason, with the first few as examples."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from datatrove.data import Document

EXAMPLES = 3  # of each reason
LONGEST = 300  # characters of an example


class Dropped:
    """A filter's `exclusion_writer`: counts instead of writing all of it. One for each filter; FOLDER/RANK.json.

    The file is written when the task has ended. Documents carry their reason in metadata["filter_reason"], as
    datatrove's filters put it there; `default` stands for those that have none.
    """

    def __init__(self, folder: str, default: str = "dropped"):
        self.folder, self.default = folder, default
        self.rank = 0
        self.reasons: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Dropped:
        self.reasons = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.reasons:
            file = pathlib.Path(self.folder, f"{self.rank:05d}.json")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(self.reasons))

    def write(self, document: Document, rank: int = 0) -> None:
        """Counts a document."""
        reason = document.metadata.get("filter_reason", self.default)
        self.count(rank, reason, document.id, document.text, len(document.text.encode()))

    def count(self, rank: int, reason: str, where: str, text: str, size: int) -> None:
        """The same of what is no document: a row that cannot be read."""
        self.rank = rank
        found = self.reasons.setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
        found["documents"] += 1
        found["bytes"] += size
        if len(found["examples"]) < EXAMPLES:
            found["examples"].append({"where": where, "text": text[:LONGEST]})


def gather(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The sums of all tasks by reason, most frequent first."""
    out: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        for reason, found in json.loads(file.read_text()).items():
            sums = out.setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
            sums["documents"] += found["documents"]
            sums["bytes"] += found["bytes"]
            sums["examples"] += found["examples"][: EXAMPLES - len(sums["examples"])]
    return dict(sorted(out.items(), key=lambda item: (-item[1]["documents"], item[0])))
