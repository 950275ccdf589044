"""What a model's configuration leaves open, worked out and checked before anything is traced."""

from __future__ import annotations

import dataclasses
import fnmatch
import math

from lmtrain import schema
from lmtrain.mesh import divisors
from lmtrain.models import lora
from lmtrain.models.attention import BACKENDS
from lmtrain.models.layers import GATED, PLAIN
from lmtrain.types import nearest

CHOICES = {
    "activation": (*GATED, *PLAIN),
    "norm": ("rmsnorm", "gemma", "layernorm"),
    "qk_norm_over": ("head", "all"),
    "positions": ("rope", "learned"),
    "attention": ("auto", *BACKENDS),
    "remat": ("none", "dots", "full"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}
SCALINGS = ("none", "linear", "dynamic", "llama3", "yarn", "longrope")

LARGEST_SIZE = 2**31 - 1  # of one dimension: what an int32 index reaches
LARGEST_ARRAY = 2**40  # numbers in one parameter, all layers of a stack together: 4 TiB


def resolve(model: schema.Model, vocab_size: int = 0) -> schema.Model:
    """The same model with every shape that was left at 0 filled in. Resolving twice changes nothing.

    Args:
      model: as configured.
      vocab_size: the tokenizer's; 0: model.vocab_size must say it.

    Raises:
      ConfigError: where shapes do not fit together, or a name is not known.
    """
    m = model
    for field, names in CHOICES.items():
        _one_of(f"model.{field}", getattr(m, field), names)
    _one_of("model.rope_scaling.kind", m.rope_scaling.kind, SCALINGS)
    _finite("model", m)
    _finite("model.rope_scaling", m.rope_scaling)
    for field in ("layers", "width", "heads"):
        _at_least(field, getattr(m, field), 1)
    for field in ("kv_heads", "head_dim", "mlp", "vocab_size", "max_positions", "window", "experts", "shared_experts",
                  "expert_mlp", "unroll", "microbatches", "loss_chunk", "attn_softcap", "logit_softcap", "attn_scale",
                  "router_balance", "router_z", "init_scale", "rope_local_theta"):  # fmt: skip
        _at_least(field, getattr(m, field), 0)
    _at_least("rounds", m.rounds, 1)
    if m.norm_eps <= 0:
        raise schema.ConfigError(f"model.norm_eps is {m.norm_eps}; it takes a number above 0.")

    if not m.head_dim and m.width % m.heads:
        raise schema.ConfigError(
            f"model.heads is {m.heads}, which does not divide model.width={m.width}; it takes one of "
            f"{divisors(m.width)}, or set model.head_dim."
        )
    head_dim = m.head_dim or m.width // m.heads
    turning = int(m.rotary * head_dim)
    if m.positions == "rope" and m.rotary == 1 and head_dim % 2:
        raise schema.ConfigError(
            f"model.head_dim is {head_dim}{'' if m.head_dim else ' (model.width / model.heads)'}; "
            "rotary positions turn pairs, so it takes an even number."
        )
    if m.positions == "rope" and (not 0 < m.rotary <= 1 or turning % 2 or turning < 2):
        raise schema.ConfigError(
            f"model.rotary is {m.rotary}, which turns {turning} of a head's {head_dim} dimensions; "
            "it takes a share from 0 to 1 that is an even number of them."
        )
    if (m.positions == "learned") != bool(m.max_positions):
        raise schema.ConfigError(
            f"model.positions is {m.positions!r} and model.max_positions {m.max_positions}; "
            "learned positions take the longest row there, others 0."
        )
    if not (m.pre_norm or m.post_norm):
        raise schema.ConfigError("model.pre_norm and model.post_norm are both False; at least one takes True.")
    kv_heads = m.kv_heads or m.heads
    if m.heads % kv_heads:
        raise schema.ConfigError(
            f"model.kv_heads is {kv_heads}, which does not divide model.heads={m.heads}; "
            f"it takes one of {divisors(m.heads)}."
        )
    if not m.pattern or set(m.pattern) - {"G", "W"}:
        raise schema.ConfigError(
            f"model.pattern is {m.pattern!r}; it takes a word of G (global) and W (windowed), such as 'WWWWWG'."
        )
    if "W" in m.pattern and not m.window:
        raise schema.ConfigError(
            f"model.pattern is {m.pattern!r}, but model.window is 0; set how many positions W sees."
        )
    if m.window and "W" not in m.pattern:
        raise schema.ConfigError(
            f"model.window is {m.window}, but model.pattern={m.pattern!r} has no windowed layer; "
            "set model.pattern='W' for a window in every layer, or model.window=0."
        )
    if m.experts and not 1 <= m.experts_per_token <= m.experts:
        raise schema.ConfigError(
            f"model.experts_per_token is {m.experts_per_token}; it takes 1 to model.experts={m.experts}."
        )
    if m.shared_experts and not m.experts:
        raise schema.ConfigError(
            f"model.shared_experts is {m.shared_experts}, but model.experts is 0: there is no mixture."
        )
    _check_lora(m)
    if m.experts and m.mlp_bias:
        raise schema.ConfigError("model.mlp_bias is True, but experts (model.experts) have no biases; it takes False.")
    _check_rope(m)
    if m.vocab_size and vocab_size > m.vocab_size:
        raise schema.ConfigError(
            f"model.vocab_size is {m.vocab_size}, but the tokenizer has {vocab_size} tokens; "
            "it takes at least as many, or 0 for as many."
        )
    if not (m.vocab_size or vocab_size):
        raise schema.ConfigError("model.vocab_size is 0 (the tokenizer's), but no tokenizer is given; set it.")

    mlp = m.mlp or (-(-8 * m.width // (3 * 64)) * 64 if m.activation in GATED else 4 * m.width)
    resolved = dataclasses.replace(
        m, kv_heads=kv_heads, head_dim=head_dim, mlp=mlp, vocab_size=m.vocab_size or vocab_size,
        expert_mlp=m.expert_mlp or mlp)  # fmt: skip
    _check_arrays(resolved)
    return resolved


def groups(cfg: schema.Model) -> tuple[int, str, str]:
    """(number of layer groups, kinds of layer in a group, kinds of the layers left over)."""
    body = cfg.pattern[0] if len(set(cfg.pattern)) == 1 else cfg.pattern[: cfg.layers]
    count = cfg.layers // len(body)
    return count, body, body[: cfg.layers - count * len(body)]


def embedding_std(cfg: schema.Model) -> float:
    """Standard deviation of a fresh embedding. A tied one is the output matrix too, so its rows start short."""
    return cfg.init_scale or (0.02 if cfg.tied else 1.0)


def _check_arrays(m: schema.Model) -> None:
    """Refuses a parameter that no machine holds, before anything is traced: a digit too many, most likely."""
    arrays: list[tuple[str, ...]] = [("vocab_size", "width"), ("layers", "width", "heads", "head_dim")]
    arrays += [("layers", "width", "experts", "expert_mlp") if m.experts else ("layers", "width", "mlp")]
    arrays += [("layers", "width", "shared_experts", "expert_mlp")]
    for fields in arrays:
        sizes = [getattr(m, field) for field in fields]
        if math.prod(sizes) > LARGEST_ARRAY:
            said = " * ".join(f"model.{field}={size}" for field, size in zip(fields, sizes, strict=True))
            count = f"{math.prod(sizes):.1e} numbers in one array"
            raise schema.ConfigError(f"{said} is {count}; it takes at most {LARGEST_ARRAY:.1e}.")


def _check_lora(m: schema.Model) -> None:
    if not 0 <= m.lora.rank <= LARGEST_SIZE or not math.isfinite(m.lora.alpha) or m.lora.alpha <= 0:
        raise schema.ConfigError(
            f"model.lora.rank is {m.lora.rank} and alpha {m.lora.alpha}; they take at least 0, and a number above 0."
        )
    if not m.lora.rank:
        return
    there = [n for n in lora.MATRICES if not (
        n.endswith("/gate") and m.activation not in GATED or "shared" in n and not m.shared_experts
        or n.startswith("head") and m.tied)]  # fmt: skip
    for pattern in m.lora.matrices:
        if not fnmatch.filter(there, pattern):
            raise schema.ConfigError(
                f"model.lora.matrices has {pattern!r}, which is the name of no matrix; it takes patterns of "
                f"{', '.join(there)}.{nearest(pattern, there)}"
            )
    if not m.lora.matrices:
        raise schema.ConfigError("model.lora.matrices is empty; ('attn/*', 'mlp/*') adapts all of a layer's.")


def _check_rope(m: schema.Model) -> None:
    s = m.rope_scaling
    if m.rope_theta <= 1 or 0 < m.rope_local_theta <= 1:
        raise schema.ConfigError(
            f"model.rope_theta is {m.rope_theta} and model.rope_local_theta {m.rope_local_theta}; "
            "they take numbers above 1."
        )
    if s.kind == "none":
        return
    if s.factor < 1 or s.original_length < 2:
        raise schema.ConfigError(
            f"model.rope_scaling: factor is {s.factor} and original_length {s.original_length}; "
            "they take at least 1 and 2."
        )
    if s.kind == "llama3" and s.low_freq <= 0:
        raise schema.ConfigError(f"model.rope_scaling.low_freq is {s.low_freq}; it takes a number above 0.")
    pairs = int(m.rotary * (m.head_dim or m.width // m.heads)) // 2
    if s.kind == "longrope" and (len(s.short), len(s.long)) != (pairs, pairs):
        raise schema.ConfigError(
            f"model.rope_scaling has {len(s.short)} short and {len(s.long)} long divisors; longrope takes {pairs} of "
            "each, one for every pair of dimensions that turns."
        )
    if s.kind == "longrope" and not all(math.isfinite(x) and x > 0 for x in (*s.short, *s.long)):
        raise schema.ConfigError("model.rope_scaling.short and .long take finite numbers above 0.")
    if s.kind == "yarn" and s.beta_slow <= 0:
        raise schema.ConfigError(f"model.rope_scaling.beta_slow is {s.beta_slow}; it takes a number above 0.")
    if s.attention_factor < 0:
        raise schema.ConfigError(
            f"model.rope_scaling.attention_factor is {s.attention_factor}; it takes at least 0 "
            "(0: worked out from the factor)."
        )
    if s.kind == "llama3" and s.high_freq <= s.low_freq:
        raise schema.ConfigError(
            f"model.rope_scaling.high_freq is {s.high_freq}; it takes more than low_freq={s.low_freq}."
        )
    if s.kind == "yarn" and s.beta_fast <= s.beta_slow:
        raise schema.ConfigError(
            f"model.rope_scaling.beta_fast is {s.beta_fast}; it takes more than beta_slow={s.beta_slow}."
        )


def _one_of(field: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise schema.ConfigError(f"{field} is {value!r}; it takes {', '.join(names)}.{nearest(str(value), names)}")


def _finite(where: str, settings: schema.Model | schema.RopeScaling) -> None:
    """Refuses an inf, a nan, and a size that no index reaches, in any field."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise schema.ConfigError(f"{where}.{field.name} is {value}; it takes a finite number.")
        if field.type == "int" and value > LARGEST_SIZE:
            raise schema.ConfigError(f"{where}.{field.name} is {value}; it takes at most {LARGEST_SIZE}.")


def _at_least(field: str, value: float, least: int) -> None:
    if value < least:
        raise schema.ConfigError(f"model.{field} is {value}; it takes at least {least}.")
