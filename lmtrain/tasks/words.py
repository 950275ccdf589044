"""Pronounceable words that mean nothing, as many as one wants: the same offline, on every machine and Python."""

from __future__ import annotations

import random

_ONSETS, _VOWELS, _ENDS = "b d f g h k l m n p r s t v w z".split(), "a e i o u".split(), "n r s l t m".split()


def word(rng: random.Random, syllables: int, end: float = 0.3) -> str:
    """A word such as "lomiter"; `end` is the chance of a closing consonant."""
    text = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
    return text + (rng.choice(_ENDS) if rng.random() < end else "")


def several(rng: random.Random, count: int, syllables: int, end: float = 0.3) -> list[str]:
    """`count` different words."""
    found: list[str] = []
    while len(found) < count:
        new = word(rng, syllables, end)
        if new not in found:
            found.append(new)
    return found
