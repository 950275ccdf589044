"""An experiment is an ordered set of stages; this runs them, each from the one before, and keeps the run's folder.

runs/NAME/tokenizer/          tokenizer.json
runs/NAME/data/               tokenised shards
runs/NAME/STAGE/              config.json  metrics.jsonl  tensorboard/  checkpoints/STEP/  samples.jsonl
runs/NAME/summary.json        scores before and after each stage
runs/NAME/report.html
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmtrain import checkpoint, config, engine, flags, log, runs, schema, train
from lmtrain import mesh as mesh_lib
from lmtrain.data import pipeline, shards, sources, split
from lmtrain.data import tokenizer as tokenizer_lib
from lmtrain.eval import heldout as heldout_lib
from lmtrain.models import transformer
from lmtrain.types import LmtrainError, Params


def run(
    experiment: str | os.PathLike[str] | ConfigDict | schema.Experiment,
    workdir: str | os.PathLike[str],
    overrides: Iterable[str] = (),
) -> runs.Run:
    """Runs an experiment's stages in order, each going on where it stopped, and returns the run.

    Args:
      experiment: "FILE[:arg]", the ConfigDict that such a file makes, or a schema.Experiment.
      workdir: the run's folder; made where it is missing.
      overrides: further settings, as on the command line: ["--config.stages.pretrain.steps=10"].

    Raises:
      LmtrainError: a setting or an input that cannot be, in one message; train.Stopped after SIGTERM or Ctrl-C.
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
    folder = pathlib.Path(workdir)
    use_compilation_cache()
    mesh = mesh_lib.make(e.mesh)
    preflight(e, mesh, folder)
    with runs.owned(folder):
        tok: tokenizer_lib.Tokenizer | None = None
        before: str = ""
        done: runs.Run | None = None
        first = next(s for s in e.stages.values() if isinstance(s, schema.Stage))
        for name, stage in e.stages.items():
            if isinstance(stage, schema.Tokenizer):
                tok = tokenizer_stage(stage, first.data, folder / "tokenizer")
            else:
                tok = tok or tokenizer_stage(schema.Tokenizer(), first.data, folder / "tokenizer")
                done = training_stage(e, name, stage, before, tok, folder, mesh)
                before = name
        assert done is not None  # config.build refuses an experiment without a training stage
    return done


# ------------------------------------------------------------------------------------------- the stages


def preflight(e: schema.Experiment, mesh: Mesh, folder: pathlib.Path) -> None:
    """Refuses what can be refused before a file is written: shapes, mesh, optimizer, sources that do not open."""
    from lmtrain import optim

    for name, stage in e.stages.items():
        try:
            if isinstance(stage, schema.Stage):
                model = transformer.resolve(stage.model, stage.model.vocab_size or 1024)
                shapes, axes = transformer.shapes(model), transformer.axes(model)
                if stage.model.vocab_size:
                    mesh_lib.check_shapes(shapes, axes, mesh)
                optim.make(stage.optim, stage.steps, axes)
                check_batch(stage, mesh)
                if stage.init_from and not checkpoint.steps(folder / name / "checkpoints"):
                    runs.find_stage(pathlib.Path(stage.init_from))
            if stage.data is not None:
                for member, document in split.members(stage.data).items():
                    next(sources.read(document, split.field(member)), None)
        except LmtrainError as error:
            raise type(error)(f"stages.{name}: {error}") from None


def check_batch(stage: schema.Stage, mesh: Mesh) -> None:
    """Refuses a batch that does not split evenly over microbatches and devices, or rows over the context axis."""
    ways, context = stage.accumulate * mesh_lib.batch_shards(mesh), mesh.shape["context"]
    if stage.batch_size % ways:
        raise schema.ConfigError(
            f"batch_size is {stage.batch_size}, but must be a multiple of {ways}: accumulate={stage.accumulate} times "
            f"the {ways // stage.accumulate} ways that mesh.data, fsdp and expert split it."
        )
    if stage.data.row_length % context:
        raise schema.ConfigError(
            f"data.row_length is {stage.data.row_length}, which mesh.context={context} does not divide."
        )


