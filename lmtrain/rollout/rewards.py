"""What a conversation is worth: a weighted mean of parts, each from 0 to 1, each a plain function, each logged.

A part is written "WEIGHT*NAME" or "NAME": "score" (the task's own), "model(RUN)" (a trained reward model's probability
that the conversation is the better one of two), or a function of tasks/rewards.py or of yours ("ideas:politeness").
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lmtrain import mesh as mesh_lib
from lmtrain import tasks
from lmtrain.models.transformer import Forward
from lmtrain.rollout.episodes import Episode
from lmtrain.schema import ConfigError
from lmtrain.tasks import rewards as functions
from lmtrain.types import Frozen, LmtrainError

#: The parts of one reward for many conversations: name -> a number for each of them.
Part = Callable[[Sequence[Episode]], list[dict[str, float]]]


@dataclasses.dataclass(frozen=True)
class Reward:
    """A weighted mean of parts: (weight, part) pairs."""

    parts: tuple[tuple[float, Part], ...]

    def __call__(self, episodes: Sequence[Episode]) -> np.ndarray:
        """The reward of every conversation, float64 [n]; each one's `scores` get its parts and their mean, "reward"."""
        total, whole = np.zeros(len(episodes)), sum(weight for weight, _ in self.parts)
        for e in episodes:
            e.scores = {}
        for k, (weight, part) in enumerate(self.parts, start=1):
            for i, (e, scores) in enumerate(zip(episodes, part(episodes), strict=True)):
                # Two parts may be of one name (length of the task's and of tasks/rewards.py): both are told.
                e.scores |= {f"{name}_{k}" if name in e.scores else name: value for name, value in scores.items()}
                total[i] += weight * sum(scores.values()) / len(scores)
        # One process decides, for a score may depend on the clock (a program's time limit), and all must learn alike.
        total = mesh_lib.from_first(total / whole)
        for e, value in zip(episodes, total, strict=True):
            e.scores["reward"] = float(value)
        return total


def make(specs: Sequence[str], models: Callable[[str], Frozen], pad: int) -> Reward:
    """The reward that a configuration writes as ("score", "0.5*length(low=10, high=60)", "model(runs/reward)").

    Args:
      models: opens the run that model(RUN) names.

    Raises:
      ConfigError: no part, an unknown name, a weight that is no number.
    """
    if not specs:
        raise ConfigError('rollout.rewards is empty, but takes at least one, such as ("score",).')
    return Reward(tuple(_part(spec, models, pad) for spec in specs))


def _part(spec: str, models: Callable[[str], Frozen], pad: int) -> tuple[float, Part]:
    weight, name = 1.0, spec.strip()
    if found := re.match(r"([^*(]+)\*(.+)$", name):
        try:
            weight, name = float(found[1]), found[2].strip()
        except ValueError:
            raise ConfigError(f"rollout.rewards: {spec!r}: {found[1]!r} is not a number, such as 0.5.") from None
    if not 0 < weight < math.inf:
        raise ConfigError(f"rollout.rewards: {spec!r}: the weight is {weight}, but takes a number above 0.")
    if name == "score":
        return weight, score
    if found := re.fullmatch(r"model\((.+)\)", name):
        return weight, model(models(found[1].strip("'\" ")), pad)
    return weight, plain(name.partition("(")[0], functions.get(name))


def score(episodes: Sequence[Episode]) -> list[dict[str, float]]:
    """The task's own score. A reply that was cut is never scored as if it were complete: it gets 0."""
    scores = [task_score(e) for e in episodes]
    problems: dict[tuple[int, str], list[int]] = {}
    for i, e in enumerate(episodes):
        if hasattr(e.task, "versions"):
            problems.setdefault((id(e.task), json.dumps(e.task.versions(e.row), sort_keys=True)), []).append(i)
    for numbers in problems.values():
        for i in numbers:
            scores[i]["consistent"] = _consistent(episodes[i], [episodes[k] for k in numbers])
    return scores


def _consistent(e: Episode, same: Sequence[Episode]) -> float:
    """How alike a reply is to those to other versions of its problem, against those to its own: (1 + a - b) / 2, where
    a and b are the means over the others. So 1/2 is the most that all can have together, where the versions' replies
    are drawn alike; a alone would have them all the same. (Over a rollout the mean of b - a is half the square of the
    maximum mean discrepancy, Gretton et al. 2012, with `alike` as its kernel, and a - b the slope down it.) A reply
    that is the only one to its version is alike to itself. 0 where it was cut, or there is no other version.
    """
    others = [o for o in same if o is not e and not o.truncated]
    across = [o for o in others if o.row != e.row]
    if e.truncated or not across:
        return 0.0
    a, b = (
        [e.task.alike(e.row, e.reply, o.row, o.reply) for o in some]
        for some in (across, [o for o in others if o.row == e.row] or [e])
    )
    return _checked((1 + sum(a) / len(a) - sum(b) / len(b)) / 2, f"task {e.task.name}, consistent", e)


