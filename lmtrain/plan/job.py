"""What is planned: one training stage of an experiment, its model, and the mesh it runs on."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from lmtrain import config, feeds, optim, origins, partial, preflight, scattered, schema, step
from lmtrain import mesh as meshes
from lmtrain.data import tokenizer as tokenizer_lib
from lmtrain.models import pipeline, transformer
from lmtrain.models.attention import choose
from lmtrain.models.shapes import groups
from lmtrain.plan.chips import Topology
from lmtrain.types import TrainState, nearest


@dataclasses.dataclass(frozen=True)
class Job:
    """One update of one stage on one topology.

    Attributes:
      name: the stage's.
      model: resolved.
      sizes: of the mesh's axes.
      memories: bytes that the optimizer keeps for each number of a parameter, by its path (`memories_of`).
    """

    name: str
    stage: schema.Stage
    model: schema.Model
    topology: Topology
    sizes: Mapping[str, int]
    memories: Mapping[tuple[str, ...], float]

    @property
    def ways(self) -> int:
        """How many ways the rows of a batch are split."""
        return math.prod(self.sizes[axis] for axis in meshes.BATCH_AXES)

    @property
    def passes(self) -> int:
        """How often a stage works: M R, see models/pipeline.py."""
        return (self.model.microbatches or self.sizes["stage"]) * self.model.rounds

    @property
    def turns(self) -> int:
        """How often all stages take a turn: M R + S - 1."""
        return self.passes + self.sizes["stage"] - 1

    @property
    def idle(self) -> float:
        """By how much longer stages take than the layers alone."""
        return self.turns / self.passes

    @property
    def rows(self) -> int:
        """Rows of one microbatch on one device."""
        return self.stage.batch_size // (self.ways * self.stage.accumulate)

    @property
    def length(self) -> int:
        """Positions of a row on one device."""
        return self.stage.data.row_length // self.sizes["context"]

    @property
    def tokens(self) -> int:
        """Of one update."""
        return self.stage.batch_size * self.stage.data.row_length

    @property
    def bytes(self) -> int:
        """Of one number in activations and products."""
        auto = "float32" if self.topology.chip.platform == "cpu" else "bfloat16"
        return jax.numpy.dtype(auto if self.model.dtype == "auto" else self.model.dtype).itemsize

    @property
    def attention(self) -> str:
        """The backend that this model takes on this chip."""
        dtype = "float32" if self.bytes == 4 else "bfloat16"
        m, platform, length = self.model, self.topology.chip.platform, self.stage.data.row_length
        return choose(m.attention, platform, length=length, head_dim=m.head_dim, softcap=m.attn_softcap, dtype=dtype,
                      mesh=self.mesh)  # fmt: skip

    @functools.cached_property
    def mesh(self) -> Any:
        """The mesh without devices: enough for shapes and shardings."""
        return AbstractMesh(
            tuple(self.sizes[a] for a in meshes.AXES), meshes.AXES, axis_types=(AxisType.Auto,) * len(meshes.AXES)
        )

    def parameters(self) -> Iterator[tuple[tuple[str, ...], tuple[str | None, ...], Any, list[str]]]:
        """(path, logical axes, ShapeDtypeStruct, the mesh axes that split it) of every parameter, trained or not."""
        shapes, axes = layout(self.model)
        for path, _, names in partial.named(axes):
            leaf = functools.reduce(lambda tree, key: tree[key], path, shapes)
            yield path, names, leaf, spec_axes(meshes.spec(names, self.mesh))

    def check(self) -> None:
        """Raises ConfigError where the mesh divides the batch, its rows or a parameter unevenly."""
        preflight.check_batch(self.stage, self.mesh)
        pipeline.check(self.model, groups(self.model)[0], self.mesh)
        meshes.check_shapes(*layout(self.model), self.mesh)

    def setting(self) -> schema.Mesh:
        """The mesh as a configuration has it."""
        sizes: dict[str, Any] = dict(self.sizes)
        return schema.Mesh(**sizes)

    def parts(self) -> tuple[Any, Any]:
        """(trained parameters' axes, those that are not)."""
        axes = layout(self.model)[1]
        return partial.split(axes, partial.trained(self.stage, self.model, axes))

    def state(self, mesh: Any = None) -> tuple[TrainState, Any, Any]:
        """(the update's state as ShapeDtypeStructs with shardings, the optimizer, its schedule), as train.py has it."""
        mesh = mesh or self.mesh
        axes = self.parts()[0]
        chosen = partial.trained(self.stage, self.model, transformer.axes(self.model))
        tx, schedule = optim.make(self.stage.optim, self.stage.steps, axes, mesh)
        begin = lambda key: partial.split(transformer.init(self.model, key), chosen)[0]  # noqa: E731
        return step.make_init(begin, tx, axes, mesh)[1], tx, schedule


@functools.lru_cache(maxsize=64)
def layout(model: schema.Model) -> tuple[Any, Any]:
    """(shapes, logical axes) of a model's parameters. A search asks for them at every mesh."""
    return transformer.shapes(model), transformer.axes(model)


@functools.lru_cache(maxsize=64)
def flops_per_token(model: schema.Model, row_length: int) -> float:
    """transformer.flops_per_token, kept: it looks at every parameter."""
    return transformer.flops_per_token(model, row_length)


def memories_of(stage: schema.Stage, model: schema.Model) -> dict[tuple[str, ...], float]:
    """Bytes that the optimizer keeps for each number of a parameter, by the parameter's path."""
    shapes, axes = layout(model)
    chosen = partial.trained(stage, model, axes)
    ours: Any = partial.split(shapes, chosen)[0]
    tx, _ = optim.make(stage.optim, stage.steps, partial.split(axes, chosen)[0])
    sizes = {path: leaf.shape for path, _, leaf in partial.named(ours)}
    found = dict.fromkeys(sizes, 0.0)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, ours)):
        path = tuple(str(getattr(key, "key", "")) for key in keys)
        own = next((path[i:] for i in range(len(path)) if sizes.get(path[i:]) == leaf.shape), None)
        if own is not None:
            found[own] += leaf.dtype.itemsize
    return found


