"""The whole decoder written a second time, in NumPy and float64, a token and a head at a time: what the fields mean."""

import math

import jax
import numpy as np
import pytest

from lmtrain.models import transformer
from lmtrain.models.shapes import groups
from lmtrain.schema import Model, RopeScaling

V, T = 40, 14
GEMMA = dict(layers=5, norm="gemma", post_norm=True, activation="geglu", pattern="WG", window=5, rope_local_theta=50.0,
             rope_scaling=RopeScaling("linear", 4.0), attn_softcap=2.0, logit_softcap=3.0, attn_scale=0.2,
             embed_scale=True, head_dim=12)  # fmt: skip
KINDS = {
    "default": {},
    "llama": dict(activation="swiglu", qk_norm=False, tied=False, norm_eps=1e-2, rope_theta=500.0),
    "gemma": GEMMA,
    "windowed": dict(pattern="W", window=3, rope_theta=30.0, rope_scaling=RopeScaling("linear", 2.0)),
    "biases": dict(qkv_bias=True, out_bias=True, mlp_bias=True, embed_norm=True, norm_scale=False, qk_norm_scale=False),
}


def norm(cfg, x, p):
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps)
    return y * (p["scale"] + (cfg.norm == "gemma")) if p else y


def turn(cfg, x, t, windowed):
    local = windowed and cfg.rope_local_theta
    theta = cfg.rope_local_theta if local else cfg.rope_theta
    half = len(x) // 2
    angle = t * theta ** (-np.arange(half) / half) / (1 if local else cfg.rope_scaling.factor)
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag])


def attention(cfg, x, p, windowed):
    N, K, H = cfg.heads, cfg.kv_heads, cfg.head_dim
    q, k, v = (
        np.einsum("td,dnh->tnh", x, p[c]) + (p[c + "_bias"].reshape(-1, H) if cfg.qkv_bias else 0) for c in "qkv"
    )
    if cfg.qk_norm:
        q, k = norm(cfg, q, p.get("q_norm")), norm(cfg, k, p.get("k_norm"))
    out = np.zeros((T, N, H))
    for n in range(N):
        for t in range(T):
            seen = range(max(0, t - cfg.window + 1) if windowed else 0, t + 1)
            turned = turn(cfg, q[t, n], t, windowed)
            score = np.array([turned @ turn(cfg, k[s, n // (N // K)], s, windowed) for s in seen])
            score = score * (cfg.attn_scale or H**-0.5)
            score = cfg.attn_softcap * np.tanh(score / cfg.attn_softcap) if cfg.attn_softcap else score
            weight = np.exp(score) / np.exp(score).sum()
            out[t, n] = weight @ v[list(seen), n // (N // K)]
    return np.einsum("tnh,nhd->td", out, p["o"]) + (p["o_bias"] if cfg.out_bias else 0)


def mlp(cfg, x, p):
    bias = lambda name: p[name] if cfg.mlp_bias else 0  # noqa: E731
    up = x @ p["up"] + bias("up_bias")
    if cfg.activation == "relu2":
        hidden = np.maximum(up, 0) ** 2
    else:
        gate = x @ p["gate"]
        gelu = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        hidden = (gelu if cfg.activation == "geglu" else gate / (1 + np.exp(-gate))) * up
    return hidden @ p["down"] + bias("down_bias")


def decoder(cfg, params, tokens):
    x = params["embed"]["table"][tokens] * (math.sqrt(cfg.width) if cfg.embed_scale else 1)
    x = norm(cfg, x, params.get("embed_norm")) if cfg.embed_norm else x
    count, body, _ = groups(cfg)
    for i in range(cfg.layers):
        stack = params["layers"] if i < count * len(body) else params["tail"]
        p = jax.tree.map(lambda w: w[i // len(body) if stack is params["layers"] else 0], stack[str(i % len(body))])  # noqa: B023
        windowed = cfg.pattern[i % len(cfg.pattern)] == "W"
        after = lambda y, name: norm(cfg, y, p[name]) if cfg.post_norm else y  # noqa: B023, E731
        x = x + after(attention(cfg, norm(cfg, x, p.get("attn_norm")), p["attn"], windowed), "attn_post_norm")
        x = x + after(mlp(cfg, norm(cfg, x, p.get("mlp_norm")), p["mlp"]), "mlp_post_norm")
    x = norm(cfg, x, params.get("norm"))
    logits = x @ (params["embed"]["table"].T if cfg.tied else params["head"]["kernel"])
    return cfg.logit_softcap * np.tanh(logits / cfg.logit_softcap) if cfg.logit_softcap else logits


def both(cfg):
    rng = np.random.default_rng(0)
    draw = lambda s: rng.normal(0.4 * (len(s.shape) < 3), 0.25, s.shape).astype(np.float32)  # noqa: E731
    params = jax.tree.map(draw, transformer.shapes(cfg))
    tokens = rng.integers(0, V, T)
    forward = transformer.Forward(cfg)
    run = jax.jit(lambda p, t: forward.logits(p, forward.hidden(p, {"tokens_BT": t})[0]))
    return decoder(cfg, jax.tree.map(np.float64, params), tokens), np.asarray(run(params, tokens[None])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_is_what_its_fields_say(kind):
    base = dict(layers=2, width=24, heads=4, kv_heads=2, mlp=20, zero_init=False)
    cfg = transformer.resolve(Model(**base | KINDS[kind]), V)
    expected, got = both(cfg)
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())
    assert np.abs(expected).max() > 0.5
