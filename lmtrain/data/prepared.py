"""A folder that `lmtrain prepare` wrote, as a source of pretraining: its shards are used where they lie.

FOLDER/manifest.json        written last: what was read, dropped and kept, and a record for each shard
FOLDER/shards/RRRRR-KKKKK.* tokens of shard K of task R, as store.py lays them out
FOLDER/tokenizer/           what they were tokenised with

Any other tokenizer or split still trains: the texts are decoded, exactly, and tokenised anew into the run's own shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lmtrain.data import store
from lmtrain.data.tokenizer import Tokenizer, load
from lmtrain.schema import Data
from lmtrain.types import LmtrainError

KIND = "lmtrain prepare"


def read_manifest(path: str, field: str = "data") -> dict[str, Any]:
    """What FOLDER/manifest.json holds.

    Raises:
      LmtrainError: there is none (`lmtrain prepare` has not finished there), or it is not one of its own.
    """
    file = manifest_file(path)
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        done = (
            "`lmtrain prepare` has not finished there; the same command goes on"
            if file.parent.is_dir()
            else "no folder"
        )
        raise LmtrainError(f"{field}.path: no {file}: {done}") from None
    except (OSError, ValueError) as error:
        raise LmtrainError(f"{file}: cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise LmtrainError(f"{file}: not the manifest of `lmtrain prepare`; data.source=prepared takes its --to folder")
    return found


def manifest_file(path: str) -> Path:
    """FOLDER/manifest.json of a data.path."""
    return Path(path).expanduser() / "manifest.json"


def member(data: Data, tokenizer: Tokenizer, field: str) -> tuple[dict[str, Any] | None, str]:
    """What the manifest of a run's data says of a member that is used where it lies; else (None, why it is not)."""
    found = read_manifest(data.path, field)
    if found["tokenizer"] != tokenizer.fingerprint:
        folder = Path(data.path).expanduser() / "tokenizer"
        return None, (
            "it was tokenised with another tokenizer"
            f" (its own: --config.stages.tokenizer.kind=file --config.stages.tokenizer.path={folder})"
        )
    if data.heldout == "tail" or found["heldout_fraction"] != data.heldout_fraction:
        return None, (
            f"it holds out by heldout=hash and heldout_fraction={found['heldout_fraction']},"
            f" not {data.heldout} and {data.heldout_fraction}"
        )
    for name in ("limit", "augment"):
        if getattr(data, name):
            return None, f"data.{name} is set"
    folder = Path(data.path).expanduser().resolve()
    sha256 = hashlib.sha256(manifest_file(data.path).read_bytes()).hexdigest()
    split = {"kind": "hash", "fraction": found["heldout_fraction"], "cut": 0}
    sums = {count: found[count] for count in store.COUNTS}
    return {"split": split, **sums, "shards": found["shards"], "folder": str(folder), "manifest_sha256": sha256}, ""


def marks(part: dict[str, Any]) -> Iterator[bytes]:
    """The digests of all documents of a member that `member` returned."""
    for shard in part["shards"]:
        found = store.read_shard(Path(part["folder"]) / shard["stem"])
        if found is None:
            raise LmtrainError(f"{part['folder']}: shard {shard['stem']} is missing; prepare the folder again")
        yield from (mark.tobytes() for mark in found[1]["hash"])


def texts(data: Data, field: str) -> Iterator[tuple[str, bytes]]:
    """(where, text) of every document, both sides of its split, decoded from the tokens."""
    found = read_manifest(data.path, field)
    folder = Path(data.path).expanduser()
    tokenizer = load(folder / "tokenizer")
    dtype = store.token_type(tokenizer.vocab_size)
    for shard in found["shards"]:
        base = folder / shard["stem"]
        read = store.read_shard(base)
        if read is None:
            raise LmtrainError(f"{base}: this shard is missing; prepare the folder again")
        counts = (shard["tokens"], shard["heldout_tokens"])
        sides = [
            store.Stream([base.with_suffix(f".{side}.npy")], [count], dtype)
            for side, count in zip(store.SIDES, counts, strict=True)
        ]
        at = [0, 0]
        for number, document in enumerate(read[1]):
            side, size = int(document["heldout"]), int(document["tokens"])
            ids: np.ndarray = sides[side].read(at[side], at[side] + size)
            at[side] += size
            yield f"{base}, document {number}", tokenizer.decode_bytes(ids[1:].tolist())