def spec_axes(spec: Any) -> list[str]:
    """The mesh axes that a PartitionSpec names."""
    return [a for part in spec if part for a in ((part,) if isinstance(part, str) else part)]


def read(file: str, stage: str = "", overrides: list[str] | tuple[str, ...] = ()) -> tuple[schema.Experiment, str]:
    """(the experiment, the name of the stage that is meant: the first that trains unless it is named).

    Raises:
      ConfigError: no such stage, or whatever config.load refuses.
    """
    e = config.build(config.load(file, overrides))
    training = [name for name, s in e.stages.items() if isinstance(s, schema.Stage)]
    if stage and stage not in training:
        raise schema.ConfigError(f"--stage {stage}: no training stage of {file} has this name."
                                 f"{nearest(stage, training)} (stages: {', '.join(training)})")  # fmt: skip
    return e, stage or training[0]


def models(e: schema.Experiment) -> dict[str, schema.Model]:
    """The resolved model of every training stage, without building a tokenizer or reading data."""
    vocabulary, found = 0, dict[str, schema.Model]()
    before: schema.Model | None = None
    for name, s in e.stages.items():
        if isinstance(s, schema.Tokenizer):
            vocabulary = tokens_of(s)
        elif isinstance(s, schema.Stage):
            origin = found.get(s.init_from) or (origins.find(s.init_from).model if s.init_from else before)
            vocabulary = vocabulary or (origin.vocab_size if origin else schema.Tokenizer().vocab_size)
            found[name] = before = preflight.model_of(s, origin, vocabulary)
    return found


def tokens_of(s: schema.Tokenizer) -> int:
    """The vocabulary that a tokenizer stage will have."""
    if s.kind == "bytes":
        return tokenizer_lib.bytes_tokenizer().vocab_size
    if s.kind == "file":
        return tokenizer_lib.load(scattered.found(s.path)).with_specials(s.add).vocab_size
    return s.vocab_size


def make(e: schema.Experiment, name: str, topology: Topology, sizes: Mapping[str, int] | None = None) -> Job:
    """The job of one stage on a topology, on the experiment's own mesh unless `sizes` are given.

    Raises:
      ConfigError: the mesh does not fit the devices, the batch or the model.
    """
    sizes = dict(sizes or meshes.resolve(e.mesh, topology.devices))
    if sizes["data"] % topology.slices:
        raise schema.ConfigError(f"mesh.data is {sizes['data']}, which {topology.slices} slices do not divide: "
                                 "between slices only the data axis runs.")  # fmt: skip
    stage, model = feeds.settled(e.stages[name]), models(e)[name]
    made = Job(name, stage, model, topology, sizes, memories_of(stage, model))
    made.check()
    return made
