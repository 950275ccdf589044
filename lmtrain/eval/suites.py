"""The suites of `lmtrain eval`, by name. Another one is a function here: Subject -> Result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lmtrain.eval import accuracy, bias, coherence, contamination, fluency, harness, overfitting
from lmtrain.eval.subject import Result, Subject
from lmtrain.types import LmtrainError, nearest


class Suite(NamedTuple):
    """A suite, and what --help says of it.

    Attributes:
      in_all: `--suite all` runs it.
    """

    run: Callable[[Subject], Result]
    says: str
    in_all: bool = True


SUITES = {
    "accuracy": Suite(accuracy.run, "tasks answered and scored; multiple choice by log-likelihood"),
    "fluency": Suite(fluency.run, "bits per byte of held-out text, and how generated text repeats itself"),
    "coherence": Suite(coherence.run, "the true continuation against shuffled and foreign ones; consistency in a chat"),
    "overfitting": Suite(overfitting.run, "loss on rows learned from against held-out rows, with an alarm"),
    "contamination": Suite(contamination.run, "evaluation rows that stand in the training data"),
    "bias": Suite(bias.run, "how differently groups are treated, by --bias; with intervals", in_all=False),
    "harness": Suite(harness.run, "lm-evaluation-harness's tasks (--tasks), where it is installed", in_all=False),
}


def names(asked: str) -> list[str]:
    """The suites that "accuracy,fluency" or "all" names, in the table's order.

    Raises:
      LmtrainError: an unknown one, with the nearest; none.
    """
    wanted = [name.strip() for name in asked.split(",") if name.strip()]
    for name in wanted:
        if name != "all" and name not in SUITES:
            raise LmtrainError(
                f"--suite {name!r} is not known.{nearest(name, [*SUITES, 'all'])} (suites: {', '.join(SUITES)}, or all)"
            )
    if not wanted:
        raise LmtrainError(f"--suite is empty, but takes {', '.join(SUITES)}, several with commas between, or all.")
    return [name for name, suite in SUITES.items() if name in wanted or ("all" in wanted and suite.in_all)]


def described() -> Sequence[str]:
    """A line for each suite, for --help."""
    return [f"  {name:<15}{suite.says}" for name, suite in SUITES.items()]
