"""Numbers as they stand in answers: "$1,234.50", "-3 apples", "72."."""

from __future__ import annotations

import re
from decimal import Decimal

_MOST = 60  # digits; longer runs are no answer
# Thousands may be grouped by commas; a point counts only before a digit, a minus only where nothing stands before it.
_NUMBER = re.compile(r"(?:(?<![\w).])[-−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)


def normal(text: str) -> str:
    """A number without grouping, plus sign, needless zeros or exponent: "1,234.50" -> "1234.5"; "" where it is none."""
    plain = text.replace(",", "").replace("−", "-")
    if len(plain) > _MOST or not re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)", plain, re.ASCII):
        return ""
    value = Decimal(plain)
    written = f"{value:f}"
    written = written.rstrip("0").rstrip(".") if "." in written else written
    return "0" if value == 0 else written


def last(text: str) -> str:
    """The last number of a text, normalised; "" where there is none."""
    found = _NUMBER.findall(text[-10_000:])
    return normal(found[-1]) if found else ""


def first(text: str) -> str:
    """The first number of a text, normalised; "" where there is none."""
    found = _NUMBER.search(text[:10_000])
    return normal(found[0]) if found else ""
