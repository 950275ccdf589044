"""The evaluation rows that decontamination looks for: of files and of lmtrain's tasks."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from lmtrain.data import files, records
from lmtrain.data.messages import Unusable
from lmtrain.eval import contamination
from lmtrain.eval.contamination import CHANCE, Row, words
from lmtrain.rollout import rewards
from lmtrain.schema import Data
from lmtrain.tasks import spec
from lmtrain.types import LmtrainError


def rows(what: list[str]) -> tuple[list[Row], int]:
    """The rows of --decontaminate, and how many more have too few words to be looked for.

    A question of fewer than CHANCE words stands in too many texts by chance; such are left out, and so are rows all of
    whose texts are so short.

    Raises:
      LmtrainError: neither a file nor a task, or a file that cannot be read.
    """
    found: list[Row] = []
    for item in (part for text in what for part in spec.several(text)):
        if _is_file(item):
            found += _file_rows(item)
        else:
            try:
                tasks = rewards.get_tasks([item])
            except LmtrainError as error:
                raise LmtrainError(f"--decontaminate {item}: no such file, and no task: {error}") from None
            found += contamination.task_rows(tasks)
    kept = []
    for row in found:
        asks = tuple(text for text in row.asks if words(text) >= CHANCE)
        says = (*row.says, *(text for text in row.asks if words(text) < CHANCE))
        if asks or any(words(text) >= CHANCE for text in says):
            kept.append(dataclasses.replace(row, asks=asks, says=says))
    return kept, len(found) - len(kept)


def write(found: list[Row], file: pathlib.Path) -> None:
    """One row a line, for `blocks.Decontaminate`."""
    file.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in found))


def _is_file(item: str) -> bool:
    path = pathlib.Path(item).expanduser()
    try:
        return path.exists() or ("(" not in item and (path.suffix != "" or len(path.parts) > 1 or "*" in item))
    except OSError:
        return False


def _file_rows(item: str) -> Iterator[Row]:
    """Of JSON Lines, JSON and Parquet a row's longest text is what it asks, its other texts count by their n-grams; of
    plain text a row is a paragraph."""
    for path in files.matching(item, "--decontaminate"):
        data = Data(path=str(path))
        name = path.name.removesuffix(".gz")
        if name.endswith((".jsonl", ".ndjson")):
            found: Any = records.jsonl(data)
        elif name.endswith(".json"):
            found = records.json_file(data)
        elif name.endswith(".parquet"):
            found = records.parquet(data)
        else:
            text = files.content(path).decode("utf-8", "replace")
            yield from contamination.text_rows(path.name, [text])
            continue
        for number, (where, value) in enumerate(found):
            if isinstance(value, Unusable):
                raise value
            texts = sorted(_texts(value), key=len, reverse=True)
            yield Row(path.name, number, where, tuple(texts[:1]), tuple(texts[1:]))


def _texts(value: Any) -> Iterator[str]:
    """All text in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
