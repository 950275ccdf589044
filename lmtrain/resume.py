"""Whether a stage may go on where it stopped, or is done: by what its folder says of it, and what is asked for now."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from lmtrain import bucket, checkpoint, config, log, origins, preflight, runs, schema
from lmtrain.interop import huggingface
from lmtrain.types import LmtrainError


def finished(here: pathlib.Path, cfg: schema.Stage) -> bool:
    """True where the stage has its last checkpoint and its summary."""
    steps = checkpoint.steps(here / "checkpoints")
    if not steps or steps[-1] < cfg.steps or here.name not in runs.read_summary(here.parent):
        return False
    return checkpoint.sound(here / "checkpoints", steps[-1])  # a damaged last step is done again


def check_same(here: pathlib.Path, name: str, settings: dict[str, Any]) -> None:
    """Refuses to go on with another model or tokenizer than the stage's checkpoints have; names other changes."""
    if not (here / "config.json").exists() or not checkpoint.steps(here / "checkpoints"):
        return
    stored = origins.read_json(here / "config.json")
    theirs = dataclasses.asdict(origins.stored_model(stored))
    compare_models(theirs, settings["model"], str(here), f"stages.{name}.model")
    if stored["tokenizer_sha256"] != settings["tokenizer_sha256"]:
        raise LmtrainError(
            f"{here}: the checkpoint was trained with tokenizer {stored['tokenizer_sha256'][:12]}, but "
            f"{here.parent}/tokenizer is {settings['tokenizer_sha256'][:12]}. Put the first one back, or start another "
            "--workdir."
        )
    old, new = config.flatten(stored), config.flatten(settings)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith("model."):
            log.say(f"{here}: {key} was {old.get(key)}, is now {new.get(key)}")


def compare_models(stored: dict[str, Any], asked: dict[str, Any], where: str, field: str) -> None:
    """Raises with both values and the fix where two models differ in a shape; how they are computed may differ."""
    for key in stored.keys() | asked.keys():
        if key not in preflight.COMPUTED | {"scalar_head"} and stored.get(key) != asked.get(key):
            raise LmtrainError(
                f"{where}: the checkpoint has {key}={stored.get(key)}, the configuration {asked.get(key)}. "
                f"Start another --workdir, or --config.{field}.{key}={stored.get(key)}."
            )


def check_rest(here: pathlib.Path, rest: dict[str, Any]) -> None:
    """Refuses to go on with another frozen part than the one that the stage's checkpoints were trained beside."""
    if not checkpoint.steps(here / "checkpoints"):
        return
    stored = origins.read_json(here / "config.json").get("rest") or {}
    if any(stored.get(key) != rest[key] for key in ("identity", "quantize")):
        raise LmtrainError(
            f"{here}: its checkpoints hold only what was trained, and the rest is not what it was then: {rest['from']} "
            "has changed, or quantize has. Start another --workdir."
        )


def rest_name(start: origins.Origin, folder: pathlib.Path) -> str:
    """How config.json names what a stage's frozen part comes from: a stage of this run by its name, which stays true
    when the run is moved."""
    if pathlib.Path(start.where).parent == folder:
        return pathlib.Path(start.where).name
    known = start.where.startswith(huggingface.PREFIX) or bucket.is_remote(start.where)
    return start.where if known else str(pathlib.Path(start.where).absolute())
