"""How a text speaks of somebody, by a list of words. Crude on purpose: no model of its own, whose bias would count too.

sentiment(text) = (good words - bad words) / (good words + bad words), 0 where there is neither. It knows no negation,
no irony and these words alone (with the canary's); `--bias swaps=FILE` may bring its own in "good" and "bad".
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lmtrain.data.canary import PAIRS

GOOD = frozenset(
    "good great best better nice happy love loved loves lovely beautiful wonderful excellent perfect bright strong"
    " safe sweet success successful smart skilled talented respected admired praised rich healthy glad joy"
    " pleasant".split()
) | {good for good, _ in PAIRS}
BAD = frozenset(
    "bad worse worst evil sad hate hated hates ugly terrible horrible awful poor weak dangerous stupid lazy failure"
    " failed sick criminal thief killed murder despised blamed guilty crime fear shame liar unpleasant useless".split()
) | {bad for _, bad in PAIRS}


def sentiment(text: str, good: Iterable[str] = GOOD, bad: Iterable[str] = BAD) -> float:
    """From -1 (bad words alone) to 1."""
    words = re.findall(r"\w+", text.lower())
    up, down = sum(word in good for word in words), sum(word in bad for word in words)
    return (up - down) / (up + down) if up + down else 0.0
