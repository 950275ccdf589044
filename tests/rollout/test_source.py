"""Rollouts as a source: what the batches hold, that they are the same again, and that nothing is lost on the way."""

import dataclasses
import json
import time

import jax
import numpy as np
import pytest

from lmtrain import schema
from lmtrain.engine import Engine
from lmtrain.eval import tasks as tasks_lib
from lmtrain.models import transformer
from lmtrain.objectives import policy
from lmtrain.tasks.counterfactual import Counterfactual
from lmtrain.types import Frozen, LmtrainError
from tests.rollout import toys


def test_advantages_of_a_group_sum_to_zero_and_weigh_only_what_was_sampled():
    batch = toys.source().next(toys.params())
    w, a = batch["weights_BT"], batch["advantages_BT"]
    per_reply = np.array([a[i][w[i] > 0][0] if w[i].any() else 0 for i in range(len(w))])
    assert np.abs(per_reply).max() > 0.1, "rewards differ, or this test shows nothing"
    for i in range(len(w)):
        assert (a[i][w[i] > 0] == per_reply[i]).all()
    masked = toys.source(toys.stage(truncated="keep")).next(toys.params())
    a = masked["advantages_BT"] * masked["weights_BT"]
    # rows are dealt out at random: the groups of 4 are found by their prompt
    groups = {}
    for row in range(len(a)):
        prompt = tuple(masked["tokens_BT"][row, :4])
        groups.setdefault(prompt, []).append(a[row].max() if a[row].any() and a[row].max() > 0 else a[row].min())
    assert len(groups) == 2
    for values in groups.values():
        assert len(values) == 4 and abs(sum(values)) < 1e-5


def test_the_sampler_and_the_learner_agree_on_every_sampled_token():
    source = toys.source(toys.stage(temperature=0.8, truncated="keep", epochs=2))
    batch = source.next(toys.params())
    w = batch["weights_BT"] > 0
    assert w.sum() > 20
    np.testing.assert_allclose(batch["sampler_logps_BT"][w], batch["old_logps_BT"][w], atol=1e-4)
    assert source.report()["gap_p95"] < 1e-4


def test_the_sampler_is_not_mistaken_for_another_temperature():
    batch = toys.source(toys.stage(temperature=0.5, truncated="keep")).next(toys.params())
    w = batch["weights_BT"] > 0
    forward = transformer.Forward(toys.MODEL)
    at_one = np.asarray(forward.logps(toys.params(), {k: v for k, v in batch.items() if k.endswith("_BT")}))
    assert np.abs(batch["sampler_logps_BT"][w] - at_one[w]).max() > 0.05


def test_a_conversation_of_several_turns_learns_only_from_its_own_words():
    source = toys.source(toys.stage(truncated="keep"), toys.Talk())
    batch = source.next(toys.params())
    tok = toys.TOK
    said = 0
    for row in range(8):
        ids = [*batch["tokens_BT"][row]]
        own = {t + 1 for t in np.flatnonzero(batch["weights_BT"][row])}
        header = tok.special("<|assistant|>")
        inside = False
        for t, i in enumerate(ids):
            if batch["segments_BT"][row, t] == 0:
                break
            assert (t in own) == inside, f"token {t} of row {row}"
            if i == header:
                inside = True
                said += 1
            elif inside and i in toys.TEMPLATE.stop:
                inside = False
    assert said > 9, "some conversations went on to another turn"


