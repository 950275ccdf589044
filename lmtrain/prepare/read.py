"""Documents for datatrove's pipelines: which files --input stands for, how they are shared out, and what is in them.

datatrove's own readers pass over a row without text, a broken line or a cut archive with a warning in a log; here each
is refused by file and line, or (malformed="skip") counted in the manifest with examples. Paths are fsspec's: local,
s3://, gs://.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import lzma
import re
import zlib
from collections.abc import Iterator
from typing import Any

import fsspec
import zstandard
from datatrove.data import Document
from datatrove.io import get_shard_from_paths_file
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.extractors.base import ExtractorSandbox

from lmtrain.data import files, records
from lmtrain.prepare.dropped import Dropped
from lmtrain.types import LmtrainError

#: Kinds of files by the end of their names; .gz, .zst, .bz2 and .xz may follow.
KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".warc": "warc", ".wet": "warc", ".txt": "text",
    ".md": "text", ".rst": "text", ".html": "html", ".htm": "html",
}  # fmt: skip
PACKED = (".gz", ".zst", ".bz2", ".xz")
EXTRA = "pip install -e '.[prepare]' in a checkout"
EXTRACT_SECONDS = 60.0  # for one page; far above what any needs, so that a busy machine drops no other pages
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
_HTML = ("text/html", "application/xhtml+xml")


# -------------------------------------------------------------------------------------------------- which files, shared
def kind(path: str) -> str:
    """What a file holds, by its name.

    Raises:
      LmtrainError: a name that says nothing of the sort.
    """
    name = path.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    found = re.search(r"\.[a-z0-9]+$", name)
    if found is None or found[0] not in KINDS:
        raise LmtrainError(
            f"--input: {path} is of no kind that is read. The name ends in {' '.join(KINDS)}, perhaps with"
            f" {' '.join(PACKED)} behind"
        )
    return KINDS[found[0]]


def find(patterns: list[str]) -> list[tuple[str, int]]:
    """(path, bytes) of all files that --input stands for, sorted, each once.

    Raises:
      LmtrainError: a pattern without a file, or a file of no known kind.
    """
    found: dict[str, int] = {}
    for pattern in patterns:
        if "://" in pattern:
            try:
                system, path = fsspec.core.url_to_fs(pattern)
                names = system.find(path) if system.isdir(path) else system.glob(path)
                found |= {system.unstrip_protocol(name): system.size(name) for name in names if system.isfile(name)}
            except ImportError as error:
                raise LmtrainError(
                    f"--input: {pattern}: {error}. pip install -e '.[cloud]' adds gs:// and s3://"
                ) from None
            except Exception as error:  # of many kinds: no such protocol, no credentials, no network
                raise LmtrainError(f"--input: cannot look for {pattern}: {files.short(str(error), 300)}") from None
            if not names:
                raise LmtrainError(f"--input: no file at {pattern}")
        else:
            found |= {str(path.absolute()): path.stat().st_size for path in files.matching(pattern, "--input")}
    kinds = {kind(name) for name in found}
    if kinds & {"warc", "html"}:
        try:
            import trafilatura  # noqa: F401
        except ImportError as error:
            raise LmtrainError(f"--input: pages of HTML are read by trafilatura ({error}): {EXTRA}") from None
    return sorted(found.items())


def units(found: list[tuple[str, int]], task_bytes: int) -> tuple[list[dict[str, Any]], int]:
    """What tasks read, and how many tasks: {"path", "part", "parts"}, part K of N parts of a file's rows.

    It depends on the files alone, not on the workers, so that any number of them gives the same result. A large file is
    read by several tasks, each of which decompresses all of it and parses its own rows.
    """
    out = []
    for path, size in found:
        parts = 1 if kind(path) in ("text", "html") else max(1, -(-size // task_bytes))
        out += [{"path": path, "part": part, "parts": parts} for part in range(parts)]
    return out, min(len(out), max(1, -(-sum(size for _, size in found) // task_bytes)))


# ------------------------------------------------------------------------------------------------------------ the block
class Read(PipelineStep):
    """The documents of a task's units.

    Args:
      units: a file with one unit a line; task R of N takes lines R, R + N, ...
      field: what holds the text of a row.
      skip: rows and files that cannot be read are counted and left out, not refused.
      dropped: where that is counted; also documents that have no text.
    """

    type = "📖 - READER"
    name = "read"

    def __init__(self, units: str, field: str, skip: bool, dropped: Dropped):
        super().__init__()
        self.units, self.field, self.skip, self.dropped = units, field, skip, dropped
        self.extractor = Trafilatura(timeout=EXTRACT_SECONDS)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Contract of datatrove's blocks. Raises LmtrainError for what cannot be read."""
        with contextlib.ExitStack() as stack:
            dropped = stack.enter_context(self.dropped)
            box: ExtractorSandbox | None = None
            for line in get_shard_from_paths_file(self.units, rank, world_size):
                for where, text, is_page in self._unit(json.loads(line)):
                    if isinstance(text, LmtrainError):
                        if not self.skip:
                            raise text
                        dropped.count(rank, "malformed", where, str(text), 0)
                        continue
                    if not text.isascii():  # a lone surrogate, which UTF-8 cannot say
                        text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
                    if is_page:
                        box = box or stack.enter_context(_sandbox())
                        page, text = text, self._extract(box, text)
                        if not text.strip():
                            dropped.count(rank, "page without text", where, page, len(page.encode()))
                            continue
                    if not text.strip():
                        dropped.count(rank, "empty", where, text, len(text.encode()))
                        continue
                    self.stat_update("documents")
                    self.stat_update("bytes", value=len(text.encode()))
                    yield Document(text, where)

    def _extract(self, box: ExtractorSandbox, page: str) -> str:
        """The text of a page; "" where there is none, or it cannot be parsed."""
        try:
            return box.process_document(page, self.extractor.extract) or ""
        except Exception:  # of the parser's: what it cannot read has no text
            return ""

    def _unit(self, unit: dict[str, Any]) -> Iterator[tuple[str, Any, bool]]:
        """(where, text or LmtrainError, whether it is a page of HTML) of a part of a file."""
        path = unit["path"]
        what = kind(path)
        read = {"jsonl": self._jsonl, "parquet": self._parquet, "warc": self._warc}.get(what, self._text)
        where = path
        try:
            for where, value, is_page in itertools.islice(read(path), unit["part"], None, unit["parts"]):
                if what == "jsonl":
                    value = records.parse(value, where, "a JSON line")
                yield where, value if what in ("text", "html", "warc") else self._row(value, where), is_page
        except LmtrainError as error:
            yield path, error, False
        except _DAMAGED as error:
            after = where.removeprefix(path).lstrip(":, ") or "its start"
            yield path, files.unreadable(f"{path}, after {after}", error), False

    def _jsonl(self, path: str) -> Iterator[tuple[str, Any, bool]]:
        with opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line, False

    def _parquet(self, path: str) -> Iterator[tuple[str, Any, bool]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        row = 0
        with opened(path) as file:
            try:
                table = pq.ParquetFile(file)
                if self.field not in table.schema_arrow.names:
                    raise LmtrainError(_no_field(self.field, table.schema_arrow.names, path))
                for batch in table.iter_batches(batch_size=1024, columns=[self.field]):
                    for value in batch.column(0).to_pylist():
                        row += 1
                        yield f"{path}, row {row}", {self.field: value}, False
            except pa.ArrowException as error:
                at = f", after row {row}" if row else ": not a Parquet file"
                raise LmtrainError(f"{path}{at}: cannot be read: {files.short(str(error), 300)}") from None

    def _text(self, path: str) -> Iterator[tuple[str, Any, bool]]:
        with opened(path) as file:
            yield path, file.read().decode("utf-8", "replace"), kind(path) == "html"

    def _warc(self, path: str) -> Iterator[tuple[str, Any, bool]]:
        """Pages (response) and texts (conversion, of WET files). Others, images say, are no documents."""
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed

        # warcio unpacks .gz itself, record by record.
        compression = None if path.endswith(".gz") else "infer"
        with fsspec.open(path, "rb", compression=compression) as file:
            try:
                for number, record in enumerate(ArchiveIterator(file), 1):
                    where = f"{path}, record {number}"
                    if record.rec_type in ("response", "conversion"):
                        content = record.content_stream().read()
                        if record.raw_stream.limit > 0 and not record.raw_stream.read(1):
                            raise LmtrainError(f"{where}: cannot be read: it ends {record.raw_stream.limit:,} bytes"
                                               " early. Replace the file, or leave it out")  # fmt: skip
                        mime = _mime(record)
                        if mime in _HTML or (record.rec_type == "conversion" and mime == "text/plain"):
                            yield where, _decoded(content), mime in _HTML
            except ArchiveLoadFailed as error:
                raise LmtrainError(f"{path}: not a WARC file, or damaged: {files.short(str(error), 300)}") from None

    def _row(self, row: Any, where: str) -> str | LmtrainError:
        """The text of a row, or why it has none."""
        if isinstance(row, LmtrainError):
            return row
        if not isinstance(row, dict):
            return LmtrainError(f"{where}: an object with field {self.field!r} was expected, got {type(row).__name__}")
        if self.field not in row:
            return LmtrainError(_no_field(self.field, list(row), where))
        text = row[self.field]
        if not isinstance(text, str):
            return LmtrainError(f"{where}: field {self.field!r} holds {type(text).__name__}, text was expected")
        return text


def _sandbox() -> ExtractorSandbox:
    """A process in which pages are parsed: libxml2 crashes on some, and its complaints are of no use here."""
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    return ExtractorSandbox(EXTRACT_SECONDS, warmup_text="")


def opened(path: str) -> Any:
    """A file, unpacked by its name's end, open to read bytes and lines."""
    return io.BufferedReader(fsspec.open(path, "rb", compression="infer").open(), 1 << 20)


def _mime(record: Any) -> str:
    """What a record of a WARC file says that it holds; a text of a WET file needs not say so."""
    said = record.rec_headers.get("WARC-Identified-Payload-Type")
    if not said and record.http_headers:
        said = record.http_headers.get("Content-Type")
    said = said or ("text/plain" if record.rec_type == "conversion" else "")
    return said.split(";")[0].strip().lower()


def _decoded(content: bytes) -> str:
    """UTF-8, else what the bytes look like."""
    import cchardet

    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        try:
            return content.decode(cchardet.detect(content)["encoding"] or "utf-8", "replace")
        except LookupError:
            return content.decode("utf-8", "replace")


def _no_field(field: str, names: list[str], where: str) -> str:
    return records.no_field(field, names, where).replace("(data.field)", "(--field)")
