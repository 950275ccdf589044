"""What feeds a training stage: batches, the fixed held-out set, samples and scores, by the kind of its objective.

documents   text, packed (data/pipeline.py)                                    pretrain
chat        conversations (data/conversations.py)                              sft
pairs       a chosen and a rejected conversation                               reward, dpo, ipo, simpo, orpo
labels      conversations that are wanted or not                               kto
rollout     tasks, answered by the current parameters (rollout/source.py)      grpo, dapo, ppo, ... gkd
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lmtrain import config, engine, flags, log, origins, schema, train
from lmtrain import mesh as mesh_lib
from lmtrain.data import chat, conversations, groups, pipeline
from lmtrain.data.table import Conversations
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.eval import passk
from lmtrain.eval import tasks as scores_lib
from lmtrain.models.transformer import Forward
from lmtrain.rollout import episodes, rewards, users
from lmtrain.rollout.source import Rollouts
from lmtrain.types import Batch, Frozen, LmtrainError, Params

KINDS = ("documents", "chat", "pairs", "labels", "rollout")


@dataclasses.dataclass
class Feed:
    """What `train.Parts` takes of a stage's data."""

    source: train.Source
    says: str  # one line: how much there is
    passes: float = 0.0  # over the data, in all steps; 0: not known
    heldout: Sequence[Batch] = ()
    heldout_bytes: int = 0
    heldout_text: Callable[[], bytes] = lambda: b""
    sample: Callable[[Params], list[str]] | None = None
    score: Callable[[Params], tuple[dict[str, float], list[str]]] | None = None
    tasks: Sequence[str] = ()  # that `score` scores, as heldout_TASK
    pairs: int = 0  # held-out pairs, whose accuracy by chance is one half
    longer: float = 0.0  # share of them that taking the longer reply gets right


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a feed is made for: the stage, its model and where things lie."""

    cfg: schema.Stage
    forward: Forward
    tokenizer: Tokenizer
    mesh: Mesh
    seed: int
    folder: pathlib.Path  # the run's
    name: str
    initial: Callable[[], Params] | None
    start: origins.Origin | None = None  # what `initial` reads


def kind(cfg: schema.Stage) -> str:
    """Which feed a stage takes: `cfg.source`, or what its objective says."""
    if cfg.source != "auto":
        if ":" not in cfg.source and cfg.source not in KINDS:
            raise schema.ConfigError(f"source: {flags.unknown(cfg.source, KINDS, 'a kind of source')}")
        return cfg.source
    return getattr(cfg.loss, "SOURCE", "documents")


def settled(cfg: schema.Stage) -> schema.Stage:
    """The stage with its loss at the temperature that its rollouts sample at (there is one, rollout.temperature), and
    Dr. GRPO's constant and the number of group-DRO's cells filled in.

    Raises:
      ConfigError: loss.temperature or loss.cells says another.
    """
    loss, sampled = cfg.loss, cfg.rollout.temperature
    if hasattr(loss, "cells"):
        cells = groups.Cells(cfg.data).count - 1
        if not cells or loss.cells not in (0, cells):
            raise schema.ConfigError(
                f"loss.cells is {loss.cells}, but data.groups times data.outcomes are {cells}; leave it at 0, and name "
                "two groups or more."
            )
        return dataclasses.replace(cfg, loss=dataclasses.replace(loss, cells=cells))
    if kind(cfg) != "rollout" or not hasattr(loss, "ADVANTAGE"):
        return cfg
    if loss.temperature not in (1.0, sampled):
        raise schema.ConfigError(
            f"loss.temperature is {loss.temperature}, but the replies are sampled at rollout.temperature={sampled}: "
            "log-probabilities at another would be those of another policy. Set rollout.temperature alone."
        )
    changes: dict[str, Any] = {"temperature": sampled}
    if getattr(loss, "max_length", 1) == 0:  # a constant, whatever the length of one rollout's rows
        changes["max_length"] = cfg.data.row_length
    return dataclasses.replace(cfg, loss=dataclasses.replace(loss, **changes))


def build(s: Stage) -> Feed:
    """The feed of a stage.

    Raises:
      LmtrainError: settings, files or rows that cannot be, each in one message.
    """
    what = kind(s.cfg)
    if what == "documents":
        return documents(s)
    if what == "rollout":
        return rollout(s)
    if ":" in what:
        source = flags.import_function(what, "source")(s)
        return Feed(source, getattr(source, "summary", lambda: what)())
    return conversation(s, what)


# ----------------------------------------------------------------------------------------------------------- documents
def documents(s: Stage) -> Feed:
    """Pretraining's: packed text."""
    cfg = s.cfg
    source, heldout = pipeline.build(
        cfg.data, s.tokenizer, cfg.batch_size, s.seed, s.folder / "data", share=mesh_lib.share(s.mesh)
    )
    begin, end = s.tokenizer.begin, s.tokenizer.end

    def sample(params: Params) -> list[str]:
        prompts = [[begin, *s.tokenizer.encode(cfg.prompts[i % len(cfg.prompts)])] for i in range(cfg.samples)]
        how = engine.Sampling(cfg.sample_tokens, cfg.sample_temperature, stop=(end,), seed=s.seed)
        done = engine.generate(s.forward.cfg, params, prompts, how, s.mesh)
        return [s.tokenizer.decode([*p[1:], *c.reply]) for p, c in zip(prompts, done, strict=True)]

    return Feed(
        source=source,
        says=source.summary(),
        passes=cfg.steps * cfg.batch_size / source.rows,
        heldout=list(heldout.batches()),
        heldout_bytes=heldout.bytes,
        heldout_text=heldout.bytes_text,
        sample=sample if cfg.samples else None,
    )


