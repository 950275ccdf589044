"""What has to be the same on every host before the first step, and what is said where it is not."""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import secrets
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from lmtrain import config, scattered, schema
from lmtrain.hosts.roll import Roll
from lmtrain.types import LmtrainError

SKEW = 10.0  # seconds that two clocks may differ by: file times and storage credentials are compared across hosts
SEEN = 10.0  # seconds that a network file system may take to show a file to another host


def compare(
    roll: Roll, experiment: schema.Experiment, folder: pathlib.Path, copy: scattered.Copy | None = None
) -> None:
    """Refuses, in every process, what is not the same in all of them, and leaves no folder behind that it made.

    Args:
      copy: what the folder is, where each process has its own.

    Raises:
      LmtrainError: naming the host.
    """
    try:
        roll.agree(row(experiment, folder, copy), difference)
        if copy is None:
            sees_same_folder(roll, folder)
    except LmtrainError:
        with contextlib.suppress(OSError):
            folder.rmdir()  # where it is empty
        raise


def row(experiment: schema.Experiment, folder: pathlib.Path, copy: scattered.Copy | None = None) -> dict[str, Any]:
    """What this process says of itself."""
    return {
        "versions": {
            "lmtrain": source_sha256(),
            "jax": jax.__version__,
            "Python": ".".join(map(str, sys.version_info[:2])),
        },
        "settings": config.flatten(config.to_json(experiment)) | {"--workdir": copy.url if copy else ""},
        "unwritable": copy.refusal() if copy else unwritable(folder),
    }


def difference(rows: Mapping[int, dict[str, Any]]) -> str:
    """What is wrong with the rows of all processes, naming host and value on both sides; "" where nothing is."""
    first = rows[0]
    for r in rows.values():
        for what, version in r["versions"].items():
            if version != first["versions"][what]:
                return (
                    f"{r['name']} has {what} {version}, {first['name']} {first['versions'][what]}. Install the same "
                    "on all hosts."
                )
        theirs, ours = r["settings"], first["settings"]
        differ = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
        if differ:
            more = f" ({len(differ) - 1} more differ)" if len(differ) > 1 else ""
            return (
                f"{r['name']} has another configuration: {differ[0]} is {theirs.get(differ[0])!r}, but "
                f"{ours.get(differ[0])!r} on {first['name']}{more}. Start all with the same files and settings."
            )
        if abs(r["behind"]) > SKEW:
            return (
                f"the clock of {r['name']} is {abs(r['behind']):.0f} s {'behind' if r['behind'] > 0 else 'ahead of'} "
                f"that of {first['name']}; at most {SKEW:g} s are allowed. Set both by NTP."
            )
    for r in rows.values():
        if r["unwritable"]:
            return f"{r['name']} cannot write to --workdir: {r['unwritable']}"
    return ""


def sees_same_folder(roll: Roll, folder: pathlib.Path) -> None:
    """Refuses a --workdir that is another folder on some host.

    Raises:
      LmtrainError: naming the host.
    """
    mark = folder / f".hosts-{roll.token}"
    if roll.place.process == 0:
        mark.touch()
    try:
        roll.agree({}, lambda rows: "")  # the mark is there now
        deadline = time.monotonic() + SEEN
        while not (seen := mark.exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
        roll.agree({"seen": seen}, lambda rows: unseen(rows, folder))
    finally:
        if roll.place.process == 0:
            mark.unlink(missing_ok=True)


def unseen(rows: Mapping[int, dict[str, Any]], folder: pathlib.Path) -> str:
    """Names the host that does not see process 0's folder; "" where all do."""
    for r in rows.values():
        if not r["seen"]:
            return (
                f"--workdir {folder} on {r['name']} is not the folder that {rows[0]['name']} sees. It has to be on a "
                "file system that all hosts share."
            )
    return ""


def unwritable(folder: pathlib.Path) -> str:
    """Why nothing can be written to a folder, or "". Leaves it as it was, but for making it."""
    probe = folder / f".writes-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        return f"{folder}: {error.strerror or error}"
    return ""


def source_sha256() -> str:
    """What stands for the package's source, for two checkouts of one version differ too."""
    root = pathlib.Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode())
        digest.update(file.read_bytes())
    return f"with source {digest.hexdigest()[:12]}"
