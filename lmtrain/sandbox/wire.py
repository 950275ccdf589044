"""How plain values cross between the program's process and the tester's: JSON, so that reading runs no code.

What arrives is made anew of exact built-in types. An object whose `__eq__` says yes to everything arrives as nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import islice

TYPE_CHECKING = False  # typing takes longer to import than all that happens here
if TYPE_CHECKING:
    from typing import Any

LONGEST = 1 << 22  # bytes of one message
_ITEMS = 10_000  # that an iterator is read for
_LISTS: dict[str, Callable] = {"tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}


class Odd(Exception):
    """A value that does not cross."""


def encode(value: Any) -> Any:
    """As JSON has it: None, bool, int, float, str and list are themselves, the rest {kind: content}.

    Subclasses cross as the type they extend (a Counter as a dict); iterators as an iterator of their items.

    Raises:
      Odd: any other type, or nested too deeply.
    """
    try:
        return _encode(value)
    except RecursionError:
        raise Odd("a value nested too deeply, or in itself") from None


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return int(value) if -(2**63) < value < 2**63 else {"int": hex(value)}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    for kind, types in (("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, types):
            return {kind: [_encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_encode(k), _encode(v)] for k, v in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__: value.decode("latin-1")}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [_encode(n) for n in (value.start, value.stop, value.step)]}
    if hasattr(value, "__next__"):
        items = list(islice(value, _ITEMS + 1))
        if len(items) > _ITEMS:
            raise Odd(f"an iterator of more than {_ITEMS} items")
        return {"iterator": [_encode(item) for item in items]}
    raise Odd(f"a {type(value).__name__}; plain values cross: numbers, text, lists, tuples, dicts, sets, iterators")


def decode(tree: Any) -> Any:
    """What `encode` was given, of built-in types only.

    Raises:
      ValueError, TypeError, RecursionError, MemoryError: it was not made by `encode`.
    """
    if isinstance(tree, list):
        return [decode(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind in _LISTS:
        return _LISTS[kind]([decode(item) for item in content])
    if kind == "dict":
        return {decode(k): decode(v) for k, v in content}
    if kind == "int":
        return int(content, 16)
    if kind in ("bytes", "bytearray"):
        text = content.encode("latin-1")
        return text if kind == "bytes" else bytearray(text)
    if kind == "complex":
        return complex(*content)
    if kind == "range":
        return range(*map(decode, content))
    raise ValueError(f"no such kind: {kind!r}")


def send(fd: int, message: Any) -> None:
    """Writes one line of JSON; OSError where nobody reads."""
    data = memoryview(json.dumps(message).encode() + b"\n")
    while data:
        data = data[os.write(fd, data) :]


class Lines:
    """Reads a pipe line by line."""

    def __init__(self, fd: int):
        self.fd, self.rest = fd, b""

    def next(self) -> bytes | None:
        """One line without its end; None where the other side is gone, or the line is longer than LONGEST."""
        parts = [self.rest]
        size = len(self.rest)
        while b"\n" not in parts[-1]:
            part = os.read(self.fd, 1 << 16)
            size += len(part)
            if not part or size > LONGEST:
                return None
            parts.append(part)
        line, _, self.rest = b"".join(parts).partition(b"\n")
        return line
