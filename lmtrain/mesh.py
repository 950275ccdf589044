"""The mesh of devices, and the one table that says which axis of an array lies along which axis of the mesh.

Arrays name their dimensions ("embed", "heads", "batch", ...: the *logical* axes). `RULES` maps each to the mesh axes
that split it; `spec` applies the table to one array. Nothing else in lmtrain writes a PartitionSpec by hand.

The mesh has Auto axes: the compiler propagates shardings, and `constrain` pins them where it would guess wrong.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmtrain import schema
from lmtrain.types import Array, Batch, nearest

#: Axes of the mesh, slowest network first. `data` may span several slices (DCN); the rest stay within one.
AXES = ("stage", "data", "fsdp", "tensor", "context", "expert")

#: The mesh axes that split the rows of a batch, in the order of AXES. (Rows pass from stage to stage only within the
#: layers, models/pipeline.py; before and after, each stage has rows of its own.)
BATCH_AXES = ("stage", "data", "fsdp", "expert")

#: Logical axis -> the mesh axes that split it. Those split nowhere are listed too, so that a misspelt one is found.
RULES: dict[str, tuple[str, ...]] = {
    # of parameters
    "layers": ("stage",),
    "tail": (),  # layers left over where the pattern does not divide them
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "norm": (),
    # of activations
    "batch": BATCH_AXES,
    "length": ("context",),
    "residual": ("context", "tensor"),  # positions between the layers' products (Korthikanti et al. 2022)
    "kv_length": (),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
    "act_experts": ("expert",),
}

Axes = tuple[str | None, ...]


# ---------------------------------------------------------------------------------------------------- devices -> mesh
def resolve(cfg: schema.Mesh, device_count: int) -> dict[str, int]:
    """Sizes of AXES for so many devices, the -1 filled in.

    Raises:
      ConfigError: where the sizes cannot multiply to the number of devices.
    """
    sizes = {axis: getattr(cfg, axis) for axis in AXES}
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise schema.ConfigError(f"mesh.{axis} is {size}; it takes at least 1, or -1 for what the others leave.")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise schema.ConfigError(f"mesh.{' and mesh.'.join(free)} are -1; only one axis can take what is left.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    said = " * ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, -1)) or "every axis 1"
    if free:
        if device_count % fixed:
            raise schema.ConfigError(
                f"mesh: {said} asks for a multiple of {fixed} devices, but {device_count} are here. The sizes other "
                f"than mesh.{free[0]}=-1 should multiply to one of {divisors(device_count)}."
            )
        sizes[free[0]] = device_count // fixed
    elif fixed != device_count:
        raise schema.ConfigError(
            f"mesh: {said} asks for {fixed} devices, but {device_count} are here. "
            "Set one axis to -1 (mesh.data=-1) to take what the others leave."
        )
    return sizes


def make(cfg: schema.Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of a configuration, over all devices of all processes (or those given).

    Neighbours on the inner axes are neighbours on the fast network. Where the devices form several slices, the data
    axis spans them and every other axis stays within one.

    Raises:
      ConfigError: where the sizes do not multiply to the number of devices, or the slices do not divide the data axis.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = resolve(cfg, len(devices))
    shape = tuple(sizes.values())
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    networks = slices if cfg.dcn_data == 1 else cfg.dcn_data
    if networks == 1:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return _auto(array)
    if networks < 1 or (slices > 1 and networks != slices):
        raise schema.ConfigError(f"mesh.dcn_data is {networks}, but the devices form {slices} slices; set it to that.")
    if sizes["data"] % networks:
        raise schema.ConfigError(f"mesh.data is {sizes['data']}, which mesh.dcn_data={networks} does not divide.")
    outer = tuple(networks if axis == "data" else 1 for axis in AXES)
    inner = tuple(n // m for n, m in zip(shape, outer, strict=True))
    if slices == networks:
        array = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    else:
        # CPUs and GPUs know no slices: a slow network then joins equal runs of processes.
        devices.sort(key=lambda d: (d.process_index, d.id))
        array = np.moveaxis(np.array(devices).reshape(networks, *inner), 0, AXES.index("data")).reshape(shape)
    return _auto(array)


def _auto(device_array: np.ndarray) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(device_array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def platform(mesh: jax.sharding.Mesh | None) -> str:
    """cpu, gpu or tpu: the mesh's devices (which may be described, not present), else JAX's default."""
    name = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name


def divisors(n: int) -> str:
    """The divisors of a number, for an error message: "1, 2, 4"."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return ", ".join(str(d) for d in sorted({*small, *(n // d for d in small)}))


