"""Policy objectives against their formulas, written reply by reply in NumPy."""

import dataclasses

import jax
import numpy as np
import pytest

from lmtrain.objectives import policy
from lmtrain.objectives.policy import Cispo, Dapo, DrGrpo, Grpo, Gspo, Ppo, Rloo
from lmtrain.schema import ConfigError

SIZES = [
    (4, 2),
    (9, 3),
    (12, 5),
    (3, 2),
    (10, 2),
    (8, 4),
    (5, 5),
]  # (length, prompt); the last has no token that counts
PACKED = [[0, 1], [2, 3], [4], [5, 6]]
ALONE = [[i] for i in range(7)]
T = 24


@pytest.fixture(scope="module")
def talks(toy):
    """Replies of a policy that was another one by a good deal, so that ratios lie on both sides of every clip."""
    rng = np.random.default_rng(3)
    out = []
    for n, prompt in SIZES:
        draw = dict(
            old_logps=lambda n: -1.9 + 0.5 * rng.normal(size=n),
            sampler_logps=lambda n: -1.9 + 0.5 * rng.normal(size=n),
            ref_logps=lambda n: -2 + rng.normal(size=n), returns=lambda n: rng.normal(size=n),
            old_values=lambda n: 0.3 * rng.normal(size=n), advantages=rng.normal(),
        )  # fmt: skip
        out.append(toy.conversation(rng, n, prompt, **draw))
    return out


def old_of(toy, talks, params, spread):
    """The same replies, sampled by a policy nearer to this one (log-ratios of about `spread`)."""
    rng = np.random.default_rng(4)
    near = lambda c: toy.logps(params, c) + spread * rng.normal(size=len(c["tokens"]))  # noqa: E731
    return [c | {"old_logps": near(c)} for c in talks]


# ------------------------------------------------------------------------------------- the formulas, a reply at a time
def clipped(ratio, A, cfg):
    return np.array(
        [-min(r * a, min(max(r, 1 - cfg.clip_low), 1 + cfg.clip_high) * a) for r, a in zip(ratio, A, strict=True)]
    )


def token_ratio(lp, held, old, A, cfg):
    return clipped(np.exp(lp - old), A, cfg)


def reply_mean_ratio(lp, held, old, A, cfg):
    return clipped(np.full(len(lp), np.exp((lp - old).mean())), A, cfg)


def reply_sum_ratio(lp, held, old, A, cfg):
    return clipped(np.full(len(lp), np.exp((lp - old).sum())), A, cfg)


def capped_weight(lp, held, old, A, cfg):
    return -np.minimum(np.exp(held - old), cfg.cap) * A * lp


mean_of_means = lambda losses, cfg: np.mean([x.mean() for x in losses])  # noqa: E731
mean_of_all = lambda losses, cfg: np.concatenate(losses).mean()  # noqa: E731
constant = lambda losses, cfg: np.concatenate(losses).sum() / (len(losses) * (cfg.max_length or T))  # noqa: E731
METHODS = {
    "grpo": (Grpo, token_ratio, mean_of_means),
    "dapo": (Dapo, token_ratio, mean_of_all),
    "dr_grpo": (DrGrpo, token_ratio, constant),
    "gspo": (Gspo, reply_mean_ratio, mean_of_means),
    "rloo": (Rloo, reply_sum_ratio, mean_of_means),
    "cispo": (Cispo, capped_weight, mean_of_all),
    "ppo": (Ppo, token_ratio, mean_of_all),
}
WEIGHTS = {"gspo": np.mean, "rloo": np.sum}  # what the sampler's weight is of: a token elsewhere


