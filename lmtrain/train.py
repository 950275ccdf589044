"""THE loop: one function trains every stage, whatever its objective and source. It reads top to bottom."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import os
import pathlib
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from lmtrain import checkpoint, compilation, goodput, hosts, log, nearby, optim, partial, profiling, schema, step
from lmtrain import mesh as mesh_lib
from lmtrain.eval import heldout as heldout_lib
from lmtrain.models import transformer
from lmtrain.types import Batch, Frozen, LmtrainError, Params, Stopped, TrainState


class Source(Protocol):
    """What feeds the loop (contract 4): pretraining ignores `params`, reinforcement learning rolls out with them."""

    def next(self, params: Params | None = None) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...
    def skip(self, n: int) -> None: ...

    # and, where it has some: report() -> dict[str, float], numbers of the batch given last for metrics.jsonl


@dataclasses.dataclass
class Parts:
    """What one stage is made of, assembled by experiment.py."""

    cfg: schema.Stage
    model: schema.Model  # resolved
    source: Source
    loss: Callable[..., Any]
    heldout: Sequence[Batch] = ()
    heldout_bytes: int = 0
    initial: Callable[[], Params] | None = None  # trained parameters to start from; None: fresh ones
    rest: Params = dataclasses.field(default_factory=dict)  # parameters that are not trained, on the devices
    frozen: dict[str, Frozen] = dataclasses.field(default_factory=dict)  # models that the objective reads, by name
    sample: Callable[[Params], list[str]] | None = None  # texts for samples.jsonl
    score: Callable[[Params], tuple[dict[str, float], list[str]]] | None = None  # tasks: numbers, and texts to keep
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)  # kept in every checkpoint: configuration, tokenizer


SAMPLES = "samples.jsonl"
SPIKE_WINDOW = 64  # losses whose median a spike is measured against


def train(
    parts: Parts,
    folder: pathlib.Path,
    mesh: Mesh,
    seed: int,
    tensorboard: bool = True,
    crew: hosts.Crew | None = None,
) -> TrainState:
    """Runs one stage to its last step and returns its state.

    Interrupted at any point, the same call goes on where it stopped, to the bit.

    Args:
      crew: the processes that run it together; None: this one by itself.

    Raises:
      Stopped: on SIGTERM or Ctrl-C, once the state is saved.
      LmtrainError: a loss that stays non-finite, a damaged run, a full disk.
    """
    cfg, source, crew = parts.cfg, parts.source, crew or hosts.Crew()
    report: Callable[[], dict[str, float]] = getattr(source, "report", dict)

    def on_devices(batch: Batch) -> Batch:
        return {**mesh_lib.put(batch, mesh), **parts.frozen, **({partial.REST: parts.rest} if parts.rest else {})}

    def whole(state: TrainState) -> Params:
        return partial.join(parts.rest, state.params) if parts.rest else state.params

    # ---------------------------------------------------------------- build
    forward = transformer.Forward(parts.model, mesh)
    chosen = partial.trained(cfg, parts.model, transformer.axes(parts.model))
    axes = partial.split(transformer.axes(parts.model), chosen)[0]
    tx, schedule = optim.make(cfg.optim, cfg.steps, axes, mesh)
    start, abstract = step.make_init(
        lambda key: partial.split(transformer.init(parts.model, key), chosen)[0], tx, axes, mesh
    )
    loss = partial.objective(parts.loss) if parts.rest else parts.loss
    update = step.make_update(loss, forward, tx, schedule, abstract, mesh, cfg.loss, cfg.accumulate)
    evaluate = step.make_evaluate(loss, forward, mesh, cfg.loss)
    heldout = [on_devices(b) for whole in parts.heldout for b in microbatches(whole, cfg.accumulate)]
    best = "heldout_loss" if heldout else "-heldout_score"
    wall = goodput.Goodput(folder)
    near = None
    if crew.local and cfg.local_every:
        run = str(mesh_lib.from_first(np.array(wall.begun, np.int32)))
        near = nearby.Nearby(pathlib.Path(crew.local) / nearby.place(folder), run)
    # One process tries a failed save again by itself; several all end, and their launcher begins again.
    pauses = checkpoint.PAUSES if jax.process_count() == 1 else ()
    checkpoints = checkpoint.Checkpoints(
        folder / "checkpoints", cfg.keep_last, cfg.keep_best, best, pauses, near, crew.copy
    )
    writer = log.Writer(folder, tensorboard=tensorboard)

    # ---------------------------------------------------------------- restore
    first_position = source.state()
    losses: collections.deque[float] = collections.deque(maxlen=SPIKE_WINDOW)
    rollbacks = seen = 0  # seen: positions learned from so far
    counted = 0.0  # seconds of the steps up to the checkpoint

    def restore() -> tuple[TrainState, int]:
        nonlocal rollbacks, seen, counted
        found = checkpoints.restore_newest(abstract)
        losses.clear()
        if found is None:
            source.restore(first_position)
            seen, counted = 0, 0.0
            return start(jax.random.key(seed), parts.initial() if parts.initial else None), 0
        state, meta, at = found
        source.restore(meta["source"])
        losses.extend(meta["loop"]["losses"])
        rollbacks = max(rollbacks, meta["loop"]["rollbacks"])
        seen = meta["loop"]["tokens"]
        counted = meta["loop"].get("seconds", 0.0)
        return state, at

    def forget(after: int) -> None:
        writer.truncate(after)
        if jax.process_index() == 0:
            log.truncate_jsonl(folder / SAMPLES, after)

    state, at = restore()
    skipped = 0  # batches passed over since the checkpoint that a rollback would go back to
    forget(at or -1)
    if at:
        log.say(f"{folder}: going on from step {at} of {cfg.steps}")

    # ---------------------------------------------------------------- what the loop says and keeps
    flops = transformer.flops_per_token(parts.model, cfg.data.row_length)
    peak = log.peak_flops()
    # A CPU's peak is in no table, so it is measured; its devices, where there are several, share the same cores.
    meter = log.Meter(flops, peak or log.matmul_ceiling(), devices=None if peak else jax.process_count())

    def row(now: int, tokens: int, metrics: dict[str, Any]) -> dict[str, Any]:
        speed, mfu = meter.rates()
        share = wall.share(counted + meter.seconds)
        rates = {"tokens_per_second": speed, "mfu": mfu, "goodput": share, **meter.waits(), **compilation.spent()}
        return {"step": now, "tokens": tokens, **metrics, **rates, **crew.slow_host()}

    def evaluation(now: int, state: TrainState) -> dict[str, float]:
        with meter.paused():
            params = whole(state)
            scores, texts = parts.score(params) if parts.score is not None else ({}, [])
            texts = [*texts, *(parts.sample(params) if parts.sample is not None else ())]  # every process takes part
            if jax.process_index() == 0:
                log.append_jsonl(folder / SAMPLES, [{"step": now, "text": text} for text in texts])
            return scores | (heldout_lib.score(evaluate, state.params, heldout, parts.heldout_bytes) if heldout else {})

    # ---------------------------------------------------------------- step 0: where it starts from
    scores: dict[str, float] = {}
    upcoming: Batch | None = None  # a batch drawn already
    if at == 0:
        upcoming = source.next(whole(state))
        sums = [evaluate(state.params, on_devices(b))["loss"] for b in microbatches(upcoming, cfg.accumulate)]
        total, weight = (sum(float(x[i]) for x in sums) for i in (0, 1))
        scores = evaluation(0, state)
        writer.write(0, {**row(0, 0, {"loss": total / weight if weight else 0.0}), **scores})

    # ---------------------------------------------------------------- steps
    pending: collections.deque[tuple[int, int, Any, dict[str, float]]] = collections.deque()  # still on the device
    metrics: Any = {}
    trace = profiling.Trace(crew.profile, folder / "profile")
    with log.Progress(cfg.steps, at, name=folder.name) as progress, stop_signals(crew), crew.watching(meter), trace:
        progress.show(at, scores)
        meter.restart()
        met = seen  # tokens that the meter knows of
        while at < cfg.steps:
            trace.step(at, metrics)
            with meter.waiting("data"):
                batch = on_devices(source.next(whole(state)) if upcoming is None else upcoming)
            upcoming, told = None, report()
            meter.ready()
            state, metrics = update(state, batch)  # dispatched, not awaited
            at, seen = at + 1, seen + batch["tokens_BT"].size
            pending.append((at, seen, metrics, told))
            evaluating = at == cfg.steps or due(at, cfg.eval_every)
            stopping = stopped_by(crew)
            last = at == cfg.steps or bool(stopping)
            saving = last or due(at, cfg.checkpoint_every) or checkpoints.again()
            near_only = not saving and due(at, cfg.local_every) and near is not None
            # -------------------------------------------------------- log the step before, while this one runs
            wrong = ""
            while pending and not wrong and (len(pending) > 1 or evaluating or saving or near_only):
                done, tokens, on_device, told = pending.popleft()
                numbers = {k: float(v) for k, v in jax.device_get(on_device).items()} | told
                meter.step(tokens - met)
                met = tokens
                wrong = unsound(numbers, losses, cfg.spike)
                if not wrong:
                    losses.append(numbers["loss"])
                    if evaluating and done == at:
                        continue  # its line waits for the evaluation
                    if due(done, cfg.log_every):
                        writer.write(done, row(done, tokens, numbers))
                    progress.show(done, row(done, tokens, numbers))
            # -------------------------------------------------------- roll back, past the batches that did it
            if wrong:
                rollbacks += 1
                if rollbacks > cfg.max_rollbacks:
                    checkpoints.close()
                    kept = checkpoint.steps(folder / "checkpoints")
                    raise LmtrainError(
                        f"{folder}: {wrong} at step {done}, after {cfg.max_rollbacks} rollbacks. "
                        + (f"The last sound checkpoint, of step {kept[-1]}, is kept. " if kept else "")
                        + "A lower optim.lr, a longer optim.warmup or a smaller optim.clip may help; "
                        "max_rollbacks allows more."
                    )
                state, at = restore()
                upcoming, met = None, seen
                meter.restart(forget=True)
                skipped += done - at
                source.skip(skipped)
                pending.clear()
                forget(at)
                log.say(
                    f"{folder}: {wrong} at step {done}: back to step {at}, skipping the {skipped} batches since "
                    f"(rollback {rollbacks} of {cfg.max_rollbacks})"
                )
                continue
            # -------------------------------------------------------- evaluate
            scores = {}
            if evaluating:
                scores = evaluation(at, state)
                writer.write(at, {**row(at, seen, numbers), **scores})
                progress.show(at, {**row(at, seen, numbers), **scores})
            # -------------------------------------------------------- save
            if saving or near_only:
                loop = {"losses": list(losses), "rollbacks": rollbacks, "tokens": seen}
                loop["seconds"] = counted + meter.seconds
                meta = {"source": source.state(), "loop": loop, **parts.meta}
                with meter.paused(), meter.waiting("checkpoint"):
                    if saving:
                        checkpoints.save(at, state, meta, scores, last)
                    else:
                        checkpoints.save_nearby(at, state, meta)
                skipped = 0
            if stopping and at < cfg.steps:
                checkpoints.close()
                writer.close()
                wall.stop()
                raise Stopped(f"{folder}: stopped by {stopping} at step {at} and saved; the same command goes on.")
    checkpoints.close()
    writer.close()
    wall.stop()
    return state


def due(now: int, every: int) -> bool:
    """True at every multiple of `every`, never for 0."""
    return every > 0 and now % every == 0


def unsound(metrics: dict[str, float], losses: Sequence[float], spike: float) -> str:
    """Why this step's numbers call for a rollback, or ""."""
    for name in ("loss", "grad_norm", "update_ratio"):
        if not math.isfinite(metrics[name]):
            return f"{name} is {metrics[name]}"
    if spike and len(losses) >= SPIKE_WINDOW // 4:
        usual = statistics.median(losses)
        if metrics["loss"] > usual + spike:
            return f"loss {metrics['loss']:.3f} is more than {spike} above its median of {usual:.3f}"
    return ""


def microbatches(batch: Batch, count: int) -> list[Batch]:
    """The batch in `count` parts, row i to part i % count: evaluation takes no more memory than a training step."""
    return [{name: x[i::count] for name, x in batch.items()} for i in range(count)]


def stopped_by(crew: hosts.Crew) -> str:
    """The signal to stop for. Whichever of several processes got it, all of them stop at the same step."""
    if jax.process_count() == 1:
        return crew.signal
    return (crew.signal or "SIGTERM to one of the processes") if crew.preempted() else ""


@contextlib.contextmanager
def stop_signals(crew: hosts.Crew) -> Iterator[None]:
    """Turns SIGTERM and Ctrl-C into a word that the loop reads between two steps; a second Ctrl-C ends at once."""
    before = {}
    several = jax.process_count() > 1

    def handle(number: int, frame: Any) -> None:
        if crew.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        crew.signal = signal.Signals(number).name
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's runtime listens to that, and tells the other processes

    try:
        for number in (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, handle)
    except ValueError:
        pass  # not the main thread (a notebook's worker): whoever owns the signals stops the run
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
