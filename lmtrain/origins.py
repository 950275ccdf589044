"""What a setting such as init_from may name: a stage of this run, another run or its stage, or a Hugging Face folder.

    init_from="sft"   init_from="runs/quickstart"   init_from="runs/quickstart/sft"   init_from="hf:folder/of/a/model"
    init_from="gs://bucket/runs/quickstart/sft"

All are opened alike, so that whatever starts from a model, or reads a frozen one, takes any of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lmtrain import bucket, checkpoint, partial, scattered, schema
from lmtrain import mesh as mesh_lib
from lmtrain.interop import huggingface
from lmtrain.models import pipeline, quantise, transformer
from lmtrain.types import Frozen, LmtrainError, Params


@dataclasses.dataclass(frozen=True)
class Origin:
    """A trained model, not loaded yet.

    Attributes:
      where: how it is named in messages.
      model: its shape, resolved.
      tokenizer: the folder that holds its tokenizer.json (and chat template, where it has one).
      fingerprint: of the tokenizer that it was trained with.
      load: load(shardings) -> its parameters in float32; NumPy arrays where shardings is None.
      identify: a hash that stands for the weights.
      rest: of a stage that trained a part: {"from", "identity", "trained", "quantize"}, as config.json has it; else {}.
    """

    where: str
    model: schema.Model
    tokenizer: pathlib.Path
    fingerprint: str
    load: Callable[[Any], Params]
    identify: Callable[[], str]
    rest: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, mesh: Mesh) -> None:
        """Refuses a mesh that does not divide the model, a ConfigError that names both."""
        axes = transformer.axes(self.model)
        try:
            pipeline.check(self.model, transformer.groups(self.model)[0], mesh)
            mesh_lib.check_shapes(transformer.shapes(self.model), axes, mesh)
        except schema.ConfigError as error:
            raise schema.ConfigError(f"{self.where}: {error}") from None

    def frozen(self, mesh: Mesh | None = None) -> Frozen:
        """Parameters and forward pass, to be read and never trained; sharded over a mesh where given."""
        if mesh is not None:
            self.check(mesh)
        shardings = mesh_lib.shardings(transformer.axes(self.model), mesh) if mesh is not None else None
        return Frozen(self.load(shardings), transformer.Forward(self.model, mesh))


def find(name: str, here: pathlib.Path | None = None) -> Origin:
    """Opens what a setting names; `here` is the run whose stages may be named alone.

    Raises:
      LmtrainError: there is nothing of that name, or it is damaged.
    """
    if name.startswith(huggingface.PREFIX):
        return _folder(name)
    origin = _stage(locate(name, here) if here is not None else find_stage(scattered.found(name)))
    return dataclasses.replace(origin, where=name) if bucket.is_remote(name) else origin


def tokenizer(name: str) -> str:
    """The tokenizer of what a setting names, as a tokenizer stage's `path` does: the same on all machines where that is
    at an address."""
    return f"{scattered.run_of(name)}/tokenizer" if bucket.is_remote(name) else str(find(name).tokenizer)


def _folder(name: str) -> Origin:
    folder = huggingface.open_folder(name)
    return Origin(
        f"{huggingface.PREFIX}{folder.path.absolute()}",
        folder.model,
        folder.path,
        folder.tokenizer().fingerprint,
        lambda shardings: folder.params(shardings),
        lambda: folder.identity,
    )


def _stage(stage: pathlib.Path) -> Origin:
    saved, stored = stage / "checkpoints", read_json(stage / "config.json")
    model, rest = stored_model(stored), stored.get("rest") or {}

    def load(shardings: Any) -> Params:
        if not rest:
            return checkpoint.load_params(saved, shardings=shardings)
        base = find(rest["from"], stage.parent)
        if base.identify() != rest["identity"]:
            raise LmtrainError(
                f"{stage}: holds only what it trained; the rest is that of {base.where}, which has changed since."
            )
        axes = transformer.axes(model)
        chosen = {tuple(path) for path in rest["trained"]}
        ours = None if shardings is None else partial.split(shardings, chosen)[0]
        theirs = None
        if shardings is not None:
            mesh = jax.tree.leaves(shardings)[0].mesh
            theirs = mesh_lib.shardings(transformer.axes(base.model), mesh)
        frozen = base.load(theirs)
        if model.vocab_size > base.model.vocab_size:
            frozen = extended(frozen, model.vocab_size, shardings)
        frozen = quantise.rounded(partial.split(frozen, chosen)[1], rest.get("quantize", ""))
        return partial.ordered(partial.join(frozen, checkpoint.load_params(saved, shardings=ours)), axes)

    def identify() -> str:
        own = checkpoint.identity(saved)
        return hashlib.sha256(f"{own} {rest['identity']}".encode()).hexdigest() if rest else own

    return Origin(str(stage), model, stage.parent / "tokenizer", stored["tokenizer_sha256"], load, identify,
                  rest)  # fmt: skip


def extended(params: Params, vocab_size: int, shardings: Any = None) -> Params:
    """The same parameters with a row of the embedding, and a column of an untied output, for each new token.

    A new one starts as the mean of all others (Hewitt 2021): its logit is then near the average, so the distribution
    over the old tokens hardly moves, where a random one could take all of it.

    Args:
      shardings: of the larger model's parameters.
    """

    def grown(x: Any, axis: int) -> Any:
        new = vocab_size - x.shape[axis]
        mean = jnp.mean(jnp.asarray(x, jnp.float32), axis=axis, keepdims=True).astype(x.dtype)
        return jnp.concatenate([x, jnp.repeat(mean, new, axis=axis)], axis=axis)

    out = dict(params)
    for part, leaf, axis in (("embed", "table", 0), ("head", "kernel", 1)):
        if part in params:
            where = None if shardings is None else shardings[part][leaf]
            grow = jax.jit(lambda x, axis=axis: grown(x, axis), out_shardings=where)
            out[part] = {**params[part], leaf: grow(params[part][leaf])}
    return out


# -------------------------------------------------------------------------------------------------------- runs' folders
def locate(name: str, here: pathlib.Path) -> pathlib.Path:
    """The stage folder that a setting names: a stage of the run `here`, else another run or one of its stages."""
    return here / name if name and (here / name / "config.json").exists() else find_stage(scattered.found(name))


def find_stage(path: pathlib.Path) -> pathlib.Path:
    """The stage folder that `path` names: itself, or the run's last stage that has a checkpoint."""
    if not path.exists():
        raise LmtrainError(f"{path}: no such folder. {nearest_run(path)}")
    if (path / "checkpoints").is_dir():
        return path
    found = stages(path)
    saved = [p for p in found if checkpoint.steps(p / "checkpoints")]
    if found and not saved:
        raise LmtrainError(f"{path}: no checkpoint yet. `lmtrain run` makes one.")
    if not found:
        raise LmtrainError(f"{path}: not a run's folder: none of its folders holds checkpoints/. {nearest_run(path)}")
    return saved[-1]


