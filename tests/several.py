"""What the tests of several processes share: a tiny experiment, started as launch/local.sh does."""

import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import pytest

from lmtrain import checkpoint, log

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
STEPS = 30
TINY = """
from lmtrain import config
def get_config(arg=""):
    c = config.experiment(tensorboard=False)
    c.stages.tokenizer = config.tokenizer("bytes")
    c.stages.pretrain = config.stage(
        steps=30, batch_size=8, log_every=1, eval_every=15, checkpoint_every=5, keep_last=9, samples=0,
        model=config.model(layers=1, width=16, heads=2), optim=config.optim("adamw", lr=0.003),
        data=config.data("text", path={text!r}, document="line", row_length=16, heldout_rows=8),
    )
    return c
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A configuration's file, and the environment to run it in."""
    folder = tmp_path_factory.mktemp("hosts")
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "far", "home"]
    (folder / "text.txt").write_text("\n".join(" ".join(rng.choices(words, k=20)) for _ in range(400)))
    (folder / "tiny.py").write_text(TINY.format(text=str(folder / "text.txt")))
    return folder / "tiny.py"


def environment(tiny):
    return os.environ | {"PYTHONPATH": str(LAUNCH.parent), "JAX_COMPILATION_CACHE_DIR": str(tiny.parent / "cache")}


def start(tiny, workdir, processes, devices, *flags, restarts=0):
    argv = [LAUNCH / "local.sh", str(processes), "--config", tiny, "--workdir", workdir, *flags]
    env = environment(tiny) | {"DEVICES": str(devices), "RESTARTS": str(restarts), "PYTHON": sys.executable}
    return subprocess.Popen(list(map(str, argv)), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, status=0, seconds=300):
    said, _ = process.communicate(timeout=seconds)
    assert process.returncode == status, said
    return said


def losses(folder):
    return {m["step"]: m["loss"] for m in log.read_metrics(folder / "pretrain")}


def same_losses(a, b):
    return a.keys() == b.keys() and max(abs(a[k] - b[k]) for k in a) < 1e-5


def sha(folder):
    return checkpoint.params_sha256(checkpoint.load_params(folder / "pretrain/checkpoints"))


def cut(folder, to, step):
    """A copy of a run as it was at a step, as if it had been killed after that checkpoint."""
    shutil.copytree(folder, to)
    (to / "summary.json").unlink()
    for s in checkpoint.steps(to / "pretrain/checkpoints"):
        if s > step:
            shutil.rmtree(to / f"pretrain/checkpoints/{s}")
    log.truncate_jsonl(to / "pretrain/metrics.jsonl", step)
    return to


SHAPES = {"1x8": (1, 8), "2x4": (2, 4), "4x2": (4, 2)}


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory):
    """name -> the folder of a run that nothing disturbed, made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"whole-{name}") / "run"
            finish(start(tiny, made[name], *map(int, name.split("x"))))
        return made[name]

    return get


def members(launcher):
    """The processes that a launcher has started, by their place."""
    found = {}
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher.pid:
            place = next(e for e in environment if e.startswith(b"LMTRAIN_PROCESS="))
            found[int(place.split(b"=")[1])] = int(entry.name)
    return found


def step_of(folder):
    file = folder / "pretrain/metrics.jsonl"
    return file.read_text().count("\n") - 1 if file.exists() else -1


def at_step(launcher, folder, step, saving=False):
    """Waits for a step (and a save that is under way)."""
    end = time.time() + 200
    while time.time() < end and launcher.poll() is None:
        half = any("tmp" in p.name or not (p / "manifest.json").exists()
                   for p in folder.glob("pretrain/checkpoints/*"))  # fmt: skip
        if step_of(folder) >= step and (half or not saving):
            return
        time.sleep(0.002)
    raise AssertionError(f"never came to step {step}: {launcher.communicate()[0]}")