# ------------------------------------------------------------------------------------------- logical axes -> sharding
def spec(axes: Axes, mesh: jax.sharding.Mesh) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes (None: an unnamed, unsplit dimension).

    A mesh axis splits one dimension only: where two claim it, the first gets it. Mesh axes of size 1 are left out.
    """
    taken: set[str] = set()
    parts: list[Any] = []
    for name in axes:
        if name is not None and name not in RULES:
            raise ValueError(f"{name!r} is not a logical axis.{nearest(name, RULES)} (mesh.RULES: {', '.join(RULES)})")
        split = tuple(a for a in RULES.get(name, ()) if mesh.shape.get(a, 1) > 1 and a not in taken) if name else ()
        taken.update(split)
        parts.append(split[0] if len(split) == 1 else split or None)
    return PartitionSpec(*parts)


def sharding(axes: Axes, mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of an array with these logical axes."""
    return NamedSharding(mesh, spec(axes, mesh))


def shardings(axes_tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """The same tree with a sharding in place of every tuple of logical axes."""
    return jax.tree.map(lambda axes: sharding(axes, mesh), axes_tree, is_leaf=is_axes)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, axes: Axes, mesh: jax.sharding.Mesh | None) -> jax.Array:
    """Pins x's sharding inside jit, without changing its value. Without a mesh, or on one device, x itself."""
    if len(axes) != x.ndim:
        raise ValueError(f"an array of shape {x.shape} needs {x.ndim} logical axes, got {axes}")
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(axes, mesh))


def residual(x_BTD: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
    """Pins what passes from layer to layer: its positions are split over the tensor axis too, where they divide, so
    that norms and what is kept of them are not repeated there. A product then gathers positions and scatters sums."""
    ways = 1 if mesh is None else mesh.shape["context"] * mesh.shape["tensor"]
    length = "residual" if x_BTD.shape[1] % ways == 0 else "length"
    return constrain(x_BTD, ("batch", length, "act_embed"), mesh)


def check_shapes(shapes_tree: Any, axes_tree: Any, mesh: jax.sharding.Mesh) -> None:
    """Refuses parameters that the mesh cannot split evenly.

    Args:
      shapes_tree: arrays or ShapeDtypeStructs.
      axes_tree: the same tree of tuples of logical axes.

    Raises:
      ConfigError: naming the parameter, the dimension and its size, the mesh axis and its size.
    """

    def check(path, axes, leaf):
        for name, size, split in zip(axes, leaf.shape, spec(axes, mesh), strict=True):
            for axis in (split,) if isinstance(split, str) else split or ():
                if size % mesh.shape[axis]:
                    raise schema.ConfigError(
                        f"mesh.{axis} is {mesh.shape[axis]}, which does not divide dimension {name!r} = {size} of "
                        f"parameter {jax.tree_util.keystr(path, simple=True, separator='/')} {tuple(leaf.shape)}. "
                        f"mesh.{axis} could be one of {divisors(math.gcd(size, mesh.size))}."
                    )

    jax.tree_util.tree_map_with_path(check, axes_tree, shapes_tree, is_leaf=is_axes)


def is_axes(x: Any) -> bool:
    """Whether x is the logical axes of one array: a leaf of a tree of axes."""
    return isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)


# -------------------------------------------------------------------------------------------------------------- batch
def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """How many ways the rows of a batch are split."""
    return math.prod(mesh.shape.get(a, 1) for a in BATCH_AXES)


