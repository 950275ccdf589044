"""From a language model to a chat model: whole runs of tiny models, stage after stage, killed and not."""

import io
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import lmtrain
from lmtrain import checkpoint, config, feeds, runs, terminal
from lmtrain.types import LmtrainError

MODEL = dict(layers=1, width=32, heads=2)
PAIRS = ("reward", "dpo", "dpo_norm", "ipo", "simpo", "orpo", "discriminator")
POLICIES = ("grpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo", "ppo")


def chat_stage(**fields):
    given = dict(objective="sft", steps=4, batch_size=8, eval_every=2, checkpoint_every=2, log_every=1, samples=1)
    given |= dict(sample_tokens=8, model=config.model(**MODEL))
    given |= dict(data=config.data("task", path="addition(digits=1)", limit=200, row_length=64, heldout_rows=8))
    return config.stage(**{**given, **fields})


def rl_stage(objective="dapo", **fields):
    rollout = dict(group=4, slots=8, max_tokens=5) | fields.pop("rollout", {})
    given = dict(objective=objective, steps=3, batch_size=8, eval_every=2, checkpoint_every=1, log_every=1, samples=1)
    given |= dict(data=config.data(row_length=48, pack=False, heldout_rows=8))
    return config.stage(**{**given, **fields}, rollout=config.rollout("addition(digits=1)", **rollout))


def experiment(**stages):
    c = config.experiment(seed=3, tensorboard=False)
    c.stages.tokenizer = config.tokenizer("bytes")
    for name, stage in stages.items():
        c.stages[name] = stage
    return c


