"""Diagnostics of a rollout, for metrics.jsonl: what a reader needs to see that RL works, or why it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lmtrain.objectives import common
from lmtrain.rollout.episodes import Episode


def rollout(
    played: Sequence[Episode], rewards_PG: np.ndarray, measured: Mapping[str, Sequence[np.ndarray]], replaced: int
) -> dict[str, float]:
    """Numbers of one rollout.

    Args:
      rewards_PG: what each conversation's advantage is made of.
      measured: by array name, numbers at the positions of these conversations or of some of them: learner's, sampler's
        and (where there is one) reference's log-probabilities, and the weights that mark the policy's own tokens.
      replaced: prompts whose groups were given up for others, since all their replies scored alike.

    Returns:
      reward, reward_std (over all conversations), reward_NAME of every part; no_signal: share of groups whose replies
      all score alike (replaced ones counted); length: sampled tokens of a conversation, length_reward: its correlation
      with the reward (0 where either is constant); truncated: share cut by a limit; turns; gap_mean and gap_p95 of
      |log p of the sampler - of the learner|. (The objective adds its own: entropy, ratios, clipping, k1, k3.)
    """
    n_groups = len(rewards_PG)
    lengths, rewards = np.array([e.length for e in played], float), rewards_PG.reshape(-1)
    out = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        "no_signal": (int((np.ptp(rewards_PG, axis=1) == 0).sum()) + replaced) / (n_groups + replaced),
        "length": lengths.mean(),
        "length_reward": correlation(lengths, rewards),
        "truncated": np.mean([e.truncated for e in played]),
        "turns": np.mean([e.turns for e in played]),
    }
    parts = sorted({name for e in played for name in e.scores} - {"reward"})
    for name in parts:
        out[f"reward_{name}"] = np.mean([e.scores[name] for e in played if name in e.scores])
    own = np.concatenate([w > 0 for w in measured["weights_BT"]])
    if own.any():
        old, sampler = (np.concatenate(measured[name])[own] for name in ("old_logps_BT", "sampler_logps_BT"))
        gap = np.abs(sampler - old)
        out |= {"gap_mean": gap.mean(), "gap_p95": np.quantile(gap, 0.95)}
    return {name: float(value) for name, value in out.items()}


def divergence(measured: Mapping[str, Sequence[np.ndarray]]) -> dict[str, float]:
    """k1 and k3 of the policy from the reference (common.kl), for where the objective has not the numbers to tell."""
    if "ref_logps_BT" not in measured:
        return {}
    own = np.concatenate([w > 0 for w in measured["weights_BT"]])
    policy, reference = (np.concatenate(measured[name])[own] for name in ("old_logps_BT", "ref_logps_BT"))
    return {k: float(np.mean(common.kl(policy, reference, k))) if own.any() else 0.0 for k in ("k1", "k3")}


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 where either is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