# ------------------------------------------------------------------------------------------------------- conversations
def conversation(s: Stage, what: str) -> Feed:
    """Conversations, pairs of them, or labelled ones; with the reference's log-probabilities where they are needed."""
    cfg = s.cfg
    source, heldout = conversations.build(
        what, cfg.data, s.tokenizer, cfg.batch_size, s.seed, share=mesh_lib.share(s.mesh)
    )
    assert isinstance(source.table, Conversations) and isinstance(heldout.table, Conversations)
    if getattr(cfg.loss, "REFERENCE", False):
        add_reference(s, {"training": source.table, "held-out": heldout.table})
    batches = list(heldout.batches())
    template = chat.Template(s.tokenizer, cfg.data.template)
    prompts = openings(heldout.table, cfg.samples) if what == "chat" else []

    def sample(params: Params) -> list[str]:
        how = engine.Sampling(cfg.sample_tokens, cfg.sample_temperature, stop=template.stop, seed=s.seed)
        done = engine.generate(s.forward.cfg, params, prompts, how, s.mesh)
        return [f"{s.tokenizer.decode(p)}\n> {s.tokenizer.decode(c.reply)}" for p, c in zip(prompts, done, strict=True)]

    return Feed(
        source=source,
        says=source.summary(),
        passes=cfg.steps * cfg.batch_size / source.rows,
        heldout=batches,
        heldout_bytes=heldout.bytes if what == "chat" else 0,
        heldout_text=heldout.bytes_text if what == "chat" else lambda: b"",
        sample=sample if prompts else None,
        pairs=pairs_in(batches) if what == "pairs" else 0,
        longer=longer_in(batches) if what == "pairs" else 0.0,
    )


def openings(table: Conversations, most: int) -> list[list[int]]:
    """The prompts of some rows' first conversations, up to where the assistant speaks: to be answered as samples."""
    found = []
    for row in range(min(most, table.rows[0])):
        batch = table.batch([(0, row)])
        first = int(batch["weights_BT"][0].argmax())
        found.append(batch["tokens_BT"][0, : first + 1].tolist())
    return found


