"""Whole runs: what is kept, how they go on, what a rollback does. Tiny models, real files, real processes."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import lmtrain
from lmtrain import checkpoint, config, report
from lmtrain.types import LmtrainError, Stopped

STEPS = 24


def experiment(text, **stage):
    """One layer, 32 wide, bytes: a few milliseconds a step."""
    c = config.experiment(seed=1, tensorboard=False, mesh=dict(data=1))
    c.mesh.data = -1
    c.stages.tokenizer = config.tokenizer("bytes")
    given = dict(steps=STEPS, batch_size=8, log_every=1, eval_every=12, checkpoint_every=4, samples=1, sample_tokens=8)
    c.stages.pretrain = config.stage(
        model=config.model(layers=1, width=32, heads=2),
        data=config.data("text", path=str(text), row_length=32, heldout_fraction=0.2, heldout_rows=8),
        **{**given, **stage},
    )
    return c


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    words = random.Random(0).choices("the cat sat on a mat and then it ran far away".split(), k=4000)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(words))
    return file


@pytest.fixture(scope="session")
def finished(text, tmp_path_factory):
    """A run never interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return lmtrain.run(experiment(text), folder)


def sha(folder):
    return checkpoint.params_sha256(checkpoint.load_params(pathlib.Path(folder) / "pretrain/checkpoints"))


def lines(folder):
    return [json.loads(line) for line in (pathlib.Path(folder) / "pretrain/metrics.jsonl").read_text().splitlines()]


def same_metrics(a, b):
    quick = ("tokens_per_second", "mfu", "goodput", "seconds", "cache_hits")
    left_a, left_b = ([{k: v for k, v in m.items() if not any(q in k for q in quick)} for m in ms] for ms in (a, b))
    return left_a == left_b


def test_a_run_learns_and_keeps_what_the_issue_promises(finished):
    metrics = finished.metrics
    assert [m["step"] for m in metrics] == list(range(STEPS + 1))
    assert {"step", "tokens", "loss", "tokens_per_second", "mfu"} <= metrics[3].keys()
    scored = [m for m in metrics if "heldout_loss" in m]
    assert [m["step"] for m in scored] == [0, 12, 24]
    assert scored[0]["heldout_bits_per_byte"] > 6 > scored[-1]["heldout_bits_per_byte"]
    assert metrics[5]["tokens"] == 5 * 8 * 32
    entry = json.loads((finished.folder / "summary.json").read_text())["pretrain"]
    assert entry["heldout_loss"]["after"] == scored[-1]["heldout_loss"]
    assert 0 < entry["compressors"]["xz -9"] < 8
    for name in ("pretrain/config.json", "pretrain/samples.jsonl", "tokenizer/tokenizer.json", "report.html"):
        assert (finished.folder / name).exists(), name
    assert isinstance(finished.generate("the ", tokens=5), str)


def test_a_loaded_run_is_the_run(finished):
    again = lmtrain.load(finished.folder)
    assert checkpoint.params_sha256(again.params) == checkpoint.params_sha256(finished.params)
    assert again.generate("the cat", tokens=20) == finished.generate("the cat", tokens=20)


def test_a_finished_run_says_so_and_changes_nothing(finished, text, capsys):
    before = sha(finished.folder)
    again = lmtrain.run(experiment(text), finished.folder)
    assert "finished" in capsys.readouterr().out
    assert sha(again.folder) == before


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, text, tmp_path):
    assert sha(lmtrain.run(experiment(text, steps=4), tmp_path / "a").folder) == sha(
        lmtrain.run(experiment(text, steps=4), tmp_path / "b").folder
    )
    other = experiment(text, steps=4)
    other.seed = 2
    assert sha(lmtrain.run(other, tmp_path / "c").folder) != sha(tmp_path / "a")


def test_inspect_tells_stages_steps_and_hash(finished):
    said = report.inspect(finished.folder)
    assert sha(finished.folder) in said and f"{STEPS} of {STEPS}" in said and "row_length" in said


def test_a_longer_run_goes_on_from_the_shorter_one(text, tmp_path):
    constant = dict(optim=config.optim(schedule="constant", warmup=0.0))
    lmtrain.run(experiment(text, steps=6, **constant), tmp_path / "a")
    lmtrain.run(experiment(text, steps=12, **constant), tmp_path / "a")
    lmtrain.run(experiment(text, steps=12, **constant), tmp_path / "b")
    assert sha(tmp_path / "a") == sha(tmp_path / "b")