@pytest.fixture(scope="session")
def sft(tmp_path_factory):
    """A run with one chat stage."""
    return lmtrain.run(experiment(sft=chat_stage()), tmp_path_factory.mktemp("runs") / "sft")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    rng = random.Random(0)
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = []
    for i in range(120):
        a = rng.randrange(100)
        rows.append({"prompt": f"Number {a} of {i}?", "chosen": f"It is {a}.", "rejected": f"No, {rng.randrange(9)}!"})
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def tail(folder, stage):
    return [json.loads(line) for line in (pathlib.Path(folder) / stage / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------ the chain
def test_a_chat_model_is_trained_rewarded_scored_and_talked_to(sft, tmp_path, capsys, monkeypatch):
    c = experiment(sft=chat_stage(), rl=rl_stage())
    c.stages.evaluation = config.evaluation(
        "addition(digits=1)", "calculator", rows=6, samples=4, max_tokens=6, slots=16
    )
    done = lmtrain.run(c, tmp_path / "a")
    assert done.stage == "rl"
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    for task in ("addition", "calculator"):
        for when in ("before", "after"):
            s = summary["rl"]["tasks"][task][when]
            assert 0 <= s["ci95"][0] <= s["score"] <= s["ci95"][1] <= 1 and s["rows"] == 6 and s["samples"] == 4
            assert s["pass@1"] == pytest.approx(s["score"]) and s["pass@4"] >= s["pass@1"] and "majority@4" in s
    assert summary["rl"]["tasks"]["addition"]["before"] == summary["sft"]["tasks"]["addition"]["after"]
    said = capsys.readouterr().out
    assert "held-out task" in said and "6 rows a task, 4 replies each" in said
    row = tail(tmp_path / "a", "rl")[1]
    wanted = (
        "reward reward_std no_signal length length_reward truncated gap_mean gap_p95 entropy ratio ratio_max clipped"
    )
    wanted += " k1 k3 seconds_generate generated_tokens_per_second reward_score"
    assert set(wanted.split()) <= row.keys()
    assert "assistant:" in (tmp_path / "a/rl/samples.jsonl").read_text()
    # again: nothing is done twice
    stamp = (tmp_path / "a/evaluation/scores.json").stat().st_mtime_ns
    lmtrain.run(c, tmp_path / "a")
    assert (tmp_path / "a/evaluation/scores.json").stat().st_mtime_ns == stamp
    # and in a terminal, from a pipe
    monkeypatch.setattr(sys, "stdin", io.StringIO("3+4\n/reset\n\n5+5\n"))
    assert terminal.chat(lmtrain.load(tmp_path / "a"), max_tokens=4, temperature=0.0) == 2
    said = capsys.readouterr().out
    assert said.count("model> ") == 2 and "you> 3+4" in said


def test_a_stage_inherits_the_model_it_starts_from(sft, tmp_path):
    later = rl_stage(init_from=str(sft.folder))
    done = lmtrain.run(experiment(rl=later), tmp_path / "a")
    assert done.model.width == 32 and done.model.layers == 1
    later.model.layers = 2
    with pytest.raises(LmtrainError, match="the checkpoint has layers=1, the configuration 2"):
        lmtrain.run(experiment(rl=later), tmp_path / "b")


def test_a_run_that_starts_from_another_takes_its_tokenizer(sft, tmp_path):
    c = config.experiment(seed=3, tensorboard=False)
    c.stages.more = chat_stage(init_from=str(sft.folder), steps=1)
    done = lmtrain.run(c, tmp_path / "a")
    assert done.tokenizer.fingerprint == sft.tokenizer.fingerprint


# ---------------------------------------------------------------------------------------------------------- preferences
@pytest.mark.parametrize("objective", [*PAIRS, "kto"])
def test_every_preference_loss_trains_and_tells_pairs_apart(sft, pairs, tmp_path, objective):
    stage = chat_stage(
        objective=objective, init_from=str(sft.folder), steps=2, data=config.data(
            "jsonl", path=str(pairs), row_length=96, heldout_fraction=0.2, heldout_rows=0))  # fmt: skip
    done = lmtrain.run(experiment(preference=stage), tmp_path / "a")
    rows = tail(tmp_path / "a", "preference")
    assert all(np.isfinite(m["loss"]) for m in rows)
    start = rows[0]
    if objective in ("dpo", "dpo_norm"):
        assert start["loss"] == pytest.approx(np.log(2), abs=1e-5), "policy = reference"
    if objective == "reward":
        assert start["loss"] == pytest.approx(np.log(2), abs=1e-5) and done.model.scalar_head
    if objective != "kto":
        s = done.summary["preference"]["tasks"]["preference"]
        assert s["before"]["chance"] == 0.5 and s["before"]["longer"] == 1.0 and s["after"]["rows"] > 5
        assert s["after"]["ci95"][0] <= s["after"]["score"] <= s["after"]["ci95"][1]


def test_the_reference_of_offline_pairs_is_computed_once(sft, pairs, tmp_path, monkeypatch):
    from lmtrain.models.transformer import Forward

    stage = chat_stage(
        objective="dpo", init_from=str(sft.folder), steps=2, data=config.data(
            "jsonl", path=str(pairs), row_length=96, heldout_fraction=0.2, heldout_rows=0))  # fmt: skip
    lmtrain.run(experiment(preference=stage), tmp_path / "a")
    assert len(list((tmp_path / "a/preference").glob("reference-*.npy"))) == 2
    stage.steps = 3
    monkeypatch.setattr(Forward, "logps", lambda *args: pytest.fail("computed again"))
    lmtrain.run(experiment(preference=stage), tmp_path / "a")


@pytest.mark.slow
def test_the_reference_of_another_start_is_another(sft, pairs, tmp_path):
    data = config.data("jsonl", path=str(pairs), row_length=96, heldout_fraction=0.2, heldout_rows=0)
    further = chat_stage(init_from=str(sft.folder), steps=1)
    other = lmtrain.run(experiment(sft=further), tmp_path / "other")
    for start in (sft, other):
        stage = chat_stage(objective="dpo", init_from=str(start.folder), steps=1, data=data)
        shutil.rmtree(tmp_path / "a/preference/checkpoints", ignore_errors=True)  # as if it had died before its first
        row = lmtrain.run(experiment(preference=stage), tmp_path / "a").metrics[0]
        assert row["loss"] == pytest.approx(np.log(2), abs=1e-5), "policy = reference"
    assert len(list((tmp_path / "a/preference").glob("reference-*.npy"))) == 4


# ----------------------------------------------------------------------------------------------- reinforcement learning
@pytest.mark.parametrize(
    "objective", [pytest.param(p, marks=() if p in ("grpo", "ppo") else pytest.mark.slow) for p in POLICIES]
)
def test_every_policy_loss_trains(sft, tmp_path, objective):
    stage = rl_stage(objective, init_from=str(sft.folder), rollout=dict(minibatches=2, epochs=2), steps=5, batch_size=8)
    lmtrain.run(experiment(rl=stage), tmp_path / "a")
    rows = tail(tmp_path / "a", "rl")[1:]
    assert all(np.isfinite(m["loss"]) for m in rows) and [m["step"] for m in rows] == [1, 2, 3, 4, 5]
    assert rows[0]["ratio"] == pytest.approx(1, abs=1e-4) and rows[0]["ratio_max"] == pytest.approx(1, abs=1e-3)


def test_a_student_learns_from_a_teacher_on_its_own_samples(sft, tmp_path):
    stage = rl_stage(
        "gkd", init_from=str(sft.folder), source="rollout", teacher=str(sft.folder), rollout=dict(demonstrations=0.5)
    )
    lmtrain.run(experiment(rl=stage), tmp_path / "a")
    rows = tail(tmp_path / "a", "rl")
    assert abs(rows[1]["loss"]) < 1e-5 and rows[1]["nll"] > 0, "student = teacher: nothing to learn"


def test_a_frozen_model_that_the_mesh_does_not_divide_is_refused_by_name_before_the_first_stage(sft, tmp_path):
    two, run = config.model(layers=2, width=32, heads=2), f"{sft.folder}/{sft.stage}"
    reads = (
        rl_stage(rollout=dict(rewards=("score", f"model({run})"))),
        chat_stage(objective="gkd", model=two, teacher=run),
    )
    for stage in reads:
        c = experiment(sft=chat_stage(model=two), last=stage)
        c.mesh.stage = 2
        with pytest.raises(LmtrainError, match=f"stages.last: .*{sft.stage}: mesh.stage=2.*layers=1.*one of 1[.]"):
            lmtrain.run(c, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_reward_model_is_a_part_of_the_reward(sft, pairs, tmp_path):
    data = config.data("jsonl", path=str(pairs), row_length=96, heldout_fraction=0.2)
    stage = chat_stage(objective="reward", init_from=str(sft.folder), steps=2, data=data)
    judge = lmtrain.run(experiment(reward=stage), tmp_path / "judge")
    stage = rl_stage(init_from=str(sft.folder), rollout=dict(rewards=("score", f"2*model({judge.folder})")))
    lmtrain.run(experiment(rl=stage), tmp_path / "a")
    row = tail(tmp_path / "a", "rl")[1]
    assert 0 < row["reward_model"] < 1
    assert row["reward"] == pytest.approx((row["reward_score"] + 2 * row["reward_model"]) / 3, abs=1e-5)
    first = json.loads((tmp_path / "a/summary.json").read_text())["rl"]["tasks"]["addition"]["before"]
    assert set(first["parts"]) == {"score", "model"} and 0 <= first["parts"]["model"] < 1


def test_a_frozen_model_plays_the_user(sft, tmp_path):
    stage = rl_stage(init_from=str(sft.folder), rollout=dict(user=str(sft.folder), turns=3))
    stage.rollout.tasks = ("chatroom",)
    stage.data.row_length = 192
    lmtrain.run(experiment(rl=stage), tmp_path / "a")
    assert 1 <= tail(tmp_path / "a", "rl")[1]["turns"] <= 3


# -------------------------------------------------------------------------------------------------------------- killed
def same(a, b):
    quick = ("tokens_per_second", "mfu", "goodput", "seconds", "cache_hits")
    strip = [[{k: v for k, v in m.items() if not any(q in k for q in quick)} for m in rows] for rows in (a, b)]
    return strip[0] == strip[1]


SCRIPT = """
from tests.test_post_training import chat_stage, experiment, rl_stage
def get_config(arg=""):
    return experiment(sft=chat_stage(), rl=rl_stage(
        "ppo" if arg else "dapo", steps=12, batch_size=8, checkpoint_every=1,
        rollout=dict(minibatches=2, epochs=2) if arg else dict(group=4, dynamic=1)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arg", ["", "ppo"])
def test_killed_in_the_middle_of_rollouts_and_updates_it_goes_on_to_the_same_bits(tmp_path, arg):
    (tmp_path / "rl.py").write_text(SCRIPT)

    def start(folder):
        argv = [sys.executable, "-m", "lmtrain.cli", "run", "--config", f"{tmp_path}/rl.py:{arg}", "--workdir", folder]
        return subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": os.getcwd()}, stdout=subprocess.PIPE)

    whole = tmp_path / "whole"
    assert start(whole).wait() == 0
    rng = random.Random(0)
    for attempt in range(5):
        folder, kills = tmp_path / f"killed{attempt}", 0
        while kills < 3:
            process = start(folder)
            waited = rng.uniform(0.05, 1.5)
            begun = time.monotonic() + 120
            steps = folder / "rl/checkpoints"
            seen = len(list(steps.glob("*"))) if steps.exists() else 0
            while process.poll() is None and time.monotonic() < begun:
                if steps.exists() and len(list(steps.glob("*"))) != seen:  # it is learning: a kill now lands in it
                    break
                time.sleep(0.02)
            time.sleep(waited)
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        assert kills, "a kill has to land"
        assert start(folder).wait() == 0
        a, b = (checkpoint.load_params(f / "rl/checkpoints") for f in (whole, folder))
        assert checkpoint.params_sha256(a) == checkpoint.params_sha256(b)
        assert same(tail(whole, "rl"), tail(folder, "rl"))
        assert runs.read_summary(whole)["rl"] == runs.read_summary(folder)["rl"]


def test_the_share_of_pairs_whose_chosen_reply_is_longer():
    segments = np.array([[1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 0], [1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0]])
    weights = np.array([[0, 1, 1, 0, 0, 1, 0, 1, 0, 1, 1, 0], [0, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0]])
    # chosen 2 : 1 longer, 1 : 2 shorter, 2 : 2 a tie
    assert feeds.longer_in([{"segments_BT": segments, "weights_BT": weights}]) == 0.5
    assert feeds.longer_in([{"segments_BT": segments[:, :6], "weights_BT": weights[:, :6]}]) == 0.75
