"""An experiment is an ordered set of stages; this runs them, each from the one before, and keeps the run's folder.

runs/NAME/tokenizer/          tokenizer.json
runs/NAME/data/               tokenised shards
runs/NAME/STAGE/              config.json  metrics.jsonl  tensorboard/  checkpoints/STEP/  samples.jsonl
runs/NAME/summary.json        scores before and after each stage
runs/NAME/report.html
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmtrain import (
    bucket,
    compilation,
    config,
    feeds,
    flags,
    hosts,
    log,
    origins,
    partial,
    preflight,
    remote,
    resume,
    runs,
    scattered,
    schema,
    scoring,
    train,
)
from lmtrain import mesh as mesh_lib
from lmtrain.data import conversations, shards, split
from lmtrain.data import tokenizer as tokenizer_lib
from lmtrain.eval import heldout as heldout_lib
from lmtrain.models import quantise, transformer
from lmtrain.plan import search
from lmtrain.types import LmtrainError, Params


def run(
    experiment: str | os.PathLike[str] | ConfigDict | schema.Experiment,
    workdir: str | os.PathLike[str],
    overrides: Iterable[str] = (),
) -> runs.Run:
    """Runs an experiment's stages in order, each going on where it stopped, and returns the run.

    Args:
      experiment: "FILE[:arg]", the ConfigDict that such a file makes, or a schema.Experiment.
      workdir: the run's folder; made where it is missing. gs://... and s3://...: worked on in a copy (remote.py; by
        several processes, in one each: scattered.py).
      overrides: further settings, as on the command line: ["--config.stages.pretrain.steps=10"].

    Raises:
      LmtrainError: a setting or an input that cannot be, in one message; types.Stopped after SIGTERM or Ctrl-C.
    """
    if isinstance(experiment, str | os.PathLike):
        experiment = config.load(os.fspath(experiment), overrides)
    elif overrides:
        if not isinstance(experiment, ConfigDict):
            raise LmtrainError(
                "overrides go with a file or a ConfigDict; change a schema.Experiment by dataclasses.replace."
            )
        experiment = config.override(experiment, overrides)
    e = experiment if isinstance(experiment, schema.Experiment) else config.build(experiment)
    with contextlib.ExitStack() as held:
        copy: scattered.Copy | None = None
        if bucket.is_remote(workdir):
            place = hosts.find()
            if place.processes > 1:
                copy = scattered.Copy(str(workdir), place.process, place.processes)
            workdir = copy.local if copy else held.enter_context(remote.mirrored(str(workdir)))
        folder = pathlib.Path(workdir)
        crew = held.enter_context(hosts.joined(e, folder, copy))
        if copy is not None:
            held.enter_context(copy.at_work())
        compilation.use_cache()
        if e.mesh.auto:
            e = dataclasses.replace(e, mesh=search.auto(e, jax.devices()))
            sizes = mesh_lib.resolve(e.mesh, jax.device_count()).items()
            log.say(f"mesh=auto: {', '.join(f'{axis}={n}' for axis, n in sizes)}")
        mesh = mesh_lib.make(e.mesh)
        preflight.check(e, mesh, folder)
        held.enter_context(runs.owned(folder, near=bool(e.local)))
        tok: tokenizer_lib.Tokenizer | None = None
        before: str = ""
        done: runs.Run | None = None
        first = next(s for s in e.stages.values() if isinstance(s, schema.Stage))
        for name, stage in e.stages.items():
            if isinstance(stage, schema.Tokenizer):
                tok = tokenizer_stage(stage, first, folder / "tokenizer", crew)
                continue
            tok = tok or tokenizer_stage(default_tokenizer(first), first, folder / "tokenizer", crew)
            crew.meet(name)  # what the stage before has left is read now
            if isinstance(stage, schema.Evaluation):
                scoring.run(e, name, stage, tok, folder, mesh)
            else:
                done = training_stage(e, name, stage, before, tok, folder, mesh, crew)
                before = name
        if jax.process_index() == 0:
            from lmtrain import report  # which reads runs, so it imports this

            if table := report.comparison(folder):
                log.say(table)
        crew.meet("end")
    assert done is not None  # config.build refuses an experiment without a training stage
    return done


# ------------------------------------------------------------------------------------------- the stages


def default_tokenizer(first: schema.Stage) -> schema.Tokenizer:
    """What an experiment without a tokenizer stage takes: that of the run it starts from, else a BPE of its data."""
    if not first.init_from:
        return schema.Tokenizer()
    return schema.Tokenizer(kind="file", path=origins.tokenizer(first.init_from))


def tokenizer_stage(
    cfg: schema.Tokenizer, first: schema.Stage, folder: pathlib.Path, crew: hosts.Crew
) -> tokenizer_lib.Tokenizer:
    """Trains, reads or makes the tokenizer, once; afterwards loads it and checks that it is the one asked for."""
    asked = {"kind": cfg.kind, "path": cfg.path, "vocab_size": cfg.vocab_size if cfg.kind == "bpe" else 0}
    asked |= {"add": list(cfg.add)} if cfg.add else {}
    note = folder / "config.json"
    if jax.process_index() == 0 and not note.exists():
        beside: list[pathlib.Path] = []  # files that say how an imported model chats
        if cfg.kind == "bytes":
            tok = tokenizer_lib.bytes_tokenizer()
        elif cfg.kind == "file":
            source = scattered.found(cfg.path)
            tok = tokenizer_lib.load(source)
            tok = tok.with_specials(cfg.add) if cfg.add else tok
            beside = [source / side for side in tokenizer_lib.BESIDE]
        elif cfg.kind == "bpe":
            texts, names = tokenizer_texts(cfg, first)
            log.say(f"tokenizer: learning {cfg.vocab_size} tokens from {names}")
            tok = tokenizer_lib.train(texts, cfg.vocab_size, limit=cfg.train_bytes)
        else:
            raise schema.ConfigError(
                f"tokenizer.kind: {flags.unknown(cfg.kind, ('bpe', 'bytes', 'file'), 'a kind of tokenizer')}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        tok.save(folder)
        for side in beside:
            if side.exists():
                shutil.copy(side, folder / side.name)
        runs.write_json(note, asked)
        log.say(f"tokenizer: {tok.vocab_size} tokens, in {folder}")
    crew.meet("tokenizer")
    made = origins.read_json(note)
    if made != asked:
        raise LmtrainError(
            f"{folder}: was made with {made}, the configuration asks for {asked}. Start another --workdir."
        )
    return tokenizer_lib.load(folder)


def tokenizer_texts(cfg: schema.Tokenizer, first: schema.Stage) -> tuple[Iterable[str | bytes], str]:
    """What a tokenizer learns from, and its name: its own data, else what the first training stage learns from."""
    data, what = (cfg.data, "documents") if cfg.data is not None else (first.data, feeds.kind(first))
    names = ", ".join(f"{m.source} {m.path}".strip() for m in split.members(data).values())
    if what in conversations.KINDS:
        return conversations.texts(what, data), names
    if what != "documents":
        raise schema.ConfigError(f"the tokenizer has no text to learn from: {what} gives none. Set its data.")
    return (document.text for document in shards.documents(data)), names


def training_stage(
    e: schema.Experiment, name: str, cfg: schema.Stage, before: str, tok: tokenizer_lib.Tokenizer,
    folder: pathlib.Path, mesh: Mesh, crew: hosts.Crew,
) -> runs.Run:  # fmt: skip
    """Runs, resumes or skips one training stage."""
    here, cfg = folder / name, feeds.settled(cfg)
    start = origins.find(cfg.init_from or before, folder) if cfg.init_from or before else None
    if start and start.fingerprint != tok.fingerprint and not tok.extends(tokenizer_lib.load(start.tokenizer)):
        raise LmtrainError(
            f"init_from {start.where}: it was trained with another tokenizer, so its tokens mean other text. Take its "
            f"own: --config.stages.tokenizer.kind=file --config.stages.tokenizer.path={start.tokenizer}"
        )
    model = preflight.model_of(cfg, start.model if start else None, tok.vocab_size)
    if model.vocab_size < tok.vocab_size:
        raise schema.ConfigError(
            f"stages.{name}.model.vocab_size is {model.vocab_size}, but the tokenizer has {tok.vocab_size} tokens."
        )
    mesh_lib.check_shapes(transformer.shapes(model), transformer.axes(model), mesh)
    settings = config.to_json(dataclasses.replace(e, stages={name: cfg}))
    settings |= {"model": dataclasses.asdict(model), "tokenizer_sha256": tok.fingerprint}
    settings |= {"stages_before": list(e.stages)[: list(e.stages).index(name)]}
    resume.check_same(here, name, settings)
    if resume.finished(here, cfg):
        log.say(f"{here}: finished ({cfg.steps} steps); nothing to do")
        return runs.load(here, place=lambda model: mesh if mesh.size > 1 else None)

    initial = initial_params(start, model, mesh) if start else None
    chosen = partial.trained(cfg, model, transformer.axes(model))
    rest = frozen_part(chosen, start, model, initial, cfg.quantize)
    if rest:
        assert start is not None and initial is not None
        name_of_rest = resume.rest_name(start, folder)
        settings["rest"] = {"from": name_of_rest, "identity": start.identify(), "trained": sorted(chosen),
                            "quantize": cfg.quantize}  # fmt: skip
        resume.check_rest(here, settings["rest"])
        if cfg.quantize:
            initial = rounded(chosen, initial, cfg.quantize)
    cfg = runs.with_template(cfg, folder)
    made = feeds.Stage(cfg, transformer.Forward(model, mesh), tok, mesh, e.seed, folder, name, initial, start)
    try:
        feed = feeds.build(made)
        frozen = {"teacher": feeds.frozen(cfg.teacher, made)} if cfg.teacher else {}
    except LmtrainError as error:
        raise type(error)(f"stages.{name}: {error}") from None
    if jax.process_index() == 0:
        here.mkdir(parents=True, exist_ok=True)
        runs.write_json(here / "config.json", settings)
    counted = transformer.count(model)
    log.say(
        f"{here}: {counted['total']:,} parameters, {feed.says}, {jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    over = f", {feed.passes:.1f} passes over the data" if feed.passes else ""
    rows = "conversations in rows" if feeds.kind(cfg) == "rollout" else "rows"
    log.say(f"{cfg.steps:,} steps of {cfg.batch_size} {rows} of {cfg.data.row_length} tokens{over}; compiling")

    parts = train.Parts(
        cfg=cfg,
        model=model,
        source=feed.source,
        loss=feeds.objective(cfg),
        heldout=feed.heldout,
        heldout_bytes=feed.heldout_bytes,
        initial=(lambda: partial.split(initial(), chosen)[0]) if initial else None,
        rest=rest,
        frozen=frozen,
        sample=feed.sample,
        score=feed.score,
        meta={"config": settings, "tokenizer": (folder / "tokenizer/tokenizer.json").read_text()},
    )
    state = train.train(parts, here, mesh, e.seed, tensorboard=e.tensorboard, crew=crew)
    params = partial.join(rest, state.params) if rest else state.params
    done = runs.Run(folder, name, settings, model, tok, params, cfg.steps, mesh if mesh.size > 1 else None)
    if jax.process_index() == 0:
        summarise(done, feed)
    return done


def initial_params(origin: origins.Origin, model: schema.Model, mesh: Mesh) -> Callable[[], Params]:
    """A function that loads the parameters a stage starts from, sharded over the mesh. A scalar head that the origin
    has and this model has not is left out; one that only this model has is drawn afresh (step.make_init)."""

    def load() -> Params:
        theirs, ours = dataclasses.asdict(origin.model), dataclasses.asdict(model)
        if model.vocab_size > origin.model.vocab_size:
            theirs["vocab_size"] = model.vocab_size  # new tokens begin here
        if not origin.model.lora.rank:
            theirs["lora"] = ours["lora"]  # adapters begin here
        resume.compare_models(theirs, ours, f"init_from {origin.where}", "stages.NAME.model")
        params = origin.load(mesh_lib.shardings(transformer.axes(origin.model), mesh))
        if model.vocab_size > origin.model.vocab_size:
            shape = dataclasses.replace(origin.model, vocab_size=model.vocab_size)
            params = origins.extended(params, model.vocab_size, mesh_lib.shardings(transformer.axes(shape), mesh))
        return {k: v for k, v in params.items() if k != "scalar" or model.scalar_head}

    return load


def frozen_part(
    chosen: set[tuple[str, ...]],
    start: origins.Origin | None,
    model: schema.Model,
    initial: Callable[[], Params] | None,
    kind: str,
) -> Params:
    """The parameters that a stage does not train, on the devices, quantised where `kind` says how; {} where it trains
    all.

    Raises:
      ConfigError: what it starts from lacks one of them.
    """
    rest = partial.split(transformer.axes(model), chosen)[1]
    if not rest:
        return {}
    assert start is not None and initial is not None  # preflight refuses that
    found = partial.split(initial(), chosen)[1]
    missing = {name for _, name, _ in partial.named(rest)} - {name for _, name, _ in partial.named(found)}
    if missing:
        raise schema.ConfigError(f"{sorted(missing)[0]} is not trained, but {start.where} has none; train it too.")
    return quantise.quantised(found, kind) if kind else found


def rounded(chosen: set[tuple[str, ...]], initial: Callable[[], Params], kind: str) -> Callable[[], Params]:
    """What a stage starts from as it is computed with: its frozen matrices through so few bits."""

    def load() -> Params:
        ours, rest = partial.split(initial(), chosen)
        return partial.join(quantise.rounded(rest, kind), ours)

    return load


def summarise(done: runs.Run, feed: feeds.Feed) -> None:
    """Writes summary.json and report.html, and prints what the stage reached."""
    scored = [m for m in done.metrics if any(key.startswith("heldout_") for key in m)]
    entry: dict[str, Any] = {"steps": done.step, "parameters": transformer.count(done.model)["total"]}
    for score in ("heldout_loss", "heldout_bits_per_byte"):
        if scored and score in scored[0]:
            entry[score] = {"before": scored[0][score], "after": scored[-1][score]}
    text = feed.heldout_text()
    if "heldout_bits_per_byte" in entry and text:
        entry["compressors"] = heldout_lib.compressors(text)
        bits = entry["heldout_bits_per_byte"]
        rows = {"before training": bits["before"], **entry["compressors"], "after training": bits["after"]}
        log.say(f"held-out text ({len(text):,} bytes), bits per byte:")
        for what, value in rows.items():
            log.say(f"    {what:<16} {value:6.3f}")
    if scored and (found := feeds.scores(feed, scored[0], scored[-1])):
        entry["tasks"] = found
        for task, s in found.items():
            log.say(f"held out, {task}: {said(s['before'])} before, {said(s['after'])} after")
            for part, after in s["after"].get("parts", {}).items():
                log.say(f"    {part:<16} {s['before']['parts'][part]:.1%} before, {after:.1%} after")
    runs.write_json(done.folder / "summary.json", {**runs.read_summary(done.folder), done.stage: entry})
    from lmtrain import report  # which reads runs, so it imports this

    page = report.write(done.folder)
    log.say(f"curves and samples: {page}" if page else "no report.html: pip install -e '.[report]' draws one")
    samples = done.folder / done.stage / "samples.jsonl"
    if samples.exists() and (texts := log.read_jsonl(samples)):
        log.say("a sample:")
        first = next(t["text"] for t in texts if t["step"] == texts[-1]["step"])
        log.say("\n".join(f"    | {line}" for line in first.splitlines()))


def said(s: dict[str, Any]) -> str:
    """A score in words: "61.2 % (55.0 to 67.1, 256 rows)"."""
    chance = f", {s['chance']:.0%} by chance, {s['longer']:.0%} by taking the longer" if "chance" in s else ""
    return f"{s['score']:.1%} ({s['ci95'][0]:.1%} to {s['ci95'][1]:.1%}, {s['rows']} rows{chance})"
