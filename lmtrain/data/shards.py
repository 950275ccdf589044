"""Documents, tokenised once into memory-mapped shards: deduplicated, split into train and held-out, resumable.

    FOLDER/FINGERPRINT/MM-KKKKK.train.npy      tokens of shard K of member M, uint16 (uint32 above 65,536 ids): each document
    FOLDER/FINGERPRINT/MM-KKKKK.heldout.npy    is <|endoftext|> and its tokens, one behind the other
    FOLDER/FINGERPRINT/MM-KKKKK.docs.npy       one DOCUMENT record for each document kept
    FOLDER/FINGERPRINT/MM-KKKKK.json           written last: the shard is whole, and how far into the source it reaches
    FOLDER/FINGERPRINT/manifest.json           written last of all: the corpus is whole

**Held out.** With heldout="hash" a document is held out if the hash of its text (of its `key`, where its source gives one)
lies below `heldout_fraction`. Neither seed, order, limit, mixture nor tokenizer enters, so:
- within one preparation no text is on both sides: exact duplicates are dropped first, over all members of the mixture,
  and the members share one fraction;
- two stages or runs with the same fraction never train on what the other holds out, whatever else differs;
- the sets are nested: a smaller fraction holds out a subset of what a larger one does. So a later stage with a smaller fraction
  is safe; one with a *larger* fraction also holds out documents that the earlier stage has trained on.
Not guaranteed: near duplicates are not found; stages with different `heldout` kinds, and "tail" of a corpus that
changed, may overlap. ("auto" is hash from 100 documents a member up, else tail.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from lmtrain.data import sources
from lmtrain.data.sources import Document
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.schema import ConfigError, Data
from lmtrain.types import LmtrainError

VERSION = 1  # of the layout above; another one gives another fingerprint
AUTO_HASH = 100  # documents from which "auto" means hash
SHARD_TOKENS = 1 << 25
_ENCODE_BYTES = 1 << 22  # text that one call of the tokenizer gets

#: One kept document: blake2b of its text, bytes and tokens (its <|endoftext|> counted), and its side of the split.
DOCUMENT = np.dtype([("hash", "V16"), ("bytes", "<i8"), ("tokens", "<i8"), ("heldout", "?")])

# What members of a mixture share; set beside `mixture`.
_SHARED = ("row_length", "heldout", "heldout_fraction", "heldout_rows", "workers", "cache")
# What decides the tokens; the rest may change without tokenising again.
_DECISIVE = ("source", "path", "field", "document", "subset", "hf_split", "limit")


class Stream:
    """The tokens of many documents, end to end, in memory-mapped files."""

    def __init__(self, paths: list[Path]) -> None:
        # An empty file cannot be mapped.
        parts = [np.load(path, mmap_mode="r") if path.stat().st_size > 128 else np.load(path) for path in paths]
        self._parts = [part for part in parts if len(part)]
        self._starts = np.cumsum([0, *map(len, self._parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop, fewer at the end of the stream."""
        stop = min(stop, len(self))
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        out = []
        while start < stop:
            base = int(self._starts[first])
            out.append(self._parts[first][start - base : stop - base])
            start += len(out[-1])
            first += 1
        return out[0] if len(out) == 1 else np.concatenate([np.empty(0, np.uint16), *out])


@dataclasses.dataclass(frozen=True)
class Member:
    """One part of a mixture (a corpus without a mixture is one member)."""

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
        """sha256 over the training tokens; an iterator's state is only good for the same."""
        return self.manifest["identity"]

    def total(self, name: str) -> int:
        """A count summed over members: documents, heldout_documents, duplicates, bytes, heldout_bytes, tokens, heldout_tokens."""
        return sum(member[name] for member in self.manifest["members"])

    def summary(self) -> str:
        """One line: what there is, and how it is split."""
        held = self.total("heldout_documents")
        return (
            f"{self.total('documents'):,} documents, {self.total('bytes') / 1e6:.2f} MB, {self.total('tokens'):,} tokens to train on;"
            f" {held:,} documents, {self.total('heldout_bytes') / 1e6:.2f} MB held out; {self.total('duplicates'):,} duplicates dropped"
        )


