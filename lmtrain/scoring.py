"""The evaluation stage: the result of every training stage before it, on the same held-out rows of the same tasks."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from lmtrain import checkpoint, evaluate, log, origins, runs, schema
from lmtrain import mesh as mesh_lib
from lmtrain.data import chat
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.engine import Engine
from lmtrain.eval import bias
from lmtrain.eval import suites as suites_lib
from lmtrain.eval import tasks as scores_lib
from lmtrain.eval.estimates import Estimate
from lmtrain.eval.subject import Missing, Settings
from lmtrain.models import transformer
from lmtrain.rollout import episodes, rewards
from lmtrain.types import LmtrainError

START = "start"  # what the table calls what the first stage starts from
Scores = dict[str, dict[str, Any]]  # task -> what eval.tasks.score found


def stages_of(e: schema.Experiment, cfg: schema.Evaluation, name: str) -> list[str]:
    """The training stages that an evaluation scores, in order.

    Raises:
      ConfigError: it names one that does not come before it, or there is none.
    """
    before = list(e.stages)[: list(e.stages).index(name)]
    chatting = [n for n in before if isinstance(s := e.stages[n], schema.Stage) and not s.model.scalar_head]
    for field, wanted in [*(("stages", n) for n in cfg.stages), *([("heldout", cfg.heldout)] if cfg.heldout else [])]:
        if wanted not in chatting:
            raise schema.ConfigError(
                f"stages.{name}.{field} names {wanted!r}, but takes training stages before it: {', '.join(chatting)}."
            )
    if START in e.stages:
        raise schema.ConfigError(
            f"stages.{START}: call it otherwise; stages.{name} shows by that name what the first stage begins from."
        )
    if not chatting:
        raise schema.ConfigError(f"stages.{name} scores the training stages before it, and there is none.")
    return [n for n in chatting if not cfg.stages or n in cfg.stages]


def start_of(
    e: schema.Experiment, cfg: schema.Evaluation, tok: Tokenizer, folder: pathlib.Path
) -> dict[str, tuple[origins.Origin, schema.Data]]:
    """{START: (what an experiment's first stage starts from, that stage's data)}; {} where it starts from nothing, or
    that is not scored: stages are named, it has other tokens, or it is a reward model."""
    first = next(s for s in e.stages.values() if isinstance(s, schema.Stage))
    if cfg.stages or not first.init_from:
        return {}
    origin = origins.find(first.init_from, folder)
    if origin.fingerprint != tok.fingerprint:
        log.say(f"{first.init_from}: not scored as {START}, since its tokens are others than the stages'.")
        return {}
    if origin.model.scalar_head:
        return {}
    return {START: (origin, first.data)}


def run(
    e: schema.Experiment, name: str, cfg: schema.Evaluation, tok: Tokenizer, folder: pathlib.Path, mesh: Mesh
) -> None:
    """Scores what has not been scored yet, writes summary.json, prints the table. Goes on where it was stopped."""
    here = folder / name
    if cfg.suites:
        log.say(side_by_side(_suites(e, name, cfg, tok, folder)))
    if not cfg.tasks:
        return
    made = rewards.get_tasks(cfg.tasks)
    settings = dataclasses.asdict(cfg) | {"seed": e.seed}
    known = origins.read_json(here / "scores.json") if (here / "scores.json").exists() else {}
    mesh_lib.barrier("scores")  # see _suites
    results: dict[str, Scores] = {}
    scored = start_of(e, cfg, tok, folder)
    scored |= {n: (origins.find(str(folder / n)), e.stages[n].data) for n in stages_of(e, cfg, name)}
    for stage, (origin, data) in scored.items():
        step = origin.identify() if stage == START else checkpoint.newest_sound(folder / stage / "checkpoints")
        mark = json.loads(json.dumps({"step": step, "settings": settings}))
        if known.get(stage, {}).get("of") == mark:
            results[stage] = known[stage]["tasks"]
            continue
        results[stage] = _score(stage, origin, data, cfg, made, tok, mesh, e.seed, here)
        known[stage] = {"of": mark, "tasks": results[stage]}
        if jax.process_index() == 0:
            here.mkdir(parents=True, exist_ok=True)
            runs.write_json(here / "scores.json", known)
    if jax.process_index() == 0:
        _summarise(folder, results)
        log.say(table(results))


def check(cfg: schema.Evaluation, where: str) -> None:
    """Refuses unknown tasks, suites or measurements of bias, and an evaluation of nothing. Raises LmtrainError."""
    if cfg.tasks or not cfg.suites:
        rewards.get_tasks(cfg.tasks)
    for suite in cfg.suites:
        suites_lib.names(suite)
    if cfg.heldout and not {"fluency", "coherence"} & set(cfg.suites):
        raise schema.ConfigError(
            f"{where}.heldout goes with suites=('fluency', 'coherence') or one of them; suites is {cfg.suites!r}."
        )
    if cfg.bias and "bias" not in cfg.suites:
        raise schema.ConfigError(f"{where}.bias goes with suites=('bias',); suites is {cfg.suites!r}.")
    bias.parse(cfg.bias)


def _suites(
    e: schema.Experiment, name: str, cfg: schema.Evaluation, tok: Tokenizer, folder: pathlib.Path
) -> dict[str, dict[str, Any]]:
    """{stage: {score: as it stands in eval.json}}. What stands there of the same step and settings is not run again."""
    length = e.stages[cfg.heldout].data.row_length if cfg.heldout else 0
    settings = Settings(
        bias=cfg.bias, heldout=cfg.heldout, rows=cfg.rows, seed=e.seed, temperature=cfg.temperature, row_length=length
    )
    stages = stages_of(e, cfg, name)
    before = {stage: evaluate.kept(folder, stage) for stage in stages}
    start = folder / name / "start.json"
    known_of_start = origins.read_json(start) if start.exists() else {}
    mesh_lib.barrier("suites")  # what process 0 writes from here on, the others are not to read
    out: dict[str, dict[str, Any]] = {}
    for begin, (origin, data) in start_of(e, cfg, tok, folder).items():
        seen = dataclasses.replace(settings, row_length=length or data.row_length)
        out[START] = _suites_of_start(begin, origin, cfg, seen, tok, folder, known_of_start, start)
    for stage in stages:
        step = checkpoint.newest_sound(folder / stage / "checkpoints")
        for suite in suites_lib.names(",".join(cfg.suites)):
            known = before[stage].get(suite, {})
            if (known.get("step"), known.get("settings")) != (step, evaluate.plain(settings)):
                known = evaluate.evaluate(folder / stage, suite, settings)[suite].json()
            out.setdefault(stage, {}).update(known["scores"])
    return out


def _suites_of_start(
    begin: str, origin: origins.Origin, cfg: schema.Evaluation, settings: Settings, tok: Tokenizer,
    folder: pathlib.Path, known: dict[str, Any], file: pathlib.Path,
) -> dict[str, Any]:  # fmt: skip
    """{score: as it stands in eval.json}, kept in a file of the evaluation, for a model from elsewhere has none."""
    mark = json.loads(json.dumps({"of": origin.identify(), "settings": evaluate.plain(settings)}))
    opened: runs.Run | None = None
    scores: dict[str, Any] = {}
    for suite in suites_lib.names(",".join(cfg.suites)):
        if known.get(suite, {}).get("mark") != mark:
            if opened is None:
                onto = evaluate.spread(origin.model)
                shardings = mesh_lib.shardings(transformer.axes(origin.model), onto) if onto is not None else None
                opened = runs.Run(folder, begin, {}, origin.model, tok, origin.load(shardings), 0, onto)
            try:
                found = evaluate.evaluate(opened, suite, settings)[suite].json()["scores"]
            except Missing as why:  # it has no record of its training
                log.say(f"{START}, {suite}: left out. {why}")
                found = {}
            known[suite] = {"mark": mark, "scores": found}
            if jax.process_index() == 0:
                file.parent.mkdir(parents=True, exist_ok=True)
                runs.write_json(file, known)
        scores |= known[suite]["scores"]
    return scores


def side_by_side(found: dict[str, dict[str, Any]]) -> str:
    """A line for each score, a column for each stage: the value with its interval, and how much the last one differs
    from the first where the scores are costs (bits per byte, perplexity)."""
    names = list(dict.fromkeys(name for scores in found.values() for name in scores))
    width = max(map(len, names)) + 2
    shown = {stage: {n: "  ".join(Estimate.of(v).says()) for n, v in scores.items()} for stage, scores in found.items()}
    wide = {stage: max(map(len, [stage, *texts.values()])) + 3 for stage, texts in shown.items()}
    lines = [f"{'with 95 % intervals':<{width}}" + "".join(f"{stage:<{wide[stage]}}" for stage in shown)]
    first, last = next(iter(found.values())), list(found.values())[-1]
    for name in names:
        line = f"{name:<{width}}" + "".join(f"{texts.get(name, ''):<{wide[stage]}}" for stage, texts in shown.items())
        if ("per byte" in name or "perplexity" in name) and len(found) > 1 and name in first and name in last:
            line += f"{last[name]['value'] / first[name]['value'] - 1:+.1%}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _score(
    stage: str, origin: origins.Origin, data: schema.Data, cfg: schema.Evaluation, made: dict[str, Any],
    tok: Tokenizer, mesh: Mesh, seed: int, here: pathlib.Path,
) -> Scores:  # fmt: skip
    params = origin.load(mesh_lib.shardings(transformer.axes(origin.model), mesh))
    engine = Engine(origin.model, mesh, slots=cfg.slots)
    template = chat.Template(tok, runs.template(here.parent, data.template))
    scores: Scores = {}
    for task_name, task in made.items():
        rows = min(cfg.rows or len(task.rows("heldout")), len(task.rows("heldout")))
        with log.Progress(rows * cfg.samples, name=f"{here.name}: {stage}, {task_name}") as progress:
            done = 0

            def show(ended: int) -> None:
                nonlocal done
                done += ended
                progress.show(done, {})

            found = scores_lib.score(
                engine, params, template, task, rows=cfg.rows, samples=cfg.samples, temperature=cfg.temperature,
                max_tokens=cfg.max_tokens, longest=data.row_length, seed=seed, progress=show,
            )  # fmt: skip
        scores[task_name] = found.summary
        texts = [
            {"step": 0, "stage": stage, "task": task_name, "text": episodes.transcript(p)} for p in found.played[:4]
        ]
        if jax.process_index() == 0:
            here.mkdir(parents=True, exist_ok=True)
            log.append_jsonl(here / "samples.jsonl", texts)
    return scores


def _summarise(folder: pathlib.Path, results: dict[str, Scores]) -> None:
    summary = runs.read_summary(folder)
    before: Scores = {}
    for stage, scores in results.items():
        entry = summary.setdefault(stage, {})
        entry["tasks"] = {t: {"before": before.get(t), "after": after} for t, after in scores.items()}
        before = scores
    runs.write_json(folder / "summary.json", summary)


def table(results: dict[str, Scores]) -> str:
    """The scores as text: a line for each task and stage."""
    if not results:
        raise LmtrainError("nothing was scored.")
    lines = [f"{'held-out task':<22}{'after':<12}{'score':>8}  {'95 % interval':<16}{'best k':>14}{'majority':>10}"]
    for task in next(iter(results.values())):
        for i, (stage, scores) in enumerate(results.items()):
            s = scores[task]
            k = max((key for key in s if key.startswith("pass@")), key=lambda key: int(key[5:]))
            vote = next((f"{v:.1%}" for key, v in s.items() if key.startswith("majority@")), "")
            low, high = s["ci95"]
            shown = task if i == 0 else ""
            columns = f"{s['score']:>8.1%}  {f'{low:.1%} to {high:.1%}':<16}{f'{k} {s[k]:.1%}':>14}{vote:>10}"
            lines.append(f"{shown:<22}{stage:<12}{columns}")
    first = next(iter(next(iter(results.values())).values()))
    lines.append(
        f"({first['rows']} rows a task, {first['samples']} replies each; the score is pass@1 where a reply is right or "
        "wrong; intervals are over rows)"
    )
    return "\n".join(lines)