def reference_of(toy, talks, name, cfg):
    _, surrogate, mean = METHODS[name]

    def reference(params, held):
        losses, values = [], []
        for c in talks:
            own = c["weights"] > 0
            if not own.any():
                continue
            lp, lp0 = (toy.logps(p, c, cfg.temperature)[own] for p in (params, held))
            old, sampler, ref, A = (c[k][own] for k in ("old_logps", "sampler_logps", "ref_logps", "advantages"))
            x = surrogate(lp, lp0, old, np.where(A < 0, cfg.negative * A, A), cfg)
            if cfg.is_cap:
                gap = old - sampler
                gap = np.full(len(gap), WEIGHTS[name](gap)) if name in WEIGHTS else gap
                x = x * np.minimum(np.exp(gap), cfg.is_cap)
            d = ref - lp
            x = x + cfg.beta * {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - 1 - d}[cfg.kl]
            losses.append(x)
            if name == "ppo":
                v, v0, R = params["value"][c["tokens"][own]], c["old_values"][own], c["returns"][own]
                near = v0 + np.clip(v - v0, -cfg.value_clip, cfg.value_clip)
                values.append(cfg.value_weight * np.maximum((v - R) ** 2, (near - R) ** 2))
        return mean(losses, cfg) + (mean(values, cfg) if values else 0)

    return reference


SETTINGS = [
    ("grpo", {}), ("grpo", dict(beta=0.3)), ("grpo", dict(beta=0.3, kl="k1")), ("grpo", dict(beta=0.3, kl="k3")),
    ("grpo", dict(temperature=0.7, is_cap=1.2)), ("dapo", {}), ("dapo", dict(beta=0.1, is_cap=2.0, temperature=1.3)),
    ("grpo", dict(negative=0.3)), ("cispo", dict(negative=0.0, cap=1.1)), ("ppo", dict(negative=2.0)),
    ("dr_grpo", {}), ("dr_grpo", dict(max_length=50)), ("gspo", dict(clip_low=0.1, clip_high=0.2)),
    ("gspo", dict(clip_low=0.1, clip_high=0.2, is_cap=1.1, beta=0.2)), ("rloo", {}), ("rloo", dict(is_cap=1.5)),
    ("cispo", dict(cap=1.1)), ("cispo", dict(cap=1.1, beta=0.2, is_cap=1.3)), ("ppo", {}),
    ("ppo", dict(beta=0.2, value_clip=0.5, value_weight=0.1)),
]  # fmt: skip


@pytest.mark.parametrize("layout", [PACKED, ALONE], ids=["packed", "alone"])
@pytest.mark.parametrize("name, fields", SETTINGS, ids=str)
def test_the_loss_is_its_formula(toy, talks, name, fields, layout):
    cfg = METHODS[name][0](**fields)
    if name == "rloo":  # sums over replies: of a policy near enough that not all is clipped
        talks = old_of(toy, talks, toy.parameters(), 0.4)
    reference = reference_of(toy, talks, name, cfg)
    metrics = toy.check(getattr(policy, name), reference, toy.parameters(), toy.rows(talks, layout, T), cfg)
    assert 0 < metrics["clipped"] < 1
    assert metrics["clipped"] == pytest.approx(metrics["clipped_low"] + metrics["clipped_high"])


def test_what_is_watched(toy, talks):
    cfg, params = Dapo(temperature=0.8), toy.parameters()
    metrics = toy.run(policy.dapo, params, toy.rows(talks, PACKED, T), cfg)[2]
    own = [(c, c["weights"] > 0) for c in talks]
    lp, old, sampler, ref, A, entropy = (
        np.concatenate([f(c)[w] for c, w in own])
        for f in (
            lambda c: toy.logps(params, c, 0.8), lambda c: c["old_logps"], lambda c: c["sampler_logps"],
            lambda c: c["ref_logps"], lambda c: c["advantages"],
            lambda c: np.array([
                -sum(toy.logps(params, {"tokens": [x], "targets": [v]}, 0.8)[0]
                     * np.exp(toy.logps(params, {"tokens": [x], "targets": [v]}, 0.8)[0]) for v in range(toy.V))
                for x in c["tokens"]]),
        )
    )  # fmt: skip
    ratio, d = np.exp(lp - old), ref - lp
    low, high = ((ratio < 0.8) & (A < 0)).mean(), ((ratio > 1.28) & (A > 0)).mean()
    expected = dict(
        entropy=entropy.mean(), ratio=ratio.mean(), ratio_max=ratio.max(), clipped=low + high, clipped_low=low,
        clipped_high=high, k1=-d.mean(), k3=(np.exp(d) - 1 - d).mean(), sampler_gap=np.abs(sampler - old).mean(),
    )  # fmt: skip
    assert metrics == pytest.approx(expected, rel=1e-6) and low > 0 and high > 0
    bare = [
        {k: v for k, v in c.items() if k in ("tokens", "targets", "weights", "old_logps", "advantages")} for c in talks
    ]
    assert set(toy.run(policy.dapo, params, toy.rows(bare, PACKED, T), cfg)[2]) == set(expected) - {
        "k1",
        "k3",
        "sampler_gap",
    }


