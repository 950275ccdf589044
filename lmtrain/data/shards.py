"""Tokenises a corpus once: deduplicated (split.py says how it is split), into the shards of store.py, resumable."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from lmtrain import log, storage
from lmtrain.data import prepared, sources, store
from lmtrain.data.cuts import as_bytes
from lmtrain.data.sources import Document
from lmtrain.data.split import DECISIVE, Split, digest, distinct, field, members, plan
from lmtrain.data.store import Shards
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.schema import ConfigError, Data
from lmtrain.types import LmtrainError

SHARD_TOKENS = 1 << 25
_ENCODE_BYTES = 1 << 22  # text that one call of the tokenizer gets


def prepare(
    data: Data,
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    progress: bool = True,
    shard_tokens: int = SHARD_TOKENS,
) -> Shards:
    """Tokenises a corpus into folder/FINGERPRINT (`data.cache`, where set, instead of folder), or finds it there.

    Interrupted at any point, the same call goes on behind the last whole shard, to the same bytes. Other settings or
    other input files have another fingerprint. Of several processes, process 0 prepares and the others wait, so they
    must see the same folder, or what fetches it (scattered.py). Digests of all documents are held in memory: about 100
    bytes each.

    Raises:
      ConfigError, LmtrainError: bad settings, missing or broken files, an empty corpus, a full disk, a shard that is
        not as it was written (see `store.load`).
    """
    try:
        root = Path(data.cache or folder).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"data.cache: got {data.cache!r}, takes a folder: {error}") from None
    if jax.process_count() > 1:
        target = _prepare_together(data, tokenizer, root, progress, shard_tokens)
    else:
        target = root / fingerprint(data, tokenizer)
        _prepare(data, tokenizer, target, progress, shard_tokens)
    return store.load(target, data, tokenizer.vocab_size)


def documents(data: Data) -> Iterator[Document]:
    """The distinct documents of all members that are trained on, not those held out: what a tokenizer may learn from.

    Raises:
      ConfigError, LmtrainError: as `split.members` and `sources.read`.
    """
    seen: set[bytes] = set()
    for name, member in members(data).items():
        split = plan(data, sources.read(member, field(name)), seen)
        offset = 0
        for document, text, mark in distinct(sources.read(member, field(name)), seen):
            yield from (Document(part, document.name) for part, held in split(document, offset) if not held)
            offset += len(text)
            seen.add(mark)


def fingerprint(data: Data, tokenizer: Tokenizer) -> str:
    """16 hex digits that stand for the settings, the input files (name, size, time of change) and the tokenizer."""
    parts = [
        (name, {key: getattr(member, key) for key in DECISIVE}, sources.inputs(member, field(name)))
        for name, member in members(data).items()
    ]
    spec = [store.VERSION, parts, data.heldout, data.heldout_fraction, tokenizer.fingerprint]
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def _prepare(data: Data, tokenizer: Tokenizer, target: Path, progress: bool, shard_tokens: int) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(_writing(target.parent))
        if (target / "manifest.json").is_file():
            return
        target.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_lock(target))
        if (target / "manifest.json").is_file():  # another run was quicker
            return
        bar = stack.enter_context(_Bar(progress))
        seen: set[bytes] = set()
        ready = _ready(data, tokenizer, seen)
        parts = []
        for number, (name, member) in enumerate(members(data).items()):
            if name in ready:
                parts.append({"name": name, **ready[name]})
                continue
            split = plan(data, sources.read(member, field(name)), seen)
            records = _member(member, name, number, split, tokenizer, target, seen, bar, shard_tokens)
            sums = {count: sum(record[count] for record in records) for count in store.COUNTS}
            if not sums["documents"] + sums["heldout_documents"]:
                only = " that other members have not" if sums["duplicates"] else ""
                raise LmtrainError(
                    f"{field(name)}: the corpus is empty: source={member.source!r}, path={member.path!r}"
                    f" gave no text{only}"
                )
            parts.append({"name": name, "split": dataclasses.asdict(split), **sums, "shards": records})
        hashes = [[part["name"], [record["sha256"] for record in part["shards"]]] for part in parts]
        manifest = {
            "version": store.VERSION,
            "settings": {name: {key: getattr(m, key) for key in DECISIVE} for name, m in members(data).items()},
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "identity": hashlib.sha256(json.dumps(hashes).encode()).hexdigest(),
            "members": parts,
        }
        store.write(target / "manifest.json", json.dumps(manifest, indent=1).encode())


def _ready(data: Data, tokenizer: Tokenizer, seen: set[bytes]) -> dict[str, dict]:
    """Members that `lmtrain prepare` has tokenised already, by name. Where others stand beside them, these leave out
    what is in `seen` afterwards; what two prepared ones share stays in both (always on the same side of the split)."""
    ready: dict[str, dict] = {}
    for name, member in members(data).items():
        if member.source == "prepared":
            shared = dataclasses.replace(member, heldout=data.heldout, heldout_fraction=data.heldout_fraction)
            part, why = prepared.member(shared, tokenizer, field(name))
            if part is None:
                log.say(f"{field(name)}: {member.path} is tokenised anew: {why}")
            else:
                ready[name] = part
    if len(ready) < len(members(data)):
        for part in ready.values():
            seen.update(prepared.marks(part))
    return ready


def _member(
    data: Data,
    name: str,
    number: int,
    split: Split,
    tokenizer: Tokenizer,
    target: Path,
    seen: set[bytes],
    bar: _Bar,
    shard_tokens: int,
) -> list[dict]:
    """Writes the shards of one member that are not there yet. Returns the record of each; extends `seen`.

    Where a shard ends depends on the documents alone, so that an interrupted run cuts as an uninterrupted one.
    """
    records: list[dict] = []
    offset = 0  # bytes of distinct text so far
    while found := store.read_shard(store.stem(target, number, len(records))):
        records.append(found[0])
        seen.update(mark.tobytes() for mark in found[1]["hash"])
        offset += int(found[1]["bytes"].sum())
    if records and records[-1]["last"]:
        return records
    read = records[-1]["read"] if records else 0
    bar.start(data, name, done=offset)
    source = itertools.islice(sources.read(data, field(name)), read, None)
    dtype = store.token_type(tokenizer.vocab_size)
    begin = np.array([tokenizer.begin], dtype)
    last = False
    while not last:
        sides: dict[bool, list[np.ndarray]] = {False: [np.empty(0, dtype)], True: [np.empty(0, dtype)]}
        rows: list[tuple[bytes, int, int, bool]] = []
        duplicates = tokens = 0
        while tokens < shard_tokens and not last:
            chunk: list[tuple[bytes, bytes, bool]] = []
            size = skipped = 0
            last = True  # unless the source still has some when the chunk is full
            for document in source:
                read += 1
                text = as_bytes(document.text)
                mark = digest(text)
                size += len(text)
                if mark in seen:
                    duplicates += 1
                    skipped += len(text)
                elif text:
                    seen.add(mark)
                    chunk += [(part, mark, held) for part, held in split(document, offset)]
                    offset += len(text)
                if size >= min(_ENCODE_BYTES, shard_tokens):
                    last = False
                    break
            bar.advance(skipped)
            encoded = tokenizer.encode_batch([text for text, _, _ in chunk], done=bar.advance)
            for (text, mark, held), ids in zip(chunk, encoded, strict=True):
                sides[held] += [begin, ids.astype(dtype)]
                rows.append((mark, len(text), len(ids) + 1, held))
                tokens += len(ids) + 1
        train, heldout = np.concatenate(sides[False]), np.concatenate(sides[True])
        note = {"read": read, "duplicates": duplicates, "last": last}
        path = store.stem(target, number, len(records))
        records.append(store.write_shard(path, train, heldout, np.array(rows, store.DOCUMENT), note))
    return records


def _prepare_together(data: Data, tokenizer: Tokenizer, root: Path, progress: bool, shard_tokens: int) -> Path:
    """As `_prepare`, in every process of a run with several: 0 works, the others wait for its manifest.

    They wait by looking at the folder: a collective that waits as long as tokenising takes would time out.
    """
    from jax.experimental import multihost_utils

    name = np.zeros(16, np.uint8)
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            name = np.frombuffer(fingerprint(data, tokenizer).encode(), np.uint8)
            with _writing(root):
                (root / name.tobytes().decode() / "failed").unlink(missing_ok=True)
        except Exception as e:
            name, error = np.zeros(16, np.uint8), e
    name = np.asarray(multihost_utils.broadcast_one_to_all(name), np.uint8)
    if not name.any():
        raise error or LmtrainError("data: process 0 cannot read the sources; its message says why")
    target = root / name.tobytes().decode()
    if jax.process_index() == 0:
        try:
            _prepare(data, tokenizer, target, progress, shard_tokens)
        except Exception as e:
            with contextlib.suppress(OSError):
                store.write(target / "failed", str(e).encode())
            raise
    wanted = target / storage.WANTED
    if jax.process_index() and not storage.shared(root):
        target.mkdir(parents=True, exist_ok=True)
        wanted.touch()
    while not (target / "manifest.json").is_file():
        with contextlib.suppress(FileNotFoundError):
            raise LmtrainError(f"data: process 0 cannot prepare {target}: {(target / 'failed').read_text()}")
        time.sleep(0.2)
    if not storage.shared(root):
        wanted.unlink(missing_ok=True)
    multihost_utils.sync_global_devices("lmtrain.data.prepare")
    return target


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Keeps two runs with one cache from preparing the same corpus at once. A killed run's lock is gone with it."""
    with contextlib.ExitStack() as stack:
        # No fcntl: Windows; OSError: a network folder without locks.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            file = stack.enter_context(open(target / "lock", "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Turns a folder that takes no files, or no more, into one message. (What sources raise is LmtrainError by now.)"""
    try:
        yield
    except OSError as error:
        raise LmtrainError(
            f"data: cannot write tokenised shards to {str(root)[:200]}: {error.strerror or error}. Set data.cache to a"
            " folder that takes files and has room, or make room: the same command goes on with the shards there are"
        ) from None


class _Bar:
    """Progress in bytes, with MB/s; on a terminal only, and only while there is work."""

    def __init__(self, show: bool) -> None:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (show and console.is_terminal),
        )

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, data: Data, name: str, done: int) -> None:
        """Another member, of which `done` bytes are tokenised already."""
        files = sources.inputs(data) if data.source == "text" and not data.limit else []
        total = None if any(path.endswith(".gz") for path, _, _ in files) else sum(size for _, size, _ in files)
        label = f"tokenising {name or data.path or data.source}"
        self._task = self._progress.add_task(label, total=total or None, completed=done)

    def advance(self, size: int) -> None:
        """More bytes tokenised."""
        self._progress.advance(self._task, size)
