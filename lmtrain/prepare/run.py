"""The command: looks at what it is given, runs the stages, and says what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator
from typing import Any

from lmtrain import log
from lmtrain.data import store
from lmtrain.data import tokenizer as tokenizer_lib
from lmtrain.prepare.settings import Settings
from lmtrain.types import LmtrainError

try:
    from lmtrain.prepare import blocks, evaluation, launch, read, stages, synthetic
except ImportError as missing:
    raise LmtrainError(
        f"lmtrain prepare needs datatrove and what it reads with ({missing}): pip install -e '.[prepare]' in a checkout"
    ) from None

# What a folder of its own may hold.
KEPT = ("settings.json", "inputs.jsonl", "manifest.json", "tokenizer", "shards", "synthetic", "logs", "scratch")


def prepare(s: Settings, progress: bool = True) -> pathlib.Path | None:
    """Does all of it, or goes on. Returns the manifest; None where jobs have been queued and are yet to end.

    Raises:
      LmtrainError: settings, files or rows that cannot be; a folder that was begun with others.
    """
    folder = pathlib.Path(s.to).expanduser().absolute()
    s = dataclasses.replace(s, to=str(folder))
    if s.language != "all":
        blocks.check_language(s.language, s.language_model)
    blocks.words(s.language)
    _apart(folder, s.input)
    found = read.find(list(s.input))
    given = None if s.tokenizer == "bpe" else _tokenizer(s.tokenizer)
    rows, short = evaluation.rows(list(s.decontaminate))
    if s.decontaminate and not rows:
        raise LmtrainError(f"--decontaminate: of {short:,} rows none has {evaluation.CHANCE} words to look for")
    with _owned(folder):
        _same(folder / "settings.json", s.decisive(), "other settings")
        if s.synthetic:
            _same(folder / "synthetic" / "settings.json", s.writing(), "other settings")
            found += [(str(file), file.stat().st_size) for file in [synthetic.write(s, folder, progress)]]
        _same(folder / "inputs.jsonl", [{"path": path, "bytes": size} for path, size in found], "other files")
        if (folder / "manifest.json").exists():
            shutil.rmtree(folder / "scratch", ignore_errors=True)
            log.say(summary(json.loads((folder / "manifest.json").read_text())))
            return folder / "manifest.json"
        scratch = folder / "scratch"
        scratch.mkdir(exist_ok=True)
        parts, tasks = read.units(found, s.task_mb << 20)
        (scratch / "units.jsonl").write_text("".join(json.dumps(part) + "\n" for part in parts))
        if given:
            given.save(folder / "tokenizer")
        head: dict[str, Any] = {
            "settings": s.decisive(),
            "inputs": {
                "files": len(found),
                "bytes": sum(size for _, size in found),
                "sha256": hashlib.sha256((folder / "inputs.jsonl").read_bytes()).hexdigest(),
            },
            "heldout_fraction": s.heldout_fraction,
        }
        if rows:
            evaluation.write(rows, scratch / "evaluation.jsonl")
            head["decontamination"] = {"rows": len(rows), "too_short": short}
        begun = (folder / "logs").exists()
        started = time.monotonic()
        if not launch.run(s, stages.plan(s, tasks, head), progress):
            return None
        manifest = json.loads((folder / "manifest.json").read_text())
        log.say(summary(manifest, 0.0 if begun else time.monotonic() - started))
        return folder / "manifest.json"


def _tokenizer(name: str) -> tokenizer_lib.Tokenizer:
    """ "bytes", a tokenizer.json, its folder, or a run's folder."""
    if name == "bytes":
        return tokenizer_lib.bytes_tokenizer()
    path = pathlib.Path(name).expanduser()
    try:
        return tokenizer_lib.load(path / "tokenizer" if (path / "tokenizer").is_dir() else path)
    except LmtrainError as error:
        raise LmtrainError(
            f"--tokenizer {name}: takes bpe, bytes, a tokenizer.json, its folder or a run's: {error}"
        ) from None


