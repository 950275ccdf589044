"""Frozen matrices in 8 or 4 bits, by qwix: a model that is adapted takes a quarter or an eighth of float32's memory.

int8: whole numbers from -127 to 127, one scale for each output. nf4: sixteen levels at the quantiles of a normal
distribution, one scale for each 64 inputs of an output (QLoRA, Dettmers et al. 2023). A layer's matrices become
floating point again where the layer is computed, one layer at a time.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lmtrain.types import LmtrainError, Params

KINDS = ("int8", "nf4")
MATRICES = ("q", "k", "v", "o", "gate", "up", "down", "kernel")
TILE = 64


def quantised(params: Params, kind: str, path: tuple[str, ...] = ()) -> Params:
    """The same tree with each matrix as a qwix.QArray; embeddings, norms, biases, routers and adapters stay.

    Raises:
      LmtrainError: qwix is not installed.
    """
    out: Params = {}
    for name, value in params.items():
        here = (*path, name)
        if isinstance(value, dict):
            out[name] = quantised(value, kind, here)
        elif name in MATRICES and path[-1] != "scalar":
            out[name] = _quantise(value, kind, here)
        else:
            out[name] = value
    return out


def _quantise(x: Any, kind: str, path: tuple[str, ...]) -> Any:
    qwix = _qwix()
    if x.ndim < 2 or is_quantised(x):
        return x
    last = x.ndim - (2 if path[-1] in ("o", "down", "gate", "up", "kernel") else 3)  # the last dimension of inputs
    inputs = {last - 1, last} if path[-1] == "o" else {last}
    if kind == "nf4":
        size = x.shape[last]
        tile = next(t for t in range(min(TILE, size), 0, -1) if size % t == 0)
        how: dict[str, Any] = {"channelwise_axes": [i for i in range(x.ndim) if i != last], "tiled_axes": {last: tile}}
    else:
        how = {"channelwise_axes": [i for i in range(x.ndim) if i not in inputs]}
    qtype = "nf4" if kind == "nf4" else np.int8
    return jax.jit(lambda x: qwix.quantize(x, qtype, **how))(x)


def is_quantised(x: Any) -> bool:
    """Whether a leaf is a qwix.QArray."""
    return hasattr(x, "qvalue")


def dequantised(tree: Any) -> Any:
    """The same tree in floating point; one that is so already is handed back."""
    if not any(map(is_quantised, jax.tree.leaves(tree, is_leaf=is_quantised))):
        return tree
    qwix = _qwix()
    return jax.tree.map(lambda x: qwix.dequantize(x) if is_quantised(x) else x, tree, is_leaf=is_quantised)


def rounded(params: Params, kind: str) -> Params:
    """What the matrices are once they have been in so few bits."""
    return dequantised(quantised(params, kind)) if kind else params


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise LmtrainError("quantize takes qwix: pip install -e '.[quantize]'.") from None
    return qwix
