"""Adapters written as PEFT loads them: adapter_config.json and adapter_model.safetensors, beside their base model.

A family may hold several of our matrices in one tensor (Phi-3's qkv_proj). Their adapters become one of a larger rank:
A's rows one after the other, B block by block, so that each part adds what it added.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from lmtrain.interop.export import check_free
from lmtrain.interop.families import FAMILIES, Weight
from lmtrain.interop.layout import Part, tensors_of
from lmtrain.models import lora
from lmtrain.schema import Lora, Model
from lmtrain.types import LmtrainError, Params

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def write(to: pathlib.Path, kind: str, base: str, m: Model, params: Params) -> None:
    """Writes a model's adapters as a PEFT folder.

    Args:
      to: the folder; it must not exist, or be empty.
      kind: the family of the base model.
      base: where it lies: its folder, or its name on the hub.
      params: of the whole model, adapters among them.

    Raises:
      LmtrainError: `to` is taken; there are no adapters, or PEFT has no place for one.
    """
    from safetensors.numpy import save_file

    if not m.lora.rank:
        raise LmtrainError("--adapter: this model has no adapters (model.lora.rank is 0); export it without.")
    check_free(to)
    family = FAMILIES[kind]
    held: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    plain, _ = lora.merge(m, {"layers": {}})
    for name, parts in tensors_of(family, plain):
        module = name.removesuffix(".weight")
        found = [(part, own) for part in parts if (own := _adapter(params, part)) is not None]
        if not found:
            continue
        if "{e}" in found[0][0][0].theirs:
            raise LmtrainError(
                f"--adapter: {module} is an expert's matrix, and PEFT has no adapters of those; export without it, and "
                "each is added to its matrix."
            )
        a, b, gain = _joined(parts, found, m.lora)
        stem = f"base_model.model.{module}"
        held |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        ranks[module] = len(a)
        if gain is not None:
            held[f"{stem}.lora_magnitude_vector"] = gain * _lengths(params, parts)
    fused = {module: rank for module, rank in ranks.items() if rank != m.lora.rank}
    growth = {module: rank / m.lora.rank for module, rank in fused.items()}
    settings: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": m.lora.rank, "lora_alpha": m.lora.alpha, "lora_dropout": 0.0, "bias": "none",
        "use_rslora": m.lora.rslora, "use_dora": m.lora.dora, "target_modules": sorted(ranks),
        "fan_in_fan_out": any(part[0].flat for _, parts in tensors_of(family, plain) for part in parts),
        "rank_pattern": {f"^{module}$": rank for module, rank in fused.items()},
        "alpha_pattern": {f"^{module}$": m.lora.alpha * (g**0.5 if m.lora.rslora else g)
                          for module, g in growth.items()},
    }  # fmt: skip
    half = to.with_name(f"{to.name}.partial")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    (half / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    save_file({name: np.ascontiguousarray(x, np.float32) for name, x in held.items()}, half / TENSORS)
    if to.exists():
        to.rmdir()
    os.replace(half, to)


def _adapter(params: Params, part: Part) -> dict[str, np.ndarray] | None:
    """A [in, r], B [r, out] and gain [out] of one of our arrays, or None where it has no adapter."""
    weight, path, at, expert, _ = part
    own = _leaf(params, (*path[:-1], path[-1] + lora.SUFFIX))
    if own is None:
        return None
    cut = {name: _cut(x, at, expert) for name, x in own.items()}
    rank = cut["a"].shape[-1]
    found = {"a": cut["a"].reshape(-1, rank), "b": cut["b"].reshape(rank, -1)}
    return found | ({"gain": cut["gain"].reshape(-1)} if "gain" in cut else {})


def _joined(parts: list[Part], found: list[tuple[Part, dict[str, np.ndarray]]], cfg: Lora) -> Any:
    """One adapter of a tensor from those of its parts: A [r, in], B [out, r] as torch lays them out, and the gain."""
    widths = [int(np.prod(shape[weight.ins :])) for weight, _, _, _, shape in parts]
    starts = dict(zip([part[1] for part in parts], np.cumsum([0, *widths[:-1]]).tolist(), strict=True))
    rank = cfg.rank
    a_rI = np.concatenate([own["a"].T for _, own in found])
    b_Or = np.zeros((sum(widths), rank * len(found)), np.float32)
    gain_O = np.ones(sum(widths), np.float32)
    for i, (part, own) in enumerate(found):
        rows = slice(starts[part[1]], starts[part[1]] + own["b"].shape[1])
        b_Or[rows, i * rank : (i + 1) * rank] = own["b"].T
        if "gain" in own:
            gain_O[rows] = own["gain"]
    return a_rI, b_Or, gain_O if cfg.dora else None


def _lengths(params: Params, parts: list[Part]) -> np.ndarray:
    """|W| of each output of a tensor: what DoRA's gain multiplies, and PEFT's magnitude holds multiplied."""
    out = []
    for weight, path, at, expert, _ in parts:
        w = _cut(_leaf(params, path), at, expert)
        out.append(np.linalg.norm(_inputs_first(w, weight), axis=0))
    return np.concatenate(out)


def _inputs_first(w: np.ndarray, weight: Weight) -> np.ndarray:
    return w.reshape(int(np.prod(w.shape[: weight.ins])), -1).astype(np.float32)


def _leaf(params: Params, path: tuple[str, ...]) -> Any:
    tree: Any = params
    for key in path:
        if key not in tree:
            return None
        tree = tree[key]
    return tree


def _cut(x: Any, at: int | None, expert: int | None) -> np.ndarray:
    x = x if at is None else x[at]
    x = x if expert is None else x[expert]
    return np.asarray(jax.device_get(x))
