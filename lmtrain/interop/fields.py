"""A Hugging Face config.json, read field by field. What nobody took, and nobody may ignore, is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from lmtrain.schema import Model, RopeScaling
from lmtrain.types import LmtrainError, nearest

#: Fields that do not change what the model computes: names, token ids, how it is trained or sampled from.
SILENT = frozenset(
    """_name_or_path architectures model_type transformers_version torch_dtype dtype use_cache bos_token_id eos_token_id
    pad_token_id sep_token_id decoder_start_token_id initializer_range attention_dropout embd_pdrop resid_pdrop
    attn_pdrop hidden_dropout id2label label2id problem_type finetuning_task tokenizer_class prefix
    task_specific_params return_dict output_hidden_states output_attentions output_router_logits router_aux_loss_coef
    torchscript _attn_implementation attn_implementation auto_map unsloth_version unsloth_fixed max_length min_length
    do_sample early_stopping num_beams temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size num_return_sequences remove_invalid_values reorder_and_upcast_attn summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj n_ctx max_position_embeddings
    chunk_size_feed_forward cache_implementation""".split()
)
#: Fields of every configuration with the one value that is understood.
ONLY: dict[str, Any] = {
    "is_encoder_decoder": False, "is_decoder": False, "add_cross_attention": False, "tie_encoder_decoder": False,
    "pruned_heads": {}, "use_bfloat16": False, "quantization_config": None,
}  # fmt: skip
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
             "original_max_position_embeddings"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor", "original_max_position_embeddings"),
}  # fmt: skip


class Fields:
    """The fields of one config.json. `take` reads one; `done` refuses those that nobody took.

    Args:
      values: the JSON object.
      where: its file, for messages.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self._taken: set[str] = set()

    def take(self, name: str, default: Any = None, kind: type | tuple[type, ...] | None = None) -> Any:
        """The field's value; `default` where it is absent or null.

        Raises:
          LmtrainError: it is not of that kind; absent, and there is no default where kind is given.
        """
        self._taken.add(name)
        value = self.values.get(name)
        value = default if value is None else value
        if kind is None:
            return value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            says = "is missing" if value is None else f"is {value!r}"
            named = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
            raise self.error(f"{name} {says}, but takes {named}.")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Takes a field that may have only these values, the first of which stands for its absence."""
        self._taken.add(name)
        value = self.values.get(name, allowed[0])
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):  # True is not 1
            said = " or ".join(repr(a) for a in allowed)
            raise self.error(f"{name} is {value!r}, which lmtrain's models cannot do; it takes {said}.")

    def done(self, known: Collection[str]) -> None:
        """Refuses fields that were not taken, but for those that change nothing. `known`: names, for the nearest."""
        for name, value in ONLY.items():
            if name in self.values:
                self.only(name, value, None)
        for name in self.values:
            if name not in self._taken | SILENT:
                hint = nearest(name, {*known, *self._taken, *SILENT})
                raise self.error(f"field {name}={self.values[name]!r} is not understood, so it is not ignored.{hint}")

    def error(self, text: str) -> LmtrainError:
        return LmtrainError(f"{self.where}: {text}")


# ----------------------------------------------------------------------------------------------------------- positions
def read_rope(
    f: Fields, model: dict[str, Any], theta: float = 10000.0, local: float = 0.0, partial: bool = False
) -> None:
    """rope_theta, rope_scaling and partial_rotary_factor (transformers 4), or rope_parameters (5), into a model.

    Args:
      theta: where the file gives none.
      local: of windowed layers, where the family has two and the file gives none (Gemma 3).
      partial: whether the family's code turns a part of a head only.
    """
    longest = f.take("max_position_embeddings", 2048, int)
    given = f.take("rope_parameters", None)
    scaling = dict(f.take("rope_scaling", None) or {})
    theta, share = f.take("rope_theta", theta, float), f.take("partial_rotary_factor", 1.0, float)
    original = f.take("original_max_position_embeddings", None)
    local = f.take("rope_local_base_freq", local, float) if local else 0.0
    if isinstance(given, dict) and local and not {"full_attention", "sliding_attention"} <= given.keys() and given:
        raise f.error(
            "rope_parameters takes full_attention and sliding_attention, since windowed layers have their own."
        )
    if given:
        scaling = dict(given)
        if local:
            windowed = dict(scaling["sliding_attention"])
            local = windowed.pop("rope_theta", local)
            if windowed.pop("rope_type", "default") != "default" or windowed:
                raise f.error(f"rope_parameters.sliding_attention has {windowed}: windowed layers are not scaled.")
            scaling = dict(scaling["full_attention"])
        theta, share = scaling.pop("rope_theta", theta), scaling.pop("partial_rotary_factor", share)
    named, older = scaling.pop("rope_type", None), scaling.pop("type", None)
    kind = named or older or "default"
    kind = "longrope" if kind == "su" else kind  # Phi 3's first name for it
    if kind not in ROPE_KEYS:
        hint = nearest(str(kind), ROPE_KEYS)
        raise f.error(f"rope scaling {kind!r} is not understood; lmtrain has {', '.join(ROPE_KEYS)}.{hint}")
    if kind in ("longrope", "yarn", "llama3") and "original_max_position_embeddings" not in scaling:
        scaling["original_max_position_embeddings"] = original or longest
    if kind == "default":  # nothing is scaled, so the length it was trained on says nothing
        scaling.pop("original_max_position_embeddings", None)
    for name in scaling:
        if name not in ROPE_KEYS[kind]:
            hint = nearest(name, ROPE_KEYS[kind])
            raise f.error(f"rope scaling {kind!r} has {name}={scaling[name]!r}, which is not understood.{hint}")
    if share != 1 and not partial:
        raise f.error(f"partial_rotary_factor is {share}, but this family's heads turn whole.")
    model |= {"rope_theta": float(theta), "rotary": float(share), "rope_local_theta": float(local)}
    model["rope_scaling"] = _scaling(f, kind, scaling, longest)


def _scaling(f: Fields, kind: str, s: dict[str, Any], longest: int) -> RopeScaling:
    if kind == "default":
        return RopeScaling()
    trained = s.get("original_max_position_embeddings") or longest
    factor = s.get("factor") or (longest / trained if kind in ("yarn", "longrope") else None)
    if factor is None:
        raise f.error(f"rope scaling {kind!r} takes a factor, and there is none.")
    common: dict[str, Any] = {"kind": kind, "factor": float(factor), "original_length": int(trained)}
    if kind == "linear":
        return RopeScaling(kind, float(factor))
    if kind == "dynamic":
        return RopeScaling(**common | {"original_length": longest})
    if kind == "llama3":
        low, high = s.get("low_freq_factor", 1.0), s.get("high_freq_factor", 4.0)
        return RopeScaling(**common, low_freq=float(low), high_freq=float(high))
    common["attention_factor"] = float(s.get("attention_factor") or 0.0)
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            if not isinstance(s.get(name), list):
                raise f.error(f"rope scaling 'longrope' takes a list {name}, and it is {s.get(name)!r}.")
        short, long = (tuple(map(float, s[name])) for name in ("short_factor", "long_factor"))
        return RopeScaling(**common, short=short, long=long)
    if not common["attention_factor"] and s.get("mscale") and s.get("mscale_all_dim"):
        grown = lambda m: 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0  # noqa: E731
        common["attention_factor"] = grown(s["mscale"]) / grown(s["mscale_all_dim"])
    fast, slow = s.get("beta_fast") or 32, s.get("beta_slow") or 1
    return RopeScaling(**common, beta_fast=float(fast), beta_slow=float(slow), truncate=bool(s.get("truncate", True)))


def write_rope(m: Model, out: dict[str, Any], local: bool = False) -> None:
    """The inverse of read_rope, as transformers 5 writes it. `local`: the family gives windowed layers their own."""
    s = m.rope_scaling
    p: dict[str, Any] = {"rope_type": "default" if s.kind == "none" else s.kind, "rope_theta": m.rope_theta}
    if m.rotary != 1:
        p["partial_rotary_factor"] = m.rotary
    if s.kind != "none":
        p["factor"] = s.factor
    if s.kind == "dynamic":
        out["max_position_embeddings"] = s.original_length
    if s.kind in ("llama3", "yarn", "longrope"):
        p["original_max_position_embeddings"] = s.original_length
        out["max_position_embeddings"] = int(s.original_length * s.factor)
    if s.kind == "llama3":
        p |= {"low_freq_factor": s.low_freq, "high_freq_factor": s.high_freq}
    if s.kind in ("yarn", "longrope") and s.attention_factor:
        p["attention_factor"] = s.attention_factor
    if s.kind == "yarn":
        p |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
    if s.kind == "longrope":
        p |= {"short_factor": list(s.short), "long_factor": list(s.long)}
        out["original_max_position_embeddings"] = s.original_length
    if not local:
        out["rope_parameters"] = p
        return
    theta = m.rope_local_theta or m.rope_theta
    out["rope_parameters"] = {"full_attention": p, "sliding_attention": {"rope_type": "default", "rope_theta": theta}}


# ------------------------------------------------------------------------------------------------------------- windows
def read_pattern(
    f: Fields, model: dict[str, Any], window: int | None, windowed: Callable[[int], bool]
) -> None:  # fmt: skip
    """layer_types, or where the file has none the family's rule, as a pattern of G and W.

    Args:
      window: positions that a windowed layer sees; None: none is windowed.
      windowed: whether layer i is, where the file does not say.
    """
    kinds = f.take("layer_types", None)
    layers = model["layers"]
    if kinds is None:
        word = "".join("W" if window and windowed(i) else "G" for i in range(layers))
    else:
        letters = {"full_attention": "G", "sliding_attention": "W"}
        for kind in kinds:
            if kind not in letters:
                raise f.error(f"layer_types has {kind!r}, but takes {', '.join(letters)}.{nearest(str(kind), letters)}")
        word = "".join(letters[kind] for kind in kinds)
        if len(word) != layers:
            raise f.error(f"layer_types has {len(word)} entries for num_hidden_layers={layers}.")
    if "W" in word and not window:
        raise f.error("layer_types has sliding_attention, but sliding_window is null.")
    model |= {"pattern": shortest(word), "window": window if "W" in word else 0}


def shortest(word: str) -> str:
    """The shortest pattern whose repetition begins with this word."""
    for n in range(1, len(word) + 1):
        if (word[:n] * len(word))[: len(word)] == word:
            return word[:n]
    return word


def layer_types(m: Model) -> list[str]:
    """The kind of every layer, in Hugging Face's words."""
    word = (m.pattern * m.layers)[: m.layers]
    return [{"G": "full_attention", "W": "sliding_attention"}[kind] for kind in word]