def task_score(e: Episode) -> dict[str, float]:
    """{"score": ...}, or the parts that the task gives a whole conversation, each in [0, 1].

    Raises:
      LmtrainError: the task raised, or gave no number in [0, 1].
    """
    name = f"task {e.task.name}"
    try:
        if hasattr(e.task, "score_conversation"):
            parts = e.task.score_conversation(e.row, e.messages)
        else:
            parts = {"score": 0.0 if e.truncated else e.task.score(e.row, e.reply)}
    except LmtrainError:
        raise
    except Exception as error:
        raise LmtrainError(f"{name}: its score raised {type(error).__name__}: {error}; row {e.row}") from error
    return {part: _checked(value, f"{name}, {part}", e) for part, value in parts.items()}


def plain(name: str, function: Callable[[dict, list], Any]) -> Part:
    """A function of (row, messages) as a part; tasks.rewards has checked what it gives. 0 for what was cut."""

    def one(e: Episode) -> dict[str, float]:
        value = function(e.row, e.messages)
        found = value if isinstance(value, dict) else {name: value}
        return {k: 0.0 for k in found} if e.truncated else found

    def part(episodes: Sequence[Episode]) -> list[dict[str, float]]:
        return [one(e) for e in episodes]

    return part


def model(frozen: Frozen, pad: int, size: int = 32) -> Part:
    """A reward model's part: sigmoid of its score, the probability (Bradley-Terry) that this conversation is preferred
    to one of score 0. So many conversations at a time. 0 for what was cut."""

    def part(episodes: Sequence[Episode]) -> list[dict[str, float]]:
        values = raw_scores(frozen, pad, [e.tokens for e in episodes], size)
        likely = [0.0 if e.truncated else 1 / (1 + math.exp(-v)) for e, v in zip(episodes, values, strict=True)]
        return [{"model": _checked(v, "reward model", e)} for v, e in zip(likely, episodes, strict=True)]

    return part


def raw_scores(frozen: Frozen, pad: int, conversations: Sequence[Sequence[int]], size: int = 32) -> list[float]:
    """A reward model's scores: its scalar head at the last token of each conversation, so many of them at a time (or a
    few more, where the mesh splits rows into parts that do not divide this). Rows are as long as few programs allow, as
    the mesh divides, and as positions were learned.

    Raises:
      ConfigError: a conversation is longer than the positions that the reward model learned.
    """
    out: list[float] = []
    mesh, last = frozen.forward.mesh, frozen.forward.cfg.max_positions
    ways, context = (1, 1) if mesh is None else (mesh_lib.batch_shards(mesh), mesh.shape["context"])
    size, step = -(-size // ways) * ways, 32 * context
    for begin in range(0, len(conversations), size):
        some = conversations[begin : begin + size]
        longest = max(map(len, some))
        T = -(-longest // step) * step
        if last and T > last:
            T = max(last // context, -(-longest // context)) * context
        read = {"tokens_BT": np.full((size, T), pad, np.int32)}
        read |= {name: np.zeros((size, T), np.int32) for name in ("segments_BT", "positions_BT")}
        for b, ids in enumerate(some):
            n = len(ids)
            read["tokens_BT"][b, :n], read["segments_BT"][b, :n] = ids, 1
            read["positions_BT"][b, :n] = np.arange(n)
        score_BT = np.asarray(_scores(frozen.forward)(frozen.params, read))
        out += [float(score_BT[b, len(ids) - 1]) for b, ids in enumerate(some)]
    return out


@functools.lru_cache(maxsize=8)  # compiled once, however many parts there are
def _scores(forward: Forward) -> Callable[..., jax.Array]:
    """The jitted scores(params, batch) [B, T], whole on every process."""
    where = mesh_lib.replicated(forward.mesh) if forward.mesh is not None else None
    return jax.jit(lambda params, b: forward.scalar(params, forward.hidden(params, b)[0]), out_shardings=where)


def _checked(value: Any, what: str, e: Episode) -> float:
    if not isinstance(value, int | float | np.floating | np.integer) or not 0 <= value <= 1:
        raise LmtrainError(
            f"{what}: gave {value!r}, but takes a number from 0 to 1; row {e.row}, reply {e.reply[:80]!r}"
        )
    return float(value)


def get_tasks(specs: Sequence[str]) -> dict[str, Any]:
    """The tasks of a configuration, by the name that their scores get: the task's own, or where several have that one,
    what was written ("addition(digits=2)").

    Raises:
      ConfigError: none, an unknown one, or one twice.
    """
    if not specs:
        raise ConfigError("rollout.tasks is empty, but takes at least one task, such as ('addition',).")
    made = [(spec.strip(), tasks.get(spec)) for spec in specs]
    names = [task.name for _, task in made]
    out = {task.name if names.count(task.name) == 1 else spec: task for spec, task in made}
    if len(out) < len(made):
        raise ConfigError(f"a task stands twice in {tuple(specs)!r}; its scores would be told apart by nothing.")
    return out