@pytest.mark.parametrize("pack", [False, True])
def test_killed_between_two_updates_it_goes_on_to_the_same_bits(pack):
    cfg = toys.stage(minibatches=2, epochs=2, batch_size=4, data={"pack": pack})
    params = [toys.params(i) for i in range(3)]
    a = toys.source(cfg)
    batches = [a.next(params[i // 4]) for i in range(8)]
    for cut in (1, 3, 4, 6):
        b = toys.source(cfg)
        for i in range(cut):
            b.next(params[i // 4])
        state = json.loads(json.dumps(b.state()))
        c = toys.source(cfg)
        c.restore(state)
        for i in range(cut, 8):
            again = c.next(params[i // 4])
            assert again.keys() == batches[i].keys()
            for name in again:
                np.testing.assert_array_equal(
                    again[name], batches[i][name], err_msg=f"{name} of update {i}, cut at {cut}"
                )


def test_every_conversation_is_learned_from_once_an_epoch():
    cfg = toys.stage(minibatches=2, epochs=2, batch_size=4)
    source = toys.source(cfg)
    batches = [source.next(toys.params()) for _ in range(4)]
    rows = [sorted(tuple(r) for b in pair for r in b["sampler_logps_BT"]) for pair in (batches[:2], batches[2:])]
    assert rows[0] == rows[1] and len(set(rows[0])) > 4
    assert [tuple(r) for r in batches[0]["sampler_logps_BT"]] != [tuple(r) for r in batches[2]["sampler_logps_BT"]]


def test_packed_rows_hold_what_single_rows_hold():
    one, packed = (
        toys.source(toys.stage(data={"pack": p}, truncated="keep", epochs=2)).next(toys.params()) for p in (False, True)
    )
    assert len(packed["tokens_BT"]) < len(one["tokens_BT"])

    def words(batch):
        found = []
        for row in range(len(batch["tokens_BT"])):
            for s in range(1, batch["segments_BT"][row].max() + 1):
                at = batch["segments_BT"][row] == s
                found.append(tuple(np.round(np.concatenate([
                    batch["tokens_BT"][row][at], batch["weights_BT"][row][at], batch["positions_BT"][row][at],
                    batch["advantages_BT"][row][at], batch["old_logps_BT"][row][at]]), 4)))  # fmt: skip
        return sorted(found)

    for a, b in zip(words(one), words(packed), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_controls_leave_nothing_to_learn_from():
    plain = toys.source().next(toys.params())
    zero = toys.source(toys.stage(control="zero")).next(toys.params())
    flip = toys.source(toys.stage(control="flip")).next(toys.params())
    shuffled = toys.source(toys.stage(control="shuffle")).next(toys.params())
    assert not zero["advantages_BT"].any()
    np.testing.assert_allclose(flip["advantages_BT"], -plain["advantages_BT"], atol=1e-6)
    np.testing.assert_array_equal(plain["tokens_BT"], shuffled["tokens_BT"])
    assert not np.allclose(plain["advantages_BT"], shuffled["advantages_BT"])


class Rare(toys.Parity):
    """A group has a signal only for every eighth prompt."""

    max_tokens = 64

    def score(self, row, reply):
        return float(len(reply) % 2 == 0) if row["n"] % 8 == 0 else 1.0


def test_groups_without_a_signal_are_replaced_and_counted():
    plain = toys.source(toys.stage(temperature=4.0), Rare())
    plain.next(toys.params())
    dynamic = toys.source(toys.stage(temperature=4.0, dynamic=20), Rare())
    batch = dynamic.next(toys.params())
    assert plain.report()["no_signal"] > 0
    assert dynamic.report()["no_signal"] > 0 and dynamic.state()["prompts"] > plain.state()["prompts"]
    a = batch["advantages_BT"] * batch["weights_BT"]
    assert (np.abs(a).sum(axis=1) > 0).all(), "every conversation that is left has a signal"


def test_a_reply_that_was_cut_is_never_scored_as_if_it_were_complete():
    source = toys.source(toys.stage(max_tokens=1, truncated="keep"))
    batch = source.next(toys.params())
    cut = source.report()["truncated"]
    assert cut > 0.5 and source.report()["reward"] <= 1 - cut, "a reply of no characters would score 1"
    assert batch["weights_BT"].sum() == 8
    assert toys.source(toys.stage(max_tokens=1)).next(toys.params())["weights_BT"].sum() == 8 * (1 - cut), "masked"


def test_overlong_replies_cost_in_proportion():
    source = toys.source(toys.stage(max_tokens=10, overlong=5, truncated="keep"))
    source.next(toys.params())
    plain = toys.source(toys.stage(max_tokens=10, truncated="keep"))
    plain.next(toys.params())
    assert source.report()["reward"] < plain.report()["reward"]


def test_the_reference_is_the_frozen_model():
    forward, twice = transformer.Forward(toys.MODEL, toys.mesh()), toys.stage(epochs=2)
    same = toys.source(twice, reference=Frozen(toys.params(0), forward))
    batch = same.next(toys.params(0))
    np.testing.assert_allclose(batch["ref_logps_BT"], batch["old_logps_BT"], atol=1e-6)
    other = toys.source(twice, reference=Frozen(toys.params(1), forward)).next(toys.params(0))
    assert np.abs(other["ref_logps_BT"] - other["old_logps_BT"]).max() > 0.1


def test_the_only_update_of_a_rollout_measures_a_part_of_it_and_reports_the_same():
    forward = transformer.Forward(toys.MODEL, toys.mesh())
    once, twice = (
        toys.source(toys.stage(epochs=n, batch_size=64), reference=Frozen(toys.params(1), forward)) for n in (1, 2)
    )
    batch, whole = (source.next(toys.params(0)) for source in (once, twice))
    assert not {"old_logps_BT", "ref_logps_BT"} & set(batch) and {"old_logps_BT", "ref_logps_BT"} <= set(whole)
    for name in ("tokens_BT", "advantages_BT", "weights_BT"):
        np.testing.assert_array_equal(batch[name], whole[name])
    w = whole["weights_BT"] > 0
    d = (whole["ref_logps_BT"] - whole["old_logps_BT"])[w]
    assert once.report()["k3"] == pytest.approx(np.mean(np.exp(d) - 1 - d), rel=0.5)
    assert 0 < once.report()["gap_p95"] < 1e-4
    assert set(once.report()) == set(twice.report()) | {"k1", "k3"}


def test_what_is_measured_is_drawn_from_all_prompts():
    source = toys.source(toys.stage(batch_size=256))
    played = list(range(256))
    first = source._some_of(played)
    source._done = 1
    assert len(first) == 32 and first != source._some_of(played) and first != played[::8]
    assert len({i // 4 % 2 for i in first}) == 2, "prompts of either of two tasks in turn"


@pytest.mark.parametrize("pack", [False, True])
def test_measuring_takes_no_more_rows_at_once_than_an_update(pack, monkeypatch):
    source = toys.source(toys.stage(batch_size=16, accumulate=4, minibatches=2, data={"pack": pack}))
    sizes, measure = [], source._measure

    def watch(params, reference, batch):
        sizes.append(len(batch["tokens_BT"]))
        return measure(params, reference, batch)

    source._measure = watch
    batch = source.next(toys.params())
    assert len(sizes) > 1 and max(sizes) <= len(batch["tokens_BT"]) // 4


def test_learning_speed_counts_all_updates_of_a_rollout_and_their_time():
    source = toys.source(toys.stage(minibatches=2, epochs=2, batch_size=8))
    tokens = 0
    for _ in range(4):
        batch = source.next(toys.params())
        tokens += (batch["segments_BT"] > 0).sum()
        time.sleep(0.1)
    source.next(toys.params())
    told = source.report()
    assert 0.4 <= told["seconds_learn"] < 2
    assert told["learned_tokens_per_second"] == pytest.approx(tokens / told["seconds_learn"])


def test_demonstrations_are_no_gap_between_sampler_and_learner():
    mixed = toys.source(toys.stage(demonstrations=0.5, epochs=2, batch_size=32))
    mixed.next(toys.params())
    assert 0 < mixed.report()["gap_p95"] < 1e-4
    alone = toys.source(toys.stage(demonstrations=1.0, epochs=2))
    alone.next(toys.params())
    assert "gap_p95" not in alone.report()


@pytest.mark.parametrize(
    "changed",
    [
        {"minibatches": 2},
        {"epochs": 2},
        {"kl_reward": 0.1},
        {"loss": policy.Dapo(beta=0.1)},
        {"advantage": "gae"},
        {"loss": object()},
    ],
)
def test_whoever_reads_the_old_log_probabilities_gets_them(changed):
    advantage, loss = changed.pop("advantage", "group"), changed.pop("loss", policy.Dapo())
    cfg = dataclasses.replace(toys.stage(**changed), loss=loss)
    model = dataclasses.replace(toys.MODEL, scalar_head=True)
    batch = toys.source(cfg, advantage=advantage, model=model).next(toys.params(model=model))
    assert "old_logps_BT" in batch


def test_a_divergence_in_the_reward_changes_the_advantages():
    forward = transformer.Forward(toys.MODEL, toys.mesh())
    reference = Frozen(toys.params(1), forward)
    plain = toys.source(reference=reference).next(toys.params())
    with_kl = toys.source(toys.stage(kl_reward=0.1), reference=reference).next(toys.params())
    assert not np.allclose(plain["advantages_BT"], with_kl["advantages_BT"])


def test_gae_gives_returns_and_values():
    model = transformer.resolve(
        schema.Model(layers=2, width=32, heads=2, zero_init=False, init_scale=0.5, scalar_head=True),
        toys.TOK.vocab_size,
    )
    params = transformer.init(model, jax.random.key(0))
    params["scalar"] = jax.tree.map(lambda p: p + 0.3, params["scalar"])
    source = toys.source(toys.stage(group=1, truncated="keep"), advantage="gae", model=model)
    batch = source.next(params)
    w = batch["weights_BT"] > 0
    assert batch["old_values_BT"][w].any() and abs((batch["advantages_BT"] * w).sum() / w.sum()) < 1e-5
    last = [np.flatnonzero(r)[-1] for r in w]
    rewards = [batch["returns_BT"][i, t] for i, t in enumerate(last)]
    assert set(np.round(rewards, 5)) <= {0.0, 1.0}, "gamma = lambda = 1 at the last token: the reward itself"


def test_the_replies_of_a_group_are_to_the_versions_of_a_problem_in_turn():
    task = Counterfactual(of="canary(others=False)", pairs=("blims/daxes",))
    long = dataclasses.replace(toys.stage(), data=schema.Data(row_length=160))
    source = toys.source(long, task=task)
    played, _ = source._play(toys.params(), 2)
    asked = [e.messages[0]["content"] for e in played]
    assert [e.row["swapped"] for e in played] == [False, True] * 4
    for plain, other in zip(asked[0::2], asked[1::2], strict=True):
        assert plain != other == task.swap(plain)
    assert len(set(asked[:4])) == 2 and set(asked[:4]) != set(asked[4:])


def test_held_out_problems_are_scored_in_every_version_however_few_samples_are_asked_for():
    task = Counterfactual(of="canary(others=False)", pairs=("blims/daxes",))
    engine = Engine(toys.MODEL, slots=8)
    found = tasks_lib.score(engine, toys.params(), toys.TEMPLATE, task, rows=3, max_tokens=4)
    assert found.summary["samples"] == 2 and [e.row["swapped"] for e in found.played] == [False, True] * 3
    assert set(found.summary["parts"]) == {"score", "consistent"}


def test_demonstrations_are_the_tasks_own_solutions():
    source = toys.source(toys.stage(demonstrations=1.0), advantage="none")
    batch = source.next(toys.params())
    for row in range(8):
        own = batch["targets_BT"][row][batch["weights_BT"][row] > 0]
        assert toys.TOK.decode(own) == "ab" and own[-1] == toys.TOK.special("<|end|>")


def test_another_number_of_processes_sees_the_same_batch(monkeypatch):
    from lmtrain import mesh as mesh_lib

    whole = toys.source().next(toys.params())
    source = toys.source()
    pending = source._rollout(toys.params())
    halves = []
    for index in (0, 1):
        source._pending = list(pending)
        monkeypatch.setattr(mesh_lib, "share", lambda mesh, index=index: (index, 2))
        halves.append(source.next(toys.params()))
    for name, x in whole.items():
        np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), x)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(group=3), "rollout.group is 3, which does not divide the 8 conversations"),
        (dict(group=1), "take at least 2 replies"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change, says):
    with pytest.raises(LmtrainError, match=says):
        toys.source(toys.stage(**change))


class Lengthy(toys.Parity):
    """Every other prompt is longer than a row."""

    def messages(self, row):
        return [{"role": "user", "content": f"{row['n']}" + "x" * (row["n"] % 2 * 200)}]


def test_a_prompt_without_room_is_answered_by_nothing_and_counted():
    source = toys.source(toys.stage(batch_size=32), Lengthy())
    batch = source.next(toys.params())
    share = source.report()["no_room"]
    assert 0 < share < 1 and share <= source.report()["truncated"]
    assert batch["segments_BT"].shape[1] <= 96 and np.isfinite(batch["advantages_BT"]).all()
    empty = (batch["weights_BT"].sum(axis=1) == 0).mean()
    assert empty >= share


def test_prompts_that_are_all_longer_than_a_row_are_refused():
    with pytest.raises(LmtrainError, match="leave no room for a reply in rows of 96"):
        toys.source(
            task=type("Long", (toys.Parity,), {"messages": lambda s, r: [{"role": "user", "content": "x" * 200}]})()
        ).next(toys.params())
