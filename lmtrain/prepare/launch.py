"""Where the stages run: datatrove's executors, on this machine, under Slurm or on Ray.

What has been completed is kept task by task in FOLDER/logs/STAGE/completions; the same command goes on with the rest.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import inspect
import io
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import multiprocess
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from loguru import logger

from lmtrain import log
from lmtrain.prepare.settings import Settings
from lmtrain.prepare.stages import Stage
from lmtrain.types import LmtrainError, nearest

# Arguments of an executor that are settled here.
_OURS = ("self", "pipeline", "tasks", "workers", "logging_dir", "depends", "skip_completed", "depends_job_id")
_POLL = 0.2  # seconds


class Local(LocalPipelineExecutor):
    """datatrove's, whose tasks write to their log files alone, and end when the command is killed.

    Otherwise a task of a killed run could still write while the next run does the same task.
    """

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        folder = pathlib.Path(self.logging_dir.path).parent
        with contextlib.redirect_stderr(io.StringIO()), _held(folder / "tasks.lock", fcntl.LOCK_SH):
            if multiprocess.parent_process() is not None:
                threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
            return super()._run_for_rank(rank, local_rank, node_rank)


def run(s: Settings, stages: Sequence[Stage], progress: bool = True) -> bool:
    """Runs what is not completed yet. Returns whether all is: under Slurm the jobs have only been queued.

    Raises:
      LmtrainError: what a task raised, or options that the executor does not take.
    """
    logger.remove()  # datatrove's words go to its log files
    if s.executor == "slurm":
        return _submit(s, stages)
    if s.executor == "ray":
        _start_ray()
    elif multiprocess.get_start_method(allow_none=True) is None:
        multiprocess.set_start_method("forkserver")  # a fork of a process with JAX's threads may hang
        multiprocess.set_forkserver_preload(["lmtrain.prepare.stages"])  # imported once, not by each worker
    logs = pathlib.Path(s.to, "logs")
    with _held(logs / "tasks.lock", fcntl.LOCK_EX):
        pass  # tasks of a run that was killed have ended
    for number, stage in enumerate(stages, 1):
        executor = _executor(s, stage)
        label = f"{stage.name} ({number} of {len(stages)})"
        with _bar(executor, label, progress), contextlib.redirect_stderr(io.StringIO()):
            executor.run()
        if left := executor.get_incomplete_ranks():
            raise LmtrainError(f"{stage.name}: {len(left)} of {stage.tasks} tasks failed; the logs are in"
                               f" {logs / stage.name / 'logs'}")  # fmt: skip
    return True


def _executor(s: Settings, stage: Stage, depends: Any = None) -> Any:
    logs = str(pathlib.Path(s.to, "logs", stage.name).absolute())
    workers = min(s.workers, stage.tasks)
    if s.executor == "local":
        return Local(stage.pipeline, tasks=stage.tasks, workers=workers, logging_dir=logs)
    kind = SlurmPipelineExecutor if s.executor == "slurm" else RayPipelineExecutor
    known = [name for name in inspect.signature(kind.__init__).parameters if name not in _OURS]
    options = {}
    for option in s.options:
        name, equals, value = option.partition("=")
        if not equals or name not in known:
            raise LmtrainError(f"--option {option}: takes NAME=VALUE, an argument of datatrove's {kind.__name__}."
                               f"{nearest(name, known)} ({', '.join(known)})")  # fmt: skip
        options[name] = _literal(value)
    if s.executor == "slurm":
        options = {
            "job_name": f"prepare-{stage.name}",
            "qos": "",
            "venv_path": _activate(),
            "depends": depends,
        } | options
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


def _submit(s: Settings, stages: Sequence[Stage]) -> bool:
    """Queues a job array for each stage that is not completed, each behind the one before."""
    depends, jobs = None, []
    for stage in stages:
        executor = _executor(s, stage, depends)
        left = len(executor.get_incomplete_ranks())
        if left:
            try:
                executor.run()
            except (OSError, Exception) as error:
                raise LmtrainError(f"--executor slurm: sbatch refuses {stage.name}: {error}") from None
            jobs.append(f"{stage.name}: job {executor.job_id}, {left} of {stage.tasks} tasks")
            depends = executor
    if jobs:
        log.say("queued, each behind the one before:\n  " + "\n  ".join(jobs))
    return not jobs


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
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)


@contextlib.contextmanager
def _held(file: pathlib.Path, how: int) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as handle:
        with contextlib.suppress(OSError):  # a network folder without locks
            fcntl.flock(handle, how)
        yield


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL)
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
