"""Counterfactual swaps: the same text with the words of one group in the place of another's.

    he/she   blims/daxes   his/her*   king/queen

Whole words alone are exchanged, both ways at once, and each keeps its case: "He" becomes "She", "SHE" becomes "HE".
English says "her" for both "him" and "his", so a swap cannot be undone in every text: where a word stands in several
pairs, the first pair decides.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence

from lmtrain.schema import ConfigError

#: What `data.augment=("gender",)` and the audit's own templates take: words that differ by gender alone. (Names that
#: most people read as a man's or a woman's are left to lists of the user's own.)
GENDER = (
    "he/she", "him/her", "his/her", "himself/herself", "man/woman", "men/women", "boy/girl", "boys/girls",
    "father/mother", "fathers/mothers", "son/daughter", "sons/daughters", "brother/sister", "brothers/sisters",
    "husband/wife", "husbands/wives", "king/queen", "uncle/aunt", "nephew/niece", "grandfather/grandmother",
    "gentleman/lady", "gentlemen/ladies", "mr/mrs", "sir/madam",
)  # fmt: skip


class Swaps:
    """Pairs of words, exchanged in texts.

    Args:
      pairs: "he/she"; "gender" stands for GENDER.
      field: what errors call them.

    Raises:
      ConfigError: one that is no pair of two different words.
    """

    def __init__(self, pairs: Sequence[str], field: str = "data.augment"):
        self.to: dict[str, str] = {}
        self.pairs: list[tuple[str, str]] = []
        for pair in _spelled(pairs):
            words = [word.strip().lower() for word in pair.split("/")]
            if len(words) != 2 or not all(re.fullmatch(r"[^\W_](?:[\w' -]*\w)?", word) for word in words):
                raise ConfigError(f"{field}: got {pair!r}, takes pairs of words such as 'he/she', or 'gender'.")
            first, second = words
            if first == second:
                raise ConfigError(f"{field}: {pair!r} exchanges a word with itself.")
            self.pairs.append((first, second))
            self.to.setdefault(first, second)
            self.to.setdefault(second, first)
        longest_first = sorted(self.to, key=len, reverse=True)
        self._any = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.I)

    def __call__(self, text: str) -> str:
        """The text with every word of a pair exchanged; the text itself where it has none."""
        return self._any.sub(lambda found: like(found[0], self.to[found[0].lower()]), text) if self.to else text

    def words(self, text: str) -> list[str]:
        """The words of pairs that stand in a text, in lower case and its order."""
        return [word.lower() for word in self._any.findall(text)] if self.to else []


@functools.lru_cache(maxsize=32)
def swaps(pairs: tuple[str, ...], field: str = "data.augment") -> Swaps:
    """Swaps, compiled once."""
    return Swaps(pairs, field)


def like(word: str, other: str) -> str:
    """`other` in the case of `word`."""
    if word.isupper() and len(word) > 1:
        return other.upper()
    return other[:1].upper() + other[1:] if word[:1].isupper() else other


def _spelled(pairs: Iterable[str]) -> list[str]:
    return [one for pair in pairs for one in (GENDER if pair.strip() == "gender" else (pair,))]
