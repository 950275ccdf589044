"""Distillation: a student learns a teacher's whole next-token distributions, not only the tokens that were drawn.

B rows, T positions, C positions of a chunk, D width, V vocabulary; weights_BT marks the reply.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lmtrain.objectives import common
from lmtrain.schema import ConfigError
from lmtrain.types import Batch, Params

__all__ = ["gkd"]


@dataclasses.dataclass(frozen=True)
class Gkd:
    """Settings of `gkd`."""

    SOURCE: ClassVar[str] = "chat"

    beta: float = 0.5  # 0: KL(teacher || student), which covers; 1: KL(student || teacher), which seeks a mode
    temperature: float = 1.0  # of both distributions

    def __post_init__(self):
        common.within(self, beta=(0, 1), temperature=(1e-6, None))


def jsd(teacher_BTV: jax.Array, student_BTV: jax.Array, beta: float) -> jax.Array:
    """Generalised Jensen-Shannon divergence of two log-distributions, [B, T], in nats.

    With M = beta P + (1 - beta) Q: beta KL(P || M) + (1 - beta) KL(Q || M), P the teacher, Q the student (Agarwal et
    al., arXiv 2306.13649, eq. 1). It vanishes at both ends, as beta KL(P || Q) and (1 - beta) KL(Q || P); there, those
    two divergences themselves are given.
    """

    def kl(a, b):
        return (jnp.exp(a) * (a - b)).sum(axis=-1)

    if beta in (0, 1):
        return kl(student_BTV, teacher_BTV) if beta else kl(teacher_BTV, student_BTV)
    mixed_BTV = jnp.logaddexp(teacher_BTV + math.log(beta), student_BTV + math.log1p(-beta))
    return beta * kl(teacher_BTV, mixed_BTV) + (1 - beta) * kl(student_BTV, mixed_BTV)


def gkd(forward: Any, params: Params, batch: Batch, cfg: Gkd) -> common.Return:
    """GKD (arXiv 2306.13649): the divergence of the student from batch["teacher"], a mean over the reply's tokens.

    On conversations it is ordinary distillation; on the student's own samples (source="rollout") it corrects what the
    student really does, and no gradient goes through the sampling. Both models' logits exist for a chunk of positions
    at a time.

    Metrics: nll, the student's mean -log p(target).

    Raises:
      ConfigError: no teacher, or one with another vocabulary.
    """
    if "teacher" not in batch:
        raise ConfigError("gkd learns from a teacher; set --config.stages.NAME.teacher to its run's folder.")
    teacher = batch["teacher"]
    hidden_BTD, aux = forward.hidden(params, batch)
    theirs_BTD, _ = teacher.forward.hidden(teacher.params, batch)

    def part(logits_BCV, theirs_BCD, targets_BC):
        theirs_BCV = teacher.forward.logits(teacher.params, theirs_BCD)
        if theirs_BCV.shape != logits_BCV.shape:
            raise ConfigError(
                f"gkd: the teacher's vocabulary has {theirs_BCV.shape[-1]} tokens, the student's "
                f"{logits_BCV.shape[-1]}; both take the same tokenizer and model.vocab_size."
            )
        nll_BC, _ = forward.cross_entropy(logits_BCV, targets_BC)
        p, q = (jax.nn.log_softmax(x / cfg.temperature) for x in (theirs_BCV, logits_BCV))
        return jsd(p, q, cfg.beta), nll_BC

    loss_BT, nll_BT = forward.map_logits(params, part, hidden_BTD, theirs_BTD, batch["targets_BT"])
    w_BT = batch["weights_BT"]
    n = w_BT.sum()
    return (loss_BT * w_BT).sum() + aux, n, {"nll": ((nll_BT * w_BT).sum(), n)}