def members(data: Data) -> dict[str, Data]:
    """The parts of a mixture by name; {"": data} where there is none.

    Raises:
      ConfigError: settings that contradict each other.
    """
    if not 0 < data.heldout_fraction < 1:
        raise ConfigError(f"data.heldout_fraction: got {data.heldout_fraction}, takes a share between 0 and 1")
    if data.heldout not in ("auto", "hash", "tail"):
        raise ConfigError(f"data.heldout: got {data.heldout!r}, takes auto, hash or tail")
    if not data.mixture:
        return {"": data}
    default = Data()
    for name in (*_DECISIVE, "weight"):
        if getattr(data, name) != getattr(default, name):
            raise ConfigError(f"data.{name}: a mixture's members have their own; set data.mixture.NAME.{name} instead")
    for key, member in data.mixture.items():
        if member.mixture:
            raise ConfigError(f"data.mixture.{key}.mixture: a mixture has no mixtures in it; list its members side by side")
        if not member.weight > 0:
            raise ConfigError(f"data.mixture.{key}.weight: got {member.weight}, takes a number above 0")
        for name in _SHARED:
            if getattr(member, name) not in (getattr(default, name), getattr(data, name)):
                raise ConfigError(f"data.mixture.{key}.{name}: one value holds for the whole mixture; set data.{name}")
    return dict(data.mixture)


def documents(data: Data) -> Iterator[Document]:
    """Every document of all members, unsplit and with duplicates: what a tokenizer is trained on."""
    for name, member in members(data).items():
        yield from sources.read(member, _field(name))


def prepare(
    data: Data,
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    progress: bool = True,
    shard_tokens: int = SHARD_TOKENS,
) -> Shards:
    """Tokenises a corpus into folder/FINGERPRINT (`data.cache`, where set, instead of folder), or finds it there.

    Interrupted at any point, the same call goes on behind the last whole shard, to the same bytes. Other settings or other
    input files have another fingerprint. Of several processes, process 0 prepares and the others wait.

    Raises:
      ConfigError, LmtrainError: bad settings, missing or broken files, an empty corpus, a full disk.
    """
    root = Path(data.cache or folder).expanduser()
    if jax.process_count() == 1:
        target = root / fingerprint(data, tokenizer)
        with _full_disk(root):
            _prepare(data, tokenizer, target, progress, shard_tokens)
    else:
        target = _prepare_together(data, tokenizer, root, progress, shard_tokens)
    return _load(target, data)


def fingerprint(data: Data, tokenizer: Tokenizer) -> str:
    """16 hex digits that stand for the settings, the input files (name, size, time of change) and the tokenizer."""
    parts = [
        (name, {key: getattr(member, key) for key in _DECISIVE}, sources.inputs(member))
        for name, member in members(data).items()
    ]
    spec = [VERSION, parts, data.heldout, data.heldout_fraction, tokenizer.fingerprint]
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def _prepare(data: Data, tokenizer: Tokenizer, target: Path, progress: bool, shard_tokens: int) -> None:
    if (target / "manifest.json").is_file():
        return
    target.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    with _lock(target), _Bar(progress) as bar:
        if (target / "manifest.json").is_file():  # another run was quicker
            return
        parts = []
        for number, (name, member) in enumerate(members(data).items()):
            split = _plan(data, sources.read(member, _field(name)), seen)
            shards = _member(member, name, number, split, tokenizer, target, seen, bar, shard_tokens)
            parts.append({"name": name, "split": dataclasses.asdict(split), "shards": len(shards)} | _sums(shards))
            if not parts[-1]["documents"] + parts[-1]["heldout_documents"]:
                raise LmtrainError(
                    f"{_field(name)}: the corpus is empty: source={member.source!r}, path={member.path!r} gave no document"
                    + (" that another member has not" if parts[-1]["duplicates"] else "")
                )
            for shard in shards:
                parts[-1].setdefault("sha256", []).append(shard["sha256"])
        identity = hashlib.sha256(json.dumps([[part["name"], part["sha256"]] for part in parts]).encode()).hexdigest()
        settings = {name: {k: getattr(m, k) for k in _DECISIVE} for name, m in members(data).items()}
        manifest = {
            "version": VERSION,
            "settings": settings | {"heldout": data.heldout, "heldout_fraction": data.heldout_fraction},
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "identity": identity,
            "members": parts,
        }
        _write(target / "manifest.json", json.dumps(manifest, indent=1).encode())


