"""The last blocks: a tokenizer learned from what is kept, its tokens in store.py's shards, and the manifest."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from lmtrain.data import prepared, store
from lmtrain.data import tokenizer as tokenizer_lib
from lmtrain.data.split import digest, held_out
from lmtrain.prepare import dropped
from lmtrain.types import LmtrainError

SHARD_TOKENS = 1 << 25
_ENCODE_BYTES = 1 << 22  # text that one call of the tokenizer gets
_TALLY = ("documents", "bytes")


class Learn(PipelineStep):
    """One task: trains a BPE on what the pipeline `steps` keeps, an equal share of `size` bytes from each of its tasks.

    Held-out documents are left out. Where no document is kept, there is none: the manifest says who dropped them.
    """

    type = "🔤 - TOKENIZER"
    name = "learn"

    def __init__(self, steps: list[Any], tasks: int, vocab_size: int, size: int, heldout: float, folder: str):
        super().__init__()
        self.steps, self.tasks, self.vocab_size, self.size = steps, tasks, vocab_size, size
        self.heldout, self.folder = heldout, folder
        self.held_out = 0

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Contract of datatrove's blocks. Raises LmtrainError where all that is kept is held out."""
        texts = self._texts()
        if first := list(itertools.islice(texts, 1)):
            tokenizer_lib.train(itertools.chain(first, texts), self.vocab_size).save(self.folder)
        elif self.held_out:
            raise LmtrainError(f"--tokenizer bpe: no text to learn from: all {self.held_out:,} documents that are kept"
                               f" are held out (--heldout-fraction {self.heldout})")  # fmt: skip

    def _texts(self) -> Iterator[str]:
        for task in range(self.tasks):
            documents: Any = None
            for step in copy.deepcopy(self.steps):
                documents = step(documents, task, self.tasks)
            left = self.size // self.tasks
            for document in documents:
                text = document.text.encode()
                if held_out(text, self.heldout):
                    self.held_out += 1
                    continue
                yield document.text
                left -= len(text)
                if left <= 0:
                    break


class Tokenise(PipelineStep):
    """A task's documents as shards `FOLDER/shards/RRRRR-KKKKK.*`, split by the hash of their text (split.py)."""

    type = "🔤 - TOKENIZER"
    name = "tokenise"

    def __init__(self, folder: str, heldout: float, shard_tokens: int = SHARD_TOKENS):
        super().__init__()
        self.folder, self.heldout, self.shard_tokens = folder, heldout, shard_tokens

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        """Contract of datatrove's blocks. Run again, it writes the same files."""
        if (first := next(data, None)) is None:  # of no document at all, none of them has a tokenizer
            return
        data = itertools.chain([first], data)
        tokenizer = tokenizer_lib.load(pathlib.Path(self.folder, "tokenizer"))
        dtype = store.token_type(tokenizer.vocab_size)
        begin = np.array([tokenizer.end], dtype)
        pathlib.Path(self.folder, "shards").mkdir(exist_ok=True)
        for number in itertools.count():
            sides: dict[bool, list[np.ndarray]] = {False: [np.empty(0, dtype)], True: [np.empty(0, dtype)]}
            rows: list[tuple[bytes, int, int, bool]] = []
            tokens = 0
            while tokens < self.shard_tokens and (texts := _chunk(data)):
                for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                    held = held_out(text, self.heldout)
                    sides[held] += [begin, ids.astype(dtype)]
                    rows.append((digest(text), len(text), len(ids) + 1, held))
                    tokens += len(ids) + 1
            if not rows:
                return
            stem = f"shards/{rank:05d}-{number:05d}"
            train, heldout = np.concatenate(sides[False]), np.concatenate(sides[True])
            note = {"stem": stem, "read": len(rows), "duplicates": 0, "last": False}
            documents = np.array(rows, store.DOCUMENT)
            store.write_shard(pathlib.Path(self.folder, stem), train, heldout, documents, note)
            self.stat_update("documents", value=len(rows))
            self.stat_update("tokens", value=tokens)


def _chunk(data: Iterator[Document]) -> list[bytes]:
    """The next texts, _ENCODE_BYTES of them or the rest."""
    texts: list[bytes] = []
    size = 0
    for document in data:
        texts.append(document.text.encode())
        size += len(texts[-1])
        if size >= _ENCODE_BYTES:
            break
    return texts


