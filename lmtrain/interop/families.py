"""Families of models on the Hugging Face hub: one table each, of what its config.json says and what its tensors are.

A family maps fields of config.json to fields of schema.Model (`fields`), says what all its members are (`fixed`), which
fields may have one value only (`only`), and reads and writes what takes more than that (`aspects`: rope, windows). Its
`weights` name, for each of our parameters, the tensor that holds it. To add a family, add a table to FAMILIES.

A tensor of a torch Linear is [out, in], ours is [in, out...]; GPT-2's Conv1D is [in, out] (`flat`). Several of ours may
lie in one tensor, one after the other along its outputs: `part` says which and how many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lmtrain.interop import fields as f_lib
from lmtrain.interop.fields import Fields
from lmtrain.schema import Model

Aspect = tuple[Callable[[Fields, dict[str, Any]], None], Callable[[Model, dict[str, Any]], None]]


@dataclasses.dataclass(frozen=True)
class Weight:
    """Where one of our parameters lies in a checkpoint.

    Attributes:
      ours: its path, "attn/q"; of a layer, unless the family lists it among the `ends`.
      theirs: the tensor's name; {l} is the layer's number, {e} an expert's.
      ins: how many leading dimensions of ours are inputs (1: [D, N, H]; 2: [N, H, D]); 0: a vector, or a table.
      flat: the tensor is [in, out], as ours.
      before: outputs of the tensor that come before this part of it, from the model; None: the tensor is all ours.
    """

    ours: str
    theirs: str
    ins: int = 1
    flat: bool = False
    before: Callable[[Model], int] | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """A family's table; see the top of this file."""

    architecture: str
    fields: dict[str, str]
    defaults: dict[str, Any]  # of config fields that a file may leave out
    fixed: dict[str, Any]
    aspects: tuple[Aspect, ...]
    layer: tuple[Weight, ...]
    ends: tuple[Weight, ...]
    only: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    prefix: str = "model."  # that some checkpoints leave out


# ------------------------------------------------------------------------------------------------------------ aspects
def _rope(theta: float = 10000.0, local: float = 0.0, partial: bool = False) -> Aspect:
    return (
        lambda f, m: f_lib.read_rope(f, m, theta, local, partial),
        lambda m, out: f_lib.write_rope(m, out, local=bool(local)),
    )


def _bias(*ours: str) -> Aspect:
    """attention_bias, which is of these of our fields at once."""

    def read(f: Fields, m: dict[str, Any]) -> None:
        m |= dict.fromkeys(ours, f.take("attention_bias", False, bool))

    return read, lambda m, out: out.update(attention_bias=getattr(m, ours[0]))


def _window() -> Aspect:
    """sliding_window of every layer (Mistral, Mixtral, Phi-3)."""

    def read(f: Fields, m: dict[str, Any]) -> None:
        f_lib.read_pattern(f, m, f.take("sliding_window", None), lambda i: True)

    return read, lambda m, out: out.update(sliding_window=m.window or None)


def _qwen_window() -> Aspect:
    """sliding_window of the layers past max_window_layers, where use_sliding_window is set."""

    def read(f: Fields, m: dict[str, Any]) -> None:
        on, window = f.take("use_sliding_window", False, bool), f.take("sliding_window", None)
        first = f.take("max_window_layers", 28, int)
        f_lib.read_pattern(f, m, window if on else None, lambda i: i >= first)

    def write(m: Model, out: dict[str, Any]) -> None:
        out |= {"use_sliding_window": bool(m.window), "sliding_window": m.window or None}
        out |= {"layer_types": f_lib.layer_types(m), "max_window_layers": m.layers}

    return read, write


def _moe_window() -> Aspect:
    """Qwen 3 MoE's, whose every layer is windowed where use_sliding_window is set."""

    def read(f: Fields, m: dict[str, Any]) -> None:
        on, window = f.take("use_sliding_window", False, bool), f.take("sliding_window", None)
        f.take("max_window_layers", 28)
        f_lib.read_pattern(f, m, window if on else None, lambda i: True)

    def write(m: Model, out: dict[str, Any]) -> None:
        out |= {"use_sliding_window": bool(m.window), "sliding_window": m.window or None}

    return read, write