@dataclasses.dataclass(frozen=True)
class _Split:
    """Which documents are held out: by hash below `fraction`; with kind "tail", all text from byte `cut` of the corpus on."""

    kind: str
    fraction: float
    cut: int = 0

    def __call__(self, document: Document, text: bytes, offset: int) -> list[tuple[bytes, bool]]:
        """(text, held out?) of a document that begins at byte `offset`: one, or two where the cut runs through it."""
        if self.kind == "tail":
            here = min(max(self.cut - offset, 0), len(text))
            return [(part, held) for part, held in ((text[:here], False), (text[here:], True)) if part]
        key = text if document.key is None else _bytes(document.key)
        return [(text, int.from_bytes(_digest(key)[:8], "big") < self.fraction * 2**64)]


def _plan(data: Data, documents: Iterator[Document], seen: set[bytes]) -> _Split:
    """Decides how to split. A tail needs the corpus' size, so documents are read (not tokenised) once more for it."""
    if data.heldout == "hash":
        return _Split("hash", data.heldout_fraction)
    new: set[bytes] = set()
    size = 0
    for document in documents:
        text = _bytes(document.text)
        digest = _digest(text)
        if text and digest not in seen and digest not in new:
            new.add(digest)
            size += len(text)
        if data.heldout == "auto" and len(new) == AUTO_HASH:
            return _Split("hash", data.heldout_fraction)
    return _Split("tail", data.heldout_fraction, int(size * (1 - data.heldout_fraction)))


def _member(
    data: Data, name: str, number: int, split: _Split, tokenizer: Tokenizer, target: Path, seen: set[bytes], bar: _Bar, shard_tokens: int
) -> list[dict]:
    """Writes the shards of one member that are not there yet. Returns what stands in the .json of each; extends `seen`."""
    shards: list[dict] = []
    offset = 0  # bytes of distinct text so far
    while (path := target / f"{number:02d}-{len(shards):05d}.json").is_file():
        shards.append(json.loads(path.read_text()))
        kept = np.load(path.with_suffix(".docs.npy"))
        seen.update(digest.tobytes() for digest in kept["hash"])
        offset += int(kept["bytes"].sum())
    if shards and shards[-1]["last"]:
        return shards
    read = shards[-1]["read"] if shards else 0
    bar.start(data, name, done=offset)
    source = itertools.islice(sources.read(data, _field(name)), read, None)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    end = tokenizer.end
    last = False
    while not last:
        streams: dict[bool, list[np.ndarray]] = {False: [], True: []}
        rows: list[tuple] = []
        duplicates = tokens = 0
        while tokens < shard_tokens and not last:
            chunk: list[tuple[bytes, bytes, bool]] = []
            size = 0
            last = True
            for document in source:
                read += 1
                text = _bytes(document.text)
                size += len(text)
                digest = _digest(text)
                if digest in seen:
                    duplicates += 1
                elif text:
                    seen.add(digest)
                    chunk += [(part, digest, held) for part, held in split(document, text, offset)]
                    offset += len(text)
                if size >= _ENCODE_BYTES:
                    last = False
                    break
            encoded = tokenizer.encode_batch([text for text, _, _ in chunk])
            for (text, digest, held), ids in zip(chunk, encoded, strict=True):
                streams[held] += [np.array([end], dtype), ids.astype(dtype)]
                rows.append((digest, len(text), len(ids) + 1, held))
                tokens += len(ids) + 1
            bar.advance(size)
        stem = target / f"{number:02d}-{len(shards):05d}"
        shards.append(_write_shard(stem, streams, np.array(rows, DOCUMENT), dtype) | {
            "read": read, "duplicates": duplicates, "last": last
        })
        _write(stem.with_suffix(".json"), json.dumps(shards[-1]).encode())
    return shards


def _write_shard(stem: Path, streams: dict[bool, list[np.ndarray]], docs: np.ndarray, dtype: type) -> dict:
    sha = {}
    for held, side in ((False, "train"), (True, "heldout")):
        tokens = np.concatenate([np.empty(0, dtype), *streams[held]])
        sha[side] = hashlib.sha256(tokens.tobytes()).hexdigest()
        _write(stem.with_suffix(f".{side}.npy"), tokens)
    _write(stem.with_suffix(".docs.npy"), docs)
    held = docs["heldout"]
    counts = {
        f"{prefix}{name}": int(values[side].sum())
        for prefix, side in (("", ~held), ("heldout_", held))
        for name, values in (("documents", np.ones(len(docs), int)), ("bytes", docs["bytes"]), ("tokens", docs["tokens"]))
    }
    return {"sha256": sha, **counts}