def _apart(folder: pathlib.Path, inputs: Iterable[str]) -> None:
    """Raises LmtrainError where what the folder holds would be among the inputs of the next command."""
    for pattern in inputs:
        if "://" in pattern:
            continue
        path = pathlib.Path(os.path.abspath(pathlib.Path(pattern).expanduser()))
        above, deep, _ = str(path).partition("**")
        inside = (deep or path.is_dir()) and folder.resolve().is_relative_to(pathlib.Path(above).resolve())
        if inside or any(pathlib.Path(os.path.abspath(folder / name)).match(str(path)) for name in KEPT):
            raise LmtrainError(f"--to {folder}: stands in --input {pattern}, of which it would be a part the next time."
                               " Take a folder outside of it")  # fmt: skip


def _same(file: pathlib.Path, value: Any, what: str) -> None:
    """Writes what decides the result; refuses to go on with what was begun with another."""
    file.parent.mkdir(exist_ok=True)
    lines = isinstance(value, list)
    text = "".join(json.dumps(item) + "\n" for item in value) if lines else json.dumps(value, indent=1) + "\n"
    if not file.exists():
        store.write(file, text.encode())
    elif (before := file.read_text()) != text:
        changed = ""
        if not lines:
            old, new = json.loads(before), json.loads(text)
            changed = "; ".join(
                f"{key}: {old.get(key)!r} there, {new[key]!r} now" for key in new if old.get(key) != new[key]
            )
        raise LmtrainError(f"{file}: was begun with {what}{f' ({changed})' if changed else ''}. Take another --to, or"
                           f" delete {file.parent}")  # fmt: skip


@contextlib.contextmanager
def _owned(folder: pathlib.Path) -> Iterator[None]:
    """Holds the folder's lock. Where no task was completed and none is at work, what a model wrote and logs alone stay.

    So what was refused may be given again with other settings and files.
    """
    if folder.exists() and any(p.name not in (*KEPT, ".lock") for p in folder.iterdir()):
        names = sorted(p.name for p in folder.iterdir() if p.name not in KEPT)
        raise LmtrainError(f"--to {folder}: holds {', '.join(names[:3])}, which are not of `lmtrain prepare`")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LmtrainError(
                f"--to {folder}: another process is preparing there. Wait for it, or take another"
            ) from None
        logs = folder / "logs"
        done = (folder / "manifest.json").exists() or any(logs.glob("*/completions/*"))
        if not done and not (logs.exists() and launch.at_work(logs)):
            begun = [folder / name for name in KEPT if name not in ("synthetic", "logs")]
            for path in [*begun, *logs.glob("*/stats")]:  # their stats would be added to those of other tasks
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        yield


def summary(manifest: dict[str, Any], seconds: float = 0.0) -> str:
    """What was read, dropped and kept, a line each. With seconds also how fast."""
    read, *rest = manifest["steps"]
    out = [
        f"read {read['documents']:,} documents, {read['bytes'] / 1e6:.1f} MB, of {manifest['inputs']['files']:,} files"
    ]
    for reason, lost in read["reasons"].items():
        out.append(f"  {lost['documents']:,} left out: {reason}")
    for step in rest:
        why = ", ".join(f"{name} {lost['documents']:,}" for name, lost in list(step["reasons"].items())[:4])
        out.append(f"{step['name']}: dropped {step['dropped']:,} ({step['dropped_bytes'] / 1e6:.1f} MB)"
                   f"{f': {why}' if len(step['reasons']) > 1 else ''}")  # fmt: skip
    if "decontamination" in manifest:
        d = manifest["decontamination"]
        short = f", {d['too_short']:,} too short to look for" if d["too_short"] else ""
        out.append(f"evaluation rows found: {d['found']:,} of {d['rows']:,}{short}")
    if manifest["settings"]["pii"]:
        p = manifest["pii"]
        out.append(
            f"pii: {p['emails']:,} e-mail and {p['addresses']:,} IP addresses replaced, in {p['changed']:,} documents"
        )
    sides = (
        (manifest[f"{side}documents"], manifest[f"{side}bytes"], manifest[f"{side}tokens"]) for side in ("", "heldout_")
    )
    kept = [f"{documents:,} documents ({size / 1e6:.1f} MB, {tokens:,} tokens)" for documents, size, tokens in sides]
    out.append(f"kept {kept[0]} to train on, {kept[1]} held out")
    if seconds:
        out.append(f"{seconds:.0f} s, {read['bytes'] / 1e6 / seconds:.2f} MB/s")
    return "\n".join(out)
