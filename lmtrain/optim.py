"""The optax chain: clip, optimizer, weight decay, learning rate by schedule.

The default is Muon for the matrices of the layers, beside AdamW for everything else. Which is which, and which
dimensions of a matrix are its input and its output, is read from the parameters' logical axes, never from their names
(see `matrix`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmtrain import mesh as meshes
from lmtrain import schema
from lmtrain.mesh import is_axes
from lmtrain.types import nearest

Axes = tuple[str | None, ...]
Schedule = Callable[[Any], jax.Array]

#: Dimensions that only stack independent matrices: each layer's, each expert's, and those without a name.
STACKED = ("layers", "tail", "experts", None)

#: Dimensions that are one vector space together: a query matrix maps `embed` to `heads` x `head_dim`.
HEADS = ("heads", "kv_heads", "head_dim")

#: Optimizers for which b1, b2, eps of the configuration are the defaults. Others keep optax's own.
ADAMS = ("adam", "adamw", "nadam", "nadamw")

#: Optimizers that an error lists, where listing all of optax would hide the message.
COMMON = ("muon", "adamw", "adam", "sgd", "lion", "lamb", "adafactor", "adagrad", "rmsprop", "radam", "adan",
          "ademamix", "prodigy", "schedule_free_adamw", "signum", "yogi")  # fmt: skip


def make(
    cfg: schema.Optim, steps: int, axes_tree: Any, mesh: jax.sharding.Mesh | None = None
) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimizer of a stage.

    Args:
      cfg: its settings.
      steps: updates of the whole stage, over which the schedule runs.
      axes_tree: the parameters' tree, with a tuple of logical axes for each.
      mesh: over which they lie (None: one device); what an optimizer does is the same on all, how Muon does it is not.

    Returns:
      (tx, schedule): tx takes mean gradients and gives updates to add to the parameters. schedule(step) is the learning
      rate at that step; Muon's own follows the same curve, times muon_lr / lr.

    Raises:
      ConfigError: unknown optimizer, argument or schedule, or a number out of range.
    """
    _check(cfg)
    curve = shape(cfg, steps)

    def schedule(step):
        return cfg.lr * curve(step)

    if cfg.name == "muon":
        tx = _muon(cfg, curve, axes_tree, mesh)
    else:
        tx = _named(cfg, schedule, axes_tree)
    parts = [optax.clip_by_global_norm(cfg.clip)] if cfg.clip else []
    parts += [tx] + ([by_layer(cfg.layer_decay)] if cfg.layer_decay != 1 else [])
    return (optax.chain(*parts) if len(parts) > 1 else tx), schedule


def by_layer(decay: float) -> optax.GradientTransformation:
    """Multiplies each layer's updates by decay ** (layers above it), those of the embedding by decay ** (all layers):
    discriminative fine-tuning (Howard and Ruder 2018), as BEiT and others have it. Output and last norm keep theirs.

    Layers lie in params["layers"][place][group] and params["tail"][place][0] (models/transformer.py).
    """

    def update(updates, state, params=None):
        stacks = {name: updates.get(name, {}) for name in ("layers", "tail")}
        places = max((int(i) + 1 for i in stacks["layers"]), default=0)
        count = next((leaf.shape[0] for leaf in jax.tree.leaves(stacks["layers"])), 0)
        total = count * places + max((int(i) + 1 for i in stacks["tail"]), default=0)

        def scaled(path, leaf):
            names = [key.key for key in path]
            if names[0] in ("embed", "embed_norm", "positions"):
                return leaf * decay**total
            if names[0] not in stacks:
                return leaf
            first = int(names[1]) + (count * places if names[0] == "tail" else 0)
            layer = first + places * jnp.arange(leaf.shape[0])
            return leaf * (decay ** (total - 1.0 - layer)).reshape(-1, *(1,) * (leaf.ndim - 1)).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# ----------------------------------------------------------------------------------------------------------- schedules
