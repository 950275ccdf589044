"""Documents from where they lie. One generator a source; each yields Documents, always in the same order.

Another source is a function in your own package: `data.source="package.module:function"`, called with the Data,
yielding str, bytes or Documents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import gzip
import json
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lmtrain import flags
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
      LmtrainError: a file that is missing or broken, or whatever a source function of your own raises.
    """
    documents = open_source(data, field)(data)
    for count, document in enumerate(documents, 1):
        if not isinstance(document, Document):
            if not isinstance(document, str | bytes):
                raise LmtrainError(
                    f"{field}.source={data.source}: document {count} is {type(document).__name__};"
                    f" a source yields {_YIELDS}"
                )
            document = Document(document, f"{data.source}#{count}")
        yield document
        if count == data.limit:
            return


def open_source(data: Data, field: str = "data") -> Callable[[Data], Iterable[Any]]:
    """The function behind `data.source`: one of SOURCES, or a dotted path.

    Raises:
      ConfigError: there is none of that name, or it does not import.
    """
    if data.source in SOURCES:
        if data.source != "stdlib" and not data.path:
            raise ConfigError(f"{field}.path: not set; source {data.source} takes a file, folder, glob (hf: or name)")
        return functools.partial(SOURCES[data.source], field=field)
    if ":" not in data.source:
        raise ConfigError(
            f"{field}.source: got {data.source!r}, takes {', '.join(SOURCES)} or 'package.module:function'."
            f"{nearest(data.source, SOURCES)}"
        )
    return functools.partial(_call, flags.import_function(data.source, f"{field}.source"), field=field)


def _call(function: Callable[[Data], Any], data: Data, field: str) -> Iterator[Any]:
    """What a function of the user's own yields; whatever it raises becomes one message."""
    where = f"{field}.source={data.source}"
    try:
        found = function(data)
        if not isinstance(found, Iterable) or isinstance(found, str | bytes):
            raise LmtrainError(f"{where}: returned {type(found).__name__}; a source returns or yields many {_YIELDS}")
        yield from found
    except LmtrainError:
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise LmtrainError(f"{where}: {type(error).__name__}: {error} ({at.filename}:{at.lineno})") from error


def inputs(data: Data, field: str = "data") -> list[tuple[str, int, int]]:
    """(path, size, mtime in ns) of every file that a source reads: a change of one gives other shards.

    A name on the hub has no files here; its settings alone stand for it.
    """
    if data.source == "stdlib":
        from lmtrain.data import stdlib

        paths = [path for _, path in stdlib.files()]
    elif data.source == "hf":
        paths = find(data.path, field) if os.path.exists(os.path.expanduser(data.path)) else []
    elif data.source in SOURCES:
        paths = find(data.path, field)
    else:
        function = flags.import_function(data.source, f"{field}.source")
        code = getattr(sys.modules.get(getattr(function, "__module__", "")), "__file__", None)
        paths = [Path(code)] if code and os.path.isfile(code) else []
        paths += find(data.path, field) if data.path and os.path.exists(os.path.expanduser(data.path)) else []
    stats = [(str(path), path.stat()) for path in paths]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def find(pattern: str, field: str = "data") -> list[Path]:
    """Files that a path stands for: itself, all in a folder (recursively, hidden ones left out), or a glob's; sorted.

    Raises:
      LmtrainError: none, with the nearest name that there is; or the system takes no such name.
    """
    try:
        return _find(pattern, field)
    except (OSError, RuntimeError, ValueError) as error:  # no permission, too long, ~nobody, a zero byte
        reason = getattr(error, "strerror", None) or error
        raise LmtrainError(f"{field}.path: cannot look for {_short(pattern)!r}: {reason}") from None


def _find(pattern: str, field: str) -> list[Path]:
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
        raise LmtrainError(f"{field}.path: no file in folder {path}")
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    hint = nearest(str(path), [str(p) for p in parent.iterdir()])
    raise LmtrainError(f"{field}.path: no such file, folder or glob: {_short(pattern)}.{hint}")


def stdlib_source(data: Data, field: str = "data") -> Iterator[Document]:
    """The embedded corpus, of the Python that runs this: "docs" (documentation), "source" (source text), "" (both)."""
    from lmtrain.data import stdlib

    if data.path not in stdlib.PARTS:
        raise ConfigError(
            f"{field}.path: source stdlib takes 'docs', 'source' or '' for both, got {data.path!r}."
            f"{nearest(data.path, stdlib.PARTS)} (your own files: {field}.source='text')"
        )
    try:
        for name, text, key in stdlib.documents(data.path):
            yield Document(text, name, key)
    except OSError as error:
        raise LmtrainError(f"{field}.source=stdlib: {error.filename}: cannot be read: {error.strerror}") from None