@functools.lru_cache(maxsize=16)  # asked for at every batch, and slow for thousands of devices
def share(mesh: jax.sharding.Mesh, process: int | None = None) -> tuple[int, int]:
    """(index, count): which of how many equal parts of the global batch a process feeds.

    Processes that hold the same rows (the tensor or context axis spans them) have the same index, so a data pipeline
    that is told these two numbers feeds them the same rows.
    """
    process = jax.process_index() if process is None else process
    rows = batch_shards(mesh)
    owned: dict[int, set[int]] = {}
    for at, device in np.ndenumerate(mesh.devices):
        where = [(i, n) for axis, i, n in zip(AXES, at, mesh.devices.shape, strict=True) if axis in BATCH_AXES]
        part = 0
        for i, n in where:
            part = part * n + i
        owned.setdefault(device.process_index, set()).add(part)
    parts = sorted({tuple(sorted(p)) for p in owned.values()})
    if sum(map(len, parts)) != rows or len({len(p) for p in parts}) != 1:
        raise schema.ConfigError(
            f"mesh {dict(mesh.shape)}: its processes hold unequal or overlapping parts of the batch. "
            "Choose sizes where one process's devices are a multiple or a divisor of tensor * context."
        )
    return parts.index(tuple(sorted(owned[process]))), len(parts)


def batch_axes(name: str, ndim: int) -> Axes:
    """Logical axes of a batch's array, read off the shape in its name: B is `batch`, T `length`, the rest unsplit."""
    letters = name.rsplit("_", 1)[-1]
    if not (letters.isalpha() and letters.isupper() and len(letters) == ndim):
        raise ValueError(f"batch[{name!r}] has {ndim} dimensions; its name should end in _ and one capital for each")
    return tuple({"B": "batch", "T": "length"}.get(letter) for letter in letters)


def put(batch: dict[str, Array], mesh: jax.sharding.Mesh) -> Batch:
    """This process's part of a batch (NumPy) -> the global batch, split over the mesh.

    Every array's name ends in its shape (`tokens_BT`): B is split over BATCH_AXES, T over context. Each process
    passes its own rows (see `share`), of the full length T.

    Raises:
      ConfigError: where the rows or positions do not divide.
    """
    _, count = share(mesh)
    out = {}
    for name, x in batch.items():
        x = np.asarray(x)
        axes = batch_axes(name, x.ndim)
        shape = tuple(n * count if axis == "batch" else n for axis, n in zip(axes, x.shape, strict=True))
        for axis, n in zip(axes, shape, strict=True):
            ways = {"batch": batch_shards(mesh), "length": mesh.shape["context"]}.get(axis or "", 1)
            if n % ways:
                what = "batch_size: the rows" if axis == "batch" else "data.row_length: the positions"
                over = " * ".join(f"mesh.{a}={mesh.shape[a]}" for a in RULES[axis or ""] if mesh.shape[a] > 1)
                raise schema.ConfigError(f"{what} of {name} are {n}, not a multiple of {ways} ({over}).")
        out[name] = jax.make_array_from_process_local_data(sharding(axes, mesh), x, shape)
    return out


def own_rows(batch: dict[str, Array], mesh: jax.sharding.Mesh) -> dict[str, Array]:
    """This process's rows of a batch of which every process has all: what `put` takes."""
    index, count = share(mesh)
    return {name: x[index * len(x) // count : (index + 1) * len(x) // count] for name, x in batch.items()}


def from_first(x: np.ndarray) -> np.ndarray:
    """What process 0 has, for all of them."""
    return np.asarray(multihost_utils.broadcast_one_to_all(x)) if jax.process_count() > 1 else x


def meet(name: str, seconds: int) -> None:
    """As `barrier`, without the devices: in any thread, for so long."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * seconds)


def barrier(name: str) -> None:
    """Waits until every process is here. Nothing to wait for where there is one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
