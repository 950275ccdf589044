"""reward, discriminator and the preference losses against their formulas."""

import math

import numpy as np
import pytest

from lmtrain.objectives.adversarial import Discriminator, discriminator
from lmtrain.objectives.preference import Dpo, DpoNorm, Ipo, Kto, Orpo, SimPo, dpo, dpo_norm, ipo, kto, orpo, simpo
from lmtrain.objectives.reward import Reward, reward
from lmtrain.schema import ConfigError

# Pairs are (0, 1), (2, 3), ...; a pair stays in one row. (8, 9): the rejected reply has no token that counts.
SIZES = [(4, 2), (7, 3), (9, 3), (12, 5), (3, 2), (10, 2), (5, 1), (8, 4), (6, 3), (6, 6)]
PACKED = [[0, 1], [2, 3], [4, 5, 6, 7], [8, 9]]
TIGHT = [[2, 3], [0, 1, 4, 5], [6, 7], [8, 9]]
ALONE = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
PAIRS = [(0, 1), (2, 3), (4, 5), (6, 7)]
log_sigmoid = lambda x: -math.log1p(math.exp(-x))  # noqa: E731
sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731


@pytest.fixture(scope="module")
def replies(toy):
    rng = np.random.default_rng(1)
    return [toy.conversation(rng, n, p, ref_logps=lambda n: -rng.random(n) * 3) for n, p in SIZES]


def total(toy, params, c, against_reference=True):
    return sum(
        (toy.logps(params, c)[t] - (c["ref_logps"][t] if against_reference else 0))
        for t in np.flatnonzero(c["weights"])
    )


def mean(toy, params, c, against_reference=True):
    return total(toy, params, c, against_reference) / c["weights"].sum()


def loss_dpo(toy, params, c, r, cfg, of=total):
    x = cfg.beta * (of(toy, params, c) - of(toy, params, r))
    return -(1 - cfg.label_smoothing) * log_sigmoid(x) - cfg.label_smoothing * log_sigmoid(-x)


def loss_ipo(toy, params, c, r, cfg):
    of = mean if cfg.average else total
    return (of(toy, params, c) - of(toy, params, r) - 1 / (2 * cfg.beta)) ** 2


def loss_simpo(toy, params, c, r, cfg):
    return -log_sigmoid(cfg.beta * (mean(toy, params, c, False) - mean(toy, params, r, False)) - cfg.gamma)


def loss_orpo(toy, params, c, r, cfg):
    p, q = (math.exp(mean(toy, params, x, False)) for x in (c, r))
    odds = (p / (1 - p)) / (q / (1 - q))
    return -math.log(p) - cfg.beta * log_sigmoid(math.log(odds))


CASES = [
    (dpo, Dpo(), loss_dpo, total, True),
    (dpo, Dpo(beta=0.3, label_smoothing=0.2), loss_dpo, total, True),
    (dpo_norm, DpoNorm(), lambda *a: loss_dpo(*a, of=mean), mean, True),
    (ipo, Ipo(beta=0.2), loss_ipo, total, True),
    (ipo, Ipo(beta=0.2, average=True), loss_ipo, mean, True),
    (simpo, SimPo(beta=1.5, gamma=0.4), loss_simpo, mean, False),
    (orpo, Orpo(beta=0.7), loss_orpo, mean, False),
]


@pytest.mark.parametrize("layout", [PACKED, TIGHT, ALONE], ids=["packed", "tight", "alone"])
@pytest.mark.parametrize("objective, cfg, loss, of, against", CASES, ids=lambda x: getattr(x, "__name__", None))
def test_pairs(toy, replies, objective, cfg, loss, of, against, layout):
    def reference(params, held):
        return sum(loss(toy, params, replies[i], replies[j], cfg) for i, j in PAIRS) / len(PAIRS)

    params = toy.parameters()
    batch = toy.rows(replies, layout, T=30)
    metrics = toy.check(objective, reference, params, batch, cfg)
    chosen, rejected = ([of(toy, params, replies[p[k]], against) for p in PAIRS] for k in (0, 1))
    assert metrics["chosen"] == pytest.approx(np.mean(chosen)) and metrics["rejected"] == pytest.approx(
        np.mean(rejected)
    )
    assert metrics["margin"] == pytest.approx(np.mean(chosen) - np.mean(rejected))
    assert metrics["accuracy"] == np.mean([c > r for c, r in zip(chosen, rejected, strict=True)])
    if objective is orpo:
        own = np.concatenate([toy.logps(params, replies[i])[replies[i]["weights"] > 0] for i, _ in PAIRS])
        assert metrics["nll"] == pytest.approx(-own.mean())


