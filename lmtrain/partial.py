"""Training some of a model's parameters: which ones, their tree apart from the rest, and the two as one again.

A parameter is named by its path without the stack it lies in: `attn/q`, `mlp/up_lora/a`, `embed/table`, `norm/scale`.
What is not trained is never in the optimizer's state, nor in a checkpoint: it comes from where the stage started.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lmtrain import schema
from lmtrain.types import Params, nearest

STACKS = ("layers", "tail")
#: Patterns of what is trained beside frozen matrices that have adapters, where Stage.train says nothing.
ADAPTERS = ("*_lora/*", "scalar/*")
REST = "rest"  # the frozen parameters' name in a batch


def named(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """(path, name, leaf) of every parameter; whatever is no dict is a leaf."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from named(value, (*path, key))
        else:
            whole = (*path, key)
            yield whole, "/".join(whole[2:] if whole[0] in STACKS else whole), value


def trained(cfg: schema.Stage, model: schema.Model, tree: Any) -> set[tuple[str, ...]]:
    """The paths of the parameters that a stage trains: those of `train`, less those of `freeze`.

    Args:
      tree: any tree of the model's parameters, such as transformer.axes.

    Raises:
      ConfigError: a pattern that is no parameter's name, or nothing left to train.
    """
    paths = {path: name for path, name, _ in named(tree)}
    names = sorted(set(paths.values()))
    for field, patterns in (("train", cfg.train), ("freeze", cfg.freeze)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise schema.ConfigError(
                    f"{field} has {pattern!r}, which is the name of no parameter.{nearest(pattern, names)} "
                    f"(names: {', '.join(names)})"
                )
    wanted = cfg.train or (ADAPTERS if model.lora.rank else ("*",))

    def matches(name: str, patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    chosen = {path for path, name in paths.items() if matches(name, wanted) and not matches(name, cfg.freeze)}
    if not chosen:
        raise schema.ConfigError(f"train {wanted} without freeze {cfg.freeze} leaves nothing to train.")
    return chosen


def split(tree: Any, chosen: set[tuple[str, ...]], path: tuple[str, ...] = ()) -> tuple[Params, Params]:
    """(the chosen part, the rest) of a nested dict; branches without a leaf are left out."""
    ours: Params = {}
    rest: Params = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            a, b = split(value, chosen, (*path, key))
            ours |= {key: a} if a else {}
            rest |= {key: b} if b else {}
        else:
            (ours if (*path, key) in chosen else rest)[key] = value
    return ours, rest


def join(a: Params, b: Params) -> Params:
    """Both as one tree; b's leaf where both have one."""
    out = dict(a)
    for key, value in b.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = join(out[key], value) if both else value
    return out


def ordered(tree: Params, like: Any) -> Params:
    """The same tree with its keys in another's order."""
    return {k: ordered(tree[k], v) if isinstance(v, dict) else tree[k] for k, v in like.items() if k in tree}


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss of all parameters as one of the trained ones: the rest come in the batch."""

    loss: Callable[..., Any]

    def __call__(self, forward: Any, params: Params, batch: dict[str, Any], cfg: Any) -> Any:
        return self.loss(forward, *self._whole(params, batch), cfg)

    def _whole(self, params: Params, batch: dict[str, Any]) -> tuple[Params, dict[str, Any]]:
        return join(batch[REST], params), {name: x for name, x in batch.items() if name != REST}


class FirstObjective(Objective):
    """The same of a loss that has a first pass."""

    def first(self, forward: Any, params: Params, batch: dict[str, Any], cfg: Any) -> Any:
        """What the whole update's loss needs to know before it."""
        return self.loss.first(forward, *self._whole(params, batch), cfg)  # type: ignore[attr-defined]


def objective(loss: Callable[..., Any]) -> Objective:
    """The loss of the trained parameters."""
    return (FirstObjective if hasattr(loss, "first") else Objective)(loss)
