"""What a setting such as init_from may name: a stage of this run, another run or its stage, or a Hugging Face folder.

    init_from="sft"   init_from="runs/quickstart"   init_from="runs/quickstart/sft"   init_from="hf:folder/of/a/model"

All are opened alike, so that whatever starts from a model, or reads a frozen one, takes any of them.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from lmtrain import checkpoint, runs, schema
from lmtrain import mesh as mesh_lib
from lmtrain.interop import huggingface
from lmtrain.models import transformer
from lmtrain.types import Frozen, Params


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
    """

    where: str
    model: schema.Model
    tokenizer: pathlib.Path
    fingerprint: str
    load: Callable[[Any], Params]
    identify: Callable[[], str]

    def frozen(self, mesh: Mesh | None = None) -> Frozen:
        """Parameters and forward pass, to be read and never trained; sharded over a mesh where given."""
        shardings = mesh_lib.shardings(transformer.axes(self.model), mesh) if mesh is not None else None
        return Frozen(self.load(shardings), transformer.Forward(self.model, mesh))


def find(name: str, here: pathlib.Path | None = None) -> Origin:
    """Opens what a setting names; `here` is the run whose stages may be named alone.

    Raises:
      LmtrainError: there is nothing of that name, or it is damaged.
    """
    if name.startswith(huggingface.PREFIX):
        folder = huggingface.open_folder(name)
        return Origin(
            name,
            folder.model,
            folder.path,
            folder.tokenizer().fingerprint,
            lambda shardings: folder.params(shardings),
            lambda: folder.identity,
        )
    stage = runs.locate(name, here) if here is not None else runs.find_stage(pathlib.Path(name))
    saved, stored = stage / "checkpoints", runs.read_json(stage / "config.json")
    return Origin(
        str(stage),
        runs.stored_model(stored),
        stage.parent / "tokenizer",
        stored["tokenizer_sha256"],
        lambda shardings: checkpoint.load_params(saved, shardings=shardings),
        lambda: checkpoint.identity(saved),
    )
