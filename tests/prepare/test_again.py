"""`lmtrain prepare`, given again: what was refused with other settings and files, what failed under Slurm; and the
commands of its page."""

import json
import os
import pathlib
import re
import shlex

import pytest

from lmtrain import cli, helps
from lmtrain.prepare import arguments, evaluation, run, stages, synthetic
from lmtrain.types import LmtrainError
from tests.prepare.test_prepare import GOOD, jsonl, manifest, settings

ROOT = pathlib.Path(__file__).parents[2]
FEW = {"quality": (), "dedup": (), "language": "all", "tokenizer": "bytes"}


# ------------------------------------------------------------------------------------------------- refused, corrected
def test_what_was_refused_is_corrected_in_place_by_settings_or_by_mending_the_file(tmp_path):
    jsonl(tmp_path / "in/a.jsonl", [{"text": GOOD[0]}, {"no": 1}, *({"text": text} for text in GOOD[1:])])
    for to, change, rows in (
        ("settings", {"malformed": "skip"}, None),
        ("file", {}, [{"text": text} for text in GOOD]),
    ):
        with pytest.raises(LmtrainError, match="a.jsonl:2: no field"):
            run.prepare(settings(tmp_path, to=str(tmp_path / to), **FEW), progress=False)
        stats = tmp_path / to / "logs/clean/stats/00007.json"  # of a task that was killed before it was completed
        stats.parent.mkdir(exist_ok=True)
        stats.write_text(json.dumps([{"name": "READER: read", "stats": {"documents": 5}}]))
        if rows:
            jsonl(tmp_path / "in/a.jsonl", rows)
        assert run.prepare(settings(tmp_path, to=str(tmp_path / to), **FEW | change), progress=False)
        found = json.loads((tmp_path / to / "manifest.json").read_text())
        assert found["documents"] + found["heldout_documents"] == len(GOOD)


def test_with_a_task_completed_settings_and_files_stay(tmp_path):
    jsonl(tmp_path / "in/a.jsonl", [{"text": GOOD[0]}] * 150)
    jsonl(tmp_path / "in/b.jsonl", [{"text": GOOD[0]}] * 149 + [{"no": 1}])
    with pytest.raises(LmtrainError, match="b.jsonl:150: no field"):
        run.prepare(settings(tmp_path, **FEW), progress=False)
    assert len(list((tmp_path / "out/logs/clean/completions").iterdir())) == 1
    with pytest.raises(LmtrainError, match="malformed: 'refuse' there, 'skip' now"):
        run.prepare(settings(tmp_path, **FEW, malformed="skip"), progress=False)
    jsonl(tmp_path / "in/b.jsonl", [{"text": GOOD[0]}])
    with pytest.raises(LmtrainError, match="inputs.jsonl: was begun with other files"):
        run.prepare(settings(tmp_path, **FEW), progress=False)


def test_what_a_model_wrote_outlives_a_refused_command(tmp_path, monkeypatch):
    def write(s, folder, progress):
        file = folder / "synthetic/rows.jsonl"
        if not file.exists():
            jsonl(file, [{"text": text} for text in GOOD])
        return file

    monkeypatch.setattr(synthetic, "write", write)
    jsonl(tmp_path / "in/a.jsonl", [{"no": 1}])
    model = FEW | {"synthetic": "a run", "prompts": "prompts", "count": len(GOOD)}
    with pytest.raises(LmtrainError, match="a.jsonl:1: no field"):
        run.prepare(settings(tmp_path, **model), progress=False)
    with pytest.raises(
        LmtrainError, match="synthetic/settings.json: .*temperature: 0.8 there, 0.5 now.*delete .*/synthetic"
    ):
        run.prepare(settings(tmp_path, **model, temperature=0.5), progress=False)
    inode = (tmp_path / "out/synthetic/rows.jsonl").stat().st_ino
    assert run.prepare(settings(tmp_path, **model, malformed="skip"), progress=False)
    assert (tmp_path / "out/synthetic/rows.jsonl").stat().st_ino == inode
    assert manifest(tmp_path)["documents"] + manifest(tmp_path)["heldout_documents"] == len(GOOD)


