"""Where the stages run: datatrove's executors, on this machine, under Slurm or on Ray.

What has been completed is kept task by task in FOLDER/logs/STAGE/completions; the same command goes on with the rest.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import fcntl
import inspect
import io
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from loguru import logger

from lmtrain import log
from lmtrain.prepare.settings import Settings
from lmtrain.prepare.stages import Stage
from lmtrain.types import LmtrainError, nearest

# Arguments of an executor that are settled here. A stage behind one that failed would take half of it for all of it.
_OURS = ("self", "pipeline", "tasks", "workers", "logging_dir", "depends", "skip_completed", "depends_job_id",
         "run_on_dependency_fail")  # fmt: skip


class Local(LocalPipelineExecutor):
    """datatrove's, whose tasks write to their log files alone, and end when the command is killed.

    Otherwise a task of a killed command could still write while the next one does the same task. datatrove's own `run`
    leaves processes behind then, and waits for ever for a worker that the system has killed.
    """

    pipeline: list[Any]

    def run(self) -> None:
        """Runs the tasks that are not completed."""
        ranks = self.get_incomplete_ranks()
        if self.workers == 1 or len(ranks) == 1:
            pipeline = self.pipeline
            for rank in ranks:
                self.pipeline = copy.deepcopy(pipeline)
                self._run_for_rank(rank)
            return
        context = multiprocessing.get_context("forkserver")  # a fork of a process with JAX's threads may hang
        context.set_forkserver_preload(["lmtrain.prepare.stages"])  # imported once, not by each worker
        others = set(multiprocessing.active_children())
        with ProcessPoolExecutor(min(self.workers, max(len(ranks), 1)), context) as pool:
            try:
                for done in as_completed([pool.submit(self._run_for_rank, rank) for rank in ranks]):
                    done.result()
            except BrokenProcessPool:
                raise LmtrainError("a worker was killed, by the system for want of memory perhaps. Fewer --workers or a"
                                   " smaller --task-mb need less; the same command goes on") from None  # fmt: skip
            except BaseException:
                for child in set(multiprocessing.active_children()) - others:
                    child.kill()
                raise

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        folder = pathlib.Path(self.logging_dir.path).parent
        with contextlib.redirect_stderr(io.StringIO()), _held(folder / "tasks.lock", fcntl.LOCK_SH):
            if (parent := multiprocessing.parent_process()) is not None:
                threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
            super()._run_for_rank(rank, local_rank, node_rank)


class Slurm(SlurmPipelineExecutor):
    """datatrove's, behind all arrays of the stage before: several, where it has more tasks than an array takes.

    datatrove's own waits for the last of them alone, and goes on where one before that failed.
    """

    ids: tuple[str, ...] = ()

    @property
    def job_id(self) -> str | None:
        """All of them, as Slurm writes jobs that another waits for."""
        return ":".join(self.ids) or None

    @job_id.setter
    def job_id(self, new: str | None) -> None:
        self.ids += (new,) if new else ()

    def launch_merge_stats(self) -> None:
        """None: a job for each stage that adds up what the manifest adds up."""


def run(s: Settings, stages: Sequence[Stage], progress: bool = True) -> bool:
    """Runs what is not completed yet. Returns whether all is: under Slurm the jobs have only been queued.

    Raises:
      LmtrainError: what a task raised, or options that the executor does not take.
    """
    logger.remove()  # datatrove's words go to its log files
    logs = pathlib.Path(s.to, "logs")
    waiting = at_work(logs)
    if s.executor == "slurm":
        return _submit(s, stages, waiting)
    if waiting:
        raise LmtrainError(f"--executor {s.executor}: job {', '.join(waiting)} of this folder is still queued or"
                           " running in Slurm. Wait for it, or scancel it")  # fmt: skip
    if s.executor == "ray":
        _start_ray()
    for number, stage in enumerate(stages, 1):
        executor = _executor(s, stage)
        label = f"{stage.name} ({number} of {len(stages)})"
        with _bar(executor, label, progress), contextlib.redirect_stderr(io.StringIO()):
            executor.run()
        if left := executor.get_incomplete_ranks():
            raise LmtrainError(f"{stage.name}: {len(left)} of {stage.tasks} tasks failed; the logs are in"
                               f" {logs / stage.name / 'logs'}")  # fmt: skip
    return True


def _executor(s: Settings, stage: Stage) -> Any:
    logs = str(pathlib.Path(s.to, "logs", stage.name).absolute())
    workers = min(s.workers, stage.tasks)
    if s.executor == "local":
        return Local(stage.pipeline, tasks=stage.tasks, workers=workers, logging_dir=logs)
    kind = Slurm if s.executor == "slurm" else RayPipelineExecutor
    known = [name for name in inspect.signature(kind.__init__).parameters if name not in _OURS]
    options = {}
    for option in s.options:
        name, equals, value = option.partition("=")
        if not equals or name not in known:
            raise LmtrainError(f"--option {option}: takes NAME=VALUE, an argument of datatrove's {kind.__name__}."
                               f"{nearest(name, known)} ({', '.join(known)})")  # fmt: skip
        options[name] = _literal(value)
    if s.executor == "slurm":
        options = {"job_name": f"prepare-{stage.name}", "qos": "", "venv_path": _activate()} | options
        for name in ("time", "partition"):
            if name not in options:
                raise LmtrainError(f"--executor slurm takes --option {name}=...: of the cluster's own")
    try:
        return kind(stage.pipeline, tasks=stage.tasks, workers=workers, logging_dir=logs, **options)
    except TypeError as error:
        raise LmtrainError(f"--option: datatrove's {kind.__name__}: {error}") from None


def _literal(value: str) -> Any:
    """A number where it is one, else text."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _submit(s: Settings, stages: Sequence[Stage], waiting: Sequence[str]) -> bool:
    """Queues a job array for each stage that is not completed, each behind the one before; none while some are queued.

    Returns whether all is completed.
    """
    executors = [_executor(s, stage) for stage in stages]
    left = [len(executor.get_incomplete_ranks()) for executor in executors]
    if waiting:
        rows = [
            f"{stage.name}: {stage.tasks - n} of {stage.tasks} tasks done"
            for stage, n in zip(stages, left, strict=True)
        ]
        log.say("\n  ".join([f"still queued or running: job {', '.join(waiting)}", *rows]))
        return False
    note = _note(pathlib.Path(s.to, "logs"))
    failed = next((stage.name for stage, n in zip(stages, left, strict=True) if n), "") if note.exists() else ""
    if failed:
        log.say(f"{failed} was not completed; its logs are in {note.parent / failed}. Queued again:")
    ids: list[str] = []
    before = None
    for stage, executor, n in zip(stages, executors, left, strict=True):
        if n:
            executor.depends = before
            try:
                executor.run()
            except (OSError, subprocess.CalledProcessError) as error:
                raise LmtrainError(f"--executor slurm: sbatch refuses {stage.name}: {error}") from None
            finally:
                ids += executor.ids
                note.write_text(json.dumps(ids))
            log.say(f"{stage.name}: job {', '.join(executor.ids)}, {n} of {stage.tasks} tasks")
            before = executor
    return not ids


