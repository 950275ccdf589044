"""launch/slurm.sbatch under a real Slurm, where it is installed (Debian: slurm-wlm, munge) and tests run as root: a
controller and two nodes, all on this machine."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from lmtrain import checkpoint
from tests.several import (
    LAUNCH,
    at_step,
    cut,
    environment,
    finish,
    losses,
    same_losses,
    sha,
    start,
    step_of,
    tiny,
    whole,
)

__all__ = ["tiny", "whole"]
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, NEEDED)) or os.geteuid() != 0, reason="needs Slurm, munge and root"),
]

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldLogFile={folder}/slurmctld.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/linear
SchedulerParameters=sched_interval=1
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=5
NodeName=n0 NodeAddr=127.0.0.1 Port={one} CPUs=2
NodeName=n1 NodeAddr=127.0.0.1 Port={two} CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment of its commands."""
    folder = pathlib.Path(f"/tmp/slurm-{os.getpid()}")
    folder.mkdir()
    host, port = socket.gethostname(), random.randrange(20000, 31000)
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=host, port=port, one=port + 1, two=port + 2))
    env = os.environ | {"SLURM_CONF": str(conf)}
    munge = ["munged", "--foreground", "--force", "--num-threads=2"]
    munge += [f"--{name}={folder}/{file}" for name, file in (
        ("socket", "munge.socket"), ("key-file", "key"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed")
    )]  # fmt: skip
    daemons = [subprocess.Popen(munge, stderr=subprocess.DEVNULL)]
    try:
        time.sleep(1)
        quiet = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        daemons.append(subprocess.Popen(["slurmctld", "-D"], **quiet))
        (folder / "hosts").write_text(f"127.0.0.1 localhost {host} n0 n1\n")
        for name in ("n0", "n1"):  # each has a host name of its own, and both names lead to this machine
            (folder / f"spool.{name}").mkdir()
            inside = f"hostname {name}; mount --bind {folder}/hosts /etc/hosts; exec slurmd -D -N {name}"
            daemons.append(subprocess.Popen(["unshare", "--mount", "--uts", "sh", "-c", inside], **quiet))
        end = time.time() + 60
        while "idle" not in (seen := said("sinfo", "-h", "-o", "%t %D", env=env)) or "2" not in seen:
            if time.time() > end:
                pytest.fail(f"Slurm did not start: {seen}\n{(folder / 'slurmctld.log').read_text()[-2000:]}")
            time.sleep(0.5)
        yield env
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def said(*argv, env):
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    return done.stdout + done.stderr


class Job:
    """A job; looks like a launcher to at_step."""

    def __init__(self, cluster, tiny, workdir, devices, tasks=1):
        self.env = cluster | environment(tiny) | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices),
                   "XLA_FLAGS": "", "PYTHON": sys.executable}  # fmt: skip
        self.log = workdir.with_suffix(".log")
        argv = ["sbatch", "--parsable", "--nodes=2", f"--ntasks-per-node={tasks}", f"--output={self.log}",
                f"--chdir={LAUNCH.parent}", str(LAUNCH / "slurm.sbatch"), "--config", str(tiny),
                "--workdir", str(workdir)]  # fmt: skip
        self.id = said(*argv, env=self.env).strip()
        assert self.id.isdigit(), self.id

    def state(self):
        return (re.findall(r"JobState=(\w+)", said("scontrol", "show", "job", self.id, env=self.env)) or ["GONE"])[0]

    def poll(self):
        return None if self.state() in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING") else 1

    def communicate(self):
        return [self.log.read_text()]

    def wait(self, seconds=300):
        end = time.time() + seconds
        while self.poll() is None and time.time() < end:
            time.sleep(0.3)
        assert self.state() == "COMPLETED", self.log.read_text()
        return self.log.read_text()

    def process(self, number):
        """The pid of one of the step's processes."""
        for entry in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                argv, environ = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            mine = {f"SLURM_JOB_ID={self.id}".encode(), f"SLURM_PROCID={number}".encode()} <= set(environ)
            if mine and b"lmtrain.cli" in argv and b"srun" not in argv and b"SLURM_STEP_NODELIST" in b"".join(environ):
                return int(entry.name)
        raise AssertionError(f"no process {number} of job {self.id}")


