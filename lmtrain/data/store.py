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
from concurrent.futures import ThreadPoolExecutor
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
VERIFY_BYTES = 2 << 30  # tokens of a corpus up to which opening it compares their hashes: a second or two
_OPEN_FILES = 256  # memory maps of a stream at once; a large corpus has more shards than a process may open


def token_type(vocab_size: int) -> np.dtype:
    """What tokens of so many ids are stored as."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _map(path: Path, length: int, dtype: np.dtype) -> np.ndarray:
    """The tokens of a file, memory-mapped, length > 0.

    np.load would parse the header, which Python 3.11 cannot do in two threads at once (SystemError), for what is known.
    """
    return np.memmap(path, dtype, "r", offset=path.stat().st_size - length * dtype.itemsize, shape=(length,))


class Stream:
    """The tokens of many documents, end to end, in memory-mapped files of known lengths."""

    def __init__(self, paths: list[Path], lengths: list[int], dtype: np.dtype) -> None:
        whole = [(path, n) for path, n in zip(paths, lengths, strict=True) if n]  # an empty file cannot be mapped
        self._starts = np.cumsum([0, *(n for _, n in whole)])
        self._dtype = dtype
        self._map = functools.lru_cache(_OPEN_FILES)(lambda i: _map(*whole[i], dtype))

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
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self._dtype), *parts])


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
        said = f"{sides[0]} to train on, {sides[1]} held out, {self.total('duplicates'):,} duplicates dropped"
        used = [m for m in self.manifest["members"] if "folder" in m]
        return said + "".join(f"; {m['folder']}/manifest.json, sha256 {m['manifest_sha256'][:16]}" for m in used)


def stem(folder: Path, member: int, shard: int) -> Path:
    """The common part of a shard's file names."""
    return folder / f"{member:02d}-{shard:05d}"


def stems(folder: Path, member: int, part: dict) -> list[Path]:
    """The same of all shards of a member of the manifest: here, or where `lmtrain prepare` wrote them."""
    if "folder" in part:
        return [Path(part["folder"]) / shard["stem"] for shard in part["shards"]]
    return [stem(folder, member, k) for k in range(len(part["shards"]))]


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
        record = json.loads(path.with_suffix(".json").read_text())
        documents = np.load(path.with_suffix(".docs.npy"))
        if documents.dtype != DOCUMENT or not {"read", "last", "sha256", *COUNTS} <= set(record):
            raise ValueError(f"{path.name} is not as it was written")
        return record, documents
    except FileNotFoundError:
        return None
    except _DAMAGED as error:
        raise _damaged(path.parent, error) from None


def load(folder: Path, data: Data, vocab_size: int) -> Shards:
    """Opens a corpus whose manifest is written; weights come from `data`.

    Files must have the size they were written with. A corpus of up to VERIFY_BYTES of tokens is read
    through besides: its hashes must be those of the manifest, and its ids below `vocab_size`. That is done once per
    process, in threads; a larger corpus would take longer than it is worth at every start, so its contents go unread.

    Raises:
      LmtrainError: a file is missing, cut, or not as it was written.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        dtype = token_type(vocab_size)
        opened, files = [], []
        for number, (part, member) in enumerate(zip(manifest["members"], members(data).values(), strict=True)):
            streams = []
            for i, (side, count) in enumerate(zip(SIDES, ("tokens", "heldout_tokens"), strict=True)):
                paths = [base.with_suffix(f".{side}.npy") for base in stems(folder, number, part)]
                for path, shard in zip(paths, part["shards"], strict=True):
                    if path.stat().st_size != shard["sizes"][i]:
                        raise ValueError(f"{path.name} has another size than it was written with")
                    if shard[count]:
                        files.append((path, shard[count], shard["sha256"][i]))
                streams.append(Stream(paths, [shard[count] for shard in part["shards"]], dtype))
            opened.append(Member(part["name"], member.weight, *streams))
        if sum(count for _, count, _ in files) * dtype.itemsize <= VERIFY_BYTES:
            _verify(files, vocab_size)
    except _DAMAGED as error:
        raise _damaged(folder, error) from None
    return Shards(folder, opened, manifest)


def _verify(files: list[tuple[Path, int, str]], vocab_size: int) -> None:
    """Raises ValueError for the first (path, length, sha256) whose tokens differ, or have an id out of vocabulary."""

    def read(file: tuple[Path, int, str]) -> tuple[str, int]:
        path, length, _ = file
        return _read_through(path, length, token_type(vocab_size), path.stat().st_mtime_ns)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (path, _, sha256), (found, largest) in zip(files, pool.map(read, files), strict=True):
            if found != sha256:
                raise ValueError(f"{path.name} has other contents than it was written with: its sha256 differs")
            if largest >= vocab_size:
                raise ValueError(f"{path.name} holds token id {largest}, the tokenizer has {vocab_size}")


@functools.lru_cache(1 << 14)
def _read_through(path: Path, length: int, dtype: np.dtype, changed: int) -> tuple[str, int]:
    """(sha256 of a file's tokens, the largest of them). Read again only where its time of change is another."""
    tokens = _map(path, length, dtype)
    return hashlib.sha256(tokens.data).hexdigest(), int(tokens.max())


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


# What reading JSON or an array raises where bytes have changed.
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError)


def _damaged(folder: Path, error: Exception) -> LmtrainError:
    return LmtrainError(f"{folder}: the tokenised corpus is damaged ({error}). Delete the folder, and it is made again")
