"""The manifest of a checkpoint: the sha256 of every file, which makes it one, and tells sound from damaged.

FOLDER/STEP/manifest.json {"sha256": of the rest, "files": {path: [size, sha256]}, "step", "metrics", "meta", ...}
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pathlib
from typing import Any

from lmtrain import log, storage
from lmtrain.types import LmtrainError

MANIFEST = "manifest.json"
Folder = str | os.PathLike[str]


# ----------------------------------------------------------------------------------------------------- a folder of them
def steps(folder: Folder) -> list[int]:
    """Steps of the finished checkpoints in a folder, oldest first."""
    return sorted(int(p.parent.name) for p in pathlib.Path(folder).glob(f"*/{MANIFEST}") if p.parent.name.isdigit())


def newest_sound(folder: Folder) -> int:
    """The newest step that passes `verify`; newer ones are named and passed over. Only reads.

    Raises:
      LmtrainError: there is no finished checkpoint, or every one is damaged (naming all that is wrong).
    """
    passed: list[str] = []
    for step in reversed(steps(folder)):
        problems = verify(folder, step)
        if not problems:
            if passed:
                log.say(f"{'; '.join(passed)}. Damaged; passed over, the checkpoint of step {step} is used.")
            return step
        passed += problems
    if passed:
        raise LmtrainError(f"{folder}: every checkpoint is damaged: {'; '.join(passed)}.")
    raise LmtrainError(f"{folder}: no finished checkpoint here.")


# ---------------------------------------------------------------------------------------------------------- one of them
Sums = dict[str, list[Any]]  # {path: [size, sha256]}


def sums(path: pathlib.Path) -> Sums:
    """Of every file of a checkpoint that is here, but for its manifest."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = pool.map(_sha256, files)
        return {str(p.relative_to(path)): s for p, s in zip(files, found, strict=True)}


def write_manifest(path: pathlib.Path, manifest: dict[str, Any], files: Sums | None = None) -> None:
    """Writes a checkpoint's manifest, in one rename. `files`: all there are; hashed here by default."""
    body = {**manifest, "files": sums(path) if files is None else files}
    text = json.dumps({"sha256": _own_sum(body), **body}, indent=1)
    half = path / f"{MANIFEST}.half"
    with half.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(half, path / MANIFEST)


def read_manifest(folder: Folder, step: int) -> dict[str, Any]:
    """A checkpoint's manifest. Raises LmtrainError where it is missing or not what was written."""
    file = pathlib.Path(folder) / str(step) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest.pop("sha256") != _own_sum(manifest):
            raise ValueError
    except FileNotFoundError:
        raise LmtrainError(f"{_short(file)}: missing") from None
    except (ValueError, KeyError, AttributeError):
        raise LmtrainError(f"{_short(file)}: not what was written (its own sha256 differs)") from None
    return manifest


def verify(folder: Folder, step: int) -> list[str]:
    """What is wrong with a checkpoint, a text for each file: "checkpoints/200/params/d/1f...: sha256 differs".

    Of several processes with a copy each, none has all of it: what they fetch is compared then (scattered.py).
    """
    path = pathlib.Path(folder) / str(step)
    try:
        files = read_manifest(folder, step)["files"]
    except LmtrainError as error:
        return [str(error)]
    return compare(path, files) if storage.shared(path) else []


def compare(path: pathlib.Path, files: Sums) -> list[str]:
    """What is wrong with these files of a checkpoint."""

    def problem(name: str, expected: list[Any]) -> str:
        file = path / name
        if not file.exists():
            return f"{_short(file)}: missing"
        if file.stat().st_size != expected[0]:
            return f"{_short(file)}: {file.stat().st_size} bytes, not {expected[0]}"
        return "" if _sha256(file) == expected else f"{_short(file)}: sha256 differs"

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return [p for p in pool.map(problem, files.keys(), files.values()) if p]


def _sha256(file: pathlib.Path) -> list[Any]:
    """[size, sha256] of a file, read in pieces."""
    with file.open("rb") as f:
        return [os.fstat(f.fileno()).st_size, hashlib.file_digest(f, "sha256").hexdigest()]


def _own_sum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _short(file: pathlib.Path) -> str:
    """checkpoints/200/..., from the folder of all checkpoints on."""
    for parent in file.parents:
        if parent.name.isdigit():
            return str(file.relative_to(parent.parent.parent))
    return str(file)