# ---------------------------------------------------------------------------------------------------------- properties
@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_at_the_first_update_every_ratio_is_one_and_all_losses_are_reinforce(toy, talks, name, left_out):
    params = toy.parameters()
    fresh = [c | {"old_logps": toy.logps(params, c), "returns": toy.parameters()["value"][c["tokens"]]} for c in talks]
    fresh = [c | {"old_values": c["returns"]} for c in fresh]
    if left_out:
        fresh = [{k: v for k, v in c.items() if k != "old_logps"} for c in fresh]
    _, _, metrics, grad = toy.run(getattr(policy, name), params, toy.rows(fresh, PACKED, T), METHODS[name][0]())
    assert metrics["ratio"] == pytest.approx(1, abs=1e-12) and metrics["ratio_max"] == pytest.approx(1, abs=1e-12)
    assert metrics["clipped"] == 0

    def plain(params, held):  # -A log p, summed where a reply's ratio is its sum, else averaged
        out = []
        for c in fresh:
            w = c["weights"] > 0
            if w.any():
                each = -c["advantages"][w] * toy.logps(params, c)[w]
                out.append(np.full(len(each), each.sum()) if name == "rloo" else each)
        return METHODS[name][2](out, METHODS[name][0]())

    e, d = 1e-5, np.random.default_rng(0).normal(size=(toy.V, toy.V))
    ahead, behind = (params | {"table": params["table"] + s * d} for s in (e, -e))
    assert (grad["table"] * d).sum() == pytest.approx((plain(ahead, 0) - plain(behind, 0)) / (2 * e), abs=1e-7)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_a_policy_that_is_its_reference_has_no_divergence(toy, talks, kind):
    params = toy.parameters()
    same = [c | {"ref_logps": toy.logps(params, c, 0.9), "advantages": 0 * c["advantages"]} for c in talks]
    cfg = Grpo(beta=1.0, kl=kind, temperature=0.9)
    value, _, metrics, grad = toy.run(policy.grpo, params, toy.rows(same, PACKED, T), cfg)
    assert abs(value) < 1e-12 and abs(metrics["k1"]) < 1e-12 and abs(metrics["k3"]) < 1e-12
    if kind != "k1":
        assert np.abs(grad["table"]).max() < 1e-12


@pytest.mark.parametrize("name", METHODS)
def test_turned_advantages_turn_the_gradient_and_zeroed_ones_have_none(toy, talks, name):
    params = toy.parameters()
    fresh = old_of(toy, talks, params, 0.0)
    cfg = METHODS[name][0]()

    def grad(sign):
        some = [c | {"advantages": sign * c["advantages"]} for c in fresh]
        return toy.run(getattr(policy, name), params, toy.rows(some, PACKED, T), cfg)[3]["table"]

    np.testing.assert_allclose(grad(1), -grad(-1), atol=1e-12)
    assert np.abs(grad(1)).max() > 1e-4 and (grad(0) == 0).all()


def test_constants_do_not_depend_on_how_long_replies_are_or_how_they_are_packed(toy, talks):
    weights = {
        str(layout): toy.run(policy.dr_grpo, toy.parameters(), toy.rows(talks, layout, T), DrGrpo(max_length=9))[1]
        for layout in (PACKED, ALONE)
    }
    assert set(weights.values()) == {6 * 9.0}  # the seventh has nothing that counts


