"""Long documents cut into pieces that can be encoded apart, and bytes that are no text told from those that are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

#: A long document is encoded in pieces of about so many characters, in parallel. A piece begins with a line that is not
#: blank, its indentation included: there SPLIT (tokenizer.py) always ends a word, so the ids are those of the whole.
#: (A line longer than two pieces is cut anywhere.)
PIECE = 1 << 14
#: The same of a tokenizer whose words may end elsewhere: only documents so long are cut at all.
FOREIGN_PIECE = 1 << 22
# Characters that one call encodes: what `tokenizers` returns takes some forty times the room of its text.
CALL = 1 << 20


def as_bytes(text: str | bytes) -> bytes:
    """The bytes of a text: UTF-8; a lone surrogate, which UTF-8 cannot say, becomes its three bytes of no UTF-8."""
    return text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogatepass")


def parts(text: str | bytes, size: int) -> Iterator[str | bytes]:
    """A text as pieces of valid UTF-8 (str), and the bytes between them that are not (bytes)."""
    escaped = as_bytes(text).decode("utf-8", errors="surrogateescape")
    for i, run in enumerate(_NOT_UTF8.split(escaped)):
        if i % 2:
            yield run.encode("utf-8", errors="surrogateescape")
        else:
            yield from cut(run, size)


def calls(found: Iterable[tuple[int, str | bytes]]) -> Iterator[list[tuple[int, str | bytes]]]:
    """Parts in lists of about CALL characters."""
    call: list[tuple[int, str | bytes]] = []
    size = 0
    for part in found:
        call.append(part)
        size += len(part[1])
        if size >= CALL:
            yield call
            call, size = [], 0
    if call:
        yield call


def cut(text: str, size: int = PIECE) -> Iterator[str]:
    """A text in pieces of about `size` characters, each beginning with a line where one begins near enough."""
    start = 0
    while len(text) - start > size:
        found = _LINE_START.search(text, start + size // 2, start + 2 * size)
        stop = found.start() if found else start + size
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")
_LINE_START = re.compile(r"(?<=\n)(?=[^\S\r\n]*\S)")