def _sums(shards: list[dict]) -> dict:
    names = ("documents", "bytes", "tokens", "heldout_documents", "heldout_bytes", "heldout_tokens", "duplicates")
    return {name: sum(shard[name] for shard in shards) for name in names}


def _load(target: Path, data: Data) -> Shards:
    try:
        manifest = json.loads((target / "manifest.json").read_text())
        parts = []
        for number, (part, member) in enumerate(zip(manifest["members"], members(data).values(), strict=True)):
            stems = [target / f"{number:02d}-{k:05d}" for k in range(part["shards"])]
            streams = [Stream([stem.with_suffix(f".{side}.npy") for stem in stems]) for side in ("train", "heldout")]
            parts.append(Member(part["name"], member.weight, *streams))
            for stream, name in zip(streams, ("tokens", "heldout_tokens"), strict=True):
                if len(stream) != part[name]:
                    raise ValueError(f"{len(stream)} {name} where the manifest counts {part[name]}")
    except (OSError, ValueError, KeyError) as error:
        raise LmtrainError(f"{target}: the tokenised corpus is damaged ({error}). Delete the folder to make it again") from None
    return Shards(target, parts, manifest)


def _prepare_together(data: Data, tokenizer: Tokenizer, root: Path, progress: bool, shard_tokens: int) -> Path:
    """As `prepare`, in every process of a run with several: 0 works, the others wait for its manifest.

    They wait by looking at the folder: a collective that waits as long as tokenising takes would time out.
    """
    from jax.experimental import multihost_utils

    name = np.zeros(16, np.uint8)
    error: LmtrainError | None = None
    if jax.process_index() == 0:
        try:
            name = np.frombuffer(fingerprint(data, tokenizer).encode(), np.uint8)
            (root / name.tobytes().decode() / "failed").unlink(missing_ok=True)
        except LmtrainError as e:
            error = e
    name = np.asarray(multihost_utils.broadcast_one_to_all(name), np.uint8)
    if error or not name.any():
        raise error or LmtrainError("data: process 0 could not read the sources; its message says why")
    target = root / name.tobytes().decode()
    if jax.process_index() == 0:
        try:
            with _full_disk(root):
                _prepare(data, tokenizer, target, progress, shard_tokens)
        except Exception as e:
            with contextlib.suppress(OSError):
                _write(target / "failed", str(e).encode())
            raise
    while not (target / "manifest.json").is_file():
        if (target / "failed").is_file():
            raise LmtrainError(f"data: process 0 could not prepare {target}: {(target / 'failed').read_text()}")
        time.sleep(0.5)
    multihost_utils.sync_global_devices("lmtrain.data.prepare")
    return target


def _field(name: str) -> str:
    return f"data.mixture.{name}" if name else "data"


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogatepass")


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()


def _write(path: Path, content: bytes | np.ndarray) -> None:
    """All of it or nothing: under another name first."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        np.save(file, content) if isinstance(content, np.ndarray) else file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Keeps two runs with one cache from preparing the same corpus at once. A killed run's lock is gone with it."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            file = stack.enter_context(open(target / "lock", "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):  # a system or network folder without locks
            pass
        yield


@contextlib.contextmanager
def _full_disk(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise LmtrainError(
                f"data: cannot write tokenised shards to {root}: {error.strerror}. Set data.cache to a folder with room;"
                " what is there already will be used"
            ) from None
        raise


class _Bar:
    """Progress in bytes, with MB/s; shown on a terminal only, and only while work is done."""

    def __init__(self, show: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal))

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, data: Data, name: str, done: int) -> None:
        files = sources.inputs(data) if data.source in ("text", "jsonl") else []
        plain = files and not any(path.endswith(".gz") for path, _, _ in files)
        total = sum(size for _, size, _ in files) if plain and not data.limit else None
        self._task = self._progress.add_task(f"tokenising {name or data.path or data.source}", total=total, completed=done)

    def advance(self, size: int) -> None:
        self._progress.advance(self._task, size)
