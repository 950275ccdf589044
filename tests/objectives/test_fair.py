"""Group-DRO and even pairs: what they claim, and that the batch's cutting up does not matter."""

import jax
import numpy as np
import pytest

from lmtrain import step
from lmtrain.objectives.fair import Even, GroupDro, even, group_dro
from lmtrain.objectives.pretrain import Pretrain, pretrain
from lmtrain.schema import ConfigError


@pytest.fixture
def batch(toy):
    """Six rows: cell 1 four times, cell 2 once, one row in no cell."""
    rng = np.random.default_rng(0)
    talks = [toy.conversation(rng, 7, 2) for _ in range(6)]
    b = toy.rows(talks, [[i] for i in range(6)], garbage=0)
    b["groups_BT"] = np.repeat([[1], [1], [1], [1], [2], [0]], b["tokens_BT"].shape[1], 1)
    w = np.array([b["weights_BT"][rows].sum() for rows in (slice(4), slice(4, 5))])
    b["balance_BT"] = np.append(1, w.sum() / 2 / w).astype(np.float32)[b["groups_BT"]]  # as were the data like it
    return b


def total(toy, params, batch, cfg):
    forward = toy.Bigram()
    whole = {**batch, **step.means(group_dro.first(forward, params, batch, cfg))}
    loss, weight, metrics = group_dro(forward, params, whole, cfg)
    return loss, weight, metrics


def test_without_a_step_size_every_cell_weighs_the_same_however_rare(toy, batch):
    params = toy.parameters()
    loss, weight, _ = total(toy, params, batch, GroupDro(cells=2, step_size=0))
    nll_BT = toy.Bigram().losses(params, batch).nll_BT * batch["weights_BT"]
    each = [nll_BT[rows].sum() / batch["weights_BT"][rows].sum() for rows in (slice(4), slice(4, 5))]
    n = batch["weights_BT"]
    assert float(loss) == pytest.approx(float(n[:5].sum() * (each[0] + each[1]) / 2 + nll_BT[5].sum()), rel=1e-5)
    assert float(weight) == n.sum()


def test_the_worse_cell_counts_more_the_larger_the_step(toy, batch):
    params = toy.parameters()
    losses = [float(total(toy, params, batch, GroupDro(cells=2, step_size=s))[0]) for s in (0.0, 1.0, 10.0)]
    assert losses[0] < losses[1] < losses[2]
    loss, n, metrics = total(toy, params, batch, GroupDro(cells=2, step_size=1e4))
    rest = (toy.Bigram().losses(params, batch).nll_BT * batch["weights_BT"])[5].sum()
    worst = metrics["worst"][0] / metrics["worst"][1]
    assert float(loss) == pytest.approx(float(worst * batch["weights_BT"][:5].sum() + rest), rel=1e-4)


def test_cells_that_are_not_there_and_equal_losses_leave_pretraining_as_it_is(toy, batch):
    params = toy.parameters()
    batch["groups_BT"], batch["balance_BT"] = batch["groups_BT"] * 0, np.ones_like(batch["balance_BT"])
    plain = pretrain(toy.Bigram(), params, batch, Pretrain())[0]
    assert float(total(toy, params, batch, GroupDro(cells=3))[0]) == pytest.approx(float(plain), rel=1e-6)


def test_a_cell_that_the_batch_lacks_takes_the_mean_and_so_moves_no_others_weight_much(toy, batch):
    """The cells that are there weigh as if the one that is not had their mean loss, not a loss of 0."""
    params, cfg = toy.parameters(), GroupDro(cells=3, step_size=2.0)
    got = float(total(toy, params, batch, cfg)[0])
    nll_BT = np.asarray(toy.Bigram().losses(params, batch).nll_BT * batch["weights_BT"])
    w = batch["weights_BT"]
    cut = [slice(4), slice(4, 5)]
    loss = np.array([nll_BT[rows].sum() / w[rows].sum() for rows in cut])
    mean = nll_BT[:5].sum() / w[:5].sum()
    q = np.exp(2.0 * np.append(loss, mean))
    q = 3 * q / q.sum()
    balance = [batch["balance_BT"][0, 0], batch["balance_BT"][4, 0]]
    wanted = sum(q[k] * balance[k] * nll_BT[rows].sum() for k, rows in enumerate(cut)) + nll_BT[5].sum()
    assert got == pytest.approx(float(wanted), rel=1e-4)


