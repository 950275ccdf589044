"""What can be refused before a file is written: shapes, meshes, optimizers, sources, tasks, references."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from jax.sharding import Mesh

from lmtrain import checkpoint, feeds, optim, origins, partial, profiling, schema, scoring
from lmtrain import mesh as mesh_lib
from lmtrain.data import conversations, jinja, sources, split
from lmtrain.models import pipeline, shapes, transformer
from lmtrain.models.layers import BY_LENGTH
from lmtrain.rollout import rewards
from lmtrain.types import LmtrainError

#: Fields of a model that say how it is computed and trained, not what it is.
COMPUTED = {
    "attention",
    "remat",
    "unroll",
    "microbatches",
    "rounds",
    "loss_chunk",
    "dtype",
    "router_balance",
    "router_z",
    "zero_init",
    "init_scale",
}


def check(e: schema.Experiment, mesh: Mesh, folder: pathlib.Path) -> None:
    """Refuses what can be refused before a file is written: shapes, mesh, optimizer, sources that do not open, tasks
    and rewards that are not there, a reference that nothing stands for."""
    every = {name: stage.local_every for name, stage in e.stages.items() if isinstance(stage, schema.Stage)}
    if bool(e.local) != any(every.values()):
        raise schema.ConfigError(
            f"local is {e.local!r} and local_every {every}: the folder on each host's own disk and the steps between "
            "two checkpoints there go together."
        )
    profiling.parse(e.profile)
    origin: schema.Model | None = None
    models: dict[str, schema.Model] = {}  # of the training stages so far
    for name, stage in e.stages.items():
        try:
            if isinstance(stage, schema.Evaluation):
                scoring.stages_of(e, stage, name)
                scoring.check(stage, f"stages.{name}")
            elif isinstance(stage, schema.Tokenizer):
                if stage.data is not None:
                    check_source(stage.data)
            else:
                if stage.init_from in models:
                    origin = models[stage.init_from]
                elif stage.init_from and not checkpoint.steps(folder / name / "checkpoints"):
                    origin = origins.find(stage.init_from, folder).model
                origin = model_of(stage, origin, stage.model.vocab_size or (origin.vocab_size if origin else 0) or 1024)
                axes = transformer.axes(origin)
                pipeline.check(origin, shapes.groups(origin)[0], mesh)
                if stage.model.vocab_size:
                    mesh_lib.check_shapes(transformer.shapes(origin), axes, mesh)
                chosen = partial.trained(stage, origin, axes)
                if partial.split(axes, chosen)[1] and not (stage.init_from or models):
                    raise schema.ConfigError(
                        "a part of the model is not trained (model.lora, train, freeze), and there is no trained model "
                        "that it comes from: set init_from, or put a stage before it."
                    )
                if stage.quantize and not partial.split(axes, chosen)[1]:
                    raise schema.ConfigError(
                        f"quantize is {stage.quantize!r}, but everything is trained: only frozen matrices can be kept "
                        "in few bits. Set model.lora.rank, train or freeze."
                    )
                optim.make(stage.optim, stage.steps, partial.split(axes, chosen)[0])
                check_batch(stage, mesh)
                check_positions(stage, origin, "the model")
                scaling = origin.rope_scaling
                if feeds.kind(feeds.settled(stage)) == "rollout" and scaling.kind in BY_LENGTH:
                    if stage.data.row_length > scaling.original_length:
                        raise schema.ConfigError(
                            f"model.rope_scaling.kind is {scaling.kind!r}: past {scaling.original_length} positions a "
                            "token is not as likely when it is drawn as in the finished row, so RL would learn from "
                            f"wrong ratios; data.row_length takes at most {scaling.original_length}."
                        )
                check_feed(feeds.settled(stage), models, mesh)
                models[name] = origin
        except LmtrainError as error:
            raise type(error)(f"stages.{name}: {error}") from None


def check_positions(stage: schema.Stage, model: schema.Model, name: str) -> None:
    """Refuses rows that are longer than the positions that a model learned."""
    if model.max_positions and stage.data.row_length > model.max_positions:
        raise schema.ConfigError(
            f"data.row_length is {stage.data.row_length}, but the positions that {name} learned end at "
            f"model.max_positions={model.max_positions}."
        )


def check_feed(stage: schema.Stage, before: dict[str, schema.Model], mesh: Mesh) -> None:
    """Refuses data, tasks, rewards and references that cannot be. `before`: the models of the training stages before
    it."""

    def exists(run: str) -> Any:
        if run in before:
            return check_positions(stage, before[run], run)
        found = origins.find(run)
        found.check(mesh)
        return check_positions(stage, found.model, run)

    what, r = feeds.kind(stage), stage.rollout
    compares = getattr(stage.loss, "REFERENCE", False) or (what == "rollout" and r.reference == "start")
    if compares and not before and not stage.init_from:
        raise schema.ConfigError(
            f"{stage.objective} begins from a trained model and compares with it, and there is none: put a training "
            "stage before it, or set init_from to a run."
        )
    if what == "rollout":
        check_rollout(stage, list(rewards.get_tasks(r.tasks).values()))
        rewards.make(r.rewards, exists, 0)
        for run in (r.user, r.reference):
            if run not in ("", "start", "none"):
                exists(run)
        if stage.data.template:
            jinja.read(stage.data.template)
    elif what == "documents":
        check_source(stage.data)
    elif ":" not in what:
        conversations.preflight(what, stage.data)
    if stage.teacher:
        exists(stage.teacher)


def check_rollout(stage: schema.Stage, tasks: list[Any]) -> None:
    """Refuses settings of a rollout that contradict one another."""
    r, loss = stage.rollout, stage.loss
    takes = getattr(loss, "ADVANTAGE", "none")
    given = takes if r.advantage == "auto" else r.advantage
    limit = r.max_tokens or min(task.max_tokens for task in tasks)
    wrong = ""
    if r.reference == "none" and (getattr(loss, "REFERENCE", False) or r.kl_reward):
        wrong = "reference is 'none', but loss.beta or rollout.kl_reward compares with one; leave it at 'start'"
    elif takes == "gae" != given:
        wrong = f"advantage is {given!r}, but {stage.objective} learns values and takes 'gae'"
    elif takes != "none" and given == "none":
        wrong = f"advantage is 'none', but {stage.objective} weighs replies by theirs; leave it at 'auto'"
    elif r.dynamic and r.group == 1:
        wrong = f"dynamic is {r.dynamic}, but in a group of one (rollout.group) no replies differ; set it to 0"
    elif r.overlong >= limit:
        wrong = f"overlong is {r.overlong}, but a reply has at most {limit} tokens; set fewer"
    elif r.demonstrations and takes != "none":
        wrong = f"demonstrations is {r.demonstrations}, but {stage.objective} learns from its own replies; set it to 0"
    if wrong:
        raise schema.ConfigError(f"rollout.{wrong}.")


def check_source(data: schema.Data) -> None:
    """Opens every member of a mixture and reads its first document."""
    for member, document in split.members(data).items():
        next(sources.read(document, split.field(member)), None)


def check_batch(stage: schema.Stage, mesh: Mesh) -> None:
    """Refuses a batch that does not split evenly over microbatches and devices, or rows over the context axis."""
    ways, context = stage.accumulate * mesh_lib.batch_shards(mesh), mesh.shape["context"]
    if stage.batch_size % ways:
        raise schema.ConfigError(
            f"batch_size is {stage.batch_size}, but must be a multiple of {ways}: accumulate={stage.accumulate} times "
            f"the {ways // stage.accumulate} ways that mesh.data, fsdp, expert and stage split it."
        )
    rows = stage.batch_size // stage.accumulate
    stages, asked = mesh.shape["stage"], max(stage.model.microbatches, mesh.shape["stage"])
    least = asked * mesh_lib.batch_shards(mesh) // stages
    if stages > 1 and rows % least:
        raise schema.ConfigError(
            f"batch_size is {stage.batch_size}, {rows} rows at a time (accumulate={stage.accumulate}), but must be a "
            f"multiple of {least}: model.microbatches={asked} times the ways that mesh.data, fsdp and expert split it."
        )
    if stage.data.row_length % context:
        raise schema.ConfigError(
            f"data.row_length is {stage.data.row_length}, which mesh.context={context} does not divide."
        )


def model_of(cfg: schema.Stage, origin: schema.Model | None, vocab_size: int) -> schema.Model:
    """The stage's model, resolved: what it leaves at its default is that of the model it starts from (`origin`), but
    for how it is computed; an objective that reads scores or values gives it a scalar head."""
    asked, default = cfg.model, schema.Model()
    if origin is not None:
        same = {
            f.name: getattr(origin, f.name)
            for f in dataclasses.fields(schema.Model)
            if f.name not in COMPUTED and getattr(asked, f.name) == getattr(default, f.name)
        }
        asked = dataclasses.replace(asked, **same)
        if origin.vocab_size < vocab_size and not cfg.model.vocab_size:
            asked = dataclasses.replace(asked, vocab_size=vocab_size)  # the tokenizer has new tokens
    head = asked.scalar_head if cfg.model.scalar_head else bool(getattr(cfg.loss, "SCALAR", False))
    return transformer.resolve(dataclasses.replace(asked, scalar_head=head), vocab_size)