def tokenizer_stage(cfg: schema.Tokenizer, default: schema.Data, folder: pathlib.Path) -> tokenizer_lib.Tokenizer:
    """Trains, reads or makes the tokenizer, once; afterwards loads it and checks that it is the one asked for."""
    asked = {"kind": cfg.kind, "path": cfg.path, "vocab_size": cfg.vocab_size if cfg.kind == "bpe" else 0}
    note = folder / "config.json"
    if jax.process_index() == 0 and not note.exists():
        data = cfg.data or default
        if cfg.kind == "bytes":
            tok = tokenizer_lib.bytes_tokenizer()
        elif cfg.kind == "file":
            tok = tokenizer_lib.load(pathlib.Path(cfg.path))
        elif cfg.kind == "bpe":
            names = ", ".join(f"{m.source} {m.path}".strip() for m in split.members(data).values())
            log.say(f"tokenizer: learning {cfg.vocab_size} tokens from {names}")
            texts = (document.text for document in shards.documents(data))
            tok = tokenizer_lib.train(texts, cfg.vocab_size, limit=cfg.train_bytes)
        else:
            raise schema.ConfigError(
                f"tokenizer.kind: {flags.unknown(cfg.kind, ('bpe', 'bytes', 'file'), 'a kind of tokenizer')}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        tok.save(folder)
        runs.write_json(note, asked)
        log.say(f"tokenizer: {tok.vocab_size} tokens, in {folder}")
    mesh_lib.barrier("tokenizer")
    made = runs.read_json(note)
    if made != asked:
        raise LmtrainError(
            f"{folder}: was made with {made}, the configuration asks for {asked}. Start another --workdir."
        )
    return tokenizer_lib.load(folder)


def training_stage(
    e: schema.Experiment, name: str, cfg: schema.Stage, before: str, tok: tokenizer_lib.Tokenizer,
    folder: pathlib.Path, mesh: Mesh,
) -> runs.Run:  # fmt: skip
    """Runs, resumes or skips one training stage."""
    here = folder / name
    model = transformer.resolve(cfg.model, tok.vocab_size)
    if model.vocab_size < tok.vocab_size:
        raise schema.ConfigError(
            f"stages.{name}.model.vocab_size is {model.vocab_size}, but the tokenizer has {tok.vocab_size} tokens."
        )
    mesh_lib.check_shapes(transformer.shapes(model), transformer.axes(model), mesh)
    settings = config.to_json(dataclasses.replace(e, stages={name: cfg}))
    settings |= {"model": dataclasses.asdict(model), "tokenizer_sha256": tok.fingerprint}
    settings |= {"stages_before": list(e.stages)[: list(e.stages).index(name)]}
    check_same(here, name, settings)
    if finished(here, cfg):
        log.say(f"{here}: finished ({cfg.steps} steps); nothing to do")
        return runs.load(here)

    try:
        source, heldout = pipeline.build(
            cfg.data, tok, cfg.batch_size, e.seed, folder / "data", share=mesh_lib.share(mesh)
        )
    except LmtrainError as error:
        raise type(error)(f"stages.{name}: {error}") from None
    if jax.process_index() == 0:
        here.mkdir(parents=True, exist_ok=True)
        runs.write_json(here / "config.json", settings)
    counted = transformer.count(model)
    log.say(
        f"{here}: {counted['total']:,} parameters, {source.shards.summary()}, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    tokens = cfg.steps * cfg.batch_size * cfg.data.row_length
    passes = tokens / max(1, source.shards.total("tokens"))
    log.say(f"{cfg.steps:,} steps of {tokens // cfg.steps:,} tokens, {passes:.1f} passes over the text; compiling")

    end = tok.special("<|endoftext|>")

    def sample(params: Params) -> list[str]:
        prompts = [[end, *tok.encode(cfg.prompts[i % len(cfg.prompts)])] for i in range(cfg.samples)]
        how = engine.Sampling(cfg.sample_tokens, cfg.sample_temperature, stop=(end,), seed=e.seed)
        return [
            tok.decode([*p[1:], *c.tokens])
            for p, c in zip(prompts, engine.generate(model, params, prompts, how, mesh), strict=True)
        ]

    parts = train.Parts(
        cfg=cfg,
        model=model,
        source=source,
        loss=config.resolve(cfg.objective, "lmtrain.objectives", "objective"),
        heldout=list(heldout.batches()),
        heldout_bytes=heldout.bytes,
        initial=initial_params(cfg, settings, folder, before, mesh),
        sample=sample if cfg.samples else None,
        meta={"config": settings, "tokenizer": (folder / "tokenizer/tokenizer.json").read_text()},
    )
    state = train.train(parts, here, mesh, e.seed, tensorboard=e.tensorboard)
    done = runs.Run(folder, name, settings, model, tok, state.params, cfg.steps)
    if jax.process_index() == 0:
        summarise(done, heldout.bytes_text())
    return done


def initial_params(
    cfg: schema.Stage, settings: dict[str, Any], folder: pathlib.Path, before: str, mesh: Mesh
) -> Callable[[], Params] | None:
    """A function that loads the parameters a stage starts from, sharded over the mesh; None where it starts afresh."""
    if not cfg.init_from and not before:
        return None

    def load() -> Params:
        origin = runs.find_stage(pathlib.Path(cfg.init_from)) if cfg.init_from else folder / before
        stored = runs.read_json(origin / "config.json")
        compare_models(stored["model"], settings["model"], f"init_from {origin}", "stages.NAME.model")
        if stored["tokenizer_sha256"] != settings["tokenizer_sha256"]:
            raise LmtrainError(
                f"init_from {origin}: it was trained with another tokenizer, so its tokens mean other text. Take its "
                f"own: --config.stages.tokenizer.kind=file --config.stages.tokenizer.path={origin.parent / 'tokenizer'}"
            )
        shardings = mesh_lib.shardings(transformer.axes(runs.stored_model(settings)), mesh)
        return checkpoint.load_params(origin / "checkpoints", shardings=shardings)

    return load


def finished(here: pathlib.Path, cfg: schema.Stage) -> bool:
    """True where the stage has its last checkpoint and its summary."""
    steps = checkpoint.steps(here / "checkpoints")
    if not steps or steps[-1] < cfg.steps or here.name not in runs.read_summary(here.parent):
        return False
    return not checkpoint.verify(here / "checkpoints", steps[-1])  # a damaged last step is done again


def summarise(done: runs.Run, heldout_text: bytes) -> None:
    """Writes summary.json and report.html, and prints what the stage reached."""
    scored = [m for m in done.metrics if "heldout_loss" in m]
    entry: dict[str, Any] = {"steps": done.step, "parameters": transformer.count(done.model)["total"]}
    for score in ("heldout_loss", "heldout_bits_per_byte"):
        if scored:
            entry[score] = {"before": scored[0][score], "after": scored[-1][score]}
    if scored and heldout_text:
        entry["compressors"] = heldout_lib.compressors(heldout_text)
        bits = entry["heldout_bits_per_byte"]
        rows = {"before training": bits["before"], **entry["compressors"], "after training": bits["after"]}
        log.say(f"held-out text ({len(heldout_text):,} bytes), bits per byte:")
        for what, value in rows.items():
            log.say(f"    {what:<16} {value:6.3f}")
    runs.write_json(done.folder / "summary.json", {**runs.read_summary(done.folder), done.stage: entry})
    from lmtrain import report  # which reads runs, so it imports this

    page = report.write(done.folder)
    log.say(f"curves and samples: {page}" if page else "no report.html: pip install -e '.[report]' draws one")
    samples = done.folder / done.stage / "samples.jsonl"
    if samples.exists():
        texts = log.read_jsonl(samples)
        log.say("a sample:")
        first = next(t["text"] for t in texts if t["step"] == texts[-1]["step"])
        log.say("\n".join(f"    | {line}" for line in first.splitlines()))


# ------------------------------------------------------------------------------------------- going on


def check_same(here: pathlib.Path, name: str, settings: dict[str, Any]) -> None:
    """Refuses to go on with another model or tokenizer than the stage's checkpoints have; names other changes."""
    if not (here / "config.json").exists() or not checkpoint.steps(here / "checkpoints"):
        return
    stored = runs.read_json(here / "config.json")
    compare_models(stored["model"], settings["model"], str(here), f"stages.{name}.model")
    if stored["tokenizer_sha256"] != settings["tokenizer_sha256"]:
        raise LmtrainError(
            f"{here}: the checkpoint was trained with tokenizer {stored['tokenizer_sha256'][:12]}, but "
            f"{here.parent}/tokenizer is {settings['tokenizer_sha256'][:12]}. Put the first one back, or start another "
            "--workdir."
        )
    old, new = flatten(stored), flatten(settings)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith("model."):
            log.say(f"{here}: {key} was {old.get(key)}, is now {new.get(key)}")


def compare_models(stored: dict[str, Any], asked: dict[str, Any], where: str, field: str) -> None:
    """Raises with both values and the fix where two models differ in a shape; how they are computed may differ."""
    free = {"attention", "remat", "unroll", "loss_chunk", "dtype", "router_balance", "router_z"}
    for key in stored.keys() | asked.keys():
        if key not in free and stored.get(key) != asked.get(key):
            raise LmtrainError(
                f"{where}: the checkpoint has {key}={stored.get(key)}, the configuration {asked.get(key)}. "
                f"Start another --workdir, or --config.{field}.{key}={stored.get(key)}."
            )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def use_compilation_cache() -> None:
    """Keeps compiled programs in ~/.cache/lmtrain, apart for each kind of CPU; JAX_COMPILATION_CACHE_DIR moves it."""
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        cpu = pathlib.Path("/proc/cpuinfo")
        flags = next((x for x in cpu.read_text().splitlines() if x.startswith("flags")), "") if cpu.exists() else ""
        kind = hashlib.sha256(flags.encode()).hexdigest()[:8]
        jax.config.update(
            "jax_compilation_cache_dir", str(pathlib.Path("~/.cache/lmtrain").expanduser() / f"xla-{kind}")
        )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
