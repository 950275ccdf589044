"""Several processes that train as one, on this machine, as launch/local.sh starts them: the same losses however many,
and what happens when one of them is killed, stopped, told to stop, or is not like the others."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from lmtrain import checkpoint, log
from lmtrain.hosts import local
from tests.several import (
    SHAPES,
    STEPS,
    at_step,
    cut,
    environment,
    finish,
    losses,
    members,
    same_losses,
    sha,
    start,
    tiny,
    whole,
)

__all__ = ["tiny", "whole"]  # fixtures
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("shape", ["2x4", "4x2"])
def test_processes_lose_what_one_loses(whole, shape):
    assert len(losses(whole("1x8"))) == STEPS + 1
    assert same_losses(losses(whole(shape)), losses(whole("1x8")))


@pytest.mark.parametrize("before, after", [(a, b) for a in SHAPES for b in SHAPES if a != b])
def test_a_checkpoint_of_any_number_of_processes_goes_on_with_any_other(tiny, whole, tmp_path, before, after):
    folder = cut(whole(before), tmp_path / "run", 10)
    said = finish(start(tiny, folder, *SHAPES[after]))
    assert "going on from step 10" in said
    assert same_losses(losses(folder), losses(whole("1x8")))


def test_four_processes_then_two_then_four_learn_the_same(tiny, whole, tmp_path):
    folder = cut(whole("4x2"), tmp_path / "first", 10)
    finish(start(tiny, folder, 2, 2))
    folder = cut(folder, tmp_path / "second", 20)
    finish(start(tiny, folder, 4, 2))
    assert same_losses(losses(folder), losses(whole("1x8")))


# More than data over the processes: an axis that crosses hosts, and what each of them then has only a part of.
MESHES = {
    "tensor-over-hosts": ["mesh.fsdp=2", "mesh.tensor=4"],
    "stage-fsdp-tensor": ["mesh.stage=2", "mesh.fsdp=2", "mesh.tensor=2"],
    "context-over-hosts": ["mesh.fsdp=2", "mesh.context=4"],
    "fsdp-expert": ["mesh.fsdp=2", "mesh.expert=4", "model.experts=4", "model.experts_per_token=2"],
}


@pytest.mark.parametrize("name", MESHES)
def test_any_mesh_over_processes_learns_what_one_process_does(tiny, tmp_path, name):
    flags = ["mesh.data=1", "model.layers=2", "model.heads=4", "samples=2", "steps=12", "checkpoint_every=6"]
    flags += MESHES[name]
    flags = [f"--config.{f}" if f.startswith("mesh") else f"--config.stages.pretrain.{f}" for f in flags]
    finish(start(tiny, tmp_path / "one", 1, 8, *flags))
    finish(start(tiny, tmp_path / "four", 4, 2, *flags))
    assert len(losses(tmp_path / "one")) == 13
    assert same_losses(losses(tmp_path / "four"), losses(tmp_path / "one"))
    samples = [(tmp_path / run / "pretrain/samples.jsonl").read_text() for run in ("one", "four")]
    assert samples[0] == samples[1] and samples[0].count("\n") >= 4
    folder = cut(tmp_path / "four", tmp_path / "two", 6)
    finish(start(tiny, folder, 2, 4, *flags))
    assert same_losses(losses(folder), losses(tmp_path / "one"))


CHAIN = """
import json, pathlib, random
from lmtrain import config
PAIRS = pathlib.Path(__file__).with_suffix(".jsonl")
def get_config(arg=""):
    rng = random.Random(0)
    rows = [{"prompt": f"Number {i}?", "chosen": f"It is {i}.", "rejected": f"No, {rng.random()}"} for i in range(99)]
    PAIRS.write_text("\\n".join(map(json.dumps, rows)))
    task = "addition(digits=1)"
    def stage(**fields):
        given = dict(batch_size=8, steps=4, log_every=1, eval_every=2, checkpoint_every=2, samples=1, sample_tokens=8)
        return config.stage(**given | fields)
    chat = config.data("task", path=task, limit=200, row_length=64, heldout_rows=8)
    pairs = config.data("jsonl", path=str(PAIRS), row_length=96, heldout_fraction=0.2, heldout_rows=8)
    c = config.experiment(seed=3, tensorboard=False)
    c.stages.tokenizer = config.tokenizer("bytes")
    c.stages.sft = stage(objective="sft", data=chat, model=config.model(layers=2, width=32, heads=4, mlp=48))
    c.stages.dpo = stage(objective="dpo", data=pairs)
    c.stages.rl = stage(objective="dapo", data=config.data(row_length=48, pack=False, heldout_rows=8),
                        rollout=config.rollout(task, group=4, slots=8, max_tokens=5))
    c.stages.scores = config.evaluation(tasks=(task,), rows=8, suites=("fluency",), heldout="sft")
    return c