def shape(cfg: schema.Optim, steps: int) -> Schedule:
    """The schedule's curve: step (0 is the first update) -> share of the learning rate, in (0, 1], float32.

    Every schedule rises linearly over the warm-up; then
      constant  stays at 1
      linear    falls towards `final`
      cosine    falls towards `final` along half a cosine (Loshchilov and Hutter 2017)
      wsd       stays at 1, falls linearly towards `final` over the last `decay` steps (warmup-stable-decay; Hu et al.
                2024)

    `final` is reached at step `steps`, one past the last update (step `steps` - 1): where it is 0, no update is wasted.
    """
    warmup = _count(cfg.warmup, steps)
    decay = _count(cfg.decay, steps)

    def curve(step):
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        if cfg.schedule == "constant":
            return rise
        begin = max(warmup, steps - decay) if cfg.schedule == "wsd" else warmup
        done = jnp.clip((step - begin) / max(steps - begin, 1), 0.0, 1.0)
        left = 0.5 * (1 + jnp.cos(jnp.pi * done)) if cfg.schedule == "cosine" else 1.0 - done
        return rise * (cfg.final + (1 - cfg.final) * left)

    return curve


SCHEDULES = ("wsd", "cosine", "linear", "constant")


def _count(amount: float, steps: int) -> int:
    """Steps meant by a number: a share of all steps if it is below 1, else steps."""
    return min(steps, round(amount * steps) if amount < 1 else round(amount))


# -------------------------------------------------------------------------------------------------------------- masks
def matrix(axes: Axes) -> optax.contrib.MuonDimensionNumbers | None:
    """How a parameter of these logical axes is a stack of matrices in x W = y; None where it is none.

    `layers`, `experts` and unnamed dimensions stack; neighbouring head dimensions count as one. What then has two
    dimensions is a matrix: the first is its input, the second its output. Embedding and output head (`vocab`) are left
    out, since their gradients are rows for single tokens; so is the router, whose `experts` are its output and last.

      ("layers", "embed", "heads", "head_dim")   in 1, out 2, 3
      ("layers", "heads", "head_dim", "embed")   in 1, 2, out 3
      ("layers", "experts", "embed", "mlp")      in 2, out 3
      ("layers", "heads", "head_dim")            None: a bias
    """
    if "vocab" in axes or (axes and axes[-1] == "experts"):
        return None
    groups: list[list[int]] = []
    for i, name in enumerate(axes):
        if name in STACKED:
            continue
        if groups and name in HEADS and axes[groups[-1][-1]] in HEADS:
            groups[-1].append(i)
        else:
            groups.append([i])
    if len(groups) != 2:
        return None
    return optax.contrib.MuonDimensionNumbers(tuple(groups[0]), tuple(groups[1]))


def matrices(axes_tree: Any) -> Any:
    """The same tree, True where weight decay (and Muon) applies."""
    return jax.tree.map(lambda axes: matrix(axes) is not None, axes_tree, is_leaf=is_axes)


