"""`lmtrain eval`: opens a model, runs suites (eval/suites.py), prints a table, keeps eval.json."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lmtrain import compilation, log, origins, record, report, runs, scattered, schema
from lmtrain import mesh as mesh_lib
from lmtrain.data import sources
from lmtrain.eval import bias, suites
from lmtrain.eval.estimates import RESAMPLES
from lmtrain.eval.subject import FORMATS, Missing, Result, Settings, Subject
from lmtrain.models import transformer
from lmtrain.rollout import rewards
from lmtrain.schema import ConfigError, Data, Model
from lmtrain.types import LmtrainError, nearest

UNKNOWN_LENGTH = 1024  # positions that a model from elsewhere sees at once, where nothing says how many
CHATTED = ("chat", "pairs", "labels", "rollout")  # kinds of a stage that is trained on conversations


def evaluate(
    run: str | os.PathLike[str] | runs.Run, suite: str = "all", settings: Settings | None = None, json: str = ""
) -> dict[str, Result]:
    """Runs suites on a model, prints their scores, and writes them as JSON.

    Args:
      run: a run's folder or that of one of its stages (or what else `runs.load` opens), or the run already open.
      suite: names of eval/suites.py with commas between, or "all": then what a suite lacks is said, and the others run.
      json: the file that is written; "": eval.json in the run's folder, where a run has one.

    Returns:
      what each suite found, by its name.

    Raises:
      LmtrainError: an unknown suite, a file that is missing or empty, a model without what a suite needs.
    """
    settings = settings or Settings()
    wanted = suites.names(suite)
    check(settings)
    if json and not pathlib.Path(json).absolute().parent.is_dir():
        raise LmtrainError(f"--json {json}: there is no folder {pathlib.Path(json).parent}.")
    texts = {name: read_text(name) for name in settings.text}
    if "bias" in wanted:
        bias.parse(settings.bias)
    compilation.use_cache()
    opened = run if isinstance(run, runs.Run) else runs.load(run, spread)
    s = subject(opened, settings, texts)
    found: dict[str, Result] = {}
    skipped: dict[str, str] = {}
    for name in wanted:
        try:
            found[name] = suites.SUITES[name].run(s)
        except Missing as why:
            if "all" not in suite.split(",") or name in suite.split(","):
                raise
            skipped[name] = str(why)
    if not found:
        raise LmtrainError("; ".join(skipped.values()))
    log.say(table(found))
    for name, reason in skipped.items():
        log.say(f"{name}: left out. {reason}")
    keep(opened, s, settings, found, skipped, json)
    return found


def check(settings: Settings) -> None:
    """Refuses settings out of range."""
    if settings.format not in FORMATS:
        hint = nearest(settings.format, FORMATS)
        raise LmtrainError(f"--format is {settings.format!r}, but takes {', '.join(FORMATS)}.{hint}")
    for name, value, least in (
        ("rows", settings.rows, 0), ("seed", settings.seed, 0), ("row-length", settings.row_length, 0),
        ("temperature", settings.temperature, 0), ("ngram", settings.ngram, 1), ("shots", settings.shots, -1),
    ):  # fmt: skip
        if not value >= least:
            raise LmtrainError(f"--{name} is {value}, but takes {least} or more.")


def subject(run: runs.Run, settings: Settings, texts: dict[str, list[str]] | None = None) -> Subject:
    """A run as suites see it.

    Raises:
      LmtrainError: a reward model, which has no use for its logits.
    """
    name = f"{run.folder / run.stage}"
    stored = run.config.get("stages", {}).get(run.stage, {})
    if stored.get("objective") == "reward":
        raise LmtrainError(
            f"{name}: a reward model scores conversations with its scalar head alone; its logits are not trained, so"
            " there is nothing here to evaluate. Give the stage before it."
        )
    kept = record.open_record(run)
    held = record.of_stage(run, settings.heldout) if settings.heldout else None
    chats = kept is not None and kept.stages[-1].kind in CHATTED
    length = settings.row_length or stored.get("data", {}).get("row_length", 0) or UNKNOWN_LENGTH
    return Subject(
        name=name, model=run.model, tokenizer=run.tokenizer, params=jax.tree.map(jnp.asarray, run.params),
        mesh=run.mesh,
        template=lambda: run.template, chat=settings.format == "chat" or (settings.format == "auto" and chats),
        longest=length, settings=settings, record=kept, held=held, texts=texts or {},
        reward=reward_model(run, settings.reward),
    )  # fmt: skip


def spread(model: Model) -> Mesh | None:
    """The mesh that a model is evaluated on: all devices, its matrices split over them where they divide evenly (else
    every device has all of them); None: there is one."""
    if jax.device_count() == 1:
        return None
    mesh = mesh_lib.make(schema.Mesh(data=1, fsdp=-1))
    try:
        mesh_lib.check_shapes(transformer.shapes(model), transformer.axes(model), mesh)
    except ConfigError:
        return mesh_lib.make(schema.Mesh(data=-1))
    return mesh


def reward_model(run: runs.Run, name: str) -> Callable[[Sequence[Sequence[int]]], list[float]] | None:
    """What gives conversations the scores of --reward, or None where that is "".

    Raises:
      LmtrainError: no reward model, or one of another tokenizer.
    """
    if not name:
        return None
    found = origins.find(name, run.folder)
    if not found.model.scalar_head:
        raise LmtrainError(
            f"--reward {name}: has no scalar head, so it scores nothing. Give a stage of objective reward."
        )
    if found.fingerprint != run.tokenizer.fingerprint:
        raise LmtrainError(f"--reward {name}: trained with another tokenizer, so its tokens mean other text.")
    return functools.partial(rewards.raw_scores, found.frozen(), run.tokenizer.pad)


def read_text(path: str) -> list[str]:
    """The documents of --text: a file, a folder or a glob, each file one document.

    Raises:
      LmtrainError: no such file, or no text in it.
    """
    found = [document.text for document in sources.read(Data(source="text", path=path), "--text")]
    texts = [text.decode("utf-8", "replace") if isinstance(text, bytes) else text for text in found]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise LmtrainError(f"--text {path}: empty, but takes a file with text in it.")
    return texts


def keep(
    run: runs.Run, s: Subject, settings: Settings, found: dict[str, Result], skipped: dict[str, str], json: str
) -> None:
    """Writes the results: for every stage the newest of each suite. Nothing is written into the folder of a model from
    elsewhere."""
    here = {
        name: {"step": run.step, "settings": plain(settings), "resamples": RESAMPLES, "row_length": s.longest,
               "chat": s.chat, **result.json()}
        for name, result in found.items()
    }  # fmt: skip
    file = pathlib.Path(json) if json else run.folder / report.EVALUATION
    where = f"all of it: {file}"
    if json:
        known: dict[str, Any] = {run.stage: here, "left_out": skipped}
    else:
        known = origins.read_json(file) if file.exists() else {}
        known.setdefault(run.stage, {}).update(here)
    if not json and s.record is None:
        where = "--json FILE keeps it"
    elif jax.process_index() == 0:
        runs.write_json(file, known)
        if not json:
            pages = [file, report.write(run.folder)]
            if (copy := scattered.of(run.folder)) is not None:  # of a run in a bucket, opened to be read
                copy.give(*(page for page in pages if page is not None))
                where = f"all of it: {copy.url}/{report.EVALUATION}"
    log.say(f"lmtrain eval: {', '.join(found)} of {s.name}, step {run.step}; {RESAMPLES:,} resamples; {where}")


def kept(folder: pathlib.Path, stage: str) -> dict[str, Any]:
    """What eval.json of a run's folder holds of a stage: {suite: its step, settings, scores ...}."""
    file = folder / report.EVALUATION
    found: dict[str, Any] = origins.read_json(file).get(stage, {}) if file.exists() else {}
    return found


def plain(settings: Settings) -> dict[str, Any]:
    """Settings as they stand in eval.json."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(settings).items()}


def table(found: dict[str, Result]) -> str:
    """The scores as text: a line for each, then what they do not say, alarms last."""
    width = max((len(name) for result in found.values() for name in result.scores), default=0) + 2
    lines = []
    for suite, result in found.items():
        lines.append(f"{suite:<{width + 2}}{'value':>10}  {'95 % interval':<20}{'rows':>7}")
        for name, score in result.scores.items():
            value, interval = score.says()
            lines.append(f"  {name:<{width}}{value:>10}  {interval:<20}{score.rows:>7,}")
        lines += [f"  ({note})" for note in result.notes]
        lines += [f"  ALARM: {text}" for text in result.alarms]
        if suite == "overfitting" and not result.alarms:
            lines.append("  no alarm")
    return "\n".join(lines)
