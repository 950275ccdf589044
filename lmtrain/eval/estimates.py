"""Numbers with a 95 % interval: what a score may be, given that other rows could have been drawn.

R rows, n resamples. Intervals are percentile bootstraps over rows: RESAMPLES times, as many rows are drawn with
replacement (Efron 1979). The same seed gives the same interval. Where every row says the same, a bootstrap would claim
to be certain; a share then gets Wilson's interval (passk.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lmtrain.eval import passk
from lmtrain.types import LmtrainError

RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A score. `unit` says how it is shown: "share" (per cent), "bits", "nats", "words", "" (a plain number)."""

    value: float
    low: float
    high: float
    rows: int
    unit: str = ""

    def json(self) -> dict[str, Any]:
        """As it stands in eval.json."""
        return {"value": self.value, "ci95": [self.low, self.high], "rows": self.rows, "unit": self.unit}

    @classmethod
    def of(cls, kept: dict[str, Any]) -> Estimate:
        """The inverse of `json`."""
        low, high = kept["ci95"]
        return cls(kept["value"], low, high, kept["rows"], kept["unit"])

    def says(self) -> tuple[str, str]:
        """(value, interval) as text."""
        form = {"share": "{:.1%}", "bits": "{:.3f}", "nats": "{:.4f}", "words": "{:.1f}"}.get(self.unit, "{:.3f}")
        return form.format(self.value), f"{form.format(self.low)} to {form.format(self.high)}"


def share(right_R: Any, seed: int) -> Estimate:
    """The share of rows that are right; values from 0 to 1."""
    right_R = _rows(right_R)
    if np.ptp(right_R) == 0 and right_R[0] in (0.0, 1.0):
        low, high = passk.wilson(float(right_R.sum()), len(right_R))
    else:
        low, high = passk.bootstrap(right_R, RESAMPLES, seed=seed)
    return Estimate(float(right_R.mean()), low, high, len(right_R), "share")


def mean(values_R: Any, seed: int, unit: str = "") -> Estimate:
    """The mean of rows."""
    values_R = _rows(values_R)
    low, high = passk.bootstrap(values_R, RESAMPLES, seed=seed)
    return Estimate(float(values_R.mean()), low, high, len(values_R), unit)


def crossed(values: Any, seed: int, unit: str = "", neutral: Any = None) -> Estimate:
    """The mean of a table each of whose axes (templates, words, outcomes) is a draw of what could have been asked: all
    axes are drawn again, each by itself (the pigeonhole bootstrap; Owen 2007, arXiv 0712.1111). Treating its cells as
    so many rows would make the interval too narrow, for cells of one column share whatever the column does.

    Args:
      values: float[R, ...], one number for each combination.
      neutral: float[k], the same mean for words between which there is nothing to find. No two words are ever quite
        alike to a model, whose training had a beginning and an order: the interval then has the spread of the
        differences of two of them in it too (of k words, the spread is that of the sample, k / (k - 1) times).

    Returns:
      an estimate whose `rows` are the cells.
    """
    x = np.asarray(values, float)
    if not x.ndim or not x.size:
        raise LmtrainError(f"a crossed mean takes a table, got shape {x.shape}.")
    rng = np.random.default_rng(seed)
    drawn_n = np.empty(RESAMPLES)
    shares = [rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n for n in x.shape]
    for i in range(RESAMPLES):
        left = x
        for share_n in shares:
            left = np.tensordot(share_n[i], left, 1)
        drawn_n[i] = left
    if neutral is not None and len(neutral) > 1:
        k = len(neutral)
        pair_n2 = np.asarray(neutral, float)[rng.integers(k, size=(RESAMPLES, 2))]
        drawn_n += (pair_n2[:, 0] - pair_n2[:, 1]) * math.sqrt(k / (k - 1))
    low, high = np.quantile(drawn_n, [0.025, 0.975])
    return Estimate(float(x.mean()), float(low), float(high), x.size, unit)


def ratio(top_R: Any, bottom_R: Any, seed: int, unit: str = "") -> Estimate:
    """sum(top) / sum(bottom), such as nats a token: rows weigh as they are long."""
    drawn_n, value, rows = _ratios(top_R, bottom_R, seed)
    low, high = np.quantile(drawn_n, [0.025, 0.975])
    return Estimate(value, float(low), float(high), rows, unit)


def difference(first: tuple[Any, Any], second: tuple[Any, Any], seed: int, unit: str = "") -> Estimate:
    """The second ratio less the first, of rows drawn apart from one another; `rows` are those of both."""
    a_n, a, a_rows = _ratios(*first, seed)
    b_n, b, b_rows = _ratios(*second, seed + 1)
    low, high = np.quantile(b_n - a_n, [0.025, 0.975])
    return Estimate(b - a, float(low), float(high), a_rows + b_rows, unit)


def of_whole(statistic: Callable[[np.ndarray], float], rows: int, seed: int, unit: str = "") -> Estimate:
    """A statistic of a whole sample that repeated rows pull to one side, such as distinct-n: a text that is drawn twice
    brings no new word. The interval has the bootstrap's width, shifted so that its mean is the value.

    Args:
      statistic: int[n] numbers of rows, perhaps repeated -> the value on these rows.
    """
    value = statistic(np.arange(rows))
    drawn_n = _resampled(lambda i_nR: np.array([statistic(i_R) for i_R in i_nR]), rows, seed)
    low, high = np.quantile(drawn_n, [0.025, 0.975]) - drawn_n.mean() + value
    if unit == "share":  # which the shift may have left
        low, high = np.clip([low, high], 0, 1)
    return Estimate(float(value), float(low), float(high), rows, unit)


def _ratios(top_R: Any, bottom_R: Any, seed: int) -> tuple[np.ndarray, float, int]:
    """(the ratio of every resample, that of all rows, how many these are)."""
    top_R, bottom_R = _rows(top_R), _rows(bottom_R)
    drawn_n = _resampled(lambda i_nR: top_R[i_nR].sum(1) / bottom_R[i_nR].sum(1), len(top_R), seed)
    return drawn_n, float(top_R.sum() / bottom_R.sum()), len(top_R)


def _resampled(statistic: Callable[[np.ndarray], np.ndarray], rows: int, seed: int) -> np.ndarray:
    """A statistic of RESAMPLES draws, a few at a time: int[n, R] numbers of rows -> float[n]."""
    rng, chunk = np.random.default_rng(seed), max(1, 1_000_000 // rows)
    sizes = [min(chunk, RESAMPLES - first) for first in range(0, RESAMPLES, chunk)]
    return np.concatenate([statistic(rng.integers(rows, size=(n, rows))) for n in sizes])


def _rows(values_R: Any) -> np.ndarray:
    values_R = np.asarray(values_R, dtype=float)
    if values_R.ndim != 1 or not len(values_R):
        raise LmtrainError(f"a score takes at least one row, got shape {values_R.shape}.")
    return values_R