def _gemma_window(every: int) -> Aspect:
    """Windowed layers but for each `every`-th."""

    def read(f: Fields, m: dict[str, Any]) -> None:
        n = f.take("sliding_window_pattern", None) or f.take("_sliding_window_pattern", every, int)
        f.take("_sliding_window_pattern")
        f_lib.read_pattern(f, m, f.take("sliding_window", 4096), lambda i: (i + 1) % n != 0)

    def write(m: Model, out: dict[str, Any]) -> None:
        out |= {"sliding_window": m.window or 4096, "layer_types": f_lib.layer_types(m)}

    return read, write


def _gemma_scales() -> Aspect:
    """Soft caps, and the scale of attention's scores, which Gemma gives as the number whose root divides them."""

    def read(f: Fields, m: dict[str, Any]) -> None:
        m["attn_softcap"] = f.take("attn_logit_softcapping", 0.0, float)
        m["logit_softcap"] = f.take("final_logit_softcapping", 0.0, float)
        m["attn_scale"] = f.take("query_pre_attn_scalar", 256.0, float) ** -0.5
        act = f.take("hidden_activation", None) or f.take("hidden_act", "gelu_pytorch_tanh")
        f.take("hidden_act")
        if act != "gelu_pytorch_tanh":
            raise f.error(f"hidden_activation is {act!r}; Gemma's is 'gelu_pytorch_tanh'.")

    def write(m: Model, out: dict[str, Any]) -> None:
        scale = m.attn_scale or m.head_dim**-0.5
        out |= {"attn_logit_softcapping": m.attn_softcap or None, "final_logit_softcapping": m.logit_softcap or None}
        out |= {"query_pre_attn_scalar": round(scale**-2), "hidden_activation": "gelu_pytorch_tanh"}

    return read, write


def _experts(count: str) -> Aspect:
    """The number of experts, which transformers 4 and 5 may call by two names."""
    names = (count, *({"num_experts", "num_local_experts"} - {count}))

    def read(f: Fields, m: dict[str, Any]) -> None:
        m["experts"] = next((f.take(n, None, int) for n in names if n in f.values), None) or f.take(count, None, int)

    return read, lambda m, out: out.update({count: m.experts})


def _plain_activation(*names: str) -> Aspect:
    """hidden_act of an MLP without a gate."""
    known = {"relu2": "relu2", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}

    def read(f: Fields, m: dict[str, Any]) -> None:
        act = f.take("hidden_act", names[0])
        if act not in names:
            raise f.error(f"hidden_act is {act!r}; lmtrain has {', '.join(names)}.")
        m["activation"] = known[act]

    def write(m: Model, out: dict[str, Any]) -> None:
        out["hidden_act"] = next((n for n in names if known[n] == m.activation), m.activation)

    return read, write


# ------------------------------------------------------------------------------------------------------------- weights
def _attention(name: str = "self_attn") -> tuple[Weight, ...]:
    return (
        Weight("attn/q", f"{name}.q_proj.weight"),
        Weight("attn/k", f"{name}.k_proj.weight"),
        Weight("attn/v", f"{name}.v_proj.weight"),
        Weight("attn/o", f"{name}.o_proj.weight", ins=2),
        Weight("attn/q_bias", f"{name}.q_proj.bias", ins=0),
        Weight("attn/k_bias", f"{name}.k_proj.bias", ins=0),
        Weight("attn/v_bias", f"{name}.v_proj.bias", ins=0),
        Weight("attn/o_bias", f"{name}.o_proj.bias", ins=0),
        Weight("attn/q_norm/scale", f"{name}.q_norm.weight", ins=0),
        Weight("attn/k_norm/scale", f"{name}.k_norm.weight", ins=0),
    )


_MLP = (
    *(Weight(f"mlp/{n}", f"mlp.{n}_proj.weight") for n in ("gate", "up", "down")),
    *(Weight(f"mlp/{n}_bias", f"mlp.{n}_proj.bias", ins=0) for n in ("gate", "up", "down")),
)


def _norms(**theirs: str) -> tuple[Weight, ...]:
    return tuple(Weight(f"{ours}/scale", f"{name}.weight", ins=0) for ours, name in theirs.items())


