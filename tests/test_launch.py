"""The launch scripts: they parse, and what they would run is what they should."""

import json
import pathlib
import re
import shlex
import subprocess
import sys
import time

import pytest

from lmtrain.hosts import local, place

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
ARGS = ["--config", "a.py:x,y=1", "--workdir", "runs/a"]


def dry(script, *args, **environment):
    env = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PYTHONPATH": str(LAUNCH.parent), **environment}
    done = subprocess.run([LAUNCH / script, "--dry-run", *args], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_a_script_parses_and_can_be_started(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o111
    assert len(script.read_text().splitlines()) < 100, "short"


def test_local_starts_n_processes_that_know_their_place():
    lines = dry("local.sh", "3", *ARGS, DEVICES="2").splitlines()
    assert len(lines) == 3
    for i, line in enumerate(lines):
        env = dict(word.split("=", 1) for word in line.split(" " + sys.executable)[0].split())
        assert env["JAX_NUM_CPU_DEVICES"] == "2" and line.endswith(f"-m lmtrain.cli run {' '.join(ARGS)}")
        assert place.find(env) == place.Place("coordinator", "127.0.0.1:8476", 3, i)


def test_local_refuses_what_is_no_number():
    done = subprocess.run([LAUNCH / "local.sh", "two", *ARGS], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: launch/local.sh" in done.stderr


@pytest.mark.parametrize("name", ["DEVICES", "RESTARTS", "BACKOFF"])
@pytest.mark.parametrize("value", ["x", "-1"])
def test_local_refuses_a_setting_that_is_no_number(name, value):
    env = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PYTHONPATH": str(LAUNCH.parent), name: value}
    done = subprocess.run([LAUNCH / "local.sh", "2", *ARGS], capture_output=True, text=True, env=env)
    assert (
        done.returncode == 2
        and f"{name} is '{value}', but takes a number" in done.stderr
        and "Trace" not in done.stderr
    )


def test_slurm_runs_one_step_over_the_nodes():
    said = shlex.split(dry("slurm.sbatch", *ARGS))
    assert said[0] == "srun" and said[-7:] == ["-m", "lmtrain.cli", "run", *ARGS]
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert "#SBATCH --ntasks-per-node=1" in text and "#SBATCH --signal=TERM@" in text


def test_the_tpu_script_goes_from_creation_to_deletion():
    said = dry("tpu_vm.sh", "resume", *ARGS, NAME="t", ZONE="z", SPOT="1").splitlines()
    wanted = ["delete t", "create t .*--spot", "tar ", "scp ", "pip", "lmtrain.+run.+--config.*status"]
    assert len(said) == len(wanted)
    for line, part in zip(said, wanted, strict=True):
        assert re.search(part, line), line
    assert "delete t" in dry("tpu_vm.sh", "delete", NAME="t") and "TERM" in dry("tpu_vm.sh", "stop")


GCLOUD = """#!/bin/bash
# A cloud in a folder: `plan` has what each creation does; the slice's state is in `state`.
cd "$(dirname "$0")"; echo "$*" >> calls
command=${!#}
case "$*" in
    *describe*) if [[ -e offline ]]; then rm offline; echo "no route to host" >&2; exit 1; fi
        cat state 2>/dev/null || { echo "NOT_FOUND: no such resource" >&2; exit 1; } ;;
    *"queued-resources create"*)
        next=$(head -n 1 plan); sed -i 1d plan
        [[ $next == fails ]] && exit 1
        echo "$next" > state ;;
    *"queued-resources delete"*) rm -f state ;;
    *pgrep*) exit 1 ;;
    *"rm -f status"*) rm -f status; run=$(head -n 1 runs); sed -i 1d runs
        case $run in
            preempted) echo SUSPENDED > state ;;
            lost) ;;
            real) cd .. && bash -c "${command#--command=}" ;;
            *) echo "$run" > status ;;
        esac ;;
    *"cat lmtrain/status"*) cat status 2>/dev/null ;;
esac
exit 0
"""


def cloud(folder):
    """A gcloud in a folder, workers' home in it, and no waiting; the environment to call it in."""
    (folder / "lmtrain").mkdir()
    for name, text in {
        "lmtrain/gcloud": GCLOUD,
        "lmtrain/sleep": "#!/bin/bash\n",
        "lmtrain/tar": "#!/bin/bash\n",
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}/lmtrain:/usr/bin:/bin"}


@pytest.mark.parametrize(
    "plan, runs, ends, created",
    [
        ("ACTIVE", "0", 0, 1),
        ("fails FAILED ACTIVE", "0", 0, 3),  # no quota, then no capacity, then a slice
        ("ACTIVE ACTIVE", "preempted 0", 0, 2),
        ("ACTIVE", "76 0", 0, 1),  # a host was lost, the slice stands
        ("ACTIVE", "lost 0", 0, 1),  # rebooted: no process, no status
        ("ACTIVE", "2", 2, 1),
        ("fails fails fails", "", 1, 3),
    ],
)
def test_the_tpu_script_goes_on_through_preemptions(tmp_path, plan, runs, ends, created):
    env = cloud(tmp_path) | {"RESTARTS": "2" if ends == 1 else "9"}
    if plan.startswith("ACTIVE ACTIVE"):
        (tmp_path / "lmtrain/offline").touch()  # one question without an answer is no lost slice
    (tmp_path / "lmtrain/plan").write_text(plan.replace(" ", "\n") + "\n")
    (tmp_path / "lmtrain/runs").write_text(runs.replace(" ", "\n") + "\n")
    done = subprocess.run([LAUNCH / "tpu_vm.sh", "resume", *ARGS], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == ends, done.stderr
    assert (tmp_path / "lmtrain/calls").read_text().count("queued-resources create") == created


def test_the_tpu_script_passes_arguments_as_they_are_and_keeps_the_status(tmp_path):
    env = cloud(tmp_path)
    (tmp_path / "lmtrain/runs").write_text("real\n")
    (tmp_path / "lmtrain/.venv/bin").mkdir(parents=True)
    command = tmp_path / "lmtrain/.venv/bin/lmtrain"
    command.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\nsys.exit(75)\n")
    command.chmod(0o755)
    args = ["--config", "a.py:t=f(x='a b')", "--workdir", "it's"]
    subprocess.run([LAUNCH / "tpu_vm.sh", "run", *args], check=True, env=env, timeout=120)
    status = tmp_path / "lmtrain/status"
    end = time.monotonic() + 20
    while not (status.exists() and status.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    assert status.read_text() == "75\n"
    assert json.loads((tmp_path / "lmtrain/lmtrain.log").read_text()) == ["run", *args]


def test_the_tpu_script_stops_the_interpreter_and_not_the_shell_that_keeps_its_status():
    pattern = re.search(r"-f '(\^.*?)'", dry("tpu_vm.sh", "stop").replace("\\", ""))[1]
    assert re.search(pattern, "/home/me/lmtrain/.venv/bin/python3 .venv/bin/lmtrain run --config a.py ")
    for other in ("bash -c .venv/bin/lmtrain run --config a.py >> lmtrain.log", f"bash -c pkill -TERM -f '{pattern}'"):
        assert not re.search(pattern, other)


def test_the_jobsets_pods_know_their_place():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    workers = job["spec"]["replicatedJobs"][0]
    spec = workers["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    env = {e["name"]: e.get("value", "") for e in container["env"]}
    fields = {e["name"]: e["valueFrom"]["fieldRef"]["fieldPath"] for e in container["env"] if "valueFrom" in e}
    assert "jobset-name" in fields["JOBSET_NAME"] and "replicatedjob-name" in fields["REPLICATED_JOB_NAME"]
    assert spec["parallelism"] == spec["completions"] == int(env["NNODES"]) and spec["completionMode"] == "Indexed"
    # As Kubernetes fills them in for pod 1.
    env |= {"JOBSET_NAME": "lmtrain", "REPLICATED_JOB_NAME": workers["name"], "JOB_COMPLETION_INDEX": "1"}
    found = place.find(env, lambda key: None)
    assert found == place.Place("jobset", "lmtrain-workers-0-0.lmtrain:8476", 2, 1)
    assert {p["containerPort"] for p in container["ports"]} == {found.address[1], found.address[1] + 1}
    assert job["spec"]["failurePolicy"]["maxRestarts"] > 0 and spec["backoffLimit"] == 0


def test_pauses_before_restarts_double_up_to_a_minute_and_end():
    assert list(local.backoff(1, 8)) == [1, 2, 4, 8, 16, 32, 60, 60]
    assert list(local.backoff(1, 0)) == []


@pytest.mark.parametrize(
    "codes, status",
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([-9, 76], 76),
        ([76, -9, -6], 76),
        ([2, 2], 2),
        ([2, 76], 2),  # refused: not again
        ([1, 76], 1),
        ([77, 77], 77),
        ([74, 76], 74),
        ([0, 76], 76),
    ],
)
def test_the_status_of_all_says_why_they_ended(codes, status):
    assert local.outcome(codes) == status


PROCESS = """
import os, pathlib, sys, time
log = pathlib.Path(sys.argv[1])
with log.open("a") as f:
    f.write(os.environ["LMTRAIN_PROCESS"] + "\\n")
starts = log.read_text().split().count(os.environ["LMTRAIN_PROCESS"])
sys.exit(int(sys.argv[2]) if starts <= int(sys.argv[3]) else 0)
"""


@pytest.mark.parametrize(
    "status, failures, restarts, ends, starts",
    [(76, 2, 5, 0, 3), (76, 9, 2, 76, 3), (2, 9, 5, 2, 1), (75, 1, 5, 0, 2), (0, 0, 5, 0, 1)],
)
def test_all_are_started_again_a_bounded_number_of_times(
    tmp_path, monkeypatch, status, failures, restarts, ends, starts
):
    monkeypatch.setenv("RESTARTS", str(restarts))
    monkeypatch.setenv("BACKOFF", "0.01")
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "log"), str(status), str(failures)]
    attempt = local.attempt
    monkeypatch.setattr(local, "attempt", lambda _, envs, told: attempt(command, envs, told))
    monkeypatch.setattr(local.signal, "signal", lambda *_: None)
    assert local.main(["2", "any"]) == ends
    assert sorted((tmp_path / "log").read_text().split()) == ["0"] * starts + ["1"] * starts


def test_who_does_not_end_when_another_has_failed_is_killed(monkeypatch):
    monkeypatch.setattr(local, "PATIENCE", 0.5)
    command = [sys.executable, "-c", "import os, sys, time; time.sleep(60 * int(os.environ['LMTRAIN_PROCESS']))\n"
               "sys.exit(76)"]  # fmt: skip
    assert local.attempt(command, local.environments(2, 0, {}, 8476), []) == [76, -9]