def stages(folder: pathlib.Path) -> list[pathlib.Path]:
    """The training stages of a run that have begun, in the experiment's order."""
    found = [p.parent for p in folder.glob("*/checkpoints")]
    return sorted(found, key=lambda p: len(read_json(p / "config.json").get("stages_before", ())))


def nearest_run(path: pathlib.Path) -> str:
    """A sentence that names runs beside `path`, for messages."""
    found = sorted(
        {str(p.parent.parent) for p in [*path.parent.glob("*/*/checkpoints"), *path.glob("*/*/checkpoints")]}
    )
    return f"Runs here: {', '.join(found[:5])}" if found else ""


def stored_model(stored: dict[str, Any]) -> schema.Model:
    """The schema.Model in a stage's config.json."""
    fields = dict(stored["model"])
    scaling: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["rope_scaling"].items()}
    adapters = dict(fields.get("lora") or {})
    if adapters:
        adapters["matrices"] = tuple(adapters["matrices"])
    return schema.Model(**{**fields, "rope_scaling": schema.RopeScaling(**scaling), "lora": schema.Lora(**adapters)})


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object that a run wrote. Raises LmtrainError where it is missing or broken."""
    try:
        value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return value
    except FileNotFoundError:
        raise LmtrainError(f"{file}: missing. `lmtrain run` with the same --config and --workdir writes it.") from None
    except (ValueError, OSError) as error:
        raise LmtrainError(f"{file}: cannot be read ({error}). Delete it; `lmtrain run` writes it anew.") from None