"""


@pytest.mark.parametrize("mesh", [["fsdp=4"], ["fsdp=2", "tensor=2"]], ids="-".join)
def test_the_whole_chain_over_processes_is_that_of_one(tiny, tmp_path, mesh):
    """SFT, DPO, RL with its sampler, and the evaluation after them."""
    file = tiny.parent / f"chain{len(mesh)}.py"
    file.write_text(CHAIN)
    flags = ["--config.mesh.data=1", *(f"--config.mesh.{m}" for m in mesh)]
    for name, processes, devices in (("one", 1, 4), ("two", 2, 2)):
        finish(start(file, tmp_path / name, processes, devices, *flags))
    for stage in ("sft", "dpo", "rl"):
        one, two = ([m["loss"] for m in log.read_metrics(tmp_path / name / stage)] for name in ("one", "two"))
        assert len(one) == 5 and one == pytest.approx(two, rel=1e-4, abs=1e-5), stage
        one, two = ((tmp_path / name / stage / "samples.jsonl").read_text() for name in ("one", "two"))
        assert one == two and (one or stage != "rl")
    one, two = (json.loads((tmp_path / name / "summary.json").read_text())["rl"]["tasks"] for name in ("one", "two"))
    assert one == two and one


# -------------------------------------------------------------------------------------------- killed, told, stopped
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("saving", [False, True], ids=["step", "save"])
@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "worker"])
def test_killed_all_end_with_its_name_and_go_on_to_the_bit(tiny, whole, tmp_path, victim, saving, seed):
    folder, rng = tmp_path / "run", random.Random(seed)
    launcher = start(tiny, folder, 2, 2, restarts=0)
    at_step(launcher, folder, rng.randrange(5, 26), saving)
    time.sleep(rng.random() * 0.05)
    pid = members(launcher)[victim]
    os.kill(pid, signal.SIGKILL)
    begun = time.time()
    said = finish(launcher, status=76)
    assert time.time() - begun < 20
    assert f"process {victim} (host " in said and f"pid {pid}) is gone" in said
    finish(start(tiny, folder, 2, 2))
    assert sha(folder) == sha(whole("2x2")) and losses(folder) == losses(whole("2x2"))


def test_the_launcher_starts_all_again_by_itself(tiny, whole, tmp_path):
    folder = tmp_path / "run"
    launcher = start(tiny, folder, 2, 2, restarts=2)
    at_step(launcher, folder, 12)
    os.kill(members(launcher)[1], signal.SIGKILL)
    said = finish(launcher)
    assert "all ended with status 76; again in 1 s" in said
    assert re.search("going on from step (5|10)", said)  # its save may not have been whole
    assert sha(folder) == sha(whole("2x2"))
    goodput = [m["goodput"] for m in log.read_metrics(folder / "pretrain")]
    assert 0 < goodput[-1] < 1


@pytest.mark.parametrize("who", ["one", "all", "ctrl-c"])
def test_told_to_stop_all_save_the_same_step(tiny, whole, tmp_path, who):
    folder = tmp_path / "run"
    launcher = start(tiny, folder, 2, 2)
    at_step(launcher, folder, 12)
    pids = members(launcher).values()
    for pid in list(pids)[: 1 if who == "one" else 2]:
        os.kill(pid, signal.SIGINT if who == "ctrl-c" else signal.SIGTERM)
    said = finish(launcher, status=75)
    (step,) = {int(line.split(" at step ")[1].split()[0]) for line in said.splitlines() if "and saved" in line}
    assert said.count("and saved") == 2 and checkpoint.steps(folder / "pretrain/checkpoints")[-1] == step > 12
    finish(start(tiny, folder, 2, 2))
    assert sha(folder) == sha(whole("2x2"))


@pytest.mark.parametrize("lost", [False, True], ids=["crash", "replaced"])
def test_the_hosts_own_disks_are_newer_where_no_host_was_replaced(tiny, whole, tmp_path, lost):
    folder = tmp_path / "run"
    near = [f"--config.local={tmp_path / 'near'}", "--config.stages.pretrain.local_every=3"]
    near += ["--config.stages.pretrain.checkpoint_every=5"]
    launcher = start(tiny, folder, 2, 2, *near)
    at_step(launcher, folder, 14)
    os.kill(members(launcher)[1], signal.SIGKILL)
    finish(launcher, status=76)
    for step in checkpoint.steps(folder / "pretrain/checkpoints"):
        if step > 5:
            shutil.rmtree(folder / f"pretrain/checkpoints/{step}")  # as if the shared folder were slow to save
    if lost:
        (gone,) = (tmp_path / "near").glob("*/1-of-2")
        shutil.rmtree(gone)
    said = finish(start(tiny, folder, 2, 2, *near))
    assert re.search("going on from step 5 " if lost else "own disks have step (9|12)", said)
    assert sha(folder) == sha(whole("2x2"))


FULL = """
import os, pathlib, resource
from lmtrain.data.pipeline import Pipeline
true, taken, mark = Pipeline.next, [], pathlib.Path(__file__ + ".mark")
def limited(self, params=None):
    taken.append(1)
    if len(taken) == 14 and os.environ["LMTRAIN_PROCESS"] == "{victim}" and not mark.exists():
        mark.touch()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))
    return true(self, params)
