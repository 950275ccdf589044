"""Documents from where they lie. One generator a source; each yields Documents, always in the same order.

Another source is a function in your own package: `data.source="package.module:function"`, called with the Data,
yielding str, bytes or Documents.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lmtrain.schema import ConfigError, Data
from lmtrain.types import LmtrainError, nearest


@dataclasses.dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
      text: str, or bytes where it need not be UTF-8.
      name: where it came from, for messages.
      key: what decides whether it is held out; None: the text itself. Documents that repeat one another in other words
        (a module's documentation and its source) share a key, so that one side never gives the other away.
    """

    text: str | bytes
    name: str
    key: str | bytes | None = None


def read(data: Data, field: str = "data") -> Iterator[Document]:
    """Every document of a source, at most `data.limit` of them. `field` is what errors call the settings.

    Raises:
      ConfigError: an unknown source, or a setting that the source does not take.
      LmtrainError: a file that is missing or broken.
    """
    documents = open_source(data, field)(data)
    for count, document in enumerate(documents, 1):
        if not isinstance(document, Document):
            if not isinstance(document, str | bytes):
                raise LmtrainError(
                    f"{field}.source={data.source}: document {count} is {type(document).__name__};"
                    " a source yields str, bytes or lmtrain.data.sources.Document"
                )
            document = Document(document, f"{data.source}#{count}")
        yield document
        if count == data.limit:
            return


def open_source(data: Data, field: str = "data") -> Callable[[Data], Iterable[Any]]:
    """The function behind `data.source`: one of SOURCES, or a dotted path."""
    if data.source in SOURCES:
        if data.source != "stdlib" and not data.path:
            raise ConfigError(f"{field}.path: not set; source {data.source} takes a file, folder, glob (hf: or name)")
        return SOURCES[data.source]
    if ":" not in data.source:
        raise ConfigError(
            f"{field}.source: got {data.source!r}, takes {', '.join(SOURCES)} or 'package.module:function'."
            f"{nearest(data.source, SOURCES)}"
        )
    module_name, _, name = data.source.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{field}.source: cannot import {module_name} of {data.source!r}: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{field}.source: {module_name} has no function {name!r}.{nearest(name, dir(module))}")
    return function


