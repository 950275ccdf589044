"""Which tensors a family's checkpoint of a model has, and which of our arrays lie in each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lmtrain.interop.families import Family, Weight
from lmtrain.models import transformer
from lmtrain.models.shapes import groups
from lmtrain.schema import Model


def expected(family: Family, model: Model) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a model."""
    out: dict[str, tuple[int, ...]] = {}
    for name, parts in tensors_of(family, model):
        out[name] = shape_of([(part[0], part[-1]) for part in parts])
    return out


#: One of our arrays in a tensor: its place in the table, its path, which layer of its stack and which expert (None: it
#: has none), its shape.
Part = tuple[Weight, tuple[str, ...], int | None, int | None, tuple[int, ...]]


def tensors_of(family: Family, model: Model) -> Iterator[tuple[str, list[Part]]]:
    """Every tensor of a model, and which of our arrays lie in it, in their order."""
    shapes = transformer.shapes(model)
    count, body, tail = groups(model)

    def leaves(tree: Any) -> dict[str, tuple[int, ...]]:
        found = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in found}

    here = {name: tree for name, tree in shapes.items() if name not in ("layers", "tail", "scalar")}
    yield from _grouped(family.ends, leaves(here), (), None, {})
    for number in range(model.layers):
        g, place = divmod(number, len(body))
        stack, at = ("layers", g) if g < count else ("tail", 0)
        shape = leaves(shapes[stack][str(place)])
        yield from _grouped(family.layer, shape, (stack, str(place)), at, {"l": number})


def _grouped(
    table: tuple[Weight, ...], shapes: dict[str, tuple[int, ...]], stem: tuple[str, ...], at: int | None,
    where: dict[str, int],
) -> Iterator[tuple[str, list[Part]]]:  # fmt: skip
    parts: dict[str, list[Part]] = {}
    for weight in table:
        if weight.ours not in shapes:
            continue
        shape = shapes[weight.ours] if at is None else shapes[weight.ours][1:]
        path = (*stem, *weight.ours.split("/"))
        for e in range(shape[0]) if "{e}" in weight.theirs else [None]:
            name = weight.theirs.format(**where, **({} if e is None else {"e": e}))
            parts.setdefault(name, []).append((weight, path, at, e, shape if e is None else shape[1:]))
    yield from parts.items()


def shape_of(parts: list[tuple[Weight, tuple[int, ...]]]) -> tuple[int, ...]:
    """The shape of the tensor that holds these arrays of ours, one after the other."""
    weight, first = parts[0]
    if weight.ins == 0:
        return (sum(shape[0] for _, shape in parts), *first[1:])
    ins = int(np.prod(first[: weight.ins]))
    outs = sum(int(np.prod(shape[weight.ins :])) for _, shape in parts)
    return (ins, outs) if weight.flat else (outs, ins)