@pytest.mark.parametrize("objective, cfg", [(dpo, Dpo()), (dpo, Dpo(label_smoothing=0.3)), (dpo_norm, DpoNorm())])
def test_a_policy_that_is_its_reference_pays_ln_2(toy, replies, objective, cfg):
    params = toy.parameters()
    same = [c | {"ref_logps": toy.logps(params, c)} for c in replies]
    value, weight, metrics, _ = toy.run(objective, params, toy.rows(same, PACKED, T=30), cfg)
    assert value == pytest.approx(math.log(2), abs=1e-12) and weight == len(PAIRS)
    assert metrics["margin"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("objective, cfg", [(c[0], c[1]) for c in CASES])
def test_preferring_the_other_reply_turns_the_gradient(toy, replies, objective, cfg):
    """A step down the loss makes the chosen reply likelier beside the rejected one; with labels turned, less likely."""
    params = toy.parameters()

    def gain(layout):
        grad = toy.run(objective, params, toy.rows(replies, layout, T=30), cfg)[3]
        ahead = {k: params[k] - 1e-4 * grad[k] for k in params}
        return sum(
            mean(toy, p, replies[0], False) * s - mean(toy, p, replies[1], False) * s
            for p, s in ((ahead, 1), (params, -1))
        )

    assert gain([[0, 1]]) > 0 > gain([[1, 0]])


def test_a_certain_reply_has_finite_odds(toy, replies):
    """ORPO where p(chosen) = 1 to the last bit."""
    c = {"tokens": np.array([1, 2, 3]), "targets": np.array([2, 3, 0]), "weights": np.array([1.0, 1, 0])}
    table = np.full((7, 7), -400.0)
    table[[1, 2], [2, 3]] = 400.0
    r = c | {"tokens": np.array([1, 4, 5]), "targets": np.array([4, 5, 0])}
    value, _, _, grad = toy.run(orpo, {"table": table, "value": np.zeros(7)}, toy.rows([c, r], [[0, 1]]), Orpo())
    assert np.isfinite(value) and np.isfinite(grad["table"]).all()


# ---------------------------------------------------------------------------------------------------------------- KTO
def labelled(toy, good=(1, -1, 1, 1)):
    rng = np.random.default_rng(2)
    out = []
    for k, (n, p) in enumerate([(6, 2), (5, 2), (9, 4), (8, 4), (7, 1), (11, 1), (4, 2), (9, 2)]):
        label = good[k // 2] if k % 2 == 0 else 0
        out.append(toy.conversation(rng, n, p, ref_logps=lambda n: -2.2 - rng.random(n), labels=label))
    return out


@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["z > 0", "z = 0"])
@pytest.mark.parametrize(
    "layout", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]], ids=["packed", "alone"]
)
def test_kto(toy, layout, shift):
    cfg = Kto(beta=0.4, desirable=1.2, undesirable=0.7)
    talks = [c | {"ref_logps": c["ref_logps"] + shift} for c in labelled(toy)]

    def reference(params, held):
        z = max(0.0, np.mean([total(toy, held, talks[i]) for i in (1, 3, 5, 7)]))
        assert (z > 0) == (shift == 0)
        out = []
        for i in (0, 2, 4, 6):
            h = total(toy, params, talks[i])
            out.append(
                cfg.desirable * (1 - sigmoid(cfg.beta * (h - z))) if talks[i]["labels"][0] > 0
                else cfg.undesirable * (1 - sigmoid(cfg.beta * (z - h)))
            )  # fmt: skip
        return np.mean(out)

    metrics = toy.check(kto, reference, toy.parameters(), toy.rows(talks, layout, T=40), cfg)
    good = np.mean([total(toy, toy.parameters(), talks[i]) for i in (0, 4, 6)])
    assert metrics["chosen"] == pytest.approx(good)
    assert metrics["rejected"] == pytest.approx(total(toy, toy.parameters(), talks[2]))
    assert (metrics["z"] > 0) == (shift == 0)


def test_kto_of_a_policy_that_is_its_reference_is_a_half(toy):
    params = toy.parameters()
    talks = [c | {"ref_logps": toy.logps(params, c)} for c in labelled(toy)]
    value, weight, metrics, _ = toy.run(kto, params, toy.rows(talks, [[0, 1, 2, 3], [4, 5, 6, 7]], T=40), Kto())
    assert value == pytest.approx(0.5) and weight == 4 and metrics["z"] == pytest.approx(0, abs=1e-12)


