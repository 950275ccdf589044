"""What a suite gets and gives: the model under evaluation with its settings, and scores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from jax.sharding import Mesh

from lmtrain import log, schema
from lmtrain.data.chat import Template
from lmtrain.data.pipeline import Table
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.engine import Engine
from lmtrain.eval.estimates import Estimate
from lmtrain.eval.likelihood import Likelihood
from lmtrain.types import LmtrainError, Params

FORMATS = ("auto", "chat", "plain")


class Missing(LmtrainError):
    """A suite needs what this model, or this command line, has not: `--suite all` says so and goes on."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says to all suites; --help has their meaning.

    Attributes:
      tasks: what is asked: tasks by name; with the suite harness, lm-evaluation-harness's own.
      text: files of held-out text; (): the run's own.
      heldout: a stage of the same run, whose held-out rows and text are meant by "the run's own"; "": those of this
        stage and of what it started from.
      rows: of each task, text and test; 0: all there are.
      seed: decides what is drawn: rows, orders, replies, resamples.
      format: "chat" asks through the chat template, "plain" by text alone, "auto" by how the model was trained.
      row_length: positions the model sees at once; 0: those of its training.
      temperature: of generated text; tasks are answered by the likeliest tokens.
      ngram: words in a row that contamination looks for.
      include_path: a folder of lm-evaluation-harness's task files.
      shots: solved rows that lm-evaluation-harness shows before each; -1: as the task file says.
      bias: what the suite bias measures with: "crows_pairs=FILE", "swaps", "canary=blims/daxes"; (): "swaps".
      reward: a reward model's run, whose scores the suite bias compares.
    """

    tasks: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    heldout: str = ""
    rows: int = 256
    seed: int = 0
    format: str = "auto"
    row_length: int = 0
    temperature: float = 1.0
    ngram: int = 13
    include_path: str = ""
    shots: int = -1
    bias: tuple[str, ...] = ()
    reward: str = ""


@dataclasses.dataclass(frozen=True)
class Side:
    """Rows of one side of a stage's data: (member, row) of its table."""

    stage: str
    table: Table
    picks: Sequence[tuple[int, int]]


class Record(Protocol):
    """What a run keeps of its own training (record.py makes it)."""

    notes: list[str]  # what it cannot say, in words

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl up to the step that is evaluated."""

    def tasks(self) -> tuple[str, ...]:
        """The tasks that the run was trained or scored on."""

    def heldout_texts(self) -> list[str]:
        """The documents that the run holds out, whole."""

    def heldout_rows(self, count: int) -> list[Side]:
        """The held-out rows that training scores, of every stage that has some; `count` of each (0: all)."""

    def drawn_rows(self, count: int, seed: int) -> tuple[Side, Side]:
        """`count` rows that the stage has learned from, and as many of its held-out ones; 0: all."""

    def learned(self) -> Iterable[tuple[str, int, Iterable[str]]]:
        """(stage, bytes of its text, its pieces) of every stage that the model has learned text from."""


@dataclasses.dataclass
class Subject:
    """A model under evaluation.

    Attributes:
      name: what messages call it.
      template: makes its chat template; raises where the tokenizer has no tokens for one.
      chat: it is asked through that.
      longest: positions that it sees at once.
      mesh: where the parameters lie; None: one device.
      record: what is known of its training; None: nothing (a model from elsewhere).
      held: where held-out rows and text are from, if not from `texts`: `record`, or that of another stage.
      texts: the documents of each file of settings.text, by its name.
      reward: gives conversations, token ids, a reward model's scores; None: there is no such model.
    """

    name: str
    model: schema.Model
    tokenizer: Tokenizer
    params: Params
    template: Callable[[], Template]
    chat: bool
    longest: int
    settings: Settings
    mesh: Mesh | None = None
    record: Record | None = None
    held: Record | None = None
    texts: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    reward: Callable[[Sequence[Sequence[int]]], list[float]] | None = None

    def __post_init__(self) -> None:
        self.held = self.held or self.record

    @functools.cached_property
    def likelihood(self) -> Likelihood:
        """Scores texts; one for all suites, so that programs are compiled once."""
        return Likelihood(self.model, self.params, self.tokenizer.pad, self.longest, self.mesh)

    @functools.cached_property
    def engine(self) -> Engine:
        """Generates."""
        return Engine(self.model, self.mesh, slots=64, decode=self.tokenizer.decode)

    def needs_record(self, suite: str) -> Record:
        """The run's record; Missing where there is none."""
        if self.record is None:
            raise Missing(
                f"suite {suite} reads the run's own record of its training (metrics.jsonl, tokenised text), and"
                f" {self.name} has none: it was not trained by `lmtrain run`."
            )
        return self.record

    def documents(self, suite: str) -> dict[str, list[str]]:
        """Held-out documents by the name of what they are from: the files of --text, else the run's own."""
        if self.texts:
            return self.texts
        if self.held is None:
            raise Missing(f"suite {suite} needs held-out text, and {self.name} keeps none: give --text FILE.")
        found = self.held.heldout_texts()
        if not found:
            whose = f"stage {self.settings.heldout}" if self.settings.heldout else self.name
            raise Missing(f"suite {suite} needs held-out text, and {whose} was trained on none: give --text FILE.")
        return {"held-out text": found}

    def progress(self, total: int, name: str) -> Progress:
        """A bar that counts up to `total`."""
        return Progress(total, name)


class Progress:
    """A bar on a terminal; nothing elsewhere but a last line. Called with how much has been done since."""

    def __init__(self, total: int, name: str):
        self._bar, self._done = log.Progress(total, name=name, every=total + 1), 0

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        return self

    def __exit__(self, *why: Any) -> None:
        self._bar.__exit__(*why)

    def __call__(self, more: int) -> None:
        self._done += more
        self._bar.show(min(self._done, self._bar.total), {})


@dataclasses.dataclass
class Result:
    """What a suite has found.

    Attributes:
      scores: by name: "gsm8k: accuracy" stands under gsm8k.
      alarms: what is wrong with the model, in words.
      notes: what the numbers do not say.
      details: for eval.json, such as the result of every row.
    """

    scores: dict[str, Estimate] = dataclasses.field(default_factory=dict)
    alarms: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """As it stands in eval.json."""
        scores = {name: score.json() for name, score in self.scores.items()}
        return {"scores": scores, "alarms": self.alarms, "notes": self.notes, "details": self.details}