def pairs_in(batches: Sequence[Batch]) -> int:
    """How many pairs the batches hold."""
    return sum(int(row.max()) // 2 for batch in batches for row in batch["segments_BT"])


def longer_in(batches: Sequence[Batch]) -> float:
    """The share of pairs whose chosen reply is the longer one, in loss tokens; a tie counts half. What a judge that
    likes length gets right: an accuracy no better has perhaps learned nothing else."""
    wins: list[float] = []
    for batch in batches:
        for segments_T, weights_T in zip(batch["segments_BT"], batch["weights_BT"], strict=True):
            n_S = np.bincount(segments_T, weights_T > 0)[1:]
            wins += [0.5 * (1 + float(np.sign(a - b))) for a, b in zip(n_S[0::2], n_S[1::2], strict=False)]
    return float(np.mean(wins)) if wins else 0.0


def add_reference(s: Stage, tables: dict[str, Conversations]) -> None:
    """Gives tables their `ref_logps_BT`, computed once: log p(target) under what the stage starts from."""
    if s.initial is None or s.start is None:
        raise LmtrainError(
            f"{s.cfg.objective} compares with a reference, the model that the stage starts from, and there is none:"
            " put a stage before it, or set init_from to a run."
        )
    start: Frozen | None = None
    origin = s.start.identify()
    logps = jax.jit(lambda f, batch: f.forward.logps(f.params, batch), out_shardings=mesh_lib.replicated(s.mesh))
    for name, table in tables.items():
        file = s.folder / s.name / f"reference-{table.identity['corpus'][:16]}-{origin[:16]}.npy"
        if file.exists():
            table.attach("ref_logps_BT", np.load(file))
            continue
        start = beginning(s) if start is None else start
        out: list[np.ndarray] = []
        size = s.cfg.batch_size // s.cfg.accumulate
        with log.Progress(len(table), name=f"{s.name}: reference, {name} rows", every=len(table) + 1) as progress:
            for batch in table.all_batches(size, mesh_lib.share(s.mesh)):
                out.append(np.asarray(logps(start, mesh_lib.put(batch, s.mesh))))
                progress.show(min(len(table), len(out) * size), {})
        table.attach("ref_logps_BT", np.concatenate(out)[: len(table)])
        if jax.process_index() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            half = file.with_suffix(".half")
            with half.open("wb") as out_file:
                np.save(out_file, table.extra["ref_logps_BT"])
            os.replace(half, file)


# ------------------------------------------------------------------------------------------------------------- rollout
def rollout(s: Stage) -> Feed:
    """Reinforcement learning's: tasks, answered by the current parameters, scored."""
    cfg, r = s.cfg, s.cfg.rollout
    template = chat.Template(s.tokenizer, cfg.data.template)
    made = rewards.get_tasks(r.tasks)
    plain = tuple(r.rewards) == ("score",)  # what the evaluation takes by itself, without scoring twice
    reward = rewards.make(r.rewards, lambda run: frozen(run, s), s.tokenizer.pad)
    user = users.ModelUser(frozen(r.user, s), template, s.mesh, slots=r.slots) if r.user else episodes.scripted
    advantage = r.advantage if r.advantage != "auto" else getattr(cfg.loss, "ADVANTAGE", "none")
    if advantage not in ADVANTAGES:
        raise schema.ConfigError(f"rollout.advantage: {flags.unknown(advantage, ADVANTAGES, 'a kind of advantage')}")
    source = Rollouts(
        cfg,
        s.forward,
        s.mesh,
        template,
        list(made.values()),
        reward,
        advantage,
        s.tokenizer.pad,
        s.seed,
        reference(s),
        user,
    )
    player = engine.Engine(s.forward.cfg, s.mesh, slots=r.slots)

    def score(params: Params) -> tuple[dict[str, float], list[str]]:
        """Sampled once for each of data.heldout_rows held-out rows of every task."""
        numbers: dict[str, float] = {}
        texts: list[str] = []
        for name, task in made.items():
            found = scores_lib.score(
                player, params, template, task, rows=cfg.data.heldout_rows, temperature=r.temperature, turns=r.turns,
                max_tokens=r.max_tokens, longest=cfg.data.row_length, seed=s.seed, user=user,
                reward=None if plain else reward,
            )  # fmt: skip
            low, high = found.summary["ci95"]
            numbers |= {f"heldout_{name}": found.summary["score"], f"heldout_{name}_low": low}
            numbers |= {f"heldout_{name}_high": high, f"heldout_{name}_rows": found.summary["rows"]}
            if len(found.summary["parts"]) > 1:
                numbers |= {f"heldout_{name}_part_{part}": v for part, v in found.summary["parts"].items()}
            texts += [episodes.transcript(e) for e in found.played[: cfg.samples]]
        numbers["heldout_score"] = sum(numbers[f"heldout_{name}"] for name in made) / len(made)
        return numbers, texts

    return Feed(source=source, says=source.summary(), score=score, tasks=list(made))


ADVANTAGES = ("group", "group_mean", "leave_one_out", "gae", "none")


def reference(s: Stage) -> Frozen | None:
    """The frozen reference of a rollout: what the stage starts from, another run, or none."""
    where = s.cfg.rollout.reference
    if where == "none":
        return None
    if where != "start":
        return frozen(where, s)
    if s.initial is None:
        raise LmtrainError(
            f"stages.{s.name}: reinforcement learning begins from a model that can answer, and there is none: put a"
            " stage before it (config.stage(objective='sft', ...)), or set init_from to a run."
        )
    return beginning(s)


def beginning(s: Stage) -> Frozen:
    """What the stage starts from, to be read: without the scalar head and adapters that only the stage's own model
    has."""
    assert s.initial is not None
    params = s.initial()
    adapters = s.start.model.lora if s.start is not None else s.forward.cfg.lora
    model = dataclasses.replace(s.forward.cfg, scalar_head="scalar" in params, lora=adapters)
    return Frozen(params, Forward(model, s.mesh))


def frozen(run: str, s: Stage) -> Frozen:
    """The last parameters of a run, or of an earlier stage of this one, sharded over the stage's mesh. Refuses another
    tokenizer."""
    found = origins.find(run, s.folder)
    if found.fingerprint != s.tokenizer.fingerprint:
        raise LmtrainError(f"{run}: trained with another tokenizer than {s.folder}, so its tokens mean other text.")
    return found.frozen(s.mesh)


def scores(feed: Feed, first: dict[str, Any], last: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """summary.json's entry for each task that the stage scores itself, from its first and last line of metrics:
    {task: {"before": {score, ci95, rows, and parts where there are several}, "after": ...}}. A preference stage's task
    is to tell the better of two."""
    out: dict[str, dict[str, Any]] = {}
    for when, m in (("before", first), ("after", last)):
        for task in feed.tasks:
            ci95 = [m[f"heldout_{task}_low"], m[f"heldout_{task}_high"]]
            found: dict[str, Any] = {"score": m[f"heldout_{task}"], "ci95": ci95}
            found["rows"] = int(m[f"heldout_{task}_rows"])
            parts = {k.removeprefix(f"heldout_{task}_part_"): m[k] for k in m if k.startswith(f"heldout_{task}_part_")}
            out.setdefault(task, {})[when] = found | ({"parts": parts} if parts else {})
        if feed.pairs and "heldout_accuracy" in m:
            right = m["heldout_accuracy"]
            ci95 = list(passk.wilson(round(right * feed.pairs), feed.pairs))
            found = {"score": right, "ci95": ci95, "rows": feed.pairs, "chance": 0.5, "longer": feed.longer}
            out.setdefault("preference", {})[when] = found
    return out


def objective(cfg: schema.Stage) -> Callable[..., Any]:
    """The stage's loss."""
    return config.resolve(cfg.objective, "lmtrain.objectives", "objective")
