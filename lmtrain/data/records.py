"""Records from where they lie, one generator a kind of file: what JSON, Parquet, ArrayRecord and `datasets` hold.

Each yields (where, value) in the files' order. A record that is no JSON comes as an Unusable in the place of its value:
who reads documents raises it, who reads conversations may skip it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmtrain.data.files import content, find, numbered, short, unreadable
from lmtrain.data.messages import Unusable
from lmtrain.schema import Data
from lmtrain.types import LmtrainError, nearest

_EXTRA = "of the extra `data` (pip install -e '.[data]' in a checkout)"


def jsonl(data: Data, field: str = "data") -> Iterator[tuple[str, Any]]:
    """JSON Lines (.gz too): the value on every line that is not blank."""
    for path in find(data.path, field):
        for number, line in numbered(path):
            if line.strip():
                where = f"{path}:{number}"
                yield where, parse(line, where, "a JSON line")


def json_file(data: Data, field: str = "data") -> Iterator[tuple[str, Any]]:
    """JSON files (.gz too): the items of an array, or of the one list that an object holds. All read at once."""
    for path in find(data.path, field):
        value = parse(content(path), str(path), "JSON")
        if isinstance(value, Unusable):
            hint = " A JSON object on every line is source jsonl" if path.suffix in (".jsonl", ".ndjson") else ""
            raise LmtrainError(f"{value}.{hint}")
        if isinstance(value, dict):
            lists = {name: items for name, items in value.items() if isinstance(items, list)}
            if len(lists) != 1:
                found = f"has the lists {', '.join(lists)}" if lists else "has no list in it"
                raise LmtrainError(
                    f"{path}: a JSON array of rows, or an object that holds one, was expected; this object {found}"
                )
            (value,) = lists.values()
        elif not isinstance(value, list):
            raise LmtrainError(f"{path}: a JSON array of rows was expected, got {type(value).__name__}")
        for number, item in enumerate(value, 1):
            yield f"{path}, item {number}", item


def parquet(data: Data, field: str = "data", column: str = "") -> Iterator[tuple[str, Any]]:
    """Parquet, a few thousand rows at a time: each row as a dict, or with `column` the value of that one."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise LmtrainError(f"{field}.source=parquet needs pyarrow ({error}), {_EXTRA}") from None
    for path in find(data.path, field):
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise LmtrainError(f"{path}: not a Parquet file: {error}") from None
        row = 0
        with file:
            if column and column not in file.schema_arrow.names:
                raise LmtrainError(no_field(column, file.schema_arrow.names, str(path)))
            try:
                for batch in file.iter_batches(batch_size=4096, columns=[column] if column else None):
                    for value in batch.column(0).to_pylist() if column else batch.to_pylist():
                        row += 1
                        yield f"{path}, row {row}", value
            except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a text column that is not UTF-8
                raise unreadable(f"{path}, after row {row}", error) from None


def arrayrecord(data: Data, field: str = "data") -> Iterator[tuple[str, bytes]]:
    """ArrayRecord: the bytes of every record."""
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as error:
        raise LmtrainError(
            f"{field}.source=arrayrecord needs array_record ({error}): pip install array-record, which comes with"
            " lmtrain on Linux; where there is no wheel of it, turn the files into jsonl or parquet"
        ) from None
    for path in find(data.path, field):
        reader = ArrayRecordReader(str(path))
        if not reader.ok():
            try:
                reader.close()  # this is where the binding says why
                reason = "unknown reason"
            except RuntimeError as error:
                reason = str(error)
            raise LmtrainError(f"{path}: not an ArrayRecord file: {reason}")
        try:
            count = reader.num_records()
            for first in range(0, count, 1024):
                try:
                    records = reader.read(first, min(first + 1024, count))
                except RuntimeError as error:
                    raise unreadable(f"{path}, from record {first + 1}", error) from None
                for row, record in enumerate(records, first + 1):
                    yield f"{path}, record {row}", record
        finally:
            with contextlib.suppress(RuntimeError):  # says again what read has said
                reader.close()


def hf(data: Data, field: str = "data") -> Iterator[tuple[str, Any]]:
    """Hugging Face `datasets`, streamed: a name on the hub, a folder of data files, or one of `save_to_disk`."""
    try:
        import datasets
    except ImportError as error:
        raise LmtrainError(f"{field}.source=hf needs datasets ({error}), {_EXTRA}") from None
    name = short(data.path)
    try:
        path = Path(data.path).expanduser()
        if any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json", "state.json")):
            splits = datasets.load_from_disk(str(path))
            if not isinstance(splits, dict):
                splits = {data.hf_split: splits}
        else:
            at = str(path) if path.exists() else data.path
            splits = datasets.load_dataset(at, data.subset or None, streaming=True)
    except Exception as error:  # of many kinds: network, permission, unknown name, unknown configuration
        raise LmtrainError(
            f"{field}.path: datasets cannot open {name!r}, subset {data.subset!r}: {short(str(error), 500)}"
        ) from None
    if data.hf_split not in splits:
        raise LmtrainError(
            f"{field}.hf_split: {name} has no split {data.hf_split!r}, it has {', '.join(splits)}."
            f"{nearest(data.hf_split, splits)}"
        )
    number = -1
    rows = iter(splits[data.hf_split])
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # of many kinds again: network, a damaged file, rows that disagree
            raise LmtrainError(
                f"{name} ({data.hf_split}), after {number + 1} rows: datasets cannot read on: {type(error).__name__}:"
                f" {short(str(error), 500)}. Repair or replace the data, or try again where it is the network"
            ) from None
        number += 1
        yield f"{name} ({data.hf_split}), row {number}", row


def parse(text: bytes, where: str, what: str) -> Any:
    """The value of a JSON text; an Unusable (not raised) where it is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        return Unusable(f"not {what}", str(error), where)
    except RecursionError:
        return Unusable("JSON nested too deeply to be read", "leave this row out", where)


def no_field(field: str, names: list[str], where: str) -> str:
    """The message for a row without a field that a setting names."""
    return f"{where}: no field {field!r} (data.field).{nearest(field, names)} (fields: {', '.join(names[:20])})"