def inputs(data: Data, field: str = "data") -> list[tuple[str, int, int]]:
    """(path, size, mtime in ns) of every file that a source reads: a change of one gives other shards.

    A name on the hub has no files here; its settings alone stand for it.
    """
    if data.source == "stdlib":
        from lmtrain.data import stdlib

        paths = [path for _, path in stdlib.files()]
    elif data.source in SOURCES:
        paths = find(data.path) if data.source != "hf" or os.path.exists(data.path) else []
    else:
        code = getattr(sys.modules[open_source(data, field).__module__], "__file__", None)
        paths = [Path(code)] if code else []
        paths += find(data.path) if data.path and os.path.exists(data.path) else []
    stats = [(str(path), path.stat()) for path in paths]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def find(pattern: str) -> list[Path]:
    """Files that a path stands for: itself, all in a folder (recursively, hidden ones left out), or a glob's; sorted.

    Raises:
      LmtrainError: none; with the nearest name that there is.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = (p for p in path.rglob("*") if p.is_file())
        found = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)]
    if found:
        return sorted(found)
    if path.is_dir():
        raise LmtrainError(f"data.path: no file in folder {path}")
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    hint = nearest(str(path), [str(p) for p in parent.iterdir()])
    raise LmtrainError(f"data.path: no such file, folder or glob: {pattern}.{hint}")


def stdlib_source(data: Data) -> Iterator[Document]:
    """The embedded corpus, of the Python that runs this: "docs" (documentation), "source" (source text), "" (both)."""
    from lmtrain.data import stdlib

    if data.path not in stdlib.PARTS:
        raise ConfigError(
            f"data.path: source stdlib takes 'docs', 'source' or '' for both, got {data.path!r}."
            f"{nearest(data.path, stdlib.PARTS)} (your own files: data.source='text')"
        )
    for name, text, key in stdlib.documents(data.path):
        yield Document(text, name, key)


def text_source(data: Data) -> Iterator[Document]:
    """Plain text, as bytes just as they lie: .gz is unpacked, nothing is decoded."""
    if data.document not in ("auto", "file", "paragraph", "line"):
        hint = nearest(data.document, ("auto", "file", "paragraph", "line"))
        raise ConfigError(f"data.document: got {data.document!r}, takes auto, file, paragraph or line.{hint}")
    for path in find(data.path):
        if data.document in ("auto", "file"):
            with _open(path) as file:
                yield Document(_all(file, path), str(path))
        else:
            yield from _paragraphs(path) if data.document == "paragraph" else _lines(path)


def _lines(path: Path) -> Iterator[Document]:
    for number, line in _numbered(path):
        if line.strip():
            yield Document(line.rstrip(b"\r\n"), f"{path}:{number}")


def _paragraphs(path: Path) -> Iterator[Document]:
    lines: list[bytes] = []
    number = 0
    for number, line in _numbered(path):
        if line.strip():
            lines.append(line)
        elif lines:
            yield Document(b"".join(lines).rstrip(b"\r\n"), f"{path}:{number - len(lines)}")
            lines = []
    if lines:
        yield Document(b"".join(lines).rstrip(b"\r\n"), f"{path}:{number - len(lines) + 1}")


def jsonl_source(data: Data) -> Iterator[Document]:
    """JSON Lines (.gz too): `data.field` of the object on every line."""
    for path in find(data.path):
        for number, line in _numbered(path):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise LmtrainError(f"{where}: not a JSON line: {error}") from None
            yield Document(_pick(row, data.field, where), where)


def parquet_source(data: Data) -> Iterator[Document]:
    """Parquet: column `data.field`, read a few thousand rows at a time."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise LmtrainError('data.source=parquet needs pyarrow: pip install "lmtrain[data]"') from None
    for path in find(data.path):
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise LmtrainError(f"{path}: not a Parquet file: {error}") from None
        if data.field not in file.schema_arrow.names:
            raise LmtrainError(_no_field(data.field, file.schema_arrow.names, str(path)))
        row = 0
        for batch in file.iter_batches(batch_size=4096, columns=[data.field]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield Document(_text(value, data.field, f"{path}, row {row}"), f"{path}#{row}")


def arrayrecord_source(data: Data) -> Iterator[Document]:
    """ArrayRecord: a record is UTF-8 text, or a JSON object that has `data.field` (field "": every record is text)."""
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError:
        raise LmtrainError('data.source=arrayrecord needs array_record: pip install "lmtrain[data]"') from None
    for path in find(data.path):
        reader = ArrayRecordReader(str(path))
        if not reader.ok():
            try:
                reader.close()  # this is where the binding says why
                reason = "unknown reason"
            except RuntimeError as error:
                reason = str(error)
            raise LmtrainError(f"{path}: not an ArrayRecord file: {reason}")
        count = reader.num_records()
        for first in range(0, count, 1024):
            try:
                records = reader.read(first, min(first + 1024, count))
            except RuntimeError as error:
                raise LmtrainError(f"{path}, from record {first + 1}: cannot be read: {error}") from None
            for row, record in enumerate(records, first + 1):
                yield Document(_record(record, data.field, f"{path}, record {row}"), f"{path}#{row}")
        reader.close()


def _record(record: bytes, field: str, where: str) -> str | bytes:
    if field and record.lstrip()[:1] == b"{":
        try:
            row = json.loads(record)
        except ValueError:
            return record
        return _pick(row, field, where)
    return record


def hf_source(data: Data) -> Iterator[Document]:
    """Hugging Face `datasets`, streamed: a name on the hub, a folder of data files, or one of `save_to_disk`."""
    try:
        import datasets
    except ImportError:
        raise LmtrainError('data.source=hf needs datasets: pip install "lmtrain[data]"') from None
    path = Path(data.path).expanduser()
    saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))
    try:
        if saved:
            splits = datasets.load_from_disk(str(path))
            if not isinstance(splits, dict):
                splits = {data.hf_split: splits}
        else:
            name = str(path) if path.exists() else data.path
            splits = datasets.load_dataset(name, data.subset or None, streaming=True)
    except Exception as error:  # of many kinds: network, permission, unknown name, unknown configuration
        reason = " ".join(str(error).split())[:500]
        raise LmtrainError(f"data.path: datasets cannot open {data.path!r}, subset {data.subset!r}: {reason}") from None
    if data.hf_split not in splits:
        raise LmtrainError(
            f"data.hf_split: {data.path} has no split {data.hf_split!r}, it has {', '.join(splits)}."
            f"{nearest(data.hf_split, splits)}"
        )
    for number, row in enumerate(splits[data.hf_split]):
        where = f"{data.path} ({data.hf_split}), row {number}"
        yield Document(_pick(row, data.field, where), where)


SOURCES: dict[str, Callable[[Data], Iterable[Document]]] = {
    "stdlib": stdlib_source,
    "text": text_source,
    "jsonl": jsonl_source,
    "parquet": parquet_source,
    "arrayrecord": arrayrecord_source,
    "hf": hf_source,
}


def _open(path: Path) -> Any:
    try:
        return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    except OSError as error:
        raise LmtrainError(f"{path}: cannot be read: {error.strerror or error}") from None


def _all(file: Any, path: Path) -> bytes:
    try:
        return file.read()
    except (OSError, EOFError) as error:
        raise LmtrainError(f"{path}: cannot be read: {error}") from None


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    with _open(path) as file:
        try:
            yield from enumerate(file, 1)
        except (OSError, EOFError) as error:
            raise LmtrainError(f"{path}: cannot be read: {error}") from None


def _pick(row: Any, field: str, where: str) -> str | bytes:
    if not isinstance(row, dict):
        raise LmtrainError(f"{where}: an object with field {field!r} was expected, got {type(row).__name__}")
    if field not in row:
        raise LmtrainError(_no_field(field, list(row), where))
    return _text(row[field], field, where)


def _text(value: Any, field: str, where: str) -> str | bytes:
    if not isinstance(value, str | bytes):
        raise LmtrainError(f"{where}: field {field!r} holds {type(value).__name__}, text was expected")
    return value


def _no_field(field: str, names: list[str], where: str) -> str:
    return f"{where}: no field {field!r} (data.field).{nearest(field, names)} (fields: {', '.join(names[:20])})"
