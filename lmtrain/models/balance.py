"""Positions over the context axis so that each device has as much to attend to.

    n devices of the context axis, T positions, in 2n runs of T / 2n

A causal query sees what comes before it, so equal stretches of a row are unequal work: the last device would have most
of it while the first waits. Here device i holds run i and run 2n - 1 - i, which together see the same for every i
(Llama 3, arXiv 2407.21783, section 3.3.2; "zigzag" in implementations of ring attention). What depends on positions
has them as numbers, so only the mask needs to know (`order`). Tokens are moved before the layers, and what comes out of
them is moved back.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmtrain.mesh import spec


def order(length: int, ways: int) -> np.ndarray:
    """int32[T]: the positions as they lie, from the first device's to the last one's."""
    runs = np.arange(length, dtype=np.int32).reshape(2 * ways, -1)
    return np.concatenate([runs[[i, 2 * ways - 1 - i]].ravel() for i in range(ways)])


def spread(x_BT: jax.Array, mesh: Mesh) -> jax.Array:
    """[B, T, ...] from the order of the text into that of `order`."""
    return _moved(x_BT, mesh, back=False)


def gathered(x_BT: jax.Array, mesh: Mesh) -> jax.Array:
    """[B, T, ...] from that of `order` back into the order of the text."""
    return _moved(x_BT, mesh, back=True)


def _moved(x_BT: jax.Array, mesh: Mesh, back: bool) -> jax.Array:
    n = mesh.shape["context"]
    home = [run if run < n else 2 * n - 1 - run for run in range(2 * n)]  # the device that has a run
    # Runs 2i, 2i + 1 lie on device i at first. The even ones go to as many different devices, and so do the odd ones.
    routes = [[(run // 2, home[run]) for run in range(odd, 2 * n, 2)] for odd in (0, 1)]

    def local(x):
        swapped = jax.lax.axis_index("context") % 2 == 1  # device i has runs i (odd like i) and 2n - 1 - i
        first, second = jnp.split(x, 2, axis=1)
        if back:
            even, odd = jnp.where(swapped, second, first), jnp.where(swapped, first, second)
            pairs = zip((even, odd), routes, strict=True)
            return jnp.concatenate([jax.lax.ppermute(a, "context", [(d, s) for s, d in r]) for a, r in pairs], axis=1)
        even, odd = (jax.lax.ppermute(a, "context", r) for a, r in zip((first, second), routes, strict=True))
        return jnp.concatenate([jnp.where(swapped, odd, even), jnp.where(swapped, even, odd)], axis=1)

    batch = "batch" if x_BT.shape[0] > 1 else None
    where = spec((batch, "length") + (None,) * (x_BT.ndim - 2), mesh)
    return jax.shard_map(local, mesh=mesh, in_specs=where, out_specs=where, check_vma=False)(x_BT)