# --------------------------------------------------------------------------------------------------------- optimizers
def _muon(
    cfg: schema.Optim, curve: Schedule, axes_tree: Any, mesh: jax.sharding.Mesh | None
) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for matrices, AdamW for the rest, one schedule for both.

    Updates are orthogonal matrices times sqrt(max(1, out / in)), Jordan's scale; `optim.args.consistent_rms=0.2` takes
    that of Liu et al. 2025 (arXiv 2502.16982) instead, with which AdamW's learning rates fit. optax.contrib.muon has an
    Adam of its own that inherits Muon's Nesterov momentum: the partition here keeps the rest to plain AdamW.
    """
    given = inspect.signature(optax.contrib.muon).parameters
    set_here = ("learning_rate", "beta", "weight_decay", "muon_weight_dimension_numbers")
    args = _arguments(cfg, [n for n in given if not n.startswith("adam_")], dict.fromkeys(set_here))
    nesterov, mu_dtype = args.pop("nesterov", True), args.pop("mu_dtype", None)
    mask = args.pop("weight_decay_mask", None)

    def orthogonal(x: jax.Array, axes: Axes) -> jax.Array:
        # Muon without a memory and with a learning rate of -1: x made orthogonal, and scaled by its shape.
        one = optax.contrib.muon(-1.0, beta=0.0, nesterov=False, **args, muon_weight_dimension_numbers=matrix(axes))
        return one.update(x, one.init(x), x)[0]

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda axes, x: x if isinstance(x, optax.MaskedNode) else whole(orthogonal, x, axes, mesh),
                            axes_tree, updates, is_leaf=is_axes), state  # fmt: skip

    muon = optax.chain(
        _momentum(cfg.momentum, nesterov, mu_dtype),
        optax.GradientTransformation(lambda params: optax.EmptyState(), update),
        optax.add_decayed_weights(cfg.weight_decay, mask),
        optax.scale_by_learning_rate(lambda step: cfg.muon_lr * curve(step)),
    )
    adam = optax.adamw(lambda step: cfg.lr * curve(step), cfg.b1, cfg.b2, cfg.eps, weight_decay=0.0)
    labels = jax.tree.map(lambda is_matrix: "muon" if is_matrix else "adam", matrices(axes_tree))
    return optax.partition({"muon": muon, "adam": adam}, labels)


class Momentum(NamedTuple):
    """Muon's memory. updates: int32, how many so far. mu: the mean of the gradients, a tree like the parameters'."""

    updates: jax.Array
    mu: Any


def _momentum(beta: float, nesterov: bool, dtype: Any) -> optax.GradientTransformation:
    """The mean of past gradients with its bias taken off, Nesterov's way: what optax's Muon makes orthogonal."""

    def init(params):
        return Momentum(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params, dtype=dtype))

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.updates)
        mu = optax.tree.update_moment(updates, state.mu, beta, 1)
        if nesterov:
            ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
            now = optax.tree.bias_correction(updates, beta, count)
            hat = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)
        else:
            hat = optax.tree.bias_correction(mu, beta, count)
        return hat, Momentum(count, optax.tree.cast(mu, dtype))

    return optax.GradientTransformation(init, update)


def whole(
    f: Callable[[jax.Array, Axes], jax.Array], x: jax.Array, axes: Axes, mesh: jax.sharding.Mesh | None
) -> jax.Array:
    """f(x, axes) of a stack of matrices, where f takes each matrix by itself and the mesh may split them.

    Devices that hold parts of the same matrices exchange them for whole ones, a share of the stack each, and back: two
    all-to-alls, where the products of split matrices would be reduced and kept whole on every device, for the whole
    stack, at each of Newton-Schulz's steps (Liu et al. 2025, section 2.3, gather whole matrices too). A stack that
    the devices do not divide is filled up with zeros.

    Args:
      axes: the logical axes of x; those of STACKED come first.
    """
    if mesh is None or mesh.size == 1:
        return f(x, axes)
    spec = meshes.spec(axes, mesh)
    stacked = next(i for i, name in enumerate(axes) if name not in STACKED)
    split = [(i - stacked + 1, axis) for i, part in enumerate(spec) if i >= stacked and part
             for axis in reversed((part,) if isinstance(part, str) else part)]  # fmt: skip
    ways = math.prod(mesh.shape[axis] for _, axis in split)

    def local(x):
        shape = x.shape
        x = x.reshape(-1, *shape[stacked:])
        count = x.shape[0]
        x = jnp.pad(x, ((0, -count % ways), *((0, 0),) * (x.ndim - 1)))
        for dim, axis in split:
            x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=dim, tiled=True)
        x = f(x, (None, *axes[stacked:]))
        for dim, axis in reversed(split):
            x = jax.lax.all_to_all(x, axis, split_axis=dim, concat_axis=0, tiled=True)
        return x[:count].reshape(shape)

    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _named(cfg: schema.Optim, schedule: Schedule, axes_tree: Any) -> optax.GradientTransformation:
    """Any optimizer of optax or optax.contrib, by name."""
    if cfg.name not in names():
        raise schema.ConfigError(_unknown("optim.name", cfg.name, names()))
    make_tx = getattr(optax if hasattr(optax, cfg.name) else optax.contrib, cfg.name)
    takes = list(inspect.signature(make_tx).parameters)
    settings: dict[str, Any] = {"learning_rate": schedule}
    # The configuration's b1, b2 and eps are AdamW's. They reach another optimizer only where they were changed.
    defaults = schema.Optim()
    for field in ("b1", "b2", "eps"):
        changed = getattr(cfg, field) != getattr(defaults, field)
        if field in takes and (changed or cfg.name in ADAMS) and field not in cfg.args:
            settings[field] = getattr(cfg, field)
        elif changed and field not in takes:
            raise schema.ConfigError(f"optim.{field} is {getattr(cfg, field)}, but {cfg.name} takes none.")
    decay = next((n for n in ("weight_decay", "weight_decay_rate") if n in takes), None)
    mask = next((n for n in ("mask", "weight_decay_mask") if n in takes), None)
    if decay and decay not in cfg.args and (mask or not cfg.weight_decay):
        settings[decay] = cfg.weight_decay or (None if decay == "weight_decay_rate" else 0.0)
    elif cfg.weight_decay:
        how = f"only of all parameters alike: set optim.args.{decay}" if decay else "not: set it to 0"
        raise schema.ConfigError(f"optim.weight_decay is {cfg.weight_decay}, but {cfg.name} decays {how}.")
    if mask:
        settings[mask] = matrices(axes_tree)
    try:
        tx = make_tx(**settings, **_arguments(cfg, takes, settings))
        # Some want more than gradients (the loss, a Hessian): found out here, not at the first step.
        tiny = jax.tree.map(lambda axes: jnp.zeros((2,) * len(axes)), axes_tree, is_leaf=is_axes)
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), tiny)
    except (TypeError, ValueError, KeyError) as error:
        raise schema.ConfigError(f"optim.name is {cfg.name!r}, which does not work so: {error}") from error
    return tx


def names() -> list[str]:
    """What `optim.name` takes: the functions of optax and optax.contrib whose first argument is the learning rate."""
    found = set()
    for module in (optax, optax.contrib):
        for name, function in vars(module).items():
            if inspect.isfunction(function) and not name.startswith(("_", "scale_by_")):
                if next(iter(inspect.signature(function).parameters), "") == "learning_rate":
                    found.add(name)
    return sorted(found)


# ------------------------------------------------------------------------------------------------------------- checks
def _arguments(cfg: schema.Optim, takes: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """optim.args, each a keyword of the optimizer that no field sets already."""
    free = [n for n in takes if n not in settings]
    for name in cfg.args:
        if name not in free:
            raise schema.ConfigError(_unknown(f"optim.args ({cfg.name})", name, free))
    return dict(cfg.args)


def _unknown(field: str, got: str, valid: list[str] | tuple[str, ...]) -> str:
    shown = [name for name in COMMON if name in valid] if len(valid) > 20 else valid
    others = f", and {len(valid) - len(shown)} others of optax" if len(shown) < len(valid) else ""
    return f"{field}: there is no {got!r}.{nearest(got, valid)} (valid: {', '.join(shown)}{others})"


def _check(cfg: schema.Optim) -> None:
    if cfg.schedule not in SCHEDULES:
        raise schema.ConfigError(_unknown("optim.schedule", cfg.schedule, SCHEDULES))
    limits = {
        "b1": (0, 1),
        "b2": (0, 1),
        "momentum": (0, 1),
        "final": (0, 1),
        "layer_decay": (0, 1),
        "lr": (0, None),
        "muon_lr": (0, None),
    }
    limits |= {"warmup": (0, None), "decay": (0, None), "weight_decay": (0, None), "clip": (0, None), "eps": (0, None)}
    for field, (low, high) in limits.items():
        value = getattr(cfg, field)
        if not (math.isfinite(value) and low <= value <= (value if high is None else high)):
            takes = f"between {low} and {high}" if high is not None else f"at least {low}"
            raise schema.ConfigError(f"optim.{field} is {value}; it takes a number of {takes}.")
    for name, value in cfg.args.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise schema.ConfigError(f"optim.args.{name} is {value}; it takes a finite number.")