_BEFORE = _norms(attn_norm="input_layernorm", mlp_norm="post_attention_layernorm")
_SANDWICH = _norms(
    attn_norm="input_layernorm", attn_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm", mlp_post_norm="post_feedforward_layernorm",
)  # fmt: skip
_AFTER = _norms(attn_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm")
_ENDS = (
    Weight("embed/table", "model.embed_tokens.weight", ins=0),
    Weight("norm/scale", "model.norm.weight", ins=0),
    Weight("head/kernel", "lm_head.weight"),
)


def _layer(*weights: Weight, stem: str = "model.layers.{l}.") -> tuple[Weight, ...]:
    return tuple(dataclasses.replace(w, theirs=stem + w.theirs) for w in weights)


def _moe(stem: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    names = {"gate": gate, "up": up, "down": down}
    experts = tuple(Weight(f"mlp/{ours}", f"{stem}.experts.{{e}}.{name}.weight") for ours, name in names.items())
    return (Weight("mlp/router", f"{stem}.gate.weight"), *experts)


_q = lambda m: m.heads * m.head_dim  # noqa: E731
_kv = lambda m: m.kv_heads * m.head_dim  # noqa: E731
_start = lambda m: 0  # noqa: E731
_PHI = (
    Weight("attn/q", "self_attn.qkv_proj.weight", before=_start),
    Weight("attn/k", "self_attn.qkv_proj.weight", before=_q),
    Weight("attn/v", "self_attn.qkv_proj.weight", before=lambda m: _q(m) + _kv(m)),
    Weight("attn/o", "self_attn.o_proj.weight", ins=2),
    Weight("mlp/gate", "mlp.gate_up_proj.weight", before=_start),
    Weight("mlp/up", "mlp.gate_up_proj.weight", before=lambda m: m.mlp),
    Weight("mlp/down", "mlp.down_proj.weight"),
)
_GPT2 = (
    *(Weight(f"attn/{n}", "attn.c_attn.weight", flat=True, before=b) for n, b in (
        ("q", _start), ("k", _q), ("v", lambda m: 2 * _q(m)))),
    *(Weight(f"attn/{n}_bias", "attn.c_attn.bias", ins=0, before=b) for n, b in (
        ("q", _start), ("k", _q), ("v", lambda m: 2 * _q(m)))),
    Weight("attn/o", "attn.c_proj.weight", ins=2, flat=True),
    Weight("attn/o_bias", "attn.c_proj.bias", ins=0),
    Weight("mlp/up", "mlp.c_fc.weight", flat=True),
    Weight("mlp/up_bias", "mlp.c_fc.bias", ins=0),
    Weight("mlp/down", "mlp.c_proj.weight", flat=True),
    Weight("mlp/down_bias", "mlp.c_proj.bias", ins=0),
    *(Weight(f"{ours}/{part}", f"{name}.{kind}", ins=0)
      for ours, name in (("attn_norm", "ln_1"), ("mlp_norm", "ln_2")) for part, kind in (
          ("scale", "weight"), ("bias", "bias"))),
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------- tables
_FIELDS = {
    "vocab_size": "vocab_size", "hidden_size": "width", "intermediate_size": "mlp", "num_hidden_layers": "layers",
    "num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps", "tie_word_embeddings": "tied",
}  # fmt: skip
_DEFAULTS = {"num_key_value_heads": 0, "head_dim": 0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_GATED = {"activation": "swiglu", "qk_norm": False}
_SILU = {"hidden_act": ("silu",)}
_QWEN3 = {"activation": "swiglu", "qk_norm": True}
_GEMMA = {"activation": "geglu", "norm": "gemma", "post_norm": True, "embed_scale": True}
_GEMMA_DEFAULTS = _DEFAULTS | {"head_dim": 256, "tie_word_embeddings": True, "num_key_value_heads": 4}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", _FIELDS | {"mlp_bias": "mlp_bias"}, _DEFAULTS | {"mlp_bias": False}, _GATED,
        (_rope(), _bias("qkv_bias", "out_bias")), _layer(*_attention(), *_MLP, *_BEFORE), _ENDS,
        _SILU | {"pretraining_tp": (1,)},
    ),
    "mistral": Family(
        "MistralForCausalLM", _FIELDS, _DEFAULTS | {"num_key_value_heads": 8}, _GATED, (_rope(), _window()),
        _layer(*_attention(), *_MLP, *_BEFORE), _ENDS, _SILU,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", _FIELDS, _DEFAULTS, _GATED | {"qkv_bias": True}, (_rope(), _qwen_window()),
        _layer(*_attention(), *_MLP, *_BEFORE), _ENDS, _SILU,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", _FIELDS, _DEFAULTS | {"head_dim": 128}, _QWEN3,
        (_rope(), _qwen_window(), _bias("qkv_bias", "out_bias")), _layer(*_attention(), *_MLP, *_BEFORE), _ENDS, _SILU,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _FIELDS | {"num_experts_per_tok": "experts_per_token", "moe_intermediate_size": "expert_mlp",
                   "norm_topk_prob": "router_norm"},
        _DEFAULTS | {"num_experts_per_tok": 8, "norm_topk_prob": False, "num_key_value_heads": 4}, _QWEN3,
        (_rope(), _moe_window(), _bias("qkv_bias", "out_bias"), _experts("num_experts")),
        _layer(*_attention(), *_BEFORE, *_moe("mlp", "gate_proj", "up_proj", "down_proj")), _ENDS,
        _SILU | {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
    ),
    "mixtral": Family(
        "MixtralForCausalLM", _FIELDS | {"num_experts_per_tok": "experts_per_token"},
        _DEFAULTS | {"num_experts_per_tok": 2, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
        _GATED | {"router_norm": True}, (_rope(1e6), _window(), _experts("num_local_experts")),
        _layer(*_attention(), *_BEFORE, *_moe("block_sparse_moe", "w1", "w3", "w2")), _ENDS,
        _SILU | {"router_jitter_noise": (0.0,)},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM", _FIELDS, _GEMMA_DEFAULTS, _GEMMA | {"qk_norm": False},
        (_rope(), _gemma_window(2), _gemma_scales(), _bias("qkv_bias", "out_bias")),
        _layer(*_attention(), *_MLP, *_SANDWICH), _ENDS, {"use_bidirectional_attention": (None, False)},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", _FIELDS, _GEMMA_DEFAULTS, _GEMMA | {"qk_norm": True},
        (_rope(1e6, 1e4), _gemma_window(6), _gemma_scales(), _bias("qkv_bias", "out_bias")),
        _layer(*_attention(), *_MLP, *_SANDWICH), _ENDS, {"use_bidirectional_attention": (False, None)},
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {"vocab_size": "vocab_size", "n_positions": "max_positions", "n_embd": "width", "n_layer": "layers",
         "n_head": "heads", "n_inner": "mlp", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tied"},
        {"n_inner": 0, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "n_positions": 1024},
        {"activation": "gelu", "norm": "layernorm", "positions": "learned", "qk_norm": False, "qkv_bias": True,
         "out_bias": True, "mlp_bias": True}, (),
        _layer(*_GPT2, stem="transformer.h.{l}."),
        (Weight("embed/table", "transformer.wte.weight", ins=0), Weight("positions/table", "transformer.wpe.weight", 0),
         Weight("norm/scale", "transformer.ln_f.weight", 0), Weight("norm/bias", "transformer.ln_f.bias", 0),
         Weight("head/kernel", "lm_head.weight")),
        {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
         "scale_attn_by_inverse_layer_idx": (False,)}, prefix="transformer.",
    ),
    "phi3": Family(
        "Phi3ForCausalLM", _FIELDS, _DEFAULTS | {"rms_norm_eps": 1e-5}, _GATED, (_rope(partial=True), _window()),
        _layer(*_PHI, *_BEFORE), _ENDS, _SILU,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM", _FIELDS, _DEFAULTS | {"rms_norm_eps": 1e-5},
        {"activation": "swiglu", "qk_norm": True, "qk_norm_over": "all", "pre_norm": False, "post_norm": True},
        (_rope(), _bias("qkv_bias", "out_bias")), _layer(*_attention(), *_MLP, *_AFTER), _ENDS, _SILU,
    ),
    # The two that hold what lmtrain trains from scratch by default: an MLP without a gate.
    "apertus": Family(
        "ApertusForCausalLM", _FIELDS, _DEFAULTS | {"rms_norm_eps": 1e-5}, {"qk_norm": True},
        (_rope(12e6), _bias("qkv_bias", "out_bias"), _plain_activation("relu2", "gelu_pytorch_tanh")),
        _layer(*_attention(), *_MLP, *_norms(attn_norm="attention_layernorm", mlp_norm="feedforward_layernorm")), _ENDS,
    ),
    "arcee": Family(
        "ArceeForCausalLM", _FIELDS | {"mlp_bias": "mlp_bias"}, _DEFAULTS | {"mlp_bias": False, "rms_norm_eps": 1e-5},
        {"qk_norm": False}, (_rope(), _bias("qkv_bias", "out_bias"), _plain_activation("relu2", "gelu_pytorch_tanh")),
        _layer(*_attention(), *_MLP, *_BEFORE), _ENDS,
    ),
}  # fmt: skip