@pytest.mark.parametrize("given, to, refused", [
    ("in", "in/out", True), ("in", "in", True), ("in/**/*.jsonl", "in/sub/out", True), ("i*/*.jsonl", "in/../i2", True),
    ("in/*.jsonl", "in/out", False), ("in", "in2", False), ("in/a.jsonl", "in/out", False),
])  # fmt: skip
def test_a_folder_within_its_own_input_is_refused_at_once(given, to, refused, tmp_path):
    jsonl(tmp_path / "in/a.jsonl", [{"text": text} for text in GOOD])
    s = settings(tmp_path, input=(str(tmp_path / given),), to=str(tmp_path / to), **FEW)
    before = sorted(tmp_path.rglob("*"))
    if not refused:
        assert run.prepare(s, progress=False)
        return
    with pytest.raises(LmtrainError, match="--to .*stands in --input .*. Take a folder outside of it"):
        run.prepare(s, progress=False)
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------------------------------------------------- Slurm
class Queue:
    """Slurm's commands, which note how they were called; a job's number is that of its sbatch."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.command("sbatch", f'echo "$@" >> {folder}/calls; echo Submitted batch job $(wc -l < {folder}/calls)')
        self.command("scancel", f'echo "$@" >> {folder}/cancelled')

    def command(self, name, script):
        (self.folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.folder / name).chmod(0o755)

    def holds(self, *lines):
        self.command("squeue", "\n".join(f"echo '{line}'" for line in lines))

    def calls(self):
        """Of sbatch: which jobs each waits for."""
        return [re.findall(r"after\w+:[\d:]+", line) for line in (self.folder / "calls").read_text().splitlines()]

    def cancelled(self):
        file = self.folder / "cancelled"
        return file.read_text().split() if file.exists() else []


@pytest.fixture
def queue(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    jsonl(tmp_path / "in/a.jsonl", [{"text": text} for text in GOOD])
    return Queue(tmp_path / "bin")


def slurm(where, **changes):
    return settings(where, executor="slurm", options=("partition=cpu", "time=1:00:00"), tokenizer="bytes", **changes)


def test_slurm_gets_one_job_array_a_stage_each_behind_the_one_before(tmp_path, queue, capsys):
    assert run.prepare(slurm(tmp_path, workers=7), progress=False) is None
    said = capsys.readouterr().out
    jobs = [line.split()[-5].strip(",") for line in said.splitlines() if ": job " in line]
    assert len(jobs) == len(stages.plan(slurm(tmp_path), 1, {}))
    assert queue.calls() == [[], *([f"afterok:{job}"] for job in jobs[:-1])]
    queue.holds(f"{jobs[1]} Resources", f"{jobs[2]} Dependency")
    assert run.prepare(slurm(tmp_path), progress=False) is None
    assert f"still queued or running: job {jobs[1]}, {jobs[2]}" in capsys.readouterr().out
    assert len(queue.calls()) == len(jobs) and not queue.cancelled()
    script = (tmp_path / "out/logs/clean/launch_script.slurm").read_text()
    assert "--partition=cpu" in script and "launch_pickled_pipeline" in script and "--qos" not in script
    with pytest.raises(
        LmtrainError, match=f"--executor local: job {jobs[1]}, {jobs[2]} of this folder is still queued"
    ):
        run.prepare(settings(tmp_path, tokenizer="bytes"), progress=False)
    with pytest.raises(LmtrainError, match="settings.json: was begun with other settings"):
        run.prepare(slurm(tmp_path, malformed="skip"), progress=False)


def test_jobs_behind_one_that_failed_leave_the_queue_and_are_queued_again(tmp_path, queue, capsys):
    assert run.prepare(slurm(tmp_path), progress=False) is None
    many = len(queue.calls())
    (tmp_path / "out/logs/clean/completions").mkdir()
    (tmp_path / "out/logs/clean/completions/00000").touch()
    queue.holds("2 None", "3 DependencyNeverSatisfied", *(f"{job} Dependency" for job in range(4, many + 1)))
    run.prepare(slurm(tmp_path), progress=False)
    assert queue.cancelled() == [str(job) for job in range(3, many + 1)]
    assert "still queued or running: job 2\n" in capsys.readouterr().out and len(queue.calls()) == many
    queue.holds("3 DependencyNeverSatisfied", *(f"{job} Dependency" for job in range(4, many + 1)))
    run.prepare(slurm(tmp_path), progress=False)
    assert len(queue.calls()) == many + many - 1 and queue.calls()[many:][:2] == [[], [f"afterok:{many + 1}"]]


def test_a_stage_waits_for_all_arrays_of_the_one_before(tmp_path, queue):
    jsonl(tmp_path / "in/b.jsonl", [{"text": GOOD[0]}] * 500)
    s = slurm(tmp_path, quality=(), dedup=(), language="all")
    s = settings(tmp_path, **FEW, executor="slurm", options=(*s.options, "max_array_size=1"))
    run.prepare(s, progress=False)
    tasks = json.loads((tmp_path / "out/logs/clean/ranks_to_run.json").read_text())
    clean, tokenise = queue.calls()[: len(tasks)], queue.calls()[len(tasks) :]
    assert len(tasks) > 1 and clean[0] == []
    every = ":".join(str(job + 1) for job in range(len(tasks)))
    assert all(call[0] == f"afterok:{every}" for call in tokenise[: len(tasks)])
    with pytest.raises(LmtrainError, match="--option run_on_dependency_fail=True: takes NAME=VALUE"):
        run.prepare(settings(tmp_path, to=str(tmp_path / "o"), **FEW, executor="slurm",
                             options=("run_on_dependency_fail=True",)), progress=False)  # fmt: skip


def test_a_queue_that_gives_no_answer_is_not_taken_for_an_empty_one(tmp_path, queue):
    run.prepare(slurm(tmp_path), progress=False)
    many = len(queue.calls())
    queue.command("squeue", "echo Unable to contact slurm controller >&2; exit 1")
    with pytest.raises(LmtrainError, match="squeue: Unable to contact slurm controller"):
        run.prepare(slurm(tmp_path), progress=False)
    queue.command("squeue", "echo Invalid job id specified >&2; exit 1")
    run.prepare(slurm(tmp_path), progress=False)
    assert len(queue.calls()) == 2 * many


# ---------------------------------------------------------------------------------------------------------- the page
def test_commands_of_the_page_and_of_help_parse_and_find_the_evaluation_rows(tmp_path, monkeypatch):
    text = (ROOT / "docs/prepare.md").read_text() + helps.PREPARE
    commands = re.findall(r"^ *lmtrain (prepare (?:.*\\\n)*.*)$", text, re.M)
    assert len(commands) >= 5
    monkeypatch.chdir(tmp_path)
    asked = [f"How many apples does the old farmer keep in barn number {i}?" for i in range(16)]
    jsonl(tmp_path / "gsm8k-train.jsonl", [{"question": "How many?", "answer": "#### 1"}])
    jsonl(tmp_path / "gsm8k-test.jsonl", [{"question": question, "answer": "#### 12"} for question in asked])
    jsonl(tmp_path / "exam.jsonl", [{"question": "Which of these is the capital city of France?"}])
    jsonl(tmp_path / "mixed-rows.jsonl", [{"question": "Which of these is the capital city of Spain?"}])
    found = []
    for command in commands:
        s = arguments.settings(cli.make_parser().parse_args(shlex.split(command.replace("\\\n", " "))))
        rows, short = evaluation.rows(list(s.decontaminate))
        assert not short
        found.append({row.asks[0] for row in rows})
    assert sum(set(asked) < asks for asks in found) == 2
    for part in re.findall(r"`\"(\w+\(.*?\))\"`", text):
        jsonl(tmp_path / "exam.jsonl", [{"question": asked[0], "choices": ["a", "b"], "answer": 0}])
        assert evaluation.rows([part])[0]
