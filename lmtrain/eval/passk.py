"""What several samples of each row say: pass@k, majority@k, and how sure a mean is.

R rows, S samples of each. right_RS is True where a sample is right; scores lie from 0 to 1.

Which interval: a row's samples share its difficulty, so rows are what is drawn, not samples.
    one sample a row, right or wrong   Wilson (1927), which holds for small counts and at 0 and 1
    anything else                      percentile bootstrap over rows, of the mean of the rows' means
    all rows' means alike              Wilson over rows: a bootstrap would claim to be certain
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from lmtrain.types import LmtrainError

Z95 = 1.959963984540054


def pass_at_k(samples: Any, right: Any, k: Any) -> np.ndarray:
    """The chance that one of k samples, drawn without replacement from `samples` of which `right` are right, is right.

    Unbiased for the chance that one of k new samples is (Chen et al. 2021, arXiv 2107.03374, eq. 1), which
    1 - (1 - right/samples)**k is not: 1 - C(n - c, k) / C(n, k).

    Args:
      samples, right, k: whole numbers, or arrays of them that broadcast together.

    Returns:
      float64, of the shape they broadcast to.

    Raises:
      LmtrainError: more right than samples, or fewer samples than k.
    """
    n, c, k = (np.asarray(x) for x in np.broadcast_arrays(samples, right, k))
    if not all(np.issubdtype(x.dtype, np.integer) for x in (n, c, k)):
        raise LmtrainError(f"pass@k takes whole numbers, got {n.dtype}, {c.dtype} and {k.dtype}.")
    if (c < 0).any() or (c > n).any() or (k < 1).any() or (k > n).any():
        raise LmtrainError("pass@k takes 0 <= right <= samples and 1 <= k <= samples.")
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n.max(initial=1) + 1)))])
    rest = np.maximum(n - c - k, 0)
    log_none = log_factorial[n - c] - log_factorial[rest] - log_factorial[n] + log_factorial[n - k]
    return np.where(c == 0, 0.0, np.where(n - c < k, 1.0, -np.expm1(np.minimum(log_none, 0.0))))


def majority(answers: Sequence[Sequence[Hashable]], right_RS: Any, k: int = 0) -> float:
    """The chance that the most frequent answer of k samples is right (self-consistency, arXiv 2203.11171): rows' mean.

    Exact: over all subsets of k of a row's samples, and with ties broken by lot. "" (no answer) has no vote; where
    nobody votes, it is wrong.

    Args:
      answers: R rows of S normalised answers.
      right_RS: whether each is right. Where samples with one answer differ in it, the answer counts by their share.
      k: 0: all S samples, a plain vote.

    Raises:
      LmtrainError: no rows, shapes that differ, k above S.
    """
    right_RS = np.asarray(right_RS, dtype=float)
    if not len(answers) or right_RS.shape != (len(answers), len(answers[0])) or len({len(row) for row in answers}) > 1:
        raise LmtrainError(f"majority takes answers and right of one shape [R, S], got {right_RS.shape} of right.")
    k = k or right_RS.shape[1]
    if not 1 <= k <= right_RS.shape[1]:
        raise LmtrainError(f"majority@{k} takes at least {k} samples of each row, there are {right_RS.shape[1]}.")
    return float(np.mean([_majority(row, right_S, k) for row, right_S in zip(answers, right_RS, strict=True)]))


def _majority(answers: Sequence[Hashable], right_S: np.ndarray, k: int) -> float:
    votes = Counter(answer for answer in answers if answer != "")
    if k == len(answers):
        most = max(votes.values(), default=0)
        ties = sum(count == most for count in votes.values())
        wins = {count: (count == most) / ties for count in votes.values()}
    else:
        wins = {count: _wins(count, votes, len(answers), k) for count in set(votes.values())}
    share = {answer: np.mean([r for a, r in zip(answers, right_S, strict=True) if a == answer]) for answer in votes}
    return float(sum(wins[count] * share[answer] for answer, count in votes.items()))


def _wins(count: int, votes: Counter[Hashable], samples: int, k: int) -> float:
    """The chance that one answer of `count` votes wins among k of `samples`. Ways are counted in whole numbers."""
    others = list(votes.values())
    others.remove(count)
    silent = samples - sum(votes.values())
    total = 0.0
    for mine in range(1, min(count, k) + 1):
        # ways[(used, ties)]: to choose `used` other samples, none of whose answers has more than `mine` votes, and
        # `ties` of whose answers have as many.
        ways = {(used, 0): math.comb(silent, used) for used in range(min(silent, k - mine) + 1)}
        for other in others:
            new: dict[tuple[int, int], int] = {}
            for (used, ties), number in ways.items():
                for theirs in range(min(other, mine, k - mine - used) + 1):
                    key = (used + theirs, ties + (theirs == mine))
                    new[key] = new.get(key, 0) + number * math.comb(other, theirs)
            ways = new
        for (used, ties), number in ways.items():
            if used == k - mine:
                total += math.comb(count, mine) * number / (ties + 1) / math.comb(samples, k)
    return total


# ---------------------------------------------------------------- how sure


def wilson(right: float, samples: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share: `right` of `samples` independent trials; z: 1.96 for 95 %."""
    if samples < 1 or not 0 <= right <= samples:
        raise LmtrainError(
            f"an interval takes at least one sample and 0 <= right <= samples, got {right} of {samples}."
        )
    share, scale = right / samples, z * z / samples
    middle = (share + scale / 2) / (1 + scale)
    half = z / (1 + scale) * math.sqrt(share * (1 - share) / samples + scale / samples / 4)
    # At the ends the formula gives 0 and 1 up to rounding.
    return (0.0 if right == 0 else max(0.0, middle - half)), (1.0 if right == samples else min(1.0, middle + half))


def bootstrap(values_R: Any, draws: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean of rows, which are drawn again with replacement. The same seed gives the same."""
    values_R = np.asarray(values_R, dtype=float)
    rng, chunk = np.random.default_rng(seed), max(1, 1_000_000 // len(values_R))
    sizes = [min(chunk, draws - first) for first in range(0, draws, chunk)]
    means = np.concatenate([values_R[rng.integers(len(values_R), size=(n, len(values_R)))].mean(1) for n in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval(scores_RS: Any) -> tuple[float, float]:
    """The 95 % interval of the mean score, chosen as this file's head says.

    Raises:
      LmtrainError: no scores, no shape [R, S], or a score outside 0 to 1.
    """
    scores_RS = np.asarray(scores_RS, dtype=float)
    if scores_RS.ndim != 2 or not scores_RS.size:
        raise LmtrainError(f"an interval takes scores of shape [R, S], got {scores_RS.shape}.")
    if not ((scores_RS >= 0) & (scores_RS <= 1)).all():
        raise LmtrainError("an interval takes scores from 0 to 1.")
    mean_R = scores_RS.mean(1)
    single = scores_RS.shape[1] == 1 and np.isin(scores_RS, (0, 1)).all()
    if single or np.ptp(mean_R) == 0:
        return wilson(float(mean_R.sum()), len(mean_R))
    return bootstrap(mean_R)
