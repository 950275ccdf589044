"""Scores on held-out rows of tasks: several sampled replies to each, played like reinforcement learning's."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from lmtrain.data.chat import Template
from lmtrain.engine import Engine
from lmtrain.eval import passk
from lmtrain.rollout import episodes as play_lib
from lmtrain.rollout import rewards
from lmtrain.rollout.episodes import Episode
from lmtrain.types import Params

PASSED = 0.999  # a reply with this score is right


@dataclasses.dataclass
class Score:
    """A task's result: `summary` for summary.json, and the conversations behind it."""

    summary: dict[str, Any]
    played: list[Episode]


def score(
    engine: Engine,
    params: Params,
    template: Template,
    task: Any,
    *,
    rows: int,
    samples: int = 1,
    temperature: float = 1.0,
    max_tokens: int = 0,
    turns: int = 8,
    longest: int = 0,
    seed: int = 0,
    user: play_lib.User = play_lib.scripted,
    reward: rewards.Reward | None = None,
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Plays `samples` conversations of each of the first `rows` held-out rows (0: all); of each version of a row at
    least one.

    The rows, and the seed of every draw, are functions of (task, seed) alone: two models are compared on the same.

    Args:
      reward: scores them; None: the task's own score.

    Returns:
      summary: score (mean over rows and samples; pass@1 where scores are 0 or 1), ci95 (bootstrap over rows), rows,
      samples, pass@k for k = 1, 2, 4, ... samples (unbiased; a reply passes with a score of 1), majority@samples where
      the task has `answer`, truncated, no_room (of these, prompts too long for any reply), length, and parts: the mean
      of every part of the reward.
    """
    held = task.rows("heldout")
    count = min(rows or len(held), len(held))
    samples = max(samples, len(play_lib.versions(task, held[0])))
    played = [
        play_lib.start(task, held[i], template, play_lib.seed_of(seed, i, s), s)
        for i, s in itertools.product(range(count), range(samples))
    ]
    play_lib.play(
        engine, params, template, played, temperature=temperature, max_tokens=max_tokens, turns=turns, longest=longest,
        user=user, progress=progress,
    )  # fmt: skip
    total = (reward or rewards.Reward(((1.0, rewards.score),)))(played)
    score_RS = total.reshape(count, samples)
    own = total if reward is None else [np.mean(list(rewards.task_score(e).values())) for e in played]
    own_RS = np.array(own).reshape(count, samples)
    right_R = (own_RS >= PASSED).sum(axis=1)
    summary: dict[str, Any] = {"score": float(score_RS.mean()), "ci95": passk.interval(score_RS), "rows": count,
                               "samples": samples}  # fmt: skip
    k = 1
    while k <= samples:
        summary[f"pass@{k}"] = float(passk.pass_at_k(samples, right_R, k).mean())
        k *= 2
    if samples > 1 and hasattr(task, "answer"):
        answers_RS = np.array([task.answer(e.row, e.reply) for e in played], object).reshape(count, samples)
        summary[f"majority@{samples}"] = passk.majority(answers_RS.tolist(), own_RS >= PASSED)
    summary["truncated"] = float(np.mean([e.truncated for e in played]))
    summary["no_room"] = float(np.mean([not e.turns for e in played]))
    summary["length"] = float(np.mean([e.length for e in played]))
    names = sorted({name for e in played for name in e.scores} - {"reward"})
    summary["parts"] = {name: float(np.mean([e.scores[name] for e in played if name in e.scores])) for name in names}
    return Score(summary, played)