def at_work(logs: pathlib.Path) -> list[str]:
    """Slurm's jobs of a folder that are queued or running. Waits for tasks of a killed command that still end.

    Those that wait for one that failed, for which Slurm would keep them for ever, are taken out of its queue.
    """
    with _held(logs / "tasks.lock", fcntl.LOCK_EX):
        pass
    if not _note(logs).exists():
        return []
    ids = json.loads(_note(logs).read_text())
    queue = _queue(logs, ids)
    never = [job for job in ids if "DependencyNeverSatisfied" in queue.get(job, ())]
    if never:  # behind it are others, that wait for it
        stuck = [job for job in ids[ids.index(never[0]) :] if job in queue]
        _asked(logs, ["scancel", *stuck])
        return [job for job in ids if job in queue and job not in stuck]
    return [job for job in ids if job in queue]


def _note(logs: pathlib.Path) -> pathlib.Path:
    """The jobs that were queued last, in their order."""
    return logs / "jobs.json"


def _queue(logs: pathlib.Path, ids: Sequence[str]) -> dict[str, set[str]]:
    """Those of the jobs that Slurm has not ended, and for which reasons they, or their tasks, wait."""
    out: dict[str, set[str]] = {}
    # %F is an array's own number, %A one of each of its tasks
    for line in _asked(logs, ["squeue", "--noheader", "--format=%F %r", f"--jobs={','.join(ids)}"]).splitlines():
        job, _, reason = line.strip().partition(" ")
        out.setdefault(job, set()).add(reason.strip())
    return out


def _asked(logs: pathlib.Path, command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise LmtrainError(f"{command[0]} cannot be asked about this folder's jobs in Slurm: {error}. Where they have"
                           f" ended, delete {_note(logs)}") from None  # fmt: skip
    if done.returncode and "Invalid job id" not in done.stderr:  # which it says of jobs that have ended long ago
        raise LmtrainError(f"{command[0]}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout


def _activate() -> str | None:
    """The script that enters the virtual environment of this process, if it runs in one."""
    script = pathlib.Path(sys.prefix, "bin", "activate")
    return str(script) if script.exists() else None


def _start_ray() -> None:
    try:
        import ray
    except ImportError as error:
        raise LmtrainError(f"--executor ray needs ray ({error}): pip install ray") from None
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="ERROR")


@contextlib.contextmanager
def _held(file: pathlib.Path, how: int) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as handle:
        with contextlib.suppress(OSError):  # a network folder without locks
            fcntl.flock(handle, how)
        yield


def _end_with(parent: Any) -> None:
    parent.join()
    for child in multiprocessing.active_children():  # that parses pages
        child.kill()
    os._exit(1)


@contextlib.contextmanager
def _bar(executor: Any, label: str, show: bool) -> Iterator[None]:
    """Tasks completed, while a stage is at work."""
    from rich import progress
    from rich.console import Console

    console = Console(file=sys.stderr)
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
               progress.TimeElapsedColumn())  # fmt: skip
    hidden = not (show and console.is_terminal)
    with progress.Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(label, total=executor.world_size)
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(1.0):
                bar.update(task, completed=executor.world_size - len(executor.get_incomplete_ranks()))

        thread = threading.Thread(target=follow, daemon=True)
        if not hidden:
            thread.start()
        try:
            yield
        finally:
            ended.set()
