"""A training state as Orbax stores it, and Orbax as checkpoint.py calls it."""

from __future__ import annotations

import logging
import os
import pathlib
from typing import Any

import jax
import numpy as np

from lmtrain.types import LmtrainError, Params, TrainState


def items(state: TrainState) -> tuple[Params, dict[str, Any]]:
    """(params, rest): the parameters' nested dict, and all else by its path, with the random key as plain numbers.

    Stored so, a checkpoint can be read without the optimizer that made it.
    """
    key: Any = state.key
    if isinstance(key, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, key)
        key = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)
    else:
        key = jax.random.key_data(key)
    return state.params, {"step": state.step, "key": key} | {f"opt/{k}": v for k, v in flat(state.opt_state)}


def state(abstract: TrainState, params: Params, rest: dict[str, Any], key_impl: str) -> TrainState:
    """The inverse of `items`."""
    key = jax.random.wrap_key_data(rest["key"], impl=key_impl)
    leaves = [rest[f"opt/{name}"] for name, _ in flat(abstract.opt_state)]
    opt_state = jax.tree.unflatten(jax.tree.structure(abstract.opt_state), leaves)
    return TrainState(step=rest["step"], params=params, opt_state=opt_state, key=key)


def flat(tree: Any) -> list[tuple[str, Any]]:
    """[("blocks/q", leaf), ...]"""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def describe(params: Params, rest: dict[str, Any]) -> dict[str, list[Any]]:
    """{"params/blocks/q": ["float32", [4, 128, 4, 32]], ...}"""
    return {name: [str(np.dtype(x.dtype)), list(x.shape)] for name, x in named(params, rest)}


def folders(params: Params, rest: dict[str, Any]) -> dict[str, Any]:
    """{"params/blocks.q": leaf, ..., "rest/step": leaf, ...}: by the folder that Orbax gives each array."""
    ours = {f"params/{name.replace('/', '.')}": x for name, x in flat(params)}
    return ours | {f"rest/{name}": x for name, x in rest.items()}


def named(params: Params, rest: dict[str, Any]) -> list[tuple[str, Any]]:
    """[("params/blocks/q", leaf), ..., ("step", leaf), ...]: all of a state by name."""
    return [(f"params/{name}", x) for name, x in flat(params)] + list(rest.items())


def check_same(path: pathlib.Path, saved: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> None:
    """Raises LmtrainError naming the first arrays that differ, parameters before the optimizer's."""
    differ = [n for n in saved.keys() | wanted.keys() if saved.get(n) != wanted.get(n)]
    if not differ:
        return
    differ.sort(key=lambda n: (not n.startswith("params/"), n))

    def says(array: list[Any] | None) -> str:
        return f"{array[0]} {tuple(array[1])}" if array else "nothing"

    shown = [f"{n} is {says(saved.get(n))} there, {says(wanted.get(n))} by the configuration" for n in differ[:3]]
    more = f", and {len(differ) - 3} others" if len(differ) > 3 else ""
    what = "model" if differ[0].startswith("params/") else "optim"
    fix = f"Start another --workdir, or set {what} as in the config.json beside it."
    raise LmtrainError(f"{path}: {'; '.join(shown)}{more}. {fix}")


# -------------------------------------------------------------------------------------------------------------- Orbax
def checkpointer(asynchronous: bool, apart: bool = False) -> Any:
    """Orbax, without its tracebacks in the log.

    Args:
      apart: each process writes into a folder that the others do not see, chunks in files of their own (zarr without
        OCDBT), so that all these folders laid over one another are a checkpoint.
    """
    import orbax.checkpoint as ocp

    # Orbax logs the traceback of every failed save; the error itself reaches the caller as one message.
    logging.getLogger("absl").addFilter(_not_from_orbax)
    logging.getLogger("asyncio").addFilter(_retrieved)
    if not apart:
        return (ocp.AsyncCheckpointer if asynchronous else ocp.Checkpointer)(ocp.CompositeCheckpointHandler())
    each: Any = {"multiprocessing_options": ocp.options.MultiprocessingOptions(primary_host=None)}
    parts = {name: ocp.StandardCheckpointHandler(use_ocdbt=False, **each) for name in ("params", "rest")}
    composite = ocp.CompositeOptions(**each)
    handler = ocp.CompositeCheckpointHandler(composite_options=composite, **parts)
    return (ocp.AsyncCheckpointer if asynchronous else ocp.Checkpointer)(handler, **each)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _retrieved(record: logging.LogRecord) -> bool:
    # One array that fails to be written fails its neighbours, and asyncio would print a traceback for each.
    return "exception was never retrieved" not in record.getMessage()


def args(kind: str, **trees: Any) -> Any:
    """What Orbax saves ("StandardSave") or restores ("StandardRestore"): each tree in a folder of its name."""
    import orbax.checkpoint as ocp

    return ocp.args.Composite(**{name: getattr(ocp.args, kind)(tree) for name, tree in trees.items()})