def test_microbatches_do_not_change_the_loss_or_its_gradient(toy, batch):
    params, forward, cfg = toy.parameters(), toy.Bigram(), GroupDro(cells=2, step_size=3.0)
    parts = [{k: v[i::2] for k, v in batch.items()} for i in range(2)]
    ahead = step.means(step.add(*(group_dro.first(forward, params, part, cfg) for part in parts)))

    def loss(params, some):
        return sum(group_dro(forward, params, {**part, **ahead}, cfg)[0] for part in some)

    whole, cut = (jax.value_and_grad(loss)(params, some) for some in ([batch], parts))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_batch_without_cells_is_refused(toy, batch):
    del batch["groups_BT"]
    with pytest.raises(ConfigError, match=r"set data\.groups"):
        group_dro(toy.Bigram(), toy.parameters(), batch, GroupDro())


# --------------------------------------------------------------------------------------------------------- even pairs
@pytest.fixture
def pair(toy):
    rng = np.random.default_rng(3)
    talks = [toy.conversation(rng, 7, 3) for _ in range(2)]
    for talk in talks:
        talk["ref_logps"] = np.where(talk["weights"] > 0, toy.logps(toy.parameters(), talk), 0)
    return talks


def test_even_is_the_square_of_the_difference_and_of_the_distance_from_the_mean_probability(toy, pair):
    params = toy.parameters(5)
    c, r = (float((toy.logps(params, t) * t["weights"]).sum()) for t in pair)
    c0, r0 = (float((t["ref_logps"] * t["weights"]).sum()) for t in pair)
    m = np.log((np.exp(c0) + np.exp(r0)) / 2)
    loss, n, _ = even(toy.Bigram(), params, toy.rows(pair, [[0, 1]]), Even(keep=0.5))
    assert abs(2 * m - c0 - r0) > 0.1  # else the mean of the logarithms would do as well
    assert float(loss) == pytest.approx((c - r) ** 2 + 0.5 * (c + r - 2 * m) ** 2, rel=1e-4) and float(n) == 1


def test_even_ends_where_both_replies_have_the_mean_of_their_probabilities_before(toy, pair):
    params, batch = toy.parameters(), toy.rows(pair, [[0, 1]])
    before = even(toy.Bigram(), params, batch, Even())[2]
    descend = jax.jit(jax.grad(lambda p: even(toy.Bigram(), p, batch, Even())[0]))
    for _ in range(400):
        params = jax.tree.map(lambda p, g: p - 0.02 * g, params, descend(params))
    after = even(toy.Bigram(), params, batch, Even())[2]
    assert float(before["gap"][0]) > 0.3 and float(after["gap"][0]) < 0.02 and abs(float(after["kept"][0])) < 0.02
    likely = [np.exp((toy.logps(params, t) * t["weights"]).sum()) for t in pair]
    was = [np.exp((t["ref_logps"] * t["weights"]).sum()) for t in pair]
    np.testing.assert_allclose(likely, np.mean(was), rtol=0.03)


def test_the_number_of_cells_is_that_of_the_data_and_no_other():
    from lmtrain import config, feeds

    def stage(**loss):
        data = config.data("text", path="x", groups=("he", "she", "they"), outcomes=("rich", "poor"))
        c = config.experiment()
        c.stages.a = config.stage(objective="group_dro", data=data, loss=loss)
        return config.build(c).stages["a"]

    assert feeds.settled(stage()).loss.cells == 6
    with pytest.raises(ConfigError, match="loss.cells is 4, but data.groups times data.outcomes are 6"):
        feeds.settled(stage(cells=4))