def text_source(data: Data, field: str = "data") -> Iterator[Document]:
    """Plain text, as bytes just as they lie: .gz is unpacked, nothing is decoded."""
    if data.document not in ("auto", "file", "paragraph", "line"):
        hint = nearest(data.document, ("auto", "file", "paragraph", "line"))
        raise ConfigError(f"{field}.document: got {data.document!r}, takes auto, file, paragraph or line.{hint}")
    for path in find(data.path, field):
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


def jsonl_source(data: Data, field: str = "data") -> Iterator[Document]:
    """JSON Lines (.gz too): `data.field` of the object on every line."""
    for path in find(data.path, field):
        for number, line in _numbered(path):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise LmtrainError(f"{where}: not a JSON line: {error}") from None
            except RecursionError:
                raise LmtrainError(f"{where}: {_TOO_DEEP}") from None
            yield Document(_pick(row, data.field, where), where)


def parquet_source(data: Data, field: str = "data") -> Iterator[Document]:
    """Parquet: column `data.field`, read a few thousand rows at a time."""
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
            if data.field not in file.schema_arrow.names:
                raise LmtrainError(_no_field(data.field, file.schema_arrow.names, str(path)))
            try:
                for batch in file.iter_batches(batch_size=4096, columns=[data.field]):
                    for value in batch.column(0).to_pylist():
                        row += 1
                        yield Document(_text(value, data.field, f"{path}, row {row}"), f"{path}#{row}")
            except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a text column that is not UTF-8
                raise _unreadable(f"{path}, after row {row}", error) from None


def arrayrecord_source(data: Data, field: str = "data") -> Iterator[Document]:
    """ArrayRecord: a record is UTF-8 text, or a JSON object that has `data.field` (field "": every record is text)."""
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
                    raise _unreadable(f"{path}, from record {first + 1}", error) from None
                for row, record in enumerate(records, first + 1):
                    yield Document(_record(record, data.field, f"{path}, record {row}"), f"{path}#{row}")
        finally:
            with contextlib.suppress(RuntimeError):  # says again what read has said
                reader.close()


def _record(record: bytes, field: str, where: str) -> str | bytes:
    if field and record.lstrip()[:1] == b"{":
        try:
            row = json.loads(record)
        except ValueError:
            return record
        except RecursionError:
            raise LmtrainError(f"{where}: {_TOO_DEEP}") from None
        return _pick(row, field, where)
    return record


def hf_source(data: Data, field: str = "data") -> Iterator[Document]:
    """Hugging Face `datasets`, streamed: a name on the hub, a folder of data files, or one of `save_to_disk`."""
    try:
        import datasets
    except ImportError as error:
        raise LmtrainError(f"{field}.source=hf needs datasets ({error}), {_EXTRA}") from None
    name = _short(data.path)
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
            f"{field}.path: datasets cannot open {name!r}, subset {data.subset!r}: {_short(str(error), 500)}"
        ) from None
    if data.hf_split not in splits:
        raise LmtrainError(
            f"{field}.hf_split: {name} has no split {data.hf_split!r}, it has {', '.join(splits)}."
            f"{nearest(data.hf_split, splits)}"
        )
    number = -1
    try:
        for number, row in enumerate(splits[data.hf_split]):
            where = f"{name} ({data.hf_split}), row {number}"
            yield Document(_pick(row, data.field, where), where)
    except LmtrainError:
        raise
    except Exception as error:  # of many kinds again: network, a damaged file, rows that disagree
        raise LmtrainError(
            f"{name} ({data.hf_split}), after {number + 1} rows: datasets cannot read on: {type(error).__name__}:"
            f" {_short(str(error), 500)}. Repair or replace the data, or try again where it is the network"
        ) from None


SOURCES: dict[str, Callable[..., Iterable[Document]]] = {
    "stdlib": stdlib_source,
    "text": text_source,
    "jsonl": jsonl_source,
    "parquet": parquet_source,
    "arrayrecord": arrayrecord_source,
    "hf": hf_source,
}


_YIELDS = "str, bytes or lmtrain.data.sources.Document"
_EXTRA = "of the extra `data` (pip install -e '.[data]' in a checkout)"
_TOO_DEEP = "JSON nested too deeply to be read; leave this row out"
# What reading a file, packed or not, raises where its bytes are damaged.
_DAMAGED = (OSError, EOFError, zlib.error)


def _open(path: Path) -> Any:
    try:
        return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    except OSError as error:
        raise LmtrainError(f"{path}: cannot be read: {error.strerror or error}") from None


def _all(file: Any, path: Path) -> bytes:
    try:
        return file.read()
    except _DAMAGED as error:
        raise _unreadable(str(path), error) from None


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    with _open(path) as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line
        except _DAMAGED as error:
            raise _unreadable(f"{path}:{number + 1}", error) from None


def _unreadable(where: str, error: Exception) -> LmtrainError:
    reason = _short(str(error), 500)
    return LmtrainError(f"{where}: cannot be read: {reason}. Replace the file, or leave it out")


def _short(text: str, most: int = 200) -> str:
    """A text on one line that leaves room for the rest of the message."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."


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
