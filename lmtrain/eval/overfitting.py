"""Overfitting: is what the model has learned from cheaper to it than what it has not seen?

    gap     loss on held-out rows less loss on rows that the stage has learned from, in nats a token
    trend   of the held-out loss in metrics.jsonl: its last value against its best, and the training loss since

The alarm is raised where either is past its threshold:

    GAP     the gap's whole interval lies above a fifth of the held-out loss. Text that a run has read once or twice
            costs it hardly less than new text; what differs then is mostly that the two sides are other text (the end
            of a book against its beginning). A model that knows rows by heart pays next to nothing for them, and the
            gap nears the held-out loss itself. A fifth lies between: docs/evaluation.md has what was measured
    TREND   the held-out loss has risen by more than 2 % from its best while the training loss fell. It is measured on
            the same rows each time, so its noise is small; the best checkpoint is then an earlier one
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lmtrain.eval import estimates
from lmtrain.eval.estimates import Estimate
from lmtrain.eval.subject import Missing, Result, Subject

GAP = 0.2  # of the held-out loss
TREND = 0.02  # of the best held-out loss
FEWEST = 3  # evaluations that make a trend
AROUND = 0.05  # of all steps: those around a step over which the training loss is averaged


def run(s: Subject) -> Result:
    """Both measures, and the alarm."""
    record = s.needs_record("overfitting")
    result = Result()
    try:
        learned, held = record.drawn_rows(s.settings.rows, s.settings.seed)
    except Missing as why:
        if "heldout_loss" not in {name for row in record.metrics() for name in row}:
            raise
        result.notes.append(str(why))
    else:
        sums = []
        with s.progress(len(learned.picks) + len(held.picks), "overfitting: rows") as progress:
            for side in (learned, held):
                sums.append(s.likelihood.table(side.table, side.picks, progress))
        scores = {name: estimates.ratio(*x, s.settings.seed, "nats") for name, x in zip(SIDES, sums, strict=True)}
        gap = estimates.difference(sums[0], sums[1], s.settings.seed, "nats")
        result.scores = {**scores, "gap": gap}
        result.alarms.append(gap_alarm(gap, scores[SIDES[1]].value))
    trend = trend_of(record.metrics())
    result.details["trend"] = trend
    if trend:
        result.alarms.append(trend_alarm(trend))
        result.notes.append(
            f"held-out loss by metrics.jsonl: best {trend['best']:.4f} at step {trend['best_step']}, last"
            f" {trend['last']:.4f} at step {trend['last_step']}; training loss around them {trend['loss_then']:.4f} and"
            f" {trend['loss_now']:.4f}"
        )
    else:
        result.notes.append(f"no trend: metrics.jsonl has fewer than {FEWEST} evaluations after the first step")
    result.alarms = [text for text in result.alarms if text]
    result.details["thresholds"] = {"gap": GAP, "trend": TREND}
    return result


SIDES = ("rows learned from", "held-out rows")


def gap_alarm(gap: Estimate, heldout: float) -> str:
    """What a gap says, or ""."""
    if gap.low <= GAP * heldout:
        return ""
    return (
        f"held-out rows cost {gap.value:.3f} nats a token more than rows learned from ({gap.low:.3f} to {gap.high:.3f})"
        f", more than {GAP:.0%} of their loss of {heldout:.3f}: the model knows its training text by heart"
    )


def trend_of(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The held-out loss at its best and last, with the training loss around these steps; {} where too few are known.

    Line 0, the model before the stage, does not count: of a stage that starts from another, its loss may be the best.
    """
    known = [(m["step"], m["heldout_loss"]) for m in metrics if m.get("heldout_loss") is not None and m["step"]]
    losses = [(m["step"], m["loss"]) for m in metrics if m.get("loss") is not None and m["step"]]
    if len(known) < FEWEST or not losses:
        return {}
    best_step, best = min(known, key=lambda x: x[1])
    last_step, last = known[-1]
    width = max(1.0, AROUND * last_step)

    def around(step: int) -> float:
        near = [loss for at, loss in losses if abs(at - step) <= width]
        return float(np.mean(near or [min(losses, key=lambda x: abs(x[0] - step))[1]]))

    return {"best": best, "best_step": best_step, "last": last, "last_step": last_step,
            "loss_then": around(best_step), "loss_now": around(last_step)}  # fmt: skip


def trend_alarm(trend: dict[str, Any]) -> str:
    """What a trend says, or ""."""
    if trend["last"] <= (1 + TREND) * trend["best"] or trend["loss_now"] >= trend["loss_then"]:
        return ""
    return (
        f"the held-out loss rose from {trend['best']:.3f} at step {trend['best_step']} to {trend['last']:.3f} at step"
        f" {trend['last_step']} while the training loss fell from {trend['loss_then']:.3f} to {trend['loss_now']:.3f}"
    )