def test_a_stage_starts_from_the_one_before_or_from_another_run(finished, text, tmp_path):
    still = dict(optim=config.optim(lr=1e-12, muon_lr=1e-12), steps=1)
    c = experiment(text, **still, init_from=str(finished.folder))
    assert close(lmtrain.run(c, tmp_path / "a").params, finished.params)
    c = experiment(text, steps=3)
    c.stages.next = experiment(text, **still).stages.pretrain
    done = lmtrain.run(c, tmp_path / "b")
    assert done.stage == "next"
    assert close(done.params, checkpoint.load_params(tmp_path / "b/pretrain/checkpoints"))


def close(a, b):
    import jax

    return all(np.allclose(x, y, atol=1e-6) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# ------------------------------------------------------------------------------------------- rollback


def spiky(forward, params, batch, cfg: None):
    """Pretraining whose loss is not a number on rows that begin with a marker."""
    import jax.numpy as jnp

    from lmtrain.objectives.pretrain import Pretrain, pretrain

    loss, n, metrics = pretrain(forward, params, batch, Pretrain())
    bad = (batch["tokens_BT"][:, 0] == batch["poison_B"]).any()
    return jnp.where(bad, jnp.nan, loss), n, metrics


class Poisoned:
    """A source whose batches numbered in `bad` carry a poison."""

    def __init__(self, source, bad):
        self.source, self.bad, self.count = source, bad, 0

    def next(self, params=None):
        batch = dict(self.source.next(params))
        hit = self.count in self.bad
        batch["poison_B"] = batch["tokens_BT"][:, 0] if hit else np.full(len(batch["tokens_BT"]), -1, np.int32)
        self.count += 1
        return batch

    def state(self):
        return {"count": self.count, **self.source.state()}

    def restore(self, state):
        self.count = state["count"]
        self.source.restore({k: v for k, v in state.items() if k != "count"})

    def skip(self, n):
        self.count += n
        self.source.skip(n)


def train_poisoned(text, folder, bad, **stage):
    from lmtrain import runs, train
    from lmtrain.data import tokenizer

    e = config.build(experiment(text, **stage))
    cfg, tok = e.stages["pretrain"], tokenizer.bytes_tokenizer()
    from lmtrain import mesh as meshes
    from lmtrain.data import pipeline
    from lmtrain.models import transformer

    source, _ = pipeline.build(cfg.data, tok, cfg.batch_size, e.seed, folder / "data")
    parts = train.Parts(cfg, transformer.resolve(cfg.model, tok.vocab_size), Poisoned(source, bad), spiky)
    (folder / "pretrain").mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / "pretrain/config.json", {})
    return train.train(parts, folder / "pretrain", meshes.make(e.mesh), e.seed, tensorboard=False)


def test_a_loss_that_is_no_number_goes_back_and_skips_its_batches(text, tmp_path, capsys):
    state = train_poisoned(text, tmp_path, bad={9})  # the batch of step 10; checkpoints at 4, 8, ...
    said = capsys.readouterr().out
    assert "step 10" in said and "back to step 8" in said and "rollback 1" in said
    assert int(state.step) == STEPS
    assert all(np.isfinite(m["loss"]) for m in lines(tmp_path))
    assert [m["step"] for m in lines(tmp_path)] == list(range(STEPS + 1))


def test_several_bad_batches_between_two_checkpoints_are_all_skipped(text, tmp_path, capsys):
    state = train_poisoned(text, tmp_path, bad={9, 11})
    said = capsys.readouterr().out
    assert "rollback 2" in said and "rollback 3" not in said
    assert int(state.step) == STEPS and all(np.isfinite(m["loss"]) for m in lines(tmp_path))


def test_a_loss_that_stays_bad_gives_up_and_keeps_the_last_sound_checkpoint(text, tmp_path):
    with pytest.raises(LmtrainError, match="after 2 rollbacks.*optim.lr"):
        train_poisoned(text, tmp_path, bad=set(range(9, 100)), max_rollbacks=2)
    assert checkpoint.steps(tmp_path / "pretrain/checkpoints")[-1] == 8
    assert np.isfinite(checkpoint.load_params(tmp_path / "pretrain/checkpoints")["embed"]["table"]).all()


# ------------------------------------------------------------------------------------------- processes

SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from test_run import experiment
def get_config(arg=""):
    return experiment({text!r}, steps=60, checkpoint_every=2, eval_every=20)