@pytest.mark.parametrize("tasks, devices", [(1, 4), (2, 2)], ids=["2x4", "4x2"])
def test_two_nodes_lose_what_one_process_loses(cluster, tiny, whole, tmp_path, tasks, devices):
    text = Job(cluster, tiny, tmp_path / "run", devices, tasks).wait()
    assert f"hosts: {2 * tasks} processes, under Slurm, coordinator" in text
    assert same_losses(losses(tmp_path / "run"), losses(whole("1x8")))


def test_a_checkpoint_goes_from_one_machine_to_slurm_and_back(cluster, tiny, whole, tmp_path):
    folder = cut(whole("1x8"), tmp_path / "run", 10)
    assert "going on from step 10" in Job(cluster, tiny, folder, 2, tasks=2).wait()
    folder = cut(folder, tmp_path / "back", 20)
    assert "going on from step 20" in finish(start(tiny, folder, 2, 4))
    assert same_losses(losses(folder), losses(whole("1x8")))


def test_a_killed_process_is_named_and_the_job_goes_on_by_itself(cluster, tiny, whole, tmp_path):
    folder = tmp_path / "run"
    job = Job(cluster, tiny, folder, 2)
    at_step(job, folder, 12)
    os.kill(job.process(1), signal.SIGKILL)
    text = job.wait()
    assert "process 1 (host n1, " in text and "is gone" in text and "launch: all ended with status" in text
    assert re.search("going on from step (5|10)", text)  # its save may not have been whole
    assert sha(folder) == sha(whole("2x2"))


def test_told_to_stop_it_saves_and_is_queued_again(cluster, tiny, tmp_path):
    folder = tmp_path / "run"
    job = Job(cluster, tiny, folder, 2)
    at_step(job, folder, 12)
    said("scancel", "--signal=TERM", job.id, env=job.env)
    end = time.time() + 60
    while "requeued" not in job.log.read_text() and time.time() < end:
        time.sleep(0.2)
    assert job.log.read_text().count("and saved; the same command") == 2
    assert checkpoint.steps(folder / "pretrain/checkpoints")[-1] == step_of(folder) > 12
    while job.state() != "PENDING" and time.time() < end:
        time.sleep(0.2)
    assert job.state() == "PENDING"
    said("scancel", job.id, env=job.env)


def test_prepare_queues_again_what_failed_and_what_waits_for_it(cluster, tmp_path):
    rows = [json.dumps({"text": f"Text number {i}."}) + "\n" for i in range(50)]
    (tmp_path / "rows.jsonl").write_text("".join([*rows, "{"]))
    argv = [sys.executable, "-m", "lmtrain.cli", "prepare", "--input", str(tmp_path / "rows.jsonl"), "--to",
            str(tmp_path / "out"), *"--executor slurm --option partition=all --option time=10 --option mem_per_cpu_gb=0"
            " --language all --quality none --dedup none --tokenizer bytes".split()]  # fmt: skip
    env = cluster | {"PYTHONPATH": str(LAUNCH.parent)}
    assert re.findall(r"(\w+): job \d+, 1 of 1 tasks", said(*argv, env=env)) == ["clean", "tokenise", "manifest"]
    end = time.time() + 240

    def queue_until(done):
        while not done(reasons := said("squeue", "-h", "-o", "%r", env=env).split()) and time.time() < end:
            time.sleep(0.3)
        return sorted(reasons)

    assert queue_until(lambda r: "DependencyNeverSatisfied" in r) == ["Dependency", "DependencyNeverSatisfied"]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    again = said(*argv, env=env)
    assert f"clean was not completed; its logs are in {tmp_path}/out/logs/clean" in again and "clean: job" in again
    assert queue_until(lambda r: not r or "DependencyNeverSatisfied" in r) == []
    assert "read 50 documents" in said(*argv, env=env)
