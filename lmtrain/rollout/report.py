"""Diagnostics of a rollout, for metrics.jsonl: what a reader needs to see that RL works, or why it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lmtrain.objectives import common
from lmtrain.rollout.episodes import Episode


def rollout(played: Sequence[Episode], rewards_PG: np.ndarray, replaced: int) -> dict[str, float]:
    """Numbers of one rollout.

    Args:
      rewards_PG: what each conversation's advantage is made of.
      replaced: prompts whose groups were given up for others, since all their replies scored alike.

    Returns:
      reward, reward_std (over all conversations), reward_NAME of every part; no_signal: share of groups whose replies
      all score alike (replaced ones counted; not told of groups of one); length: sampled tokens of a conversation,
      length_reward: its correlation with the reward (0 where either is constant); truncated: share cut by a limit;
      turns; no_room: share whose prompt left no room for a reply. (The objective adds its own: entropy, ratios,
      clipping, k1, k3.)
    """
    n_groups = len(rewards_PG)
    lengths, rewards = np.array([e.length for e in played], float), rewards_PG.reshape(-1)
    out = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        "length": lengths.mean(),
        "length_reward": correlation(lengths, rewards),
        "truncated": np.mean([e.truncated for e in played]),
        "turns": np.mean([e.turns for e in played]),
        "no_room": np.mean([not e.turns for e in played]),
    }
    if rewards_PG.shape[1] > 1:
        out["no_signal"] = (int((np.ptp(rewards_PG, axis=1) == 0).sum()) + replaced) / (n_groups + replaced)
    parts = sorted({name for e in played for name in e.scores} - {"reward"})
    for name in parts:
        out[f"reward_{name}"] = np.mean([e.scores[name] for e in played if name in e.scores])
    return {name: float(value) for name, value in out.items()}


def gap(played: Sequence[Episode], measured: Mapping[str, Sequence[np.ndarray]], divergence: bool) -> dict[str, float]:
    """What a forward pass says about these conversations, demonstrations left out.

    Args:
      measured: by array name, each conversation's numbers at its positions: learner's, sampler's and (where there is
        one) reference's log-probabilities, and the weights that mark the policy's own tokens.
      divergence: whether to tell k1 and k3 too, which the objective does where it has the reference's numbers.

    Returns:
      gap_mean and gap_p95 of |log p of the sampler - of the learner|, and k1 and k3 (common.kl); {} where nothing was
      sampled.
    """
    own = np.concatenate([(w > 0) & (not e.shown) for e, w in zip(played, measured["weights_BT"], strict=True)])
    if not own.any():
        return {}
    flat = {name: np.concatenate(x)[own] for name, x in measured.items() if name.endswith("logps_BT")}
    apart = np.abs(flat["sampler_logps_BT"] - flat["old_logps_BT"])
    out = {"gap_mean": float(apart.mean()), "gap_p95": float(np.quantile(apart, 0.95))}
    if divergence and "ref_logps_BT" in flat:
        out |= {k: float(np.mean(common.kl(flat["old_logps_BT"], flat["ref_logps_BT"], k))) for k in ("k1", "k3")}
    return out


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 where either is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