class Manifest(PipelineStep):
    """One task, the last: FOLDER/manifest.json from what all others have left. FOLDER/scratch goes.

    Args:
      head: what it begins with: settings and inputs.
      filters: names of the filters, in their order; each has counted what it dropped in FOLDER/scratch/dropped/NAME.
    """

    type = "💽 - WRITER"
    name = "manifest"

    def __init__(self, folder: str, head: dict[str, Any], filters: list[str]):
        super().__init__()
        self.folder, self.head, self.filters = folder, head, filters

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Contract of datatrove's blocks.

        Raises:
          LmtrainError: nothing was kept, or the counts do not add up.
        """
        folder = pathlib.Path(self.folder)
        scratch = folder / "scratch"
        read = {name: stat(folder, "clean", "read", name) for name in _TALLY}
        left = read["documents"]
        steps = [{"name": "read", "documents": left, "bytes": read["bytes"],
                  "reasons": dropped.gather(scratch / "dropped/read")}]  # fmt: skip
        for name in self.filters:
            reasons = dropped.gather(scratch / "dropped" / name)
            gone = {count: sum(reason[count] for reason in reasons.values()) for count in _TALLY}
            left -= gone["documents"]
            steps.append({"name": name, "dropped": gone["documents"], "dropped_bytes": gone["bytes"], "kept": left,
                          "reasons": reasons})  # fmt: skip
        for step in steps:
            if step["name"] == "c4":
                step["lines"] = stats(folder, "clean", "⛰ C4 Quality", "line-")
        shards = [json.loads(file.read_text()) for file in sorted((folder / "shards").glob("*.json"))]
        sums = {count: sum(shard[count] for shard in shards) for count in store.COUNTS}
        if left != sums["documents"] + sums["heldout_documents"]:
            raise LmtrainError(f"{folder}: {left:,} documents are left after all filters, but the shards hold"
                               f" {sums['documents'] + sums['heldout_documents']:,}. Delete the folder and prepare it"
                               " again")  # fmt: skip
        if not left:
            raise LmtrainError(f"{folder}: no document is left of {read['documents']:,}. Dropped by {_lost(steps)}."
                               f" For other settings take another --to, or delete {folder}")  # fmt: skip
        sums["duplicates"] = sum(step.get("dropped", 0) for step in steps if step["name"] in ("exact", "minhash"))
        tokenizer = tokenizer_lib.load(folder / "tokenizer")
        manifest = {
            "kind": prepared.KIND,
            "version": store.VERSION,
            **self.head,
            "steps": steps,
            "pii": {name: stat(folder, "tokenise", "pii", name) for name in ("emails", "addresses", "changed")},
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            **sums,
            "identity": hashlib.sha256(json.dumps([shard["sha256"] for shard in shards]).encode()).hexdigest(),
            "shards": shards,
        }
        if (rows := scratch / "contaminated").is_dir():
            found = {row for file in rows.glob("*.json") for row in json.loads(file.read_text())}
            manifest["decontamination"]["found"] = len(found)
        store.write(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
        shutil.rmtree(scratch, ignore_errors=True)


def _lost(steps: list[dict[str, Any]]) -> str:
    """Who dropped how many, and why."""
    out = []
    for step in steps:
        why = {reason: found["documents"] for reason, found in step["reasons"].items()}
        if why:
            reasons = ", ".join(f"{reason} {n:,}" for reason, n in list(why.items())[:4])
            out.append(f"{step['name']} {sum(why.values()):,} ({reasons})")
    return "; ".join(out) or "none"


def stats(folder: pathlib.Path, stage: str, step: str, prefix: str = "") -> dict[str, int]:
    """datatrove's counts of one block of a stage, over all its tasks."""
    out: dict[str, int] = {}
    for file in sorted((folder / "logs" / stage / "stats").glob("*.json")):
        for block in json.loads(file.read_text()):
            if block["name"].endswith(f": {step}"):
                for name, value in block["stats"].items():
                    if name.startswith(prefix):
                        out[name] = out.get(name, 0) + int(value["total"] if isinstance(value, dict) else value)
    return out


def stat(folder: pathlib.Path, stage: str, step: str, name: str) -> int:
    """One of them; 0 where it was not counted."""
    return stats(folder, stage, step).get(name, 0)
