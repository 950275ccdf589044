"""One update: gradients of an objective, summed over microbatches and devices, divided once, applied.

An objective returns sums (`loss_sum`, `weight_sum`, metrics as (sum, weight) pairs); the division by the weight of the
whole batch happens here and nowhere else. So 8 microbatches on one device and one on 8 devices make the same update,
whatever the share of loss tokens in each. A metric whose name ends in _max is the largest, not a sum (`add`).

An objective that needs a mean over the whole batch before its loss has an attribute `first`, of the same arguments,
that returns {name: (sum, weight)}: evaluated over all microbatches, without a gradient. The loss finds the quotients
in its batch, as scalars of those names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lmtrain import mesh as meshes
from lmtrain import partial, schema
from lmtrain.types import Batch, Params, TrainState

#: loss(forward, params, batch, cfg) -> (loss_sum, weight_sum, {name: (sum, weight)}), scalars.
Loss = Callable[[Any, Params, Batch, Any], tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]]
Sums = dict[str, tuple[jax.Array, jax.Array]]


# -------------------------------------------------------------------------------------------------------------- state
def make_init(
    init: Callable[[jax.Array], Params], tx: optax.GradientTransformation, axes_tree: Any, mesh: jax.sharding.Mesh
) -> tuple[Callable[..., TrainState], TrainState]:
    """How a run's state begins.

    Args:
      init: key -> parameters.
      axes_tree: the parameters' tree of logical axes.

    Returns:
      (start, abstract). start(key, params=None) is the state before the first update, every array born on the devices
      that keep it (no host or device ever holds the whole); what params lack is drawn with the key. abstract is its
      tree of ShapeDtypeStructs with shardings, as `checkpoint` restores it.

    Raises:
      ConfigError: where the mesh does not divide a parameter.
    """

    def begin(key, params=None):
        key, draw = jax.random.split(key)
        given = {} if params is None else jax.tree.map(lambda p: p.astype(jnp.float32), params)
        params = partial.join(init(draw), given)  # what is missing (a scalar head, adapters) is drawn
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params), key=key)

    shapes = jax.eval_shape(begin, jax.random.key(0))
    meshes.check_shapes(shapes.params, axes_tree, mesh)
    shardings = _state_shardings(shapes, axes_tree, mesh)
    abstract = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
    return jax.jit(begin, out_shardings=shardings), abstract


def _state_shardings(shapes: TrainState, axes_tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Parameters by their axes; what the optimizer keeps for a parameter, in its shape, like the parameter."""
    params = meshes.shardings(axes_tree, mesh)
    where = dict(jax.tree_util.tree_leaves_with_path(params))
    sizes = {path: p.shape for path, p in jax.tree_util.tree_leaves_with_path(shapes.params)}

    def like_its_parameter(path, leaf):
        # .../mu/blocks/q belongs to blocks/q: the longest end of the path that is a parameter's.
        for start in range(len(path)):
            if sizes.get(path[start:]) == leaf.shape:
                return where[path[start:]]
        return meshes.replicated(mesh)

    whole: Any = meshes.replicated(mesh)
    opt_state = jax.tree_util.tree_map_with_path(like_its_parameter, shapes.opt_state)
    return TrainState(step=whole, params=params, opt_state=opt_state, key=whole)


# ------------------------------------------------------------------------------------------------------------- update
def make_update(
    loss: Loss,
    forward: Any,
    tx: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    abstract: TrainState,
    mesh: jax.sharding.Mesh,
    cfg: Any = None,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted update(state, batch) -> (state, metrics). The state passed in is donated.

    Microbatch a of A takes the rows a, a + A, a + 2A, ..., which keeps every row on its device.

    Metrics are float32 scalars: `loss` (the objective's mean), `weight` (what it was divided by: loss tokens),
    `grad_norm` (before clipping), `update_ratio` (norm of the update over norm of the parameters), `lr`, and the
    objective's own. A batch of weight 0 (nothing in it counts) changes neither parameters nor optimizer, and reports
    weight 0 and loss 0.

    Args:
      loss: the objective, called as loss(forward, params, batch, cfg).
      schedule: of `optim.make`.
      abstract: of `make_init`; its shardings are those of the state that comes out.
      accumulate: microbatches of one update.

    Raises (at the first call with a shape):
      ConfigError: where the batch does not split into equal microbatches over the mesh.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def gradients(params, batch):
        def total(params):
            sums = _sums(loss, forward, params, batch, cfg)
            return sums["loss"][0], sums

        grads, sums = jax.grad(total, has_aux=True)(params)
        # Pinned, so that under fsdp gradients are scattered as they are summed, never gathered whole.
        return jax.lax.with_sharding_constraint(_float32(grads), shardings.params), sums

    def update(state, batch):
        micro = microbatches(batch, accumulate, mesh)
        rows = {name: x for name, x in micro.items() if _has_rows(name)}
        fixed = {name: x for name, x in micro.items() if not _has_rows(name)}
        if hasattr(loss, "first"):
            _, ahead = _over(
                lambda row: ({}, _first(loss, forward, state.params, {**fixed, **row}, cfg)), rows, accumulate
            )
            fixed |= means(ahead)
        grads, sums = _over(lambda row: gradients(state.params, {**fixed, **row}), rows, accumulate)

        weight = sums["loss"][1]
        grads = jax.tree.map(lambda g: g / jnp.where(weight == 0, 1.0, weight), grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(weight == 0, old, new), (params, opt_state), (state.params, state.opt_state)
        )
        metrics = means(sums)
        metrics["weight"] = weight
        metrics["grad_norm"] = optax.global_norm(grads)
        metrics["update_ratio"] = optax.global_norm(updates) / optax.global_norm(state.params)
        metrics["lr"] = schedule(state.step)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, meshes.replicated(mesh)))


