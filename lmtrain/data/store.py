"""A tokenised corpus on disk: written in whole shards, read through memory maps.

FOLDER/FINGERPRINT/MM-KKKKK.train.npy      tokens of shard K of member M, uint16 (uint32 above 65,536 ids): each
FOLDER/FINGERPRINT/MM-KKKKK.heldout.npy    document is <|endoftext|> and its tokens, one behind the other
FOLDER/FINGERPRINT/MM-KKKKK.docs.npy       one DOCUMENT record for each document kept
FOLDER/FINGERPRINT/MM-KKKKK.json           written last: the shard is whole, and how far into the source it reaches
FOLDER/FINGERPRINT/manifest.json           written last of all: the corpus is whole
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from lmtrain.data.split import members
from lmtrain.schema import Data
from lmtrain.types import LmtrainError

VERSION = 1  # of the layout; another one gives another fingerprint

#: One kept document: digest of its text, bytes, tokens (its <|endoftext|> counted), and its side of the split.
DOCUMENT = np.dtype([("hash", "V16"), ("bytes", "<i8"), ("tokens", "<i8"), ("heldout", "?")])
SIDES = ("train", "heldout")
COUNTS = ("documents", "bytes", "tokens", "heldout_documents", "heldout_bytes", "heldout_tokens", "duplicates")
_OPEN_FILES = 256  # memory maps of a stream at once; a large corpus has more shards than a process may open


class Stream:
    """The tokens of many documents, end to end, in memory-mapped files of known lengths."""

    def __init__(self, paths: list[Path], lengths: list[int]) -> None:
        whole = [(path, n) for path, n in zip(paths, lengths, strict=True) if n]  # an empty file cannot be mapped
        self._paths = [path for path, _ in whole]
        self._starts = np.cumsum([0, *(n for _, n in whole)])
        self._map = functools.lru_cache(_OPEN_FILES)(lambda i: np.load(self._paths[i], mmap_mode="r"))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop, fewer at the end of the stream."""
        stop = min(stop, len(self))
        i = int(np.searchsorted(self._starts, start, "right")) - 1
        parts = []
        while start < stop:
            base = int(self._starts[i])
            parts.append(self._map(i)[start - base : stop - base])
            start += len(parts[-1])
            i += 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint16), *parts])


@dataclasses.dataclass(frozen=True)
class Member:
    """One part of a mixture (a corpus without a mixture is one member, named "")."""

    name: str
    weight: float
    train: Stream
    heldout: Stream


@dataclasses.dataclass(frozen=True)
class Shards:
    """A prepared corpus. `manifest` holds the counts, the settings and the hashes of the shards."""

    folder: Path
    members: list[Member]
    manifest: dict

    @property
    def identity(self) -> str:
        """sha256 over the tokens; an iterator's state is good for the same ones only."""
        return self.manifest["identity"]

    def total(self, count: str) -> int:
        """One of COUNTS, over all members. Those not named heldout_ are of the training side."""
        return sum(member[count] for member in self.manifest["members"])

    def summary(self) -> str:
        """One line: what there is, and how it is split."""
        sides = []
        for prefix in ("", "heldout_"):
            count, size, tokens = (self.total(prefix + name) for name in ("documents", "bytes", "tokens"))
            sides.append(f"{count:,} documents ({size / 1e6:.2f} MB, {tokens:,} tokens)")
        return f"{sides[0]} to train on, {sides[1]} held out, {self.total('duplicates'):,} duplicates dropped"


def stem(folder: Path, member: int, shard: int) -> Path:
    """The common part of a shard's file names."""
    return folder / f"{member:02d}-{shard:05d}"


def write_shard(path: Path, train: np.ndarray, heldout: np.ndarray, documents: np.ndarray, note: dict) -> dict:
    """Writes a shard's files, the .json last. Returns what stands in that: counts, hashes and `note`."""
    sides = list(zip(SIDES, (train, heldout), strict=True))
    sizes = [write(path.with_suffix(f".{side}.npy"), tokens) for side, tokens in sides]
    write(path.with_suffix(".docs.npy"), documents)
    record = dict(note)
    for prefix, side in (("", ~documents["heldout"]), ("heldout_", documents["heldout"])):
        record[f"{prefix}documents"] = int(side.sum())
        record[f"{prefix}bytes"] = int(documents["bytes"][side].sum())
        record[f"{prefix}tokens"] = int(documents["tokens"][side].sum())
    record["sizes"] = sizes
    record["sha256"] = [hashlib.sha256(tokens.tobytes()).hexdigest() for _, tokens in sides]
    write(path.with_suffix(".json"), json.dumps(record).encode())
    return record


def read_shard(path: Path) -> tuple[dict, np.ndarray] | None:
    """(its .json, its DOCUMENT records); None where the shard is not whole.

    Raises:
      LmtrainError: the files are there but damaged.
    """
    try:
        return json.loads(path.with_suffix(".json").read_text()), np.load(path.with_suffix(".docs.npy"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged(path.parent, error) from None


def load(folder: Path, data: Data) -> Shards:
    """Opens a corpus whose manifest is written; weights come from `data`.

    Raises:
      LmtrainError: a file is missing or cut.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        opened = []
        for number, (part, member) in enumerate(zip(manifest["members"], members(data).values(), strict=True)):
            streams = []
            for i, (side, count) in enumerate(zip(SIDES, ("tokens", "heldout_tokens"), strict=True)):
                paths = [stem(folder, number, k).with_suffix(f".{side}.npy") for k in range(len(part["shards"]))]
                for path, shard in zip(paths, part["shards"], strict=True):
                    if path.stat().st_size != shard["sizes"][i]:
                        raise ValueError(f"{path.name} has another size than it was written with")
                streams.append(Stream(paths, [shard[count] for shard in part["shards"]]))
            opened.append(Member(part["name"], member.weight, *streams))
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folder, error) from None
    return Shards(folder, opened, manifest)


def write(path: Path, content: bytes | np.ndarray) -> int:
    """All of it or nothing: under another name first. Returns the file's size."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        if isinstance(content, np.ndarray):
            np.save(file, content)
        else:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    os.replace(partial, path)
    return size


def _damaged(folder: Path, error: Exception) -> LmtrainError:
    return LmtrainError(f"{folder}: the tokenised corpus is damaged ({error}). Delete the folder, and it is made again")
