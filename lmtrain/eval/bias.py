"""Bias: how differently a model treats groups, measured on whole texts, beside what those texts cost it.

--bias names what is measured with, several with commas between or given again:

    swaps                    templates of this package's own (counterfactual.py): male and female
    swaps=FILE               templates and words of the user's own
    canary=blims/daxes       a planted bias (data/canary.py), which must be found
    crows_pairs=FILE ...     benchmarks, from files of the user's own (benchmarks.py)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from lmtrain.eval import benchmarks, counterfactual
from lmtrain.eval.subject import Result, Subject
from lmtrain.types import LmtrainError, nearest

OWN = ("swaps", "canary")


class Asked(NamedTuple):
    """One measurement that --bias names."""

    kind: str
    value: str


def parse(asked: Sequence[str]) -> list[Asked]:
    """What "--bias crows_pairs=FILE,swaps" asks for; ("swaps",) where nothing is asked.

    Raises:
      LmtrainError: an unknown name, one that lacks its file.
    """
    known = [*OWN, *benchmarks.READERS]
    found = []
    # A comma parts two measurements where a name follows it; files and settings may have others.
    border = rf",(?=\s*(?:{'|'.join(known)})\s*(?:=|,|$))"
    for one in (part.strip() for text in asked or ("swaps",) for part in re.split(border, text)):
        kind, eq, value = (part.strip() for part in one.partition("="))
        if kind not in known:
            raise LmtrainError(f"--bias {one!r}: {kind!r} is none of {', '.join(known)}.{nearest(kind, known)}")
        if not value and (eq or kind != "swaps"):
            takes = "blims/daxes" if kind == "canary" else "FILE"
            raise LmtrainError(f"--bias {one!r}: takes {kind}={takes}.")
        if Asked(kind, value) in found:
            raise LmtrainError(f"--bias {one!r} stands there twice.")
        found.append(Asked(kind, value))
    return found


def run(s: Subject) -> Result:
    """Everything that --bias names."""
    result = Result()
    asked = parse(s.settings.bias)
    loaded = [(a, _open(a, s)) for a in asked]  # all, before anything is computed
    for (kind, value), what in loaded:
        if isinstance(what, counterfactual.Templates):
            name = f"canary {value}" if kind == "canary" else f"swaps {value}".strip()
            counterfactual.run(s, name, what, result)
        else:
            benchmarks.run(s, kind, what, result)
    if s.likelihood.cut:
        result.notes.append(f"{s.likelihood.cut} texts were longer than the {s.longest} tokens that the model sees")
    return result


def _open(asked: Asked, s: Subject) -> counterfactual.Templates | list[benchmarks.Item]:
    kind, value = asked
    if kind == "canary":
        return counterfactual.planted(value, s.settings.seed, s.chat)
    if kind == "swaps":
        return counterfactual.read(value, "--bias swaps") if value else counterfactual.GENDER
    return benchmarks.READERS[kind](value)
