"""Generation: prompts in, completions out, through a key/value cache of static shape.

The one path that samples text: `lmtrain generate`, the samples of an evaluation, and what later rooms add.
B prompts, T prompt positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmtrain import schema
from lmtrain.mesh import replicated
from lmtrain.models import decode, transformer
from lmtrain.types import Array, LmtrainError, Params


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      max_tokens: the longest completion.
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: only the k likeliest tokens; 0: all.
      top_p: only the likeliest tokens that together have this probability (nucleus sampling, arXiv 1904.09751).
      stop: token ids that end a completion (they are not part of it).
      seed: the draw of prompt i depends on (seed, i) alone.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= 1 << 20:
            raise LmtrainError(f"max_tokens is {self.max_tokens}, but takes 1 to {1 << 20}.")
        if not 0 <= self.seed < 1 << 32:
            raise LmtrainError(f"seed is {self.seed}, but takes a whole number from 0 to {(1 << 32) - 1}.")
        if not self.temperature >= 0:
            raise LmtrainError(f"temperature is {self.temperature}, but takes 0 (the likeliest token) or more.")
        if not 0 < self.top_p <= 1:
            raise LmtrainError(f"top_p is {self.top_p}, but takes a probability above 0 and up to 1.")
        if self.top_k < 0:
            raise LmtrainError(f"top_k is {self.top_k}, but takes 0 (all tokens) or more.")


@dataclasses.dataclass
class Completion:
    """What followed one prompt: token ids, each one's log-probability under the model, and why it ended."""

    tokens: list[int]
    logps: list[float]
    finish: str = "length"  # length | stop


def generate(
    cfg: schema.Model, params: Params, prompts: Sequence[Sequence[int]], sampling: Sampling, mesh: Mesh | None = None
) -> list[Completion]:
    """Completes every prompt (token ids, none empty) and returns one Completion for each, in order."""
    completions = [Completion([], []) for _ in prompts]
    for tokens_B, logps_B, live_B in stream(cfg, params, prompts, sampling, mesh):
        for i, c in enumerate(completions):
            if live_B[i]:
                c.tokens.append(int(tokens_B[i]))
                c.logps.append(float(logps_B[i]))
    for c in completions:
        c.finish = "length" if len(c.tokens) == sampling.max_tokens else "stop"
    return completions


def stream(
    cfg: schema.Model, params: Params, prompts: Sequence[Sequence[int]], sampling: Sampling, mesh: Mesh | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (tokens_B, logps_B, live_B) for every new position; live_B is False where a completion has ended.

    Shapes are rounded up to powers of two, so that prompts of many lengths share a few compiled programs.
    """
    if not prompts or any(len(p) == 0 for p in prompts):
        raise LmtrainError("a prompt without tokens: start it with the end-of-text token, as every document does.")
    params = transformer.unstack(params)  # once: each token reads every weight, and slices of a stack are copies
    b, longest = len(prompts), max(map(len, prompts))
    rows, width = _power_of_two(b, 1), _power_of_two(longest, 16)
    tokens_BT = np.zeros((rows, width), np.int32)
    lengths_B = np.ones(rows, np.int32)
    for i, p in enumerate(prompts):
        tokens_BT[i, : len(p)], lengths_B[i] = p, len(p)
    draw = (sampling.temperature, sampling.top_k, sampling.top_p)
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(sampling.seed)))(jnp.arange(rows))
    capacity = _power_of_two(width + sampling.max_tokens, 64)
    next_B, logps_B, cache = _start(
        cfg, draw, mesh, capacity, params, jnp.asarray(tokens_BT), jnp.asarray(lengths_B), keys_B
    )
    live_B = np.ones(b, bool)
    for position in range(sampling.max_tokens):
        tokens, logps = np.asarray(next_B)[:b], np.asarray(logps_B)[:b]
        live_B = live_B & ~np.isin(tokens, sampling.stop)
        if not live_B.any():
            return
        if position + 1 < sampling.max_tokens:  # dispatched before this position is handed out
            next_B, logps_B, cache = _advance(cfg, draw, mesh, params, next_B, cache, keys_B, position + 1)
        yield tokens, logps, live_B


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _start(
    cfg: schema.Model, draw: Any, mesh: Mesh | None, capacity: int, params: Params,
    tokens_BT: jax.Array, lengths_B: jax.Array, keys_B: Array,
) -> Any:  # fmt: skip
    cache = decode.init_cache(cfg, tokens_BT.shape[0], capacity)
    logits_BV, cache = decode.prefill(cfg, params, tokens_BT, lengths_B, cache, mesh=mesh)
    return *_everywhere(sample(logits_BV, keys_B, 0, *draw), mesh), cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(5,))
def _advance(
    cfg: schema.Model, draw: Any, mesh: Mesh | None, params: Params,
    tokens_B: jax.Array, cache: Any, keys_B: Array, position: Array | int,
) -> Any:  # fmt: skip
    logits_BV, cache = decode.step(cfg, params, tokens_B, cache, mesh=mesh)
    return *_everywhere(sample(logits_BV, keys_B, position, *draw), mesh), cache


def _everywhere(drawn: Any, mesh: Mesh | None) -> Any:
    """Tokens and log-probabilities whole on every device, so that every process can read them."""
    return drawn if mesh is None else jax.lax.with_sharding_constraint(drawn, replicated(mesh))


def sample(
    logits_BV: Array, keys_B: Array, position: Array | int, temperature: float, top_k: int, top_p: float
) -> tuple[jax.Array, jax.Array]:
    """Draws tokens_B int32 and returns their log-probabilities logps_B under the unmodified model, float32."""
    logits_BV = jnp.asarray(logits_BV, jnp.float32)
    full_BV = jax.nn.log_softmax(logits_BV)
    if temperature == 0:
        tokens_B = jnp.argmax(logits_BV, -1)
    else:
        logits_BV = logits_BV / temperature
        if top_k:
            kth_B = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
            logits_BV = jnp.where(logits_BV < kth_B, -jnp.inf, logits_BV)
        if top_p < 1:
            sorted_BV = jnp.sort(logits_BV, -1, descending=True)
            before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV), -1) - jax.nn.softmax(sorted_BV)
            cut_B = jnp.where(before_BV < top_p, sorted_BV, jnp.inf).min(-1, keepdims=True)
            logits_BV = jnp.where(logits_BV < cut_B, -jnp.inf, logits_BV)
        step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, position)
        tokens_B = jax.vmap(jax.random.categorical)(step_keys_B, logits_BV)
    logps_B = jnp.take_along_axis(full_BV, tokens_B[:, None], -1)[:, 0]
    return tokens_B.astype(jnp.int32), logps_B


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())
