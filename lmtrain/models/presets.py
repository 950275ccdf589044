"""Named shapes: sizes to train from scratch, the well-known open models, and the two that the benchmarks use."""

from __future__ import annotations

import dataclasses
from typing import Any

from lmtrain.schema import ConfigError, Model, RopeScaling
from lmtrain.types import nearest


def presets() -> dict[str, Model]:
    """All named models. A vocabulary of 0 becomes the tokenizer's."""
    own = {
        # layers, width, heads, kv_heads, mlp, tied                        parameters without the embedding
        "1m": _llama(4, 128, 4, 4, 384, True),
        "4m": _llama(6, 256, 4, 4, 576, True),
        "12m": _llama(6, 384, 6, 6, 1024, True),
        "30m": _llama(10, 512, 8, 8, 1408, True),
        "117m": _llama(12, 768, 12, 12, 2048, True),
        "350m": _llama(24, 1024, 16, 16, 2816, True),
        "1b": _llama(16, 2048, 16, 16, 5632, False),
        "3b": _llama(28, 3072, 24, 8, 8192, False),
        "8b": _llama(32, 4096, 32, 8, 14336, False),
        "70b": _llama(80, 8192, 64, 8, 28672, False),
    }
    bench = {
        "S": dataclasses.replace(own["12m"], vocab_size=4096),
        "M": dataclasses.replace(own["117m"], vocab_size=8192),
    }
    return own | bench | _known()


def get(name: str) -> Model:
    """The model of that name.

    Raises:
      ConfigError: with the nearest names, where there is none.
    """
    known = presets()
    if name not in known:
        raise ConfigError(f"{name!r} is not a named model.{nearest(name, known)} (names: {', '.join(known)})")
    return known[name]


def _llama(layers: int, width: int, heads: int, kv_heads: int, mlp: int, tied: bool, **more) -> Model:
    """Llama's way (Touvron et al. 2023): SwiGLU, RMSNorm before, no biases, no QK-norm."""
    fields: dict[str, Any] = {"activation": "swiglu", "qk_norm": False, "norm_eps": 1e-5} | more
    return Model(layers=layers, width=width, heads=heads, kv_heads=kv_heads, mlp=mlp, tied=tied, **fields)


def _qwen3(layers: int, width: int, heads: int, kv_heads: int, mlp: int, tied: bool, **more) -> Model:
    """Qwen 3: Llama's with QK-norm and heads of 128."""
    return _llama(layers, width, heads, kv_heads, mlp, tied, **_OPEN, head_dim=128, vocab_size=151936, qk_norm=True,
                  norm_eps=1e-6, rope_theta=1e6, **more)  # fmt: skip


def _gemma3(layers: int, width: int, heads: int, kv_heads: int, head_dim: int, mlp: int, window: int, **more) -> Model:
    """Gemma 3: sandwich norms, QK-norm, five windowed layers to a global one, each kind with its own theta."""
    return Model(layers=layers, width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim, mlp=mlp, **_OPEN,
                 activation="geglu", norm="gemma", post_norm=True, qk_norm=True, rope_theta=1e6, rope_local_theta=1e4,
                 pattern="WWWWWG", window=window, tied=True, embed_scale=True, **more)  # fmt: skip


_OPEN: dict[str, Any] = {"zero_init": False, "init_scale": 0.02}  # as their makers initialise
_LLAMA3_1 = RopeScaling("llama3", factor=8.0, original_length=8192, low_freq=1.0, high_freq=4.0)
_LLAMA3_2 = dataclasses.replace(_LLAMA3_1, factor=32.0)
_LINEAR_8 = RopeScaling("linear", factor=8.0)


def _known() -> dict[str, Model]:
    llama3 = _OPEN | {"vocab_size": 128256, "rope_theta": 500000.0}
    return {
        "llama3-1b": _llama(16, 2048, 32, 8, 8192, True, **llama3, rope_scaling=_LLAMA3_2),
        "llama3-8b": _llama(32, 4096, 32, 8, 14336, False, **llama3, rope_scaling=_LLAMA3_1),
        "llama3-70b": _llama(80, 8192, 64, 8, 28672, False, **llama3, rope_scaling=_LLAMA3_1),
        "qwen3-0.6b": _qwen3(28, 1024, 16, 8, 3072, True),
        "qwen3-8b": _qwen3(36, 4096, 32, 8, 12288, False),
        "qwen3-30b-a3b": _qwen3(48, 2048, 32, 4, 6144, False, experts=128, experts_per_token=8, expert_mlp=768),
        "gemma3-1b": _gemma3(26, 1152, 4, 1, 256, 6912, 512, vocab_size=262144),
        "gemma3-4b": _gemma3(34, 2560, 8, 4, 256, 10240, 1024, vocab_size=262208, rope_scaling=_LINEAR_8),
        "mistral-7b": _llama(32, 4096, 32, 8, 14336, False, **_OPEN, vocab_size=32000, pattern="W", window=4096),
        "mixtral-8x7b": _llama(32, 4096, 32, 8, 14336, False, **_OPEN, vocab_size=32000, rope_theta=1e6, experts=8,
                               experts_per_token=2),
    }  # fmt: skip
