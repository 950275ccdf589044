"""JSON Lines, read strictly: what Python's json lets pass and other readers do not is named, line by line.

No byte order mark, UTF-8 alone, no NaN or Infinity, no key twice in an object, no half characters, no blank lines but
at the end.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator
from typing import Any, NoReturn

from lmtrain.data.files import find, numbered, short
from lmtrain.data.messages import Unusable
from lmtrain.schema import Data


def lines(data: Data, field: str = "data") -> Iterator[tuple[str, Any]]:
    """("FILE:LINE", value) of every line of JSON Lines (.gz too); an Unusable, not raised, where a line has no value.

    Raises:
      LmtrainError: no such file, or a damaged one.
    """
    for path in find(data.path, field):
        blank: list[int] = []
        for number, line in numbered(path):
            if not line.strip():
                blank.append(number)
                continue
            for empty in blank:
                yield f"{path}:{empty}", Unusable("blank line", "a JSON object was expected", f"{path}:{empty}")
            blank = []
            where = f"{path}:{number}"
            try:
                yield where, _line(line)
            except Unusable as error:
                yield where, error.at(where)


def _line(line: bytes) -> Any:
    if line.startswith(codecs.BOM_UTF8):
        raise Unusable("byte order mark", "the line begins with one; save the file as UTF-8 without it")
    try:
        text = line.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        raise Unusable("not UTF-8", f"byte {error.start + 1} of the line is 0x{line[error.start]:02x}") from None
    return parse(text)


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
      Unusable: says what is wrong with it, and where.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_float)
    except json.JSONDecodeError as error:
        raise Unusable("not JSON", f"{error.msg} at character {error.pos + 1}{_hint(text)}") from None
    except ValueError:
        raise Unusable("no number of JSON's", "a whole number of thousands of digits") from None
    except RecursionError:
        raise Unusable("JSON nested too deeply to be read", "leave this row out") from None
    if "\\u" in text:  # half a character can only be written so
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise Unusable("half a character", f"{half} stands alone; such escapes come in pairs") from None
        except RecursionError:
            raise Unusable("JSON nested too deeply to be read", "leave this row out") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Unusable("a key twice", f"{short(twice)!r} stands twice in one object; which of the two counts?")
    return found


def _no_number(name: str) -> NoReturn:
    raise Unusable("no number of JSON's", f"{name}; JSON has numbers, text, true, false, null, lists and objects")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Unusable("no number of JSON's", f"{short(text)} is too large")
    return value


def _hint(text: str) -> str:
    """What a usual slip wants."""
    begin = text.strip()[:2]
    if begin in ("{", "[", "}", "]", "},", "],"):
        return ". An object stands on one line in JSON Lines, with nothing around it"
    if begin == "{'":
        return '. JSON takes double quotes: "'
    return ""