Pipeline.next = limited
"""


@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "worker"])
def test_a_disk_that_refuses_one_process_ends_all_and_keeps_the_last_good_checkpoint(tiny, whole, tmp_path, victim):
    """No file of that process may grow past 100 bytes any more, from about its 12th step until it begins again."""
    config = tiny.parent / f"full{victim}.py"
    config.write_text(tiny.read_text() + FULL.format(victim=victim))
    said = finish(start(config, tmp_path / "run", 2, 2, restarts=1))
    assert "File too large" in said and "all ended with status 74; again in 1 s" in said, said
    assert re.search("going on from step (5|10) of", said) and "Traceback" not in said, said
    assert "*** " not in said, said
    assert sha(tmp_path / "run") == sha(whole("2x2"))


def test_a_signal_to_the_launcher_reaches_all(tiny, tmp_path):
    folder = tmp_path / "run"
    launcher = start(tiny, folder, 2, 2, restarts=5)
    at_step(launcher, folder, 6)
    launcher.send_signal(signal.SIGTERM)
    assert finish(launcher, status=75).count("and saved") == 2


@pytest.mark.parametrize("watchdog", [True, False], ids=["watchdog", "roll"])
def test_the_watchdog_ends_a_stopped_job_with_stacks_within_its_limit(tiny, tmp_path, watchdog):
    folder = tmp_path / "run"
    flags = ["--config.watchdog=4", "--config.watchdog_least=5"] if watchdog else []
    launcher = start(tiny, folder, 2, 2, *flags)
    at_step(launcher, folder, 12)
    victim = members(launcher)[1]
    os.kill(victim, signal.SIGSTOP)
    begun, other = time.time(), members(launcher)[0]
    while time.time() - begun < 60 and other in members(launcher).values():
        time.sleep(0.1)
    took = time.time() - begun
    os.kill(victim, signal.SIGKILL)  # else the launcher does, half a minute later
    if watchdog:
        said = finish(launcher, status=77)
        assert took < 10 and "no step for" in said and "most recent call first" in said and "in train" in said
    else:
        said = finish(launcher, status=76)
        assert took < 20 and "process 1 (host " in said and "nothing heard of it for 12 s" in said


# ------------------------------------------------------------------------------------------ not like the others
def together(tiny, workdir, change, count=2):
    """Starts processes one by one, each as `change(process, argv, environment)` leaves it; [(status, what it said)]."""
    running = []
    for i, env in enumerate(local.environments(count, 2, environment(tiny), local.free_ports())):
        argv = [sys.executable, "-m", "lmtrain.cli", "run", "--config", str(tiny), "--workdir", str(workdir)]
        argv, env = change(i, argv, env)
        running.append(subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return [(p.communicate(timeout=120)[0], p.returncode) for p in running]


def patched(code):
    """A command of the same arguments whose process first runs some code."""
    return lambda argv: [argv[0], "-c", f"import sys; {code}; from lmtrain import cli; sys.exit(cli.main())", *argv[3:]]


MISFITS = {
    "setting": (lambda argv: [*argv, "--config.stages.pretrain.optim.lr=0.5"], "optim.lr is 0.5, but 0.003 on process"),
    "jax": (patched("import jax; jax.__version__ = '0.1'"), "has jax 0.1, process 0"),
    "clock": (patched("import time; true = time.time; time.time = lambda: true() - 3600"), "3600 s behind"),
    "folder": (lambda argv: [*argv[:-1], argv[-1] + "-elsewhere"], "is not the folder that process 0"),
    "unwritable": (lambda argv: [*argv[:-1], "/proc/nowhere"], "cannot write to --workdir: /proc/nowhere"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_host_that_is_not_like_the_others_is_refused_by_all_of_them(tiny, tmp_path, name):
    change, message = MISFITS[name]
    found = together(tiny, tmp_path / "run", lambda i, argv, env: (change(argv) if i == 1 else argv, env))
    for said, status in found:
        assert status == 2 and message in said and "process 1 (host " in said and "Traceback" not in said, said
    assert not (tmp_path / "run").exists()


def test_an_impossible_mesh_is_refused_by_all(tiny, tmp_path):
    change = lambda i, argv, env: ([*argv, "--config.mesh.fsdp=3"], env)  # noqa: E731
    for said, status in together(tiny, tmp_path / "run", change):
        assert status == 2 and "fsdp=3 asks for a multiple of 3 devices, but 4 are here" in said, said


SLEEPY = """
import time
import jax
from lmtrain.data.pipeline import Pipeline
true = Pipeline.next
def slow(self, params=None):
    time.sleep(0.4 * (jax.process_index() == 1))
    return true(self, params)
Pipeline.next = slow
"""


def test_a_slow_host_is_named_in_the_metrics(tiny, tmp_path):
    (tmp_path / "sleepy.py").write_text(tiny.read_text() + SLEEPY)
    finish(start(tmp_path / "sleepy.py", tmp_path / "run", 2, 2))
    last = log.read_metrics(tmp_path / "run/pretrain")[-1]
    assert "process 1 (host " in last["slow_host"] and last["slow_host_seconds"] > 0.3
