"""Rollouts as a source (contract 4): prompts + the current parameters -> conversations -> rewards -> batches.

    P prompts, G replies to each, B rows, T positions

A rollout is P * G conversations. `epochs` times it is dealt out anew into `minibatches` updates of `batch_size`
conversations. All that decides it is (parameters, seed, number of the rollout, prompts used so far), so a run that is
killed goes on to the same bits: the state is those two numbers and, between the updates of one rollout, its arrays.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from lmtrain import mesh as mesh_lib
from lmtrain import schema
from lmtrain.data.chat import Template
from lmtrain.engine import Engine
from lmtrain.models.transformer import Forward
from lmtrain.objectives import common
from lmtrain.rollout import episodes as play_lib
from lmtrain.rollout import report, rows
from lmtrain.rollout.episodes import Episode, User
from lmtrain.rollout.rewards import Reward
from lmtrain.types import Batch, Frozen, LmtrainError, Params

#: Where only the diagnostics read it, one in so many conversations of a rollout is measured, and at least so many.
SAMPLED = 8


@dataclasses.dataclass
class Rollouts:
    """Batches of reinforcement learning.

    Attributes:
      cfg: the stage.
      forward: the learner's; the same configuration samples.
      tasks: what the prompts are of, in turn.
      reward: of a conversation.
      advantage: group | group_mean | leave_one_out | gae | none (distillation).
      pad: the id that fills up rows.
      reference: a frozen model; its log-probabilities come with the batch. None: none.
      user: who answers the policy.
    """

    cfg: schema.Stage
    forward: Forward
    mesh: Mesh
    template: Template
    tasks: Sequence[Any]
    reward: Reward
    advantage: str
    pad: int
    seed: int
    reference: Frozen | None = None
    user: User = play_lib.scripted

    def __post_init__(self) -> None:
        r = self.cfg.rollout
        size = self.cfg.batch_size * r.minibatches
        if size % r.group:
            raise schema.ConfigError(
                f"rollout.group is {r.group}, which does not divide the {size} conversations of a rollout: "
                f"batch_size={self.cfg.batch_size} times rollout.minibatches={r.minibatches}."
            )
        if r.group < 2 and self.advantage in ("group", "group_mean", "leave_one_out"):
            raise schema.ConfigError(f"rollout.group is {r.group}, but advantages of a group take at least 2 replies.")
        self._prompts = size // r.group
        self._engine = Engine(self.forward.cfg, self.mesh, slots=min(r.slots, size))
        self._measure = _measure(self.forward, r.temperature, values=self.advantage == "gae")
        # The first update of a rollout is by the policy that sampled it, so its own log-probabilities are the old ones:
        # no forward pass is needed for them, unless something reads more of it.
        self._sampling = (
            r.epochs * r.minibatches == 1
            and getattr(self.cfg.loss, "ON_POLICY", False)
            and not (getattr(self.cfg.loss, "REFERENCE", False) or r.kl_reward or self.advantage == "gae")
        )
        self._orders = [
            grain.MapDataset.range(len(task.rows("train"))).shuffle(seed=play_lib.seed_of(self.seed, i)).repeat()
            for i, task in enumerate(self.tasks)
        ]
        self._rows = [task.rows("train") for task in self.tasks]
        self._done = self._asked = 0  # rollouts made; prompts drawn
        self._pending: list[Batch] = []  # updates left of the last rollout
        self._report: dict[str, float] = {}
        self._handed_out = 0.0  # when the last rollout was; 0: none since the start
        self._tokens = 0  # that the last rollout's updates learn from

    # ---------------------------------------------------------------------------------------------- contract 4
    def next(self, params: Params | None = None) -> Batch:
        """This process's rows of the next update. Rolls out with `params` where the last rollout is used up."""
        if not self._pending:
            if params is None:
                raise LmtrainError("a rollout needs parameters: next(params).")
            self._pending = self._rollout(params)
        batch = self._pending.pop(0)
        index, count = mesh_lib.share(self.mesh)
        return {name: np.split(x, count)[index] for name, x in batch.items()} if count > 1 else batch

    def report(self) -> dict[str, float]:
        """Diagnostics of the rollout that the last batch is of (see report.py)."""
        return dict(self._report)

    def state(self) -> dict[str, Any]:
        """What `restore` needs; JSON."""
        packed = [_to_text(b) for b in self._pending]
        return {"rollouts": self._done, "prompts": self._asked, "pending": packed, "report": self._report}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on behind the batch that was given last when `state` was taken."""
        self._done, self._asked = int(state["rollouts"]), int(state["prompts"])
        self._pending = [_from_text(text) for text in state["pending"]]
        self._report = dict(state["report"])

    def skip(self, batches: int) -> None:
        """Leaves out the next updates: what is pending, then prompts."""
        per_rollout = self.cfg.rollout.epochs * self.cfg.rollout.minibatches
        left = max(0, batches - len(self._pending))
        self._pending = self._pending[batches:]
        rollouts = -(-left // per_rollout)
        self._done, self._asked = self._done + rollouts, self._asked + rollouts * self._prompts

    def close(self) -> None:
        """Nothing is read ahead."""

    def summary(self) -> str:
        """What it is, for the line that begins a stage."""
        r = self.cfg.rollout
        names = " and ".join(task.name for task in self.tasks)
        return (
            f"{names}: {self._prompts} prompts x {r.group} replies a rollout, {r.epochs * r.minibatches} update(s) each"
        )

    # ---------------------------------------------------------------------------------------------- one rollout
    def _rollout(self, params: Params) -> list[Batch]:
        r = self.cfg.rollout
        jax.block_until_ready(params)
        begin = time.perf_counter()
        learned = begin - self._handed_out if self._handed_out else 0.0
        # ------------------------------------------------------------ conversations, scored
        played, playing = self._play(params, self._prompts)
        sampled = _sampled(played)
        rewards_PG = self._score(played)
        dropped = 0
        for _ in range(r.dynamic):
            flat_P = _flat(rewards_PG)
            if not flat_P.any():
                break
            dropped += int(flat_P.sum())
            more, seconds = self._play(params, int(flat_P.sum()))
            playing, sampled = playing + seconds, sampled + _sampled(more)
            better_PG = self._score(more)
            played = [e for i in np.flatnonzero(~flat_P) for e in played[i * r.group : (i + 1) * r.group]] + more
            rewards_PG = np.concatenate([rewards_PG[~flat_P], better_PG])
        # ------------------------------------------------------------ what learner and reference make of them
        longest = max(len(e.tokens) for e in played)
        length = self.cfg.data.row_length if self.cfg.data.pack else min(self._round(longest), self.cfg.data.row_length)
        watched = self._some_of(played) if self._sampling else played
        measured = self._log_probabilities(params, watched, length)
        credit = self._advantages(rewards_PG, measured) | ({} if self._sampling else measured)
        self._report = report.rollout(played, rewards_PG, dropped) | {
            "seconds_generate": playing,
            "seconds_learn": learned,
            "generated_tokens_per_second": sampled / playing,
        }
        self._report |= report.gap(watched, measured, divergence=self._sampling)
        if learned:
            self._report["learned_tokens_per_second"] = self._tokens / learned
        self._tokens = sum(len(e.tokens) for e in played) * r.epochs
        updates = []
        for epoch in range(r.epochs):
            order = np.random.default_rng((self.seed, self._done, epoch)).permutation(len(played))
            for part in np.split(order, r.minibatches):
                updates.append(
                    self._update(
                        [played[i] for i in part], {k: [v[i] for i in part] for k, v in credit.items()}, length
                    )
                )
        self._done += 1
        self._handed_out = time.perf_counter()
        return updates

    def _some_of(self, played: Sequence[Episode]) -> list[Episode]:
        """An eighth of a rollout (at least eight), drawn anew for each: measured for the diagnostics alone."""
        order = np.random.default_rng((self.seed, self._done, 8)).permutation(len(played))
        return [played[i] for i in sorted(order[: max(SAMPLED, len(played) // SAMPLED)])]

    def _play(self, params: Params, prompts: int) -> tuple[list[Episode], float]:
        """`group` conversations of each of the next prompts, played to their ends, and the seconds that took."""
        r = self.cfg.rollout
        new = []
        for p in range(self._asked, self._asked + prompts):
            i, k = p % len(self.tasks), p // len(self.tasks)
            row = self._rows[i][int(self._orders[i][k])]
            for g in range(r.group):
                seed = play_lib.seed_of(self.seed, p, g)
                new.append(play_lib.start(self.tasks[i], row, self.template, seed, g))
        self._asked += prompts
        chosen = [play_lib.seed_of(e.seed, "demonstration") < r.demonstrations * 2**32 for e in new]
        for e, shown in zip(new, chosen, strict=True):
            if shown:
                play_lib.demonstrate(e, self.template, self.cfg.data.row_length)
        begin = time.perf_counter()
        play_lib.play(
            self._engine, params, self.template, [e for e, shown in zip(new, chosen, strict=True) if not shown],
            temperature=r.temperature, max_tokens=r.max_tokens, turns=r.turns, longest=self.cfg.data.row_length,
            user=self.user,
        )  # fmt: skip
        return new, time.perf_counter() - begin

    def _score(self, played: Sequence[Episode]) -> np.ndarray:
        """Rewards [P, G], with what the configuration takes off for length and truncation."""
        r = self.cfg.rollout
        rewards = self.reward(played)
        for i, e in enumerate(played):
            if e.truncated and r.truncated == "penalise":
                rewards[i] = 0.0
            if r.overlong:  # DAPO eq. 13, on the last reply's length
                limit = r.max_tokens or e.task.max_tokens
                over = (e.last_reply_length - (limit - r.overlong)) / r.overlong
                rewards[i] -= min(max(over, 0.0), 1.0)
        rewards_PG = rewards.reshape(-1, r.group)
        if r.control == "shuffle":
            rng = np.random.default_rng((self.seed, self._done, 7))
            rewards_PG = rng.permutation(rewards_PG.reshape(-1)).reshape(rewards_PG.shape)
        return -rewards_PG if r.control == "flip" else rewards_PG

    # ---------------------------------------------------------------------------------------------- measuring
    def _log_probabilities(self, params: Params, played: Sequence[Episode], length: int) -> dict[str, list[np.ndarray]]:
        """These conversations, in batches of a microbatch's size.

        Returns:
          {array name: each conversation's numbers at its positions but the last}: log-probabilities of learner,
          reference and sampler, values, and the weights that mark the policy's own tokens.
        """
        places, count = rows.place([len(e.tokens) for e in played], length, self.cfg.data.pack)
        updates = self.cfg.rollout.minibatches
        size = self._rows_of(-(-count // updates), -(-len(played) // updates)) // self.cfg.accumulate
        whole = rows.batch(played, places, -(-count // size) * size, length, self.pad)
        parts: list[dict[str, np.ndarray]] = []
        index, shares = mesh_lib.share(self.mesh)
        for first in range(0, len(whole["tokens_BT"]), size):
            batch: Batch = {name: np.split(x[first : first + size], shares)[index] for name, x in whole.items()}
            out = self._measure(params, self.reference, mesh_lib.put(batch, self.mesh))
            parts.append({name: np.asarray(x) for name, x in jax.device_get(out).items()})
        joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        measured = {name: rows.gather(x, played, places) for name, x in joined.items()}
        measured["sampler_logps_BT"] = rows.gather(whole["sampler_logps_BT"], played, places)
        measured["weights_BT"] = rows.gather(whole["weights_BT"], played, places)
        return measured

    def _advantages(self, rewards_PG: np.ndarray, measured: dict[str, list[np.ndarray]]) -> dict[str, list[Any]]:
        """What each conversation's positions are credited with, by array name."""
        r, own = self.cfg.rollout, measured["weights_BT"]
        if self.advantage == "none":
            return {}
        kl = []
        if r.kl_reward and "ref_logps_BT" in measured:
            kl = [
                r.kl_reward * (old - ref) * w
                for old, ref, w in zip(measured["old_logps_BT"], measured["ref_logps_BT"], own, strict=True)
            ]
        if self.advantage == "gae":
            adv, returns = [], []
            values = zip(measured["old_values_BT"], own, rewards_PG.reshape(-1), strict=True)
            for i, (value, w, reward) in enumerate(values):
                a, g = np.zeros_like(w), np.zeros_like(w)
                at = np.flatnonzero(w)
                a[at], g[at] = common.gae(float(reward), value[at], r.gamma, r.lam, -kl[i][at] if kl else 0 * w[at])
                adv.append(a)
                returns.append(g)
            adv = common.whiten(adv, own)
            out: dict[str, list[Any]] = {"advantages_BT": adv, "returns_BT": returns}
        else:
            if kl:
                rewards_PG = rewards_PG - np.array([k.sum() for k in kl]).reshape(rewards_PG.shape)
            out = {"advantages_BT": list(common.group_advantages(rewards_PG, self.advantage).reshape(-1))}
        if r.control == "zero":
            out["advantages_BT"] = [0.0 * a for a in out["advantages_BT"]]
        return out

    def _update(self, some: list[Episode], credit: dict[str, list[Any]], length: int) -> Batch:
        """One update's batch: some of the conversations, placed anew, with what was measured of each."""
        places, count = rows.place([len(e.tokens) for e in some], length, self.cfg.data.pack)
        batch = rows.batch(some, places, self._rows_of(count, self.cfg.batch_size), length, self.pad)
        for name, values in credit.items():
            if name not in batch:
                batch[name] = rows.spread(values, some, places, batch["weights_BT"])
        if self.cfg.rollout.truncated == "mask":
            kept = rows.spread([float(not e.truncated) for e in some], some, places, batch["weights_BT"])
            batch["weights_BT"] = batch["weights_BT"] * kept
        return batch

    def _rows_of(self, count: int, most: int) -> int:
        """Rows of a batch for so many used ones: few different sizes (each is compiled), each a multiple of what the
        mesh splits; beyond that, at most a quarter is padding."""
        ways = self.cfg.accumulate * mesh_lib.batch_shards(self.mesh)
        if not self.cfg.data.pack:
            return -(-most // ways) * ways
        parts = -(-count // ways)
        step = 1 << max(0, (parts - 1).bit_length() - 3)
        return -(-parts // step) * step * ways

    def _round(self, length: int) -> int:
        """A few lengths of rows only, each compiled once; Splash takes multiples of 128."""
        step = 16 if self.mesh.devices.flat[0].platform == "cpu" else 128
        step *= self.mesh.shape["context"]
        return -(-length // step) * step


@functools.lru_cache(maxsize=8)  # compiled once, however many sources there are
def _measure(forward: Forward, temperature: float, values: bool) -> Callable[..., dict[str, jax.Array]]:
    """The jitted measure(params, reference, batch): log-probabilities of learner and reference, and values."""

    def measure(params, reference, batch):
        losses = forward.losses(params, batch, temperature)
        out = {"old_logps_BT": -losses.nll_BT}
        if values:
            out["old_values_BT"] = forward.scalar(params, losses.hidden_BTD)
        if reference is not None:
            out["ref_logps_BT"] = reference.forward.logps(reference.params, batch, temperature)
        return out

    where = mesh_lib.replicated(forward.mesh) if forward.mesh is not None else None
    return jax.jit(measure, out_shardings=where)


def _sampled(played: Sequence[Episode]) -> int:
    """Tokens that the policy drew."""
    return sum(e.length for e in played if not e.shown)


def _flat(rewards_PG: np.ndarray) -> np.ndarray:
    """Which prompts' replies all score alike: no advantage, nothing to learn."""
    return np.ptp(rewards_PG, axis=1) == 0


def _to_text(batch: Batch) -> str:
    file = io.BytesIO()
    np.savez_compressed(file, **batch)
    return base64.b64encode(file.getvalue()).decode()


def _from_text(text: str) -> Batch:
    with np.load(io.BytesIO(base64.b64decode(text))) as arrays:
        return {name: arrays[name] for name in arrays.files}
