"""Layers in stages: each device of the stage axis holds a part of the layers, and microbatches pass through them.

    S stages, R rounds, G layer groups (P = G / (S * R) of them at a time), M microbatches (J = M / S beside each stage)
    B rows, b rows of one microbatch, T positions, D width

All stages work at once, each on a microbatch of its own: one vmap over the stage axis, after which every result moves
on to the next stage (a collective permute). With R rounds a stage holds R runs of P groups, S * P groups apart, and a
microbatch goes round R times: the circular schedule (Narayanan et al. 2021, "interleaved"; praxis, MaxText), which
leaves (S - 1) / (M * R + S - 1) of the time unused. Gradients are autodiff's: the same belt, backwards.

Waiting microbatches lie on a belt [S, J, ...] that is split over the stages like all else. Stage 0 takes from its own
end; what the last stage has done goes to the place that its microbatch left, so that no device ever holds them all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmtrain import schema
from lmtrain.mesh import batch_shards, divisors, spec

#: The stage axis where a stage is looked at from within: there it splits no row, so that no rule may name it.
WITHIN = "within"


def inside(mesh: Mesh) -> Mesh:
    """The mesh as the layers of one stage see it: rows are not split over stages."""
    names = tuple(WITHIN if name == "stage" else name for name in mesh.axis_names)
    return Mesh(mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))


def microbatches(cfg: schema.Model, mesh: Mesh | None, rows: int) -> int:
    """M for a batch of so many rows, 0 where there are no stages to pass. What is asked for where the rows divide by
    it, else one for each stage."""
    if mesh is None or mesh.shape["stage"] == 1 or rows % batch_shards(mesh):
        return 0
    stages = mesh.shape["stage"]
    asked = cfg.microbatches or stages
    return asked if rows * stages % (asked * batch_shards(mesh)) == 0 else stages


def check(cfg: schema.Model, groups: int, mesh: Mesh) -> None:
    """Refuses stages that cannot be filled.

    Raises:
      ConfigError: naming the setting, what it is, and what it could be.
    """
    stages = mesh.shape["stage"]
    if stages > 1 and groups % (stages * cfg.rounds):
        raise schema.ConfigError(
            f"mesh.stage={stages} times model.rounds={cfg.rounds} does not divide the {groups} groups of layers "
            f"(model.layers={cfg.layers}, pattern {cfg.pattern}); the product takes one of {divisors(groups)}."
        )
    if stages > 1 and cfg.microbatches % stages:
        raise schema.ConfigError(
            f"model.microbatches is {cfg.microbatches}, but takes a multiple of mesh.stage={stages}, or 0."
        )


def run(
    stage: Callable[..., tuple[jax.Array, jax.Array]], weights: Any, x_BTD: jax.Array, rows: Any, mesh: Mesh,
    count: int, rounds: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Passes x through all layers.

    Args:
      stage: (weights of P groups, x_bTD, rows of b) -> (x_bTD, router losses), with a mesh that is `inside`.
      weights: a tree of arrays [G, ...], in the order of the layers.
      rows: a tree of what else belongs to each row, [B, ...]; [1, ...] where it is that of all rows.
      count: M.

    Returns:
      (x_BTD, router losses of all rows)
    """
    S, R, M = mesh.shape["stage"], rounds, count
    B, J = x_BTD.shape[0], M // S
    within = inside(mesh)

    def pin(a: jax.Array, *axes: Any) -> jax.Array:
        free = (PartitionSpec.UNCONSTRAINED,) * (a.ndim - len(axes))
        return jax.lax.with_sharding_constraint(a, NamedSharding(within, PartitionSpec(*axes, *free)))

    (split,) = spec(("batch",), within)

    def cut(a: jax.Array) -> jax.Array:  # [B, ...] -> [S, J, b, ...]: what a stage begins with lies there already
        return jnp.swapaxes(a.reshape(S, B // M, J, *a.shape[1:]), 1, 2)

    def arranged(w: jax.Array) -> jax.Array:  # [G, ...] -> [S, R, P, ...]
        w = jnp.swapaxes(w.reshape(R, S, -1, *w.shape[1:]), 0, 1)
        return pin(w, WITHIN)

    weights = jax.tree.map(arranged, weights)
    own = jax.tree.map(lambda a: a.shape[0] == B, rows)
    rows = jax.tree.map(lambda a, mine: cut(a).reshape(M, -1, *a.shape[1:]) if mine else a, rows, own)
    stages_S = jnp.arange(S)
    after = (S - 1) // J  # how often a place of the belt has moved on by the time its microbatch is done

    def one(weights_R: Any, round_: jax.Array, x_bTD: jax.Array, rows: Any) -> Any:
        pick = lambda w: w[0] if R == 1 else jax.lax.dynamic_index_in_dim(w, round_, keepdims=False)  # noqa: E731
        return stage(jax.tree.map(pick, weights_R), x_bTD, rows)

    lanes = jax.vmap(one, in_axes=(0, 0, 0, jax.tree.map(lambda mine: 0 if mine else None, own)), spmd_axis_name=WITHIN)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # else the mask is kept, as large as what it chooses from
    def at(mask_S: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
        return jnp.where(mask_S.reshape(S, 1, 1, 1), yes, no)

    def tick(carry: Any, t: jax.Array) -> Any:
        belt_SJbTD, y_SbTD, aux = carry
        place_SbTD = jax.lax.dynamic_index_in_dim(belt_SJbTD, t % J, 1, keepdims=False)
        x_SbTD = at(stages_S == 0, place_SbTD, jnp.roll(y_SbTD, 1, axis=0))
        belt_SJbTD = jax.lax.dynamic_update_index_in_dim(belt_SJbTD, jnp.roll(place_SbTD, -1, axis=0), t % J, 1)
        job_S = t - stages_S  # which microbatch of which round
        busy_S = (job_S >= 0) & (job_S < M * R)
        here = jax.tree.map(lambda a, mine: pin(a[job_S % M], WITHIN, split) if mine else a, rows, own)
        y_SbTD, aux_S = lanes(weights, jnp.clip(job_S // M, 0, R - 1), pin(x_SbTD, WITHIN, split), here)
        y_SbTD = pin(y_SbTD, WITHIN, split)
        back = (t - (S - 1)) % J
        place_SbTD = jax.lax.dynamic_index_in_dim(belt_SJbTD, back, 1, keepdims=False)
        done_S = (stages_S == S - 1 - after) & (t >= S - 1)
        place_SbTD = at(done_S, jnp.roll(y_SbTD, -after, axis=0), place_SbTD)
        belt_SJbTD = jax.lax.dynamic_update_index_in_dim(belt_SJbTD, place_SbTD, back, 1)
        return (pin(belt_SJbTD, WITHIN, None, split), y_SbTD, aux + jnp.where(busy_S, aux_S, 0).sum()), None

    belt = pin(cut(x_BTD), WITHIN, None, split)
    start = (belt, jnp.zeros_like(belt[:, 0]), jnp.zeros((), jnp.float32))
    (belt, _, aux), _ = jax.lax.scan(tick, start, jnp.arange(M * R + S - 1))
    # The last S - 1 ticks have moved some places on: back to where each began.
    more = (S - 1) % J
    belt = jnp.concatenate(
        [jnp.roll(belt[:, :more], after + 1, axis=0), jnp.roll(belt[:, more:], after, axis=0)], axis=1
    )
    belt = pin(belt, WITHIN, None, split)
    return jnp.swapaxes(belt, 1, 2).reshape(x_BTD.shape), aux
