"""`lmtrain bench sft` and `lmtrain bench rl`: whole steps of post-training, source and all, on made-up text."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lmtrain import bench, compilation, log, optim, schema, step
from lmtrain import mesh as mesh_lib
from lmtrain.data import conversations, tokenizer
from lmtrain.models import presets, transformer
from lmtrain.objectives import policy
from lmtrain.objectives import sft as sft_lib
from lmtrain.rollout.episodes import Episode
from lmtrain.rollout.rewards import Reward
from lmtrain.rollout.source import Rollouts
from lmtrain.types import Batch


class _Trained:
    """A fresh model of a preset, its update, and its state."""

    def __init__(self, preset: str, loss: Any, settings: Any, accumulate: int):
        self.cfg = transformer.resolve(presets.get(preset), presets.get(preset).vocab_size or bench.VOCABULARY)
        self.mesh = mesh_lib.make(schema.Mesh())
        self.forward, axes = transformer.Forward(self.cfg, self.mesh), transformer.axes(self.cfg)
        tx, schedule = optim.make(schema.Optim("adamw", lr=1e-4), 1000, axes, self.mesh)
        start, abstract = step.make_init(lambda key: transformer.init(self.cfg, key), tx, axes, self.mesh)
        self.state = start(jax.random.key(0))
        self.update = step.make_update(loss, self.forward, tx, schedule, abstract, self.mesh, settings, accumulate)

    def step(self, batch: Batch) -> dict[str, float]:
        """One update, awaited."""
        self.state, metrics = self.update(self.state, mesh_lib.put(batch, self.mesh))
        return {name: float(value) for name, value in metrics.items()}


def sft(
    preset: str = "S", rows: int = 16, row_length: int = 256, accumulate: int = 8, steps: int = 8
) -> dict[str, Any]:
    """Times SFT steps on packed conversations of 20 to 200 words, from the data pipeline to the update.

    Prints, last, one line of JSON; returns what it holds. tokens_per_second counts positions that hold a token.
    """
    compilation.use_cache()
    model = _Trained(preset, sft_lib.sft, sft_lib.Sft(), accumulate)
    data = schema.Data(source="lmtrain.bench_post:chatter", row_length=row_length, heldout_rows=1)
    source, _ = conversations.build("chat", data, tokenizer.bytes_tokenizer(), rows, 0, progress=False)
    seconds, tokens = [], []
    with log.Progress(steps, name=f"bench sft {preset}") as progress:
        for i in range(steps + 2):
            begin = time.perf_counter()
            batch = source.next()
            metrics = model.step(batch)
            seconds.append(time.perf_counter() - begin)
            tokens.append(int((batch["segments_BT"] > 0).sum()))
            if i >= 2:
                progress.show(i - 1, {**metrics, "tokens_per_second": tokens[-1] / seconds[-1]})
    rates = [n / s for n, s in zip(tokens[2:], seconds[2:], strict=True)]
    return _say("sft", preset, model, {
        "rows": rows, "row_length": row_length, "accumulate": accumulate,
        "full": round(float(np.mean(tokens)) / rows / row_length, 3),
        "tokens_per_second": round(statistics.median(rates)), "min": round(min(rates)), "max": round(max(rates)),
        "step_s": round(statistics.median(seconds[2:]), 3),
    })  # fmt: skip


def chatter(data: schema.Data) -> Iterator[dict[str, Any]]:
    """Rows of made-up conversations, for `sft`."""
    rng = random.Random(0)

    def words(n: int) -> str:
        return " ".join(f"w{rng.randrange(4000)}" for _ in range(n))

    for _ in range(2000):
        yield {"prompt": words(rng.randrange(2, 8)), "completion": words(rng.randrange(4, 33))}


class _Numbers:
    """Prompts of 16 token ids; a reply is as good as the share of even ids in it."""

    name, max_tokens = "numbers", 64
    stop: tuple[int, ...] = ()

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def rows(self, split: str) -> Sequence[dict[str, Any]]:
        return [{"ids": [(7 * i + j) % (self.vocab_size - 96) + 2 for j in range(16)]} for i in range(64)]

    def messages(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": json.dumps(row["ids"])}]

    # what of a template the rollout needs: no text, the ids themselves
    def prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        ids: list[int] = json.loads(messages[0]["content"])
        return ids

    def parse(self, ids: Sequence[int]) -> dict[str, Any]:
        return {"role": "assistant", "content": json.dumps(list(ids))}


def _even(episodes: Sequence[Episode]) -> list[dict[str, float]]:
    return [
        {"even": float(np.mean([t % 2 == 0 for t, own in zip(e.tokens, e.own, strict=True) if own]))} for e in episodes
    ]


def rl(
    preset: str = "S", prompts: int = 4, group: int = 8, new: int = 64, accumulate: int = 4, steps: int = 5
) -> dict[str, Any]:
    """Times GRPO steps: replies of `new` tokens, their rewards, one update.

    Prints, last, one line of JSON; returns what it holds.
    """
    compilation.use_cache()
    model = _Trained(preset, policy.grpo, policy.Grpo(), accumulate)
    task: Any = _Numbers(model.cfg.vocab_size)
    task.max_tokens = new
    stage = schema.Stage(
        objective="grpo", loss=policy.Grpo(), batch_size=prompts * group, accumulate=accumulate,
        data=schema.Data(row_length=16 + new, pack=False),
        rollout=schema.Rollout(group=group, slots=prompts * group, turns=1, truncated="keep"),
    )  # fmt: skip
    reward = Reward(((1.0, _even),))
    source = Rollouts(stage, model.forward, model.mesh, task, [task], reward, "group", 0, 0)
    seconds, reports = [], []
    with log.Progress(steps, name=f"bench rl {preset}") as progress:
        for i in range(steps + 1):
            begin = time.perf_counter()
            metrics = model.step(source.next(model.state.params))
            seconds.append(time.perf_counter() - begin)
            reports.append(source.report())
            if i:
                progress.show(i, {**metrics, **reports[-1]})
    generate = statistics.median(r["seconds_generate"] for r in reports[1:])
    middle = statistics.median(seconds[1:])
    return _say("rl", preset, model, {
        "rollouts": prompts * group, "new": new, "step_s": round(middle, 3), "step_min": round(min(seconds[1:]), 3),
        "step_max": round(max(seconds[1:]), 3), "generate_s": round(generate, 3),
        "learn_s": round(middle - generate, 3),
        "new_tokens_per_second": round(prompts * group * new / middle), "gap_p95": reports[-1]["gap_p95"],
    })  # fmt: skip


def _say(what: str, preset: str, model: _Trained, numbers: dict[str, Any]) -> dict[str, Any]:
    result = {"bench": what, "preset": preset, "jax": jax.__version__, "device": jax.devices()[0].device_kind,
              "parameters": transformer.count(model.cfg)["total"], **numbers,
              "peak_mb": bench.peak_memory_mb()}  # fmt: skip
    for name, value in numbers.items():
        log.say(f"    {name:<22} {value:>12,}")
    log.say(f"lmtrain bench: {what}, {preset}; as JSON:")
    print(json.dumps(result), flush=True)
    return result
