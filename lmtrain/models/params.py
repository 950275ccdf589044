"""Parameters: one line each, with shape, logical axes and initialiser; and the pure trees made of them.

    self.up = param(rngs, (D, F), ("embed", "mlp"), normal(D**-0.5))

Inside models/ a parameter is an `nnx.Param` that remembers its logical axes. Everybody else sees pure nested dicts of
float32 arrays: `pure` and `axes_of` make them, `merge` puts them back under a module's code while tracing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmtrain.types import Params

Init = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def normal(std: float) -> Init:
    """Draws from a normal distribution of that standard deviation."""
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def constant(value: float) -> Init:
    """The same value everywhere; needs no randomness."""
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


zeros = constant(0.0)
ones = constant(1.0)


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Init) -> nnx.Param:
    """One parameter: float32, of this shape, with a logical axis (or None) for each dimension."""
    if len(shape) != len(axes):
        raise ValueError(f"a parameter of shape {shape} needs {len(shape)} logical axes, got {axes}")
    return nnx.Param(init(rngs.params(), shape), axes=axes)


def pure(module: nnx.Module) -> Params:
    """A module's parameters as a pure nested dict."""
    return nnx.to_pure_dict(nnx.state(module))


def axes_of(build: Callable[[], nnx.Module]) -> Params:
    """The tree of logical axes of the module that `build` makes; nothing is allocated."""
    state = nnx.state(nnx.eval_shape(build))
    return nnx.traversals.unflatten_mapping({path: leaf.axes for path, leaf in nnx.to_flat_state(state)})


def graph(build: Callable[[], nnx.Module]) -> nnx.GraphDef:
    """The module's code without its parameters: hashable, made once per configuration."""
    return nnx.split(nnx.eval_shape(build))[0]


def merge(graphdef: nnx.GraphDef, params: Params) -> Any:
    """A module that computes with these parameters. Cheap; meant to be called while tracing."""
    return nnx.merge(graphdef, params)


def stacked(init: Callable[[jax.Array], Params], key: jax.Array, count: int) -> Params:
    """`count` independent draws of a parameter tree, stacked along a new first dimension."""
    return jax.vmap(init)(jax.random.split(key, count))


def size(tree: Any) -> int:
    """How many numbers a tree of arrays (or of their shapes) holds."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))
