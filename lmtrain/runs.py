"""A run's folder: opened, owned by one process at a time, summarised.

runs/NAME/tokenizer/          tokenizer.json
runs/NAME/data/               tokenised shards
runs/NAME/STAGE/              config.json  metrics.jsonl  tensorboard/  checkpoints/STEP/  samples.jsonl
runs/NAME/summary.json        scores before and after each stage
runs/NAME/report.html
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lmtrain import checkpoint, engine, log, origins, scattered, schema, storage
from lmtrain import mesh as mesh_lib
from lmtrain.data import chat, jinja
from lmtrain.data import tokenizer as tokenizer_lib
from lmtrain.interop import huggingface
from lmtrain.models import transformer
from lmtrain.origins import find_stage, read_json, stored_model
from lmtrain.storage import write_json as write_json
from lmtrain.types import LmtrainError, Params

WORTH_KEEPING = 100 << 20  # bytes of tokenised text that a run which failed before its first checkpoint leaves


@dataclasses.dataclass
class Run:
    """A run's folder, opened at one of its training stages: parameters, tokenizer, metrics, generation.

    Of a Hugging Face folder: stage "", step 0, no metrics, and parameters in the dtype that they are stored in.
    `mesh` is where the parameters lie, where that is more than one device.
    """

    folder: pathlib.Path
    stage: str
    config: dict[str, Any]  # the stage's settings, as config.json holds them
    model: schema.Model
    tokenizer: tokenizer_lib.Tokenizer
    params: Params
    step: int
    mesh: Mesh | None = None

    @functools.cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return log.read_metrics(self.folder / self.stage)

    @functools.cached_property
    def template(self) -> chat.Template:
        """How the stage wrote conversations; lmtrain's own template where it wrote none."""
        if not self.stage:
            return chat.Template(self.tokenizer, str(self.folder) if jinja.held(self.folder) else "")
        settings = self.config["stages"].get(self.stage, {})
        return chat.Template(self.tokenizer, template(self.folder, settings.get("data", {}).get("template", "")))

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json holds: for every stage its scores before and after."""
        return read_summary(self.folder)

    def generate(self, prompt: str = "", tokens: int = 128, temperature: float = 0.8, **sampling: Any) -> str:
        """Continues a text and returns the continuation.

        `sampling`: top_k, top_p, min_p, seed (engine.Sampling); stop, texts that end it and are not part of it.
        """
        return "".join(self.stream(prompt, tokens, temperature, **sampling))

    def stream(
        self, prompt: str = "", tokens: int = 128, temperature: float = 0.8, stop: Sequence[str] = (), **sampling: Any
    ) -> Iterator[str]:
        """The same, piece by piece. Bytes of an unfinished character, or what may begin a stop text, wait for more."""
        how = engine.Sampling(tokens, temperature, stop=(self.tokenizer.end,), stop_texts=tuple(stop), **sampling)
        ids = [self.tokenizer.begin, *self.tokenizer.encode(prompt)]
        held = ""
        drawn = engine.stream(self.model, self.params, ids, how, decode=self.tokenizer.decode)
        for piece in self.tokenizer.pieces(drawn):
            held += piece
            shown = before_stop(held, stop)
            if shown:
                yield held[:shown]
            held = held[shown:]
        rest = held[: min([held.find(text) for text in stop if text in held], default=len(held))]
        if rest:
            yield rest


def before_stop(text: str, stop: Sequence[str]) -> int:
    """How many of its characters surely lie before any stop text."""
    ends = [len(text)]
    for s in stop:
        found = text.find(s)
        begun = (len(text) - n for n in range(len(s) - 1, 0, -1) if text.endswith(s[:n]))
        ends.append(found if found >= 0 else next(begun, len(text)))
    return min(ends)


def load(folder: str | os.PathLike[str], place: Callable[[schema.Model], Mesh | None] | None = None) -> Run:
    """Opens a run (its last stage with a checkpoint), one stage's folder, or a Hugging Face folder ("hf:..."), for
    generation and inspection.

    Args:
      place: the mesh that parameters of this shape are read onto; without it they are NumPy arrays.
    """

    def split(model: schema.Model) -> tuple[Mesh | None, Any]:
        mesh = place(model) if place else None
        return mesh, None if mesh is None else mesh_lib.shardings(transformer.axes(model), mesh)

    if str(folder).startswith(huggingface.PREFIX):
        found = huggingface.open_folder(str(folder))
        config = {"model": dataclasses.asdict(found.model), "stages": {}}
        mesh, shardings = split(found.model)
        params = found.params(shardings, dtype="stored")
        return Run(found.path, "", config, found.model, found.tokenizer(), params, 0, mesh)
    stage_folder = find_stage(scattered.found(str(folder)))
    stored = read_json(stage_folder / "config.json")
    step = checkpoint.newest_sound(stage_folder / "checkpoints")
    mesh, shardings = split(stored_model(stored))
    return Run(
        folder=stage_folder.parent,
        stage=stage_folder.name,
        config=stored,
        model=stored_model(stored),
        tokenizer=tokenizer_lib.load(stage_folder.parent / "tokenizer"),
        params=origins.find(str(stage_folder)).load(shardings),
        step=step,
        mesh=mesh,
    )


def template(folder: pathlib.Path, asked: str) -> str:
    """The chat template that a run's stage writes with: the one asked for, else that of an imported tokenizer, else ""
    (lmtrain's own)."""
    return asked or (str(folder / "tokenizer") if jinja.held(folder / "tokenizer") else "")


def with_template(cfg: schema.Stage, folder: pathlib.Path) -> schema.Stage:
    """A stage with that template. What config.json keeps is what was asked for, so that a run may be moved."""
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, template=template(folder, cfg.data.template)))


def read_summary(folder: pathlib.Path) -> dict[str, Any]:
    """summary.json of a run, or {}."""
    file = folder / "summary.json"
    return read_json(file) if file.exists() else {}


@contextlib.contextmanager
def owned(folder: pathlib.Path, near: bool = False) -> Iterator[None]:
    """Holds the run's lock, and leaves no half-written run behind when the input turns out to be wrong.

    Args:
      near: hosts keep checkpoints on their own disks, so a run that has taken a step is worth keeping by itself.
    """
    if not str(folder).strip("."):
        raise LmtrainError("--workdir is empty, but takes a folder of the run's own, such as runs/mine.")
    if folder.exists() and not folder.is_dir():
        raise LmtrainError(f"--workdir {folder} is a file, but takes a folder.")
    fresh = not folder.exists() or all(path.name == storage.APART for path in folder.iterdir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    except OSError as error:
        raise LmtrainError(f"--workdir {folder}: cannot write there ({error.strerror}).") from None
    with lock:
        try:
            if jax.process_index() == 0:  # for all of the run's processes
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LmtrainError(
                f"{folder}: another process is running there. Wait for it, or take another --workdir."
            ) from None
        try:
            yield
        except Exception:
            if (
                jax.process_index() == 0
                and fresh
                and not any(checkpoint.steps(p) for p in folder.glob("*/checkpoints"))
                and not (near and any(log.read_metrics(p.parent)[1:] for p in folder.glob("*/metrics.jsonl")))
            ):
                tokenised = sum(p.stat().st_size for p in folder.glob("data/**/*") if p.is_file())
                for path in folder.iterdir():
                    if path.name != storage.APART and (path.name != "data" or tokenised < WORTH_KEEPING):
                        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
