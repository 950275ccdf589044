"""What the tests of the losses share: a model that is a table, conversations, and how these become rows.

The model is a bigram: the logits behind a token are a row of a table. It runs in float64, and a conversation's numbers
do not depend on where it lies, so everything that an objective does with segments, masks and padding shows by itself.
Conversations are dicts of NumPy arrays of their own length n; a reference in a test loops over them and knows no rows.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

V = 7  # vocabulary


@dataclasses.dataclass(frozen=True)
class Bigram:
    """What objectives use of transformer.Forward. params: table [V, V], value [V]; hidden states are tokens."""

    aux: float = 0.0  # router losses of every token

    def hidden(self, params, batch):
        real = (batch["segments_BT"] > 0).sum()
        return batch["tokens_BT"][..., None], self.aux * real * params["table"][0, 0]

    def logits(self, params, hidden_BTD):
        return params["table"][hidden_BTD[..., 0]]

    def scalar(self, params, hidden_BTD):
        return params["value"][hidden_BTD[..., 0]]

    def map_logits(self, params, f, hidden_BTD, *arrays):
        return f(self.logits(params, hidden_BTD), *arrays)

    def cross_entropy(self, logits_BTV, targets_BT):
        logps_BTV = jax.nn.log_softmax(logits_BTV)
        nll_BT = -jnp.take_along_axis(logps_BTV, targets_BT[..., None], -1)[..., 0]
        return nll_BT, jax.nn.logsumexp(logits_BTV, -1)

    def losses(self, params, batch, temperature=1.0, entropy=False, uniform=False):
        hidden_BTD, aux = self.hidden(params, batch)
        logits_BTV = self.logits(params, hidden_BTD) / temperature
        nll_BT, lse_BT = self.cross_entropy(logits_BTV, batch["targets_BT"])
        logps_BTV = jax.nn.log_softmax(logits_BTV)
        return types.SimpleNamespace(
            nll_BT=nll_BT, lse_BT=lse_BT, aux=aux, hidden_BTD=hidden_BTD,
            entropy_BT=-(jnp.exp(logps_BTV) * logps_BTV).sum(-1) if entropy else None,
            uniform_BT=-logps_BTV.mean(-1) if uniform else None,
        )  # fmt: skip


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    return {"table": rng.normal(0, 1, (V, V)), "value": rng.normal(0, 1, V)}


def conversation(rng, n, prompt, **per_token):
    """n tokens of which the first `prompt` were given; from 8 tokens on two in the middle are a user's, too."""
    tokens = rng.integers(0, V, n)
    weights = (np.arange(n) >= prompt - 1) * 1.0  # position t predicts token t + 1
    if n >= 8:
        weights[prompt + 1 : prompt + 3] = 0
    weights[-1] = 0
    c = {"tokens": tokens, "targets": np.append(tokens[1:], 0), "weights": weights}
    return c | {name: draw(n) if callable(draw) else np.full(n, draw) for name, draw in per_token.items()}


def logps(params, c, temperature=1.0):
    """log p of every target of one conversation, [n], float64."""
    z = params["table"][c["tokens"]] / temperature
    return z[np.arange(len(z)), c["targets"]] - np.log(np.exp(z).sum(-1))


def rows(conversations, layout, T=24, garbage=np.nan):
    """A batch of them. layout: for every row, the conversations in it, in order.

    Whatever weighs nothing, and padding, holds garbage: no loss may look at it.
    """
    batch = {
        name: np.zeros((len(layout), T), np.int32)
        for name in ("tokens_BT", "targets_BT", "segments_BT", "positions_BT")
    }
    extra = [name for name in conversations[0] if name not in ("tokens", "targets")]
    for name in extra:
        batch[f"{name}_BT"] = np.full((len(layout), T), 0.0 if name == "weights" else garbage)
    for b, row in enumerate(layout):
        at = 0
        for k, i in enumerate(row):
            c = conversations[i]
            n = len(c["tokens"])
            where = slice(at, at + n)
            batch["tokens_BT"][b, where], batch["targets_BT"][b, where] = c["tokens"], c["targets"]
            batch["segments_BT"][b, where], batch["positions_BT"][b, where] = k + 1, np.arange(n)
            for name in extra:
                keep = name in ("weights", "labels", "margins") or c["weights"] > 0
                batch[f"{name}_BT"][b, where] = np.where(keep, c[name], garbage)
            at += n
        assert at <= T
    return batch


def run(objective, params, batch, cfg, forward=None):
    """(mean, weight, {metric: mean}, gradient of the mean), in float64."""
    forward = forward or Bigram()
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        batch = {name: x if name in ("teacher",) else jnp.asarray(x) for name, x in batch.items()}
        if hasattr(objective, "first"):
            firsts = objective.first(forward, params, batch, cfg)
            batch |= {name: total / jnp.where(w == 0, 1, w) for name, (total, w) in firsts.items()}

        def loss(params):
            total, weight, metrics = objective(forward, params, batch, cfg)
            return total / weight, (weight, metrics)

        (value, (weight, metrics)), grad = jax.value_and_grad(loss, has_aux=True)(params)
        assert value.dtype == jnp.float64
        means = {k: float(x if k.endswith("_max") else x / np.where(w == 0, 1, w)) for k, (x, w) in metrics.items()}
        return float(value), float(weight), means, jax.tree.map(np.asarray, grad)


def check(objective, reference, params, batch, cfg, atol=1e-9, forward=None):
    """The objective's value and gradient are those of the reference, a function (params, held) -> mean in NumPy: held
    are the parameters of whatever takes no gradient. The gradient by central differences, in 6 directions."""
    value, _, metrics, grad = run(objective, params, batch, cfg, forward)
    assert value == pytest.approx(reference(params, params), abs=atol)
    rng = np.random.default_rng(5)
    for _ in range(6):
        d, e = {k: rng.normal(0, 1, x.shape) for k, x in params.items()}, 1e-5
        ahead, behind = ({k: params[k] + s * d[k] for k in params} for s in (e, -e))
        slope = (reference(ahead, params) - reference(behind, params)) / (2 * e)
        assert sum((grad[k] * d[k]).sum() for k in params) == pytest.approx(slope, abs=2e-7, rel=1e-5)
    assert max(np.abs(g).max() for g in grad.values()) > 1e-5  # something was compared
    return metrics


@pytest.fixture(scope="session")
def toy():
    """All of the above, as one thing to ask for."""
    return types.SimpleNamespace(
        **{f.__name__: f for f in (Bigram, parameters, conversation, logps, rows, run, check)}, V=V
    )