def test_a_label_turned_turns_the_gradient(toy):
    params = toy.parameters()
    grads = [
        toy.run(kto, params, toy.rows(labelled(toy, (sign,) * 4), [[0, 1, 2, 3], [4, 5, 6, 7]], T=40), Kto())[3][
            "table"
        ]
        for sign in (1, -1)
    ]
    np.testing.assert_allclose(grads[0], -grads[1], atol=1e-12)
    assert np.abs(grads[0]).max() > 1e-3


# -------------------------------------------------------------------------------------------------------------- scores
@pytest.mark.parametrize("layout", [PACKED, TIGHT, ALONE], ids=["packed", "tight", "alone"])
@pytest.mark.parametrize("margins", [False, True])
def test_reward(toy, replies, layout, margins):
    cfg = Reward(center=0.05)
    margin = [0.5, 0.5, 1.0, 1.0, 0.2, 0.2, 2.0, 2.0, 9.0, 9.0]
    talks = [c | ({"margins": np.full(len(c["tokens"]), margin[i])} if margins else {}) for i, c in enumerate(replies)]
    score = lambda params, i: params["value"][replies[i]["tokens"][-1]]  # noqa: E731

    def reference(params, held):
        out = []
        for i, j in PAIRS:
            c, r = score(params, i), score(params, j)
            out.append(-log_sigmoid(c - r - (margin[i] if margins else 0)) + cfg.center * (c + r) ** 2)
        return np.mean(out)

    params = toy.parameters()
    metrics = toy.check(reward, reference, params, toy.rows(talks, layout, T=30), cfg)
    delta = [score(params, i) - score(params, j) for i, j in PAIRS]
    assert metrics["margin"] == pytest.approx(np.mean(delta))
    assert metrics["accuracy"] == pytest.approx(np.mean([(1 + np.sign(d)) / 2 for d in delta]))


def test_a_fresh_reward_model_guesses(toy, replies):
    params = toy.parameters() | {"value": np.zeros(toy.V)}
    value, _, metrics, _ = toy.run(reward, params, toy.rows(replies, PACKED, T=30), Reward())
    assert value == pytest.approx(math.log(2)) and metrics["accuracy"] == 0.5


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_discriminator(toy, replies, smoothing):
    def reference(params, held):
        out = []
        for i, j in PAIRS:
            real, made = (params["value"][replies[k]["tokens"][-1]] for k in (i, j))
            out.append(
                -(1 - smoothing) * math.log(sigmoid(real)) - smoothing * math.log(1 - sigmoid(real))
                - math.log(1 - sigmoid(made))
            )  # fmt: skip
        return np.mean(out)

    toy.check(discriminator, reference, toy.parameters(), toy.rows(replies, PACKED, T=30), Discriminator(smoothing))


@pytest.mark.parametrize(
    "objective, cfg", [(reward, Reward()), (discriminator, Discriminator()), (dpo, Dpo()), (orpo, Orpo()), (kto, Kto())]
)
def test_router_losses_weigh_a_pair_for_a_full_row(toy, replies, objective, cfg):
    params = toy.parameters()
    batch = toy.rows([c | {"labels": 1 - i % 2} for i, c in enumerate(replies)], PACKED, T=30)
    with_aux, without = (toy.run(objective, params, batch, cfg, toy.Bigram(aux)) for aux in (0.5, 0.0))
    share = (batch["segments_BT"] > 0).sum() / 30
    assert (with_aux[0] - without[0]) * without[1] == pytest.approx(0.5 * params["table"][0, 0] * share)


# ------------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Dpo(beta=0.0), "loss.beta is 0.0; it takes at least 1e-06"),
        (lambda: Dpo(label_smoothing=0.6), "loss.label_smoothing is 0.6; it takes 0 to 0.5"),
        (lambda: Kto(desirable=-1.0), "loss.desirable is -1.0"),
        (lambda: Reward(center=float("inf")), "loss.center is inf"),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_settings_say_what_rows_and_reference_they_need():
    needs = {c: (c.SOURCE, c.REFERENCE) for c in (Dpo, DpoNorm, Ipo, Kto, SimPo, Orpo)}
    assert needs == {Dpo: ("pairs", True), DpoNorm: ("pairs", True), Ipo: ("pairs", True), Kto: ("labels", True),
                     SimPo: ("pairs", False), Orpo: ("pairs", False)}  # fmt: skip
