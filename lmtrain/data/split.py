"""Which documents are held out.

With heldout="hash" a document is held out if the hash of its text (of its `key`, where its source gives one) lies below
`heldout_fraction`. Neither seed, order, limit, mixture nor tokenizer enters, so:
- within one preparation no text is on both sides: exact duplicates are dropped first, over all members of the mixture,
  and the members share one fraction;
- two stages or runs with the same fraction never train on what the other holds out, whatever else differs;
- the sets are nested: a smaller fraction holds out a subset of what a larger one does. So a later stage with a smaller
  fraction is safe; one with a *larger* fraction also holds out documents that the earlier stage has trained on.
Not guaranteed: near duplicates are not found; a text that has a key in one stage and another, or none, in the next;
stages that split by different `heldout` kinds; and "tail" of a corpus that has changed in between.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator

from lmtrain.data.cuts import as_bytes
from lmtrain.data.sources import Document
from lmtrain.schema import ConfigError, Data
from lmtrain.types import nearest

AUTO_HASH = 100  # distinct documents of a member from which "auto" means hash
KINDS = ("auto", "hash", "tail")

#: What decides the documents of a member; the rest of Data may change without tokenising again.
DECISIVE = ("source", "path", "field", "document", "subset", "hf_split", "limit", "augment")
# What members of a mixture share; set beside `mixture`.
_SHARED = (
    "row_length", "heldout", "heldout_fraction", "heldout_rows", "workers", "cache",
    "template", "truncate", "malformed", "pack", "groups", "outcomes", "reweigh",
)  # fmt: skip


def members(data: Data) -> dict[str, Data]:
    """The parts of a mixture by name; {"": data} where there is none.

    Raises:
      ConfigError: settings out of range, or that contradict each other.
    """
    if not 0 < data.heldout_fraction < 1:
        raise ConfigError(f"data.heldout_fraction: got {data.heldout_fraction}, takes a share between 0 and 1")
    if data.heldout not in KINDS:
        raise ConfigError(
            f"data.heldout: got {data.heldout!r}, takes {', '.join(KINDS)}.{nearest(data.heldout, KINDS)}"
        )
    for name, least in (("row_length", 1), ("heldout_rows", 0), ("workers", 0)):
        if getattr(data, name) < least:
            raise ConfigError(f"data.{name}: got {getattr(data, name)}, takes a whole number from {least} up")
    _check_own(data, "data")
    if not data.mixture:
        return {"": data}
    default = Data()
    for name in (*DECISIVE, "columns", "weight"):
        if getattr(data, name) != getattr(default, name):
            raise ConfigError(f"data.{name}: members of a mixture have their own; set data.mixture.NAME.{name} instead")
    for key, member in data.mixture.items():
        here = field(key)
        if member.mixture:
            raise ConfigError(f"{here}.mixture: a mixture has no mixtures in it; list its members side by side")
        _check_own(member, here)
        for name in _SHARED:
            if getattr(member, name) not in (getattr(default, name), getattr(data, name)):
                raise ConfigError(f"{here}.{name}: one value holds for the whole mixture; set data.{name}")
    return dict(data.mixture)


def _check_own(data: Data, here: str) -> None:
    """Ranges of what a member of a mixture has of its own."""
    if not 0 < data.weight < math.inf:
        raise ConfigError(f"{here}.weight: got {data.weight}, takes a number above 0")
    if data.limit < 0:
        raise ConfigError(f"{here}.limit: got {data.limit}, takes a whole number from 0 up (0: all)")


def field(name: str) -> str:
    """What errors call a member, and what `sources.read` takes: "data.mixture.NAME"; "data" without a mixture."""
    return f"data.mixture.{name}" if name else "data"


def digest(text: bytes) -> bytes:
    """What stands for a text where documents are compared: 16 bytes of blake2b."""
    return hashlib.blake2b(text, digest_size=16).digest()


def held_out(key: bytes, fraction: float) -> bool:
    """Whether what has this key is held out, by the key's hash alone."""
    return int.from_bytes(digest(key)[:8], "big") < fraction * 2**64


@dataclasses.dataclass(frozen=True)
class Split:
    """The rule for one member: by hash below `fraction`; with kind "tail", all text from byte `cut` of the corpus."""

    kind: str
    fraction: float
    cut: int = 0

    def __call__(self, document: Document, offset: int) -> list[tuple[bytes, bool]]:
        """(text, held out?) of a document that begins at byte `offset`: one, or two where the cut runs through it."""
        text = as_bytes(document.text)
        if self.kind == "tail":
            here = min(max(self.cut - offset, 0), len(text))
            return [(part, held) for part, held in ((text[:here], False), (text[here:], True)) if part]
        key = text if document.key is None else as_bytes(document.key)
        return [(text, held_out(key, self.fraction))]


def plan(data: Data, documents: Iterable[Document], seen: set[bytes]) -> Split:
    """The rule for a member's documents; `seen` are digests that other members had before, which do not count.

    A tail needs the corpus' size, so the documents are read once more for it (not tokenised).
    """
    if data.heldout == "hash":
        return Split("hash", data.heldout_fraction)
    new: set[bytes] = set()
    size = 0
    for _, text, mark in distinct(documents, seen):
        new.add(mark)
        size += len(text)
        if data.heldout == "auto" and len(new) == AUTO_HASH:
            return Split("hash", data.heldout_fraction)
    return Split("tail", data.heldout_fraction, int(size * (1 - data.heldout_fraction)))


def distinct(documents: Iterable[Document], seen: set[bytes]) -> Iterator[tuple[Document, bytes, bytes]]:
    """(document, its bytes, their digest) of those not empty, not in `seen` and not repeated."""
    new: set[bytes] = set()
    for document in documents:
        text = as_bytes(document.text)
        mark = digest(text)
        if text and mark not in seen and mark not in new:
            new.add(mark)
            yield document, text, mark