@pytest.mark.parametrize("name", METHODS)
def test_absurd_ratios_stay_finite(toy, talks, name):
    params = toy.parameters()
    absurd = [c | {"old_logps": c["old_logps"] * 0 - 300.0} for c in talks]
    value, _, _, grad = toy.run(
        getattr(policy, name), params, toy.rows(absurd, PACKED, T), METHODS[name][0](is_cap=2.0)
    )
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grad.values())


def test_the_weight_for_the_sampler_s_error_takes_no_gradient_and_has_a_ceiling(toy, talks):
    """Replies that the sampler thought e times as likely weigh 1/e; ones it thought less likely, at most the cap."""
    params = toy.parameters()

    def grad(shift, cap):
        some = [c | {"sampler_logps": c["old_logps"] + shift} for c in talks]
        return toy.run(policy.dapo, params, toy.rows(some, PACKED, T), Dapo(is_cap=cap))[3]["table"]

    np.testing.assert_allclose(grad(1.0, 2.0), grad(0.0, 2.0) / np.e, atol=1e-12)
    np.testing.assert_allclose(grad(-5.0, 2.0), 2 * grad(0.0, 2.0), atol=1e-12)
    np.testing.assert_allclose(grad(-5.0, 0.0), grad(0.0, 2.0), atol=1e-12)  # 0: no weights


def test_router_losses_are_a_row_s_share_where_replies_weigh_the_same(toy, talks):
    params, batch = toy.parameters(), toy.rows(talks, PACKED, T)
    tokens = (batch["segments_BT"] > 0).sum()
    for name, each in (("grpo", 1 / T), ("dapo", 1), ("dr_grpo", 1), ("gspo", 1 / T)):
        cfg = METHODS[name][0]()
        with_aux = toy.run(getattr(policy, name), params, batch, cfg, forward=toy.Bigram(aux=0.5))
        without = toy.run(getattr(policy, name), params, batch, cfg)
        assert (with_aux[0] - without[0]) * without[1] == pytest.approx(0.5 * params["table"][0, 0] * tokens * each)


# ------------------------------------------------------------------------------------------------------------ settings
def test_settings_say_what_they_need():
    kinds = {c: c.ADVANTAGE for _, (c, *_) in METHODS.items()}
    assert kinds == {Grpo: "group", Dapo: "group", DrGrpo: "group_mean", Gspo: "group", Rloo: "leave_one_out",
                     Cispo: "group", Ppo: "gae"}  # fmt: skip
    assert all(c.SOURCE == "rollout" and c().REFERENCE is False and c(beta=0.1).REFERENCE is True for c in kinds)
    assert (Dapo().clip_low, Dapo().clip_high, Grpo().clip_high) == (0.2, 0.28, 0.2)
    assert (Gspo().clip_low, Gspo().clip_high, Grpo().kl) == (3e-4, 4e-4, "k2")
    assert all(f.name.islower() for c in kinds for f in dataclasses.fields(c))  # constants are no settings


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Grpo(kl="k4"), "loss.kl is 'k4'; it takes k1, k2, k3"),
        (lambda: Dapo(clip_low=1.5), "loss.clip_low is 1.5; it takes 0 to 1"),
        (lambda: Ppo(value_clip=-0.1), "loss.value_clip is -0.1; it takes at least 0"),
        (lambda: Cispo(cap=0.0), "loss.cap is 0.0"),
        (lambda: DrGrpo(max_length=-1), "loss.max_length is -1"),
        (lambda: Rloo(temperature=0.0), "loss.temperature is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_reply_that_counts_for_nothing_changes_nothing(toy, talks):
    """A masked (truncated) reply is as good as absent, for every method, whatever its numbers."""
    params = toy.parameters()
    for name, (settings, *_) in METHODS.items():
        masked = [c | {"weights": c["weights"] * (i != 1)} for i, c in enumerate(talks)]
        a = toy.run(getattr(policy, name), params, toy.rows(masked, PACKED, T), settings())
        b = toy.run(getattr(policy, name), params, toy.rows(talks, [[0], *PACKED[1:]], T), settings())
        assert a[0] == pytest.approx(b[0], abs=1e-12) and a[1] == b[1]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), a[3], b[3])
