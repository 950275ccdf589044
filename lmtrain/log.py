"""What a run says: metrics.jsonl, TensorBoard, a progress bar, tokens per second, share of the hardware's peak.

Only process 0 writes and prints. rich and tensorboardX are imported when first needed: `lmtrain --help` stays quick.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lmtrain import storage
from lmtrain.types import LmtrainError

METRICS = "metrics.jsonl"


def say(text: str) -> None:
    """Prints one message, once however many processes there are."""
    if jax.process_index() == 0:
        print(text, flush=True)


# ------------------------------------------------------------------------------------------------------------ metrics
class Writer:
    """Appends one JSON object a line to FOLDER/metrics.jsonl, and the same numbers to FOLDER/tensorboard.

    A number that is not finite becomes null, for JSON has none. Each line is flushed: what was written survives a kill.
    """

    def __init__(self, folder: str | os.PathLike[str], tensorboard: bool = True):
        self.folder = pathlib.Path(folder)
        self.file = self.folder / METRICS
        self._board: Any = None
        self._wants_board = tensorboard
        self._purge: int | None = None
        if jax.process_index() == 0:
            with storage.writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of one step. Values are numbers (or 0-d arrays), strings or None.

        Raises:
          LmtrainError: the disk refuses (no space, no permission).
        """
        if jax.process_index() != 0:
            return
        row = {"step": int(step)} | {name: _plain(value) for name, value in metrics.items() if name != "step"}
        append_jsonl(self.file, [row])
        with storage.writing(self.folder / "tensorboard"):
            board = self._tensorboard()
            if board is not None:
                for name, value in row.items():
                    if isinstance(value, int | float) and name != "step":
                        board.add_scalar(name, value, step)
                board.flush()

    def truncate(self, step: int) -> None:
        """Forgets what was written after a step, so that a run resumed there writes no step twice."""
        if jax.process_index() != 0:
            return
        truncate_jsonl(self.file, step)
        self.close()
        self._purge = step + 1  # TensorBoard hides what older files hold from there on

    def close(self) -> None:
        """Closes TensorBoard's file; a later write opens another."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def _tensorboard(self) -> Any:
        if self._board is None and self._wants_board:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                self._wants_board = False
                say("No TensorBoard files: pip install -e '.[tensorboard]' adds them. metrics.jsonl has the same.")
                return None
            # The suffix tells apart files begun within one second.
            suffix = f".from-{self._purge or 0}"
            self._board = SummaryWriter(
                str(self.folder / "tensorboard"), purge_step=self._purge, filename_suffix=suffix
            )
        return self._board


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of FOLDER/metrics.jsonl, oldest first (see `read_jsonl`)."""
    return read_jsonl(pathlib.Path(folder) / METRICS)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


