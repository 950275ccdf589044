"""Models written in the format of the Hugging Face hub: what transformers loads by AutoModelForCausalLM, AutoTokenizer.

Which family's class can hold a model is found by trying: its table writes a config.json, and the one is taken whose
config.json reads back as the same model. So whatever `huggingface.py` reads can be written again, and a model from
scratch is written where some family computes exactly what it computes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np

from lmtrain.data import tokenizer as tokenizer_lib
from lmtrain.interop.families import FAMILIES, Family, Weight
from lmtrain.interop.fields import shortest
from lmtrain.interop.huggingface import INDEX, SINGLE, read_values
from lmtrain.interop.layout import expected, tensors_of
from lmtrain.models import shapes as shapes_lib
from lmtrain.schema import Model, RopeScaling
from lmtrain.types import LmtrainError, Params, nearest

DTYPES: dict[str, Any] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16),
                          "float16": np.dtype(np.float16)}  # fmt: skip
#: Fields that say how a model is computed and trained, not what it computes.
IGNORED = {"attention", "remat", "unroll", "microbatches", "rounds", "loss_chunk", "dtype", "router_balance",
           "router_z", "zero_init", "init_scale", "scalar_head"}  # fmt: skip


# ----------------------------------------------------------------------------------------------------- which family
def normal(m: Model) -> Model:
    """The same model with what makes no difference written one way, so that two can be compared."""
    word = (m.pattern * m.layers)[: m.layers]
    windowed = "W" in word
    return dataclasses.replace(
        shapes_lib.resolve(m),
        pattern=shortest(word),
        window=m.window if windowed else 0,
        rope_local_theta=m.rope_local_theta or m.rope_theta if windowed else 0.0,
        attn_scale=m.attn_scale or m.head_dim**-0.5,
        norm_scale=True,  # none is one of ones
        qk_norm_scale=True,
        qk_norm_over=m.qk_norm_over if m.qk_norm else "head",
        mlp=m.expert_mlp if m.experts else m.mlp,
        router_norm=m.router_norm or not m.experts,
        experts_per_token=m.experts_per_token if m.experts else 2,
        rope_theta=m.rope_theta if m.positions == "rope" else 10000.0,
        rotary=m.rotary if m.positions == "rope" else 1.0,
        rope_scaling=m.rope_scaling if m.positions == "rope" else RopeScaling(),
    )


def differences(a: Model, b: Model) -> list[str]:
    """Names of the fields in which two models compute something else."""
    a, b = normal(a), normal(b)
    out = []
    for field in dataclasses.fields(Model):
        x, y = getattr(a, field.name), getattr(b, field.name)
        same = math.isclose(x, y, rel_tol=1e-9) if isinstance(x, float) else x == y
        if field.name not in IGNORED and not same:
            out.append(field.name)
    return out


def config_of(kind: str, m: Model) -> dict[str, Any]:
    """The config.json that a family's table writes for a model, whether or not it can hold it."""
    family = FAMILIES[kind]
    m = normal(m)
    out: dict[str, Any] = {"architectures": [family.architecture], "model_type": kind}
    out |= {theirs: getattr(m, ours) for theirs, ours in family.fields.items()}
    out |= {name: allowed[0] for name, allowed in family.only.items()}
    for _, write in family.aspects:
        write(m, out)
    return out


def choose(m: Model, kind: str = "") -> tuple[str, dict[str, Any]]:
    """(family, config.json) that hold exactly this model.

    Args:
      kind: the family to take; "": the first that fits.

    Raises:
      LmtrainError: none does; says what the nearest lacks.
    """
    if kind and kind not in FAMILIES:
        raise LmtrainError(f"--family is {kind!r}; lmtrain writes {', '.join(FAMILIES)}.{nearest(kind, FAMILIES)}")
    lacks: dict[str, list[str]] = {}
    for name in [kind] if kind else FAMILIES:
        values = config_of(name, m)
        try:
            _, back = read_values(values, name)
        except LmtrainError as error:
            lacks[name] = [str(error)]
            continue
        lacks[name] = differences(m, back)
        if not lacks[name]:
            return name, values
    best = min(lacks, key=lambda name: len(lacks[name]) if hasattr(m, lacks[name][0]) else len(lacks))
    whole = normal(m)
    said = ", ".join(f"model.{f}={getattr(whole, f)!r}" if hasattr(whole, f) else f for f in lacks[best])
    raise LmtrainError(f"no class of transformers computes this model; {best} would, but for {said}.")


