"""Generator against discriminator, the sequence form of a GAN (SeqGAN, arXiv 1609.05473).

Both sides' losses are at home elsewhere, but for one. In alternation:

  the discriminator  a model with a scalar head learns (real reply, generated reply) pairs: by `reward`, Bradley and
                     Terry's comparison, where both answer one prompt (generative adversarial distillation, arXiv
                     2511.10643), or by `discriminator` below, which looks at each alone
  the generator      is trained by any objective of policy.py on rollouts whose reward is the discriminator's score

B rows, S conversations of a row, P pairs of a row: segments 2k - 1 are real, 2k generated.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from lmtrain.objectives import common, reward
from lmtrain.types import Batch, Params

__all__ = ["discriminator"]


@dataclasses.dataclass(frozen=True)
class Discriminator:
    """Settings of `discriminator`."""

    SOURCE: ClassVar[str] = "pairs"
    SCALAR: ClassVar[bool] = True

    # The target for real replies is 1 - smoothing (one-sided, Salimans et al., arXiv 1606.03498): a discriminator that
    # is certain gives a generator nothing to climb.
    smoothing: float = 0.0

    def __post_init__(self):
        common.within(self, smoothing=(0, 0.5))


def discriminator(forward: Any, params: Params, batch: Batch, cfg: Discriminator) -> common.Return:
    """-log D(real) - log(1 - D(generated)), D = sigmoid of the score at a conversation's end (SeqGAN, eq. 5), a mean
    over pairs; 2 ln 2 where the two cannot be told apart.

    Metrics: those of `reward`, real for chosen.
    """
    r_BS, counts_BS, aux = reward.scores(forward, params, batch)
    real_BP, made_BP = common.pairs(r_BS)
    first_BP, second_BP = common.pairs(counts_BS)
    smooth = cfg.smoothing
    loss_BP = -(1 - smooth) * jax.nn.log_sigmoid(real_BP) - smooth * jax.nn.log_sigmoid(-real_BP)
    loss_BP += -jax.nn.log_sigmoid(-made_BP)
    w_BP = (first_BP & second_BP).astype(r_BS.dtype)
    return common.over_pairs(loss_BP, real_BP, made_BP, w_BP, aux / batch["weights_BT"].shape[1])