def microbatches(batch: Batch, accumulate: int, mesh: jax.sharding.Mesh) -> Batch:
    """Arrays B... -> A, B/A, ...; entries without rows (a frozen model, say) stay as they are.

    Raises:
      ConfigError: where the rows do not divide by accumulate times the ways the mesh splits them.
    """
    ways = accumulate * meshes.batch_shards(mesh)
    out = {}
    for name, x in batch.items():
        if _has_rows(name):
            if x.shape[0] % ways:
                raise schema.ConfigError(
                    f"batch_size is {x.shape[0]}, not a multiple of {ways}: accumulate={accumulate} times the "
                    f"{ways // accumulate} parts that the mesh splits rows into (stage * data * fsdp * expert)."
                )
            axes = meshes.batch_axes(name, x.ndim)
            x = jnp.swapaxes(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 0, 1)
            x = meshes.constrain(x, (None, *axes), mesh)
        out[name] = x
    return out


def add(a: Sums, b: Sums) -> Sums:
    """The sums of two parts of a batch. Of a name that ends in _max the larger; a part of weight 0 has no say in it."""

    def join(name):
        (x, v), (y, w) = a[name], b[name]
        if name.endswith("_max"):
            return jnp.maximum(jnp.where(v == 0, -jnp.inf, x), jnp.where(w == 0, -jnp.inf, y)), v + w
        return x + y, v + w

    return {name: join(name) for name in a}


def means(sums: Sums) -> dict[str, jax.Array]:
    """What the sums amount to, once the whole batch is in them; 0 where nothing counted."""
    return {
        name: jnp.where(w == 0, 0.0, x) if name.endswith("_max") else x / jnp.where(w == 0, 1.0, w)
        for name, (x, w) in sums.items()
    }


def _over(f: Callable[[Batch], tuple[Any, Sums]], rows: Batch, accumulate: int) -> tuple[Any, Sums]:
    """f of every microbatch (a tree to be summed, and Sums), added up."""
    if accumulate == 1:
        return f(jax.tree.map(lambda x: x[0], rows))
    one = jax.eval_shape(lambda rows: f(jax.tree.map(lambda x: x[0], rows)), rows)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), one)

    def more(total, row):
        tree, sums = f(row)
        return (jax.tree.map(jnp.add, total[0], tree), add(total[1], sums)), None

    return jax.lax.scan(more, zeros, rows)[0]


def _sums(loss: Loss, forward: Any, params: Params, batch: Batch, cfg: Any) -> Sums:
    loss_sum, weight_sum, metrics = loss(forward, params, batch, cfg)
    return _float32({"loss": (loss_sum, weight_sum), **metrics})


def _first(loss: Any, forward: Any, params: Params, batch: Batch, cfg: Any) -> Sums:
    return _float32(loss.first(forward, params, batch, cfg))


def _has_rows(name: str) -> bool:
    """Whether a batch's entry is an array of rows: its name ends in a shape that begins with B. Others are one for all
    microbatches: scalars, a frozen model."""
    return re.search("_B[A-Z]*$", name) is not None


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


# --------------------------------------------------------------------------------------------------------- evaluation
def make_evaluate(
    loss: Loss, forward: Any, mesh: jax.sharding.Mesh, cfg: Any = None
) -> Callable[[Params, Batch], Sums]:
    """The jitted evaluate(params, batch) -> {name: (sum, weight)}, `loss` included.

    `add` over batches, then `means`. What an objective works out `first` is of the one batch here.
    """

    def evaluate(params, batch):
        if hasattr(loss, "first"):
            batch = {**batch, **means(_first(loss, forward, params, batch, cfg))}
        return _sums(loss, forward, params, batch, cfg)

    return jax.jit(evaluate, out_shardings=meshes.replicated(mesh))