# -------------------------------------------------------------------------------------------------------------- jsonl
def read_jsonl(file: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a file of one JSON object a line; [] where there is none. A last line cut by a kill is left out.

    Raises:
      LmtrainError: another line is no JSON object; names the file and the line.
    """
    file = pathlib.Path(file)
    # Lines end in \n alone: str.splitlines would also cut at the U+2028 that JSON strings may hold.
    whole = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    rows = []
    for number, line in enumerate(whole, 1):
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise LmtrainError(f"{file}:{number}: not one JSON object: {error}. Remove or mend the line.") from None
        rows.append(row)
    return rows


def append_jsonl(file: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends a line for each row, in the place of a last line cut by a kill or a full disk.

    Raises:
      LmtrainError: the disk refuses.
    """
    file, lines = pathlib.Path(file), _lines(rows)

    def append() -> None:
        if file.exists():
            _drop_cut_line(file)
        with file.open("ab") as f:
            f.write(lines)

    storage.patiently(append, file)


def truncate_jsonl(file: str | os.PathLike[str], step: int) -> None:
    """Forgets the rows whose `step` is after a step, in one rename. A file that is not there stays so.

    Raises:
      LmtrainError: the disk refuses, or a line is no JSON object.
    """
    file = pathlib.Path(file)
    if file.exists():
        kept = [row for row in read_jsonl(file) if row.get("step", 0) <= step]
        half = file.with_name(f"{file.name}.half")
        with storage.writing(file):
            half.write_bytes(_lines(kept))
            os.replace(half, file)


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode("utf-8")


def _drop_cut_line(file: pathlib.Path) -> None:
    with file.open("r+b") as f:
        size = f.seek(0, os.SEEK_END)
        if size == 0:
            return
        f.seek(size - 1)
        if f.read(1) != b"\n":
            f.seek(0)
            f.truncate(f.read().rfind(b"\n") + 1)


# ----------------------------------------------------------------------------------------------------------- progress
class Progress:
    """A live bar on a terminal, else a plain line now and then: step, loss, tokens/s, MFU, time left.

    Args:
      total: last step.
      done: steps that a resumed run need not do.
      every: steps between plain lines; 0: twenty lines in all. Evaluations and the last step always have one.
    """

    def __init__(self, total: int, done: int = 0, name: str = "", every: int = 0):
        self.total, self.name = total, name
        self.every = every or max(1, total // 20)
        self._first, self._begin = done, time.monotonic()
        self._heldout = ""
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if jax.process_index() == 0 and sys.stdout.isatty():
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[says]}"),
                refresh_per_second=2,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.total, completed=self._first, says="")
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def show(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows a step. Of the metrics it uses loss (or reward), heldout_loss (heldout_accuracy, heldout_score),
        tokens_per_second and mfu, where they are there."""
        evaluated = next((n for n in ("heldout_score", "heldout_accuracy", "heldout_loss") if n in metrics), None)
        if evaluated is not None:
            shown = f"{metrics[evaluated]:.3f}" if evaluated == "heldout_loss" else f"{metrics[evaluated]:.1%}"
            self._heldout = f"held out {shown}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, says=self._says(step, metrics))
        elif step % self.every == 0 or step == self.total or evaluated:
            say(f"{self.name} {step}/{self.total}  {self._says(step, metrics)}")
            self._heldout = ""  # a line of its own; the bar keeps the last one in sight

    def _says(self, step: int, metrics: Mapping[str, Any]) -> str:
        learned = next((n for n in ("reward", "loss") if metrics.get(n) is not None), None)
        said = [f"{learned} {metrics[learned]:.3f}" if learned else "", self._heldout]
        if metrics.get("tokens_per_second"):
            said.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        if metrics.get("mfu"):
            said.append(f"MFU {metrics['mfu']:.1%}")
        if self._first < step < self.total:
            left = (time.monotonic() - self._begin) / (step - self._first) * (self.total - step)
            said.append(f"{_clock(left)} left")
        return "  ".join(s for s in said if s)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# -------------------------------------------------------------------------------------------------------------- speed
class Meter:
    """Tokens per second and MFU over the last steps. Compilation (before the first step ends) and pauses do not count.

    Args:
      flops_per_token: of training, by the model's formula (`transformer.flops_per_token`).
      peak: FLOP/s of one device; None: MFU is not known.
      devices: how many work together; None: all.
      window: steps that the rates are averaged over.

    Attributes:
      steps: noted so far.
      seconds: that they took, without pauses and without those that `restart` let go.
      pausing: whether a pause is going on.
    """

    def __init__(
        self,
        flops_per_token: float,
        peak: float | None,
        devices: int | None = None,
        window: int = 32,
    ):
        self.flops_per_token = flops_per_token
        self.peak = peak * (jax.device_count() if devices is None else devices) if peak else None
        self._ends: collections.deque[tuple[float, int]] = collections.deque(maxlen=window + 1)
        self._own: collections.deque[float] = collections.deque(maxlen=window)
        self._paused = 0.0
        self._waited: collections.defaultdict[str, float] = collections.defaultdict(float)
        self.pausing = False
        self.steps = 0
        self.seconds = 0.0

    def restart(self, forget: bool = False) -> None:
        """Lets go of the steps so far; with `forget` of their seconds too, for they did not count."""
        self._ends.clear()
        self.seconds = 0.0 if forget else self.seconds

    def step(self, tokens: int) -> None:
        """Notes that a step of so many tokens (all devices together) has ended."""
        now = time.monotonic() - self._paused
        self.seconds += now - self._ends[-1][0] if self._ends else 0.0
        self.steps += 1
        self._ends.append((now, tokens))

    def ready(self) -> None:
        """Notes that this host is about to start a step: what passed since the last one ended is the host's own time,
        in which all others wait for it."""
        if self._ends:
            self._own.append(time.monotonic() - self._paused - self._ends[-1][0])

    def median(self) -> float | None:
        """Seconds of the median step of the last ones; None while there are too few."""
        ends = list(self._ends)
        return statistics.median(b[0] - a[0] for a, b in itertools.pairwise(ends)) if len(ends) > 1 else None

    def status(self) -> dict[str, Any]:
        """What a host tells the others: steps, the median's seconds, and how many of them are its own."""
        own = list(self._own)
        return {"step": self.steps, "whole": self.median(), "own": statistics.median(own) if own else None}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (an evaluation, a save) does not count."""
        begin, self.pausing = time.monotonic(), True
        try:
            yield
        finally:
            self._paused += time.monotonic() - begin
            self.pausing = False

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Time inside is what the loop waits for data, or for a checkpoint."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._waited[f"{what}_wait_seconds"] += time.monotonic() - begin

    def waits(self) -> dict[str, float | None]:
        """Seconds of the median step, and those waited so far."""
        return {"step_seconds": self.median(), **self._waited}

    def rates(self) -> tuple[float | None, float | None]:
        """(tokens/s, MFU), each None while it is not known. MFU: model FLOP/s over the peak of all devices."""
        if len(self._ends) < 2 or self._ends[-1][0] == self._ends[0][0]:
            return None, None
        speed = sum(tokens for _, tokens in list(self._ends)[1:]) / (self._ends[-1][0] - self._ends[0][0])
        return speed, speed * self.flops_per_token / self.peak if self.peak else None


#: Part of a device's name, and its peak: bfloat16 (float16 where it has none), dense, in TFLOP/s, by its maker's data
#: sheet. The first that matches counts. A "device" of TPU v2 and v3 is one core, half a chip.
PEAKS = (
    ("TPU v6", 918.0),
    ("TPU v5 lite", 197.0),
    ("TPU v5e", 197.0),
    ("TPU v5", 459.0),
    ("TPU v4 lite", 138.0),
    ("TPU v4", 275.0),
    ("TPU v3", 61.5),
    ("TPU v2", 22.5),
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("V100", 125.0),
    ("T4", 65.0),
)


def peak_flops(device: Any = None) -> float | None:
    """Peak FLOP/s of a device (None: the first) by the table above; None where the table has none, as for a CPU."""
    kind = (jax.devices()[0] if device is None else device).device_kind
    return next((teraflops * 1e12 for name, teraflops in PEAKS if name in kind), None)


def matmul_ceiling(dtype: str = "auto", seconds: float = 0.5) -> float:
    """FLOP/s that one device reaches here and now on large square matrix products: the best of repeated runs.

    Args:
      dtype: of the matrices; auto: float32 on CPU, bfloat16 elsewhere.
      seconds: about how long to measure.
    """
    cpu = jax.default_backend() == "cpu"
    size, repeats = (1024, 2) if cpu else (8192, 16)
    dtype = ("float32" if cpu else "bfloat16") if dtype == "auto" else dtype
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype) / math.sqrt(size)

    @jax.jit
    def chain(a):
        return jax.lax.fori_loop(0, repeats, lambda _, b: jnp.dot(b, x, preferred_element_type=x.dtype), a)

    chain(x).block_until_ready()
    best, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.perf_counter()
        chain(x).block_until_ready()
        best = max(best, 2 * size**3 * repeats / (time.perf_counter() - begin))
    return best
