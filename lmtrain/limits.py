"""What the numbers of a stage must satisfy, whatever the model and the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lmtrain import flags, schema
from lmtrain.schema import ConfigError

END = 2**31

#: Field -> (least, most), both allowed.
STAGE = {
    "steps": (1, END), "batch_size": (1, END), "accumulate": (1, END), "log_every": (1, END), "eval_every": (0, END),
    "checkpoint_every": (0, END), "local_every": (0, END), "keep_last": (1, END), "keep_best": (0, END),
    "samples": (0, END), "sample_tokens": (1, END), "max_rollbacks": (0, END), "spike": (0, END),
    "sample_temperature": (0, END),
}  # fmt: skip
ROLLOUT = {
    "group": (1, END), "minibatches": (1, END), "epochs": (1, END), "max_tokens": (0, END), "turns": (1, END),
    "temperature": (1e-3, 1e3), "demonstrations": (0, 1), "dynamic": (0, 1000), "overlong": (0, END),
    "kl_reward": (0, END), "gamma": (0, 1), "lam": (0, 1), "slots": (1, END),
}  # fmt: skip
EVALUATION = {
    "rows": (0, END),
    "samples": (1, 4096),
    "temperature": (0, 1e3),
    "max_tokens": (0, END),
    "slots": (1, END),
}
CHOICES = {"truncated": ("mask", "penalise", "keep"), "control": ("none", "shuffle", "zero", "flip")}


def check(s: schema.Stage | schema.Tokenizer | schema.Evaluation, where: str) -> None:
    """Raises ConfigError for a number or a word that no stage takes; `where` is its path: "stages.rl"."""
    if isinstance(s, schema.Evaluation):
        _within(s, EVALUATION, where)
    elif isinstance(s, schema.Stage):
        _stage(s, where)
    elif s.add and s.kind != "file":
        raise ConfigError(f"{where}.add goes with kind='file', a tokenizer that is there already; kind is {s.kind!r}.")


def _stage(s: schema.Stage, where: str) -> None:
    _within(s, STAGE, where)
    _within(s.rollout, ROLLOUT, f"{where}.rollout")
    for field, takes in CHOICES.items():
        if getattr(s.rollout, field) not in takes:
            hint = flags.unknown(getattr(s.rollout, field), takes, f"what {where}.rollout.{field} takes")
            raise ConfigError(hint)
    if s.quantize not in ("", "int8", "nf4"):
        raise ConfigError(f"{where}.quantize: {flags.unknown(s.quantize, ('int8', 'nf4'), 'a way to quantise')}")
    if s.samples and not s.prompts:
        raise ConfigError(
            f"{where}.prompts is empty, but {where}.samples={s.samples} needs one; ('',) starts a document."
        )
    if s.batch_size % s.accumulate:
        raise ConfigError(
            f"{where}.batch_size={s.batch_size} does not divide into {where}.accumulate={s.accumulate} microbatches."
        )
    if s.data.row_length < 2:
        raise ConfigError(f"{where}.data.row_length is {s.data.row_length}, but takes at least 2.")
    if not 0 < s.data.heldout_fraction < 1:
        raise ConfigError(
            f"{where}.data.heldout_fraction is {s.data.heldout_fraction}, but takes a share between 0 and 1."
        )


def _within(s: Any, ranges: Mapping[str, tuple[float, float]], where: str) -> None:
    for name, (low, high) in ranges.items():
        value = getattr(s, name)
        if not math.isfinite(value) or not low <= value <= high or (high == END and value == END):
            takes = f"a number of at least {low:g}" if high >= 1000 else f"a number from {low:g} to {high:g}"
            raise ConfigError(f"{where}.{name} is {value}, but takes {takes}.")
