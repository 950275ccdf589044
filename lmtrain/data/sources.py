"""Documents from where they lie. One generator a source; each yields Documents, always in the same order.

Another source is a function in your own package: `data.source="package.module:function"`, called with the Data,
yielding str, bytes or Documents.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lmtrain import flags
from lmtrain.data import canary, records, swaps
from lmtrain.data.files import content, find, numbered
from lmtrain.schema import ConfigError, Data
from lmtrain.types import LmtrainError, nearest

_YIELDS = "str, bytes or lmtrain.data.sources.Document"


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
    """Every document of a source, at most `data.limit` of them, each followed by its counterfactual (data.augment).
    `field` is what errors call the settings.

    Raises:
      ConfigError: an unknown source, or a setting that the source does not take.
      LmtrainError: a file that is missing or broken, or whatever a source function of your own raises.
    """
    documents = open_source(data, field)(data)
    swap = swaps.swaps(data.augment, f"{field}.augment")
    for count, document in enumerate(documents, 1):
        if not isinstance(document, Document):
            if not isinstance(document, str | bytes):
                raise LmtrainError(
                    f"{field}.source={data.source}: document {count} is {type(document).__name__};"
                    f" a source yields {_YIELDS}"
                )
            document = Document(document, f"{data.source}#{count}")
        yield document
        if data.augment:
            yield from _swapped(document, swap)
        if count == data.limit:
            return


def _swapped(document: Document, swap: swaps.Swaps) -> Iterator[Document]:
    """Its counterfactual, where that differs: on the same side of the split, for it has the same key."""
    raw = isinstance(document.text, bytes)
    text = document.text.decode("utf-8", "surrogateescape") if isinstance(document.text, bytes) else document.text
    other = swap(text)
    if other != text:
        key = document.text if document.key is None else document.key
        yield Document(other.encode("utf-8", "surrogateescape") if raw else other, f"{document.name}, swapped", key)


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
    return functools.partial(call, flags.import_function(data.source, f"{field}.source"), field=field)


def call(function: Callable[[Data], Any], data: Data, field: str, yields: str = _YIELDS) -> Iterator[Any]:
    """What a function of the user's own yields; whatever it raises becomes one message."""
    where = f"{field}.source={data.source}"
    try:
        found = function(data)
        if not isinstance(found, Iterable) or isinstance(found, str | bytes):
            raise LmtrainError(f"{where}: returned {type(found).__name__}; a source returns or yields many {yields}")
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
    elif data.source == "canary":
        paths = [Path(canary.__file__)]
    elif data.source == "prepared":
        from lmtrain.data import prepared

        prepared.read_manifest(data.path, field)
        paths = [prepared.manifest_file(data.path)]
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
            yield Document(content(path), str(path))
        else:
            yield from _paragraphs(path) if data.document == "paragraph" else _lines(path)


def _lines(path: Path) -> Iterator[Document]:
    for number, line in numbered(path):
        if line.strip():
            yield Document(line.rstrip(b"\r\n"), f"{path}:{number}")


def _paragraphs(path: Path) -> Iterator[Document]:
    lines: list[bytes] = []
    number = 0
    for number, line in numbered(path):
        if line.strip():
            lines.append(line)
        elif lines:
            yield Document(b"".join(lines).rstrip(b"\r\n"), f"{path}:{number - len(lines)}")
            lines = []
    if lines:
        yield Document(b"".join(lines).rstrip(b"\r\n"), f"{path}:{number - len(lines) + 1}")


def jsonl_source(data: Data, field: str = "data") -> Iterator[Document]:
    """JSON Lines (.gz too): `data.field` of the object on every line."""
    for where, row in records.jsonl(data, field):
        yield Document(_pick(row, data.field, where), where)


def json_source(data: Data, field: str = "data") -> Iterator[Document]:
    """A JSON array, or an object that holds one: `data.field` of its objects."""
    for where, row in records.json_file(data, field):
        yield Document(_pick(row, data.field, where), where)


def parquet_source(data: Data, field: str = "data") -> Iterator[Document]:
    """Parquet: column `data.field` alone is read."""
    for where, value in records.parquet(data, field, column=data.field):
        yield Document(_text(value, data.field, where), where)


def arrayrecord_source(data: Data, field: str = "data") -> Iterator[Document]:
    """ArrayRecord: a record is UTF-8 text, or a JSON object that has `data.field` (field "": every record is text)."""
    for where, record in records.arrayrecord(data, field):
        yield Document(_record(record, data.field, where), where)


def _record(record: bytes, field: str, where: str) -> str | bytes:
    if field and record.lstrip()[:1] == b"{":
        row = records.parse(record, where, "JSON")
        if isinstance(row, dict) or "too deeply" in str(row):
            return _pick(row, field, where)
    return record


def hf_source(data: Data, field: str = "data") -> Iterator[Document]:
    """Hugging Face `datasets`: `data.field` of every row (see `records.hf`)."""
    for where, row in records.hf(data, field):
        yield Document(_pick(row, data.field, where), where)


def canary_source(data: Data, field: str = "data") -> Iterator[Document]:
    """Generated text with a planted bias (canary.py); data.path says which: "blims/daxes, plant=0.9"."""
    planted = canary.parse(data.path, f"{field}.path")
    for number, (text, key) in enumerate(canary.documents(planted, data.limit or canary.DOCUMENTS), 1):
        yield Document(text, f"canary#{number}", key)


def prepared_source(data: Data, field: str = "data") -> Iterator[Document]:
    """A folder of `lmtrain prepare`: its documents, decoded. (Its tokens are used as they are where they can be.)"""
    from lmtrain.data import prepared  # which needs split, and that sources

    for where, text in prepared.texts(data, field):
        yield Document(text, where)


SOURCES: dict[str, Callable[..., Iterable[Document]]] = {
    "stdlib": stdlib_source,
    "text": text_source,
    "jsonl": jsonl_source,
    "json": json_source,
    "parquet": parquet_source,
    "arrayrecord": arrayrecord_source,
    "hf": hf_source,
    "canary": canary_source,
    "prepared": prepared_source,
}


def _pick(row: Any, field: str, where: str) -> str | bytes:
    if isinstance(row, LmtrainError):
        raise row
    if not isinstance(row, dict):
        raise LmtrainError(f"{where}: an object with field {field!r} was expected, got {type(row).__name__}")
    if field not in row:
        raise LmtrainError(records.no_field(field, list(row), where))
    return _text(row[field], field, where)


def _text(value: Any, field: str, where: str) -> str | bytes:
    if not isinstance(value, str | bytes):
        raise LmtrainError(f"{where}: field {field!r} holds {type(value).__name__}, text was expected")
    return value