# ------------------------------------------------------------------------------------------------------------ tensors
def tensors(family: Family, m: Model, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the family's checkpoint, one at a time: our arrays cut by layer, joined and turned."""
    scaled = dataclasses.replace(m, norm_scale=True, qk_norm_scale=True)
    for name, parts in tensors_of(family, scaled):
        blocks = []
        for weight, path, at, expert, shape in parts:
            block = _array(params, path, at, expert, shape, m.norm == "gemma")
            blocks.append(_matrix(block, weight))
        yield name, np.ascontiguousarray(_joined(blocks, parts[0][0]))


def _array(
    params: Params, path: tuple[str, ...], at: int | None, expert: int | None, shape: tuple[int, ...], gemma: bool
) -> np.ndarray:
    tree: Any = params
    for key in path:
        if key not in tree:  # a norm without a learned scale
            return np.full(shape, 0.0 if gemma or path[-1] == "bias" else 1.0, np.float32)
        tree = tree[key]
    x = tree if at is None else tree[at]
    x = x if expert is None else x[expert]
    return np.asarray(jax.device_get(x))


def _matrix(x: np.ndarray, weight: Weight) -> np.ndarray:
    """As [in, out], or as it is."""
    if weight.ins == 0:
        return x
    return x.reshape(int(np.prod(x.shape[: weight.ins])), -1)


def _joined(blocks: list[np.ndarray], weight: Weight) -> np.ndarray:
    if weight.ins == 0:
        return np.concatenate(blocks)
    whole = np.concatenate(blocks, axis=1)
    return whole if weight.flat else whole.T


# ------------------------------------------------------------------------------------------------------------- folder
def write(
    to: pathlib.Path, m: Model, params: Params, tok: tokenizer_lib.Tokenizer, *, settings: dict[str, Any],
    texts: dict[str, str], kind: str = "", dtype: str = "float32", shard_bytes: int = 5 << 30,
    show: Callable[[int, int], None] | None = None,
) -> str:  # fmt: skip
    """Writes a model's folder: all of it, or (interrupted) nothing under that name.

    Args:
      to: the folder; it must not exist, or be empty.
      settings: further fields of config.json: token ids, max_position_embeddings.
      texts: further files by name.
      kind: the family; "": the first that fits.
      shard_bytes: largest file of tensors.
      show: called with (tensors written, all).

    Returns:
      the family's name

    Raises:
      LmtrainError: `to` is taken, or no family holds the model.
    """
    if dtype not in DTYPES:
        raise LmtrainError(f"--dtype is {dtype!r}; it takes {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    check_free(to)
    name, values = choose(m, kind)
    half = to.with_name(f"{to.name}.partial")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        values = {"max_position_embeddings": 2048, **tokens} | values | settings | {"dtype": dtype}
        if "n_positions" in values:
            values.pop("max_position_embeddings")
        (half / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        _write_tensors(half, FAMILIES[name], m, params, DTYPES[dtype], shard_bytes, show)
        tok.save(half)
        for file, text in texts.items():
            (half / file).write_text(text, encoding="utf-8")
        if to.exists():
            to.rmdir()
        os.replace(half, to)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    return name


def check_free(to: pathlib.Path) -> None:
    """Refuses a folder that holds something."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise LmtrainError(f"--to {to}: is there already, and nothing is overwritten. Take another name.")


def _write_tensors(
    folder: pathlib.Path, family: Family, m: Model, params: Params, dtype: Any, shard_bytes: int,
    show: Callable[[int, int], None] | None,
) -> None:  # fmt: skip
    from safetensors.numpy import save_file

    scaled = dataclasses.replace(m, norm_scale=True, qk_norm_scale=True)
    shards: list[list[str]] = [[]]
    sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, shape in expected(family, scaled).items()}
    room = shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    single = len(shards) == 1
    files = [SINGLE if single else f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    stream, done = tensors(family, m, params), 0
    for file, names in zip(files, shards, strict=True):
        held = {}
        for expected_name in names:
            name, tensor = next(stream)
            assert name == expected_name
            held[name] = tensor.astype(dtype)
            done += 1
            if show:
                show(done, len(sizes))
        save_file(held, folder / file, metadata={"format": "pt"})
    if not single:
        mapped = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": mapped}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