"""


@pytest.fixture(scope="session")
def command(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    (folder / "tiny.py").write_text(SCRIPT.format(here=str(pathlib.Path(__file__).parent), text=str(text)))
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}

    def start(workdir, *flags):
        argv = [
            sys.executable,
            "-m",
            "lmtrain.cli",
            "run",
            "--config",
            str(folder / "tiny.py"),
            "--workdir",
            str(workdir),
        ]
        return subprocess.Popen(
            [*argv, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    return start


@pytest.fixture(scope="session")
def never_killed(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("never") / "run"
    process = command(folder)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return folder


def step_of(folder):
    file = folder / "pretrain/metrics.jsonl"
    return file.read_text().count("\n") - 1 if file.exists() else -1


def kill_once(command, folder, rng, during_save):
    """Starts the run and kills it somewhere in the middle, or while a checkpoint is being written."""
    process = command(folder)
    target, limit = rng.randrange(1, 56), time.time() + 120
    while process.poll() is None and time.time() < limit:
        writing = any("tmp" in p.name for p in (folder / "pretrain/checkpoints").glob("*"))
        if step_of(folder) >= target and (writing or not during_save):
            break
        time.sleep(0.002)
    time.sleep(rng.random() * 0.02)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"ended before it was killed: {said}"


def assert_killed_goes_on_to_the_bit(command, never_killed, tmp_path, seed):
    rng = random.Random(seed)
    folder = tmp_path / "run"
    for during_save in (False, True)[: 1 + seed % 2]:
        kill_once(command, folder, rng, during_save)
    process = command(folder)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert sha(folder) == sha(never_killed)
    assert same_metrics(lines(folder), lines(never_killed))


def test_a_killed_run_goes_on_to_the_bit(command, never_killed, tmp_path):
    assert_killed_goes_on_to_the_bit(command, never_killed, tmp_path, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_killed_at_ten_instants_saves_included(command, never_killed, tmp_path, seed):
    assert_killed_goes_on_to_the_bit(command, never_killed, tmp_path, seed)


def test_sigterm_saves_says_so_and_goes_on_to_the_bit(command, never_killed, tmp_path):
    folder = tmp_path / "run"
    process = command(folder)
    while process.poll() is None and step_of(folder) < 13:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == Stopped.status == 75, said
    assert "SIGTERM" in said and "Traceback" not in said
    process = command(folder)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert sha(folder) == sha(never_killed)


def damaged_file(folder):
    """The largest file of the newest checkpoint, and that checkpoint's step."""
    step = checkpoint.steps(folder / "pretrain/checkpoints")[-1]
    inside = (folder / "pretrain/checkpoints" / str(step)).rglob("*")
    return max((p for p in inside if p.is_file()), key=lambda p: p.stat().st_size), step


@pytest.mark.parametrize("how", ["flip", *(pytest.param(how, marks=pytest.mark.slow) for how in ("cut", "delete"))])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(text, finished, tmp_path, capsys, how):
    folder = tmp_path / "run"
    lmtrain.run(experiment(text), folder)
    file, step = damaged_file(folder)
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    capsys.readouterr()
    lmtrain.run(experiment(text), folder)
    said = capsys.readouterr().out
    assert file.name in said and str(step) in said and "going on from step 20" in said
    assert sha(folder) == sha(finished.folder)


def test_a_damaged_checkpoint_can_be_looked_at_past(text, tmp_path, capsys):
    lmtrain.run(experiment(text, steps=8), tmp_path / "run")
    file, _ = damaged_file(tmp_path / "run")
    file.write_bytes(file.read_bytes()[:-7])
    assert lmtrain.load(tmp_path / "run").step == 4
    assert "4 of 8" in report.inspect(tmp_path / "run")
    assert file.name in capsys.readouterr().out


def test_a_stage_does_not_start_from_a_model_with_another_tokenizer(finished, text, tmp_path):
    c = experiment(text, steps=1, init_from=str(finished.folder))
    c.stages.tokenizer = config.tokenizer("bpe", vocab_size=264)
    lmtrain.run(c, tmp_path / "same")  # 264 tokens without a merge: the same tokenizer
    c.stages.tokenizer = config.tokenizer("bpe", vocab_size=270)
    with pytest.raises(LmtrainError, match="vocab_size=264.*270|another tokenizer"):
        lmtrain.run(c, tmp_path / "other")
    assert not (tmp_path / "other").exists()
