"""How alike two texts are, 0 to 1, by measures of the literature, each from its definition.

Words are runs of letters and digits in lower case; for BLEU and GLEU case counts and punctuation marks are words too.
They are compared as they stand: no stems, no synonyms.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable, Hashable, Sequence


def metrics() -> dict[str, Callable[[str, str], float]]:
    """Name -> function of (text, reference)."""
    rouges = {f"rouge_{n}": _rouge_of(n) for n in range(1, 6)}
    return {
        "fuzzy_match": fuzzy_match, "bleu": bleu, "gleu": gleu, "meteor": meteor, **rouges, "rouge_l": rouge_l,
    }  # fmt: skip


def fuzzy_match(text: str, reference: str) -> float:
    """Twice the longest common subsequence of characters, as a share of all: what rapidfuzz calls `ratio`."""
    total = len(text) + len(reference)
    return 2 * common(text, reference) / total if total else 1.0


def bleu(text: str, reference: str) -> float:
    """BLEU (Papineni et al. 2002) of one sentence: the geometric mean of the precisions of 1- to 4-grams, times the
    brevity penalty.

    Of a short text only the lengths that it has count; the first precision that is zero counts as half a match, the
    next as a quarter, and so on (Chen & Cherry 2014, method 3): else most sentences have zero.
    """
    said, wanted = _tokens(text), _tokens(reference)
    logs, halved = [], 1.0
    for n in range(1, min(4, len(said)) + 1):
        total = len(said) - n + 1
        matches: float = _overlap(said, wanted, n)
        if not matches:
            if n == 1:
                return 0.0
            halved /= 2
            matches = halved
        logs.append(math.log(matches / total))
    if not logs:
        return 0.0
    return math.exp(min(0.0, 1 - len(wanted) / len(said)) + sum(logs) / len(logs))


def gleu(text: str, reference: str) -> float:
    """GLEU (Wu et al. 2016, arXiv 1609.08144, section 5.1): matching 1- to 4-grams as a share of those of the longer
    text, which is the smaller of precision and recall."""
    said, wanted = _tokens(text), _tokens(reference)
    orders = range(1, 5)
    most = max(sum(max(0, len(words) - n + 1) for n in orders) for words in (said, wanted))
    return sum(_overlap(said, wanted, n) for n in orders) / most if most else 0.0


def meteor(text: str, reference: str) -> float:
    """METEOR (Banerjee & Lavie 2005) by exact words: 10 P R / (R + 9 P), less up to a half the more pieces the words
    that match stand in."""
    said, wanted = _words(text), _words(reference)
    pairs = _aligned(said, wanted)
    if not pairs:
        return 0.0
    precision, recall = len(pairs) / len(said), len(pairs) / len(wanted)
    pieces = 1 + sum(after != (i + 1, j + 1) for (i, j), after in zip(pairs, pairs[1:], strict=False))
    return 10 * precision * recall / (recall + 9 * precision) * (1 - 0.5 * (pieces / len(pairs)) ** 3)


def rouge_n(text: str, reference: str, n: int) -> float:
    """ROUGE-N (Lin 2004) as an F1: the harmonic mean of precision and recall of n-grams."""
    said, wanted = _words(text), _words(reference)
    return _f1(_overlap(said, wanted, n), len(said) - n + 1, len(wanted) - n + 1)


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L (Lin 2004) of one sentence, as an F1: the longest common subsequence of words."""
    said, wanted = _words(text), _words(reference)
    return _f1(common(said, wanted), len(said), len(wanted))


def common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence: a row of the usual table lies in the bits of one whole number
    (Hyyrö 2004), whose zeros count."""
    places: dict[Hashable, int] = {}
    for i, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for item in b:
        match = row & places.get(item, 0)
        row = ((row + match) | (row - match)) & full
    return len(a) - row.bit_count()


def _rouge_of(n: int) -> Callable[[str, str], float]:
    return lambda text, reference: rouge_n(text, reference, n)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _overlap(a: list[str], b: list[str], n: int) -> int:
    """n-grams that both have, each as often as the one that has it less often."""
    grams = [collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in (a, b)]
    return (grams[0] & grams[1]).total()


def _aligned(a: list[str], b: list[str]) -> list[tuple[int, int]]:
    """Pairs of equal words, each used once: the place behind the last pair's where it will do, else the first free."""
    free: dict[str, list[int]] = {}
    for j, word in enumerate(b):
        free.setdefault(word, []).append(j)
    pairs: list[tuple[int, int]] = []
    for i, word in enumerate(a):
        if places := free.get(word):
            follows = pairs[-1][1] + 1 if pairs and pairs[-1][0] == i - 1 else -1
            j = follows if follows in places else places[0]
            places.remove(j)
            pairs.append((i, j))
    return pairs


def _f1(matches: int, said: int, wanted: int) -> float:
    return 2 * matches / (said + wanted) if matches else 0.0
