"""pretrain, sft, gkd against their formulas."""

import dataclasses

import jax
import numpy as np
import pytest

from lmtrain import types
from lmtrain.objectives.distill import Gkd, gkd
from lmtrain.objectives.pretrain import Pretrain, pretrain
from lmtrain.objectives.sft import Sft, sft
from lmtrain.schema import ConfigError

PACKED = [[0, 1, 2], [3], [4, 5]]
ALONE = [[i] for i in range(6)]


@pytest.fixture(scope="module")
def talks(toy):
    rng = np.random.default_rng(0)
    return [toy.conversation(rng, n, prompt) for n, prompt in [(3, 1), (8, 3), (11, 2), (24, 9), (5, 4), (12, 6)]]


def log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("layout", [PACKED, ALONE], ids=["packed", "alone"])
@pytest.mark.parametrize("cfg", [Sft(), Sft(label_smoothing=0.1, z_loss=0.01)], ids=str)
def test_sft(toy, talks, cfg, layout):
    def reference(params, held):
        total = n = 0.0
        for c in talks:
            z = params["table"][c["tokens"]]
            for t in range(len(z)):
                logp = log_softmax(z[t])
                target = np.full(toy.V, cfg.label_smoothing / toy.V)
                target[c["targets"][t]] += 1 - cfg.label_smoothing
                lse = np.log(np.exp(z[t]).sum())
                total += c["weights"][t] * (-(target * logp).sum() + cfg.z_loss * lse**2)
                n += c["weights"][t]
        return total / n

    params = toy.parameters()
    metrics = toy.check(sft, reference, params, toy.rows(talks, layout), cfg)
    own = np.concatenate([toy.logps(params, c)[c["weights"] > 0] for c in talks])
    assert metrics["nll"] == pytest.approx(-own.mean(), abs=1e-9)


def test_a_message_that_weighs_nothing_teaches_nothing(toy, talks):
    silent = [c | {"weights": c["weights"] * (i != 2)} for i, c in enumerate(talks)]
    without = [c for i, c in enumerate(talks) if i != 2]
    a = toy.run(sft, toy.parameters(), toy.rows(silent, PACKED), Sft())
    b = toy.run(sft, toy.parameters(), toy.rows(without, [[0, 1], [2], [3, 4]]), Sft())
    assert a[0] == pytest.approx(b[0], abs=1e-12) and a[1] == b[1]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), a[3], b[3])


def test_router_losses_are_added(toy, talks):
    batch, params = toy.rows(talks, PACKED), toy.parameters()
    plain = toy.run(pretrain, params, batch, Pretrain())
    routed = toy.run(pretrain, params, batch, Pretrain(), forward=toy.Bigram(aux=0.5))
    tokens = sum(len(c["tokens"]) for c in talks)
    assert routed[0] - plain[0] == pytest.approx(0.5 * params["table"][0, 0] * tokens / plain[1])


# -------------------------------------------------------------------------------------------------------- distillation
def teacher(toy):
    return types.Frozen(params=toy.parameters(seed=9), forward=toy.Bigram())


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_gkd(toy, talks, beta):
    cfg = Gkd(beta=beta, temperature=1.5)

    def reference(params, held):
        total = n = 0.0
        for c in talks:
            for t in np.flatnonzero(c["weights"]):
                p = np.exp(log_softmax(teacher(toy).params["table"][c["tokens"][t]] / 1.5))
                q = np.exp(log_softmax(params["table"][c["tokens"][t]] / 1.5))
                m = beta * p + (1 - beta) * q
                if beta == 0:
                    total += (p * np.log(p / q)).sum()
                elif beta == 1:
                    total += (q * np.log(q / p)).sum()
                else:
                    total += beta * (p * np.log(p / m)).sum() + (1 - beta) * (q * np.log(q / m)).sum()
                n += 1
        return total / n

    batch = toy.rows(talks, PACKED) | {"teacher": teacher(toy)}
    params = toy.parameters()
    metrics = toy.check(gkd, reference, params, batch, cfg)
    own = np.concatenate([toy.logps(params, c)[c["weights"] > 0] for c in talks])
    assert metrics["nll"] == pytest.approx(-own.mean(), abs=1e-9)


@pytest.mark.parametrize("beta", [1e-4, 1 - 1e-4])
def test_gkd_between_its_ends_goes_to_them(toy, talks, beta):
    batch = toy.rows(talks, ALONE) | {"teacher": teacher(toy)}
    inside = toy.run(gkd, toy.parameters(), batch, Gkd(beta=beta))[0]
    end = toy.run(gkd, toy.parameters(), batch, Gkd(beta=round(beta)))[0]
    assert inside / min(beta, 1 - beta) == pytest.approx(end, rel=2e-3)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(toy, talks):
    batch = toy.rows(talks, PACKED) | {"teacher": teacher(toy)}
    for beta in (0.0, 0.3, 1.0):
        value, _, _, grad = toy.run(gkd, teacher(toy).params, batch, Gkd(beta=beta))
        assert abs(value) < 1e-12 and np.abs(grad["table"]).max() < 1e-12


def test_a_teacher_that_is_missing_or_speaks_another_language_is_named(toy, talks):
    batch = toy.rows(talks, PACKED)
    with pytest.raises(ConfigError, match="teacher"):
        toy.run(gkd, toy.parameters(), batch, Gkd())
    other = dataclasses.replace(teacher(toy), params={"table": np.zeros((toy.V, 9)), "value": np.zeros(9)})
    with pytest.raises(ConfigError, match="vocabulary has 9 tokens, the student's 7"):
        toy.run(gkd, toy.parameters(), batch | {"teacher": other}, Gkd())


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Sft(label_smoothing=1.5), "loss.label_smoothing is 1.5; it takes 0 to 1"),
        (lambda: Pretrain(z_loss=-1.0), "loss.z_loss is -1.0; it takes at least 0"),
        (lambda: Gkd(beta=float("nan")), "loss.beta is nan; it takes 0 to 1"),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
