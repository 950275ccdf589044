"""Supervised fine-tuning: next-token prediction of what the assistant says."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from lmtrain.objectives import common
from lmtrain.objectives.pretrain import Pretrain, pretrain
from lmtrain.types import Batch, Params

__all__ = ["sft"]


@dataclasses.dataclass(frozen=True)
class Sft(Pretrain):
    """Settings of `sft`: those of pretraining. What differs is the rows."""

    SOURCE: ClassVar[str] = "chat"


def sft(forward: Any, params: Params, batch: Batch, cfg: Sft) -> common.Return:
    """Pretraining's loss on conversations, whose weights mark the assistant's tokens (the end of its turn among them).

    Every token of the update weighs the same, in however short a reply: the step divides by their number in the whole
    batch. A mean of each microbatch's mean, or of each row's, would be another loss.
    """
    return pretrain(forward, params, batch, cfg)
