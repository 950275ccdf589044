"""Runs Python that nobody has read: no network, no files but its own, limits on everything, and a verdict it cannot
forge.

`run` runs a program; `check` has tests ask a program's function and says whether they passed. Linux, as root or not.
jail.py says what holds and why, inside.py why the verdict is safe. Where the kernel cannot give the promise, both raise
and run nothing. Both may be called from several threads at once.

The program is one thread of one process. It sees the standard library and an empty folder (flat; a file that is written
stays), and the same on every machine, so that a score does not depend on the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lmtrain.types import LmtrainError

_START = 60.0  # seconds in which an interpreter must have started, however busy the machine
_TICK = 0.02  # seconds between two looks at the folder
_FILES = 256  # that the folder may hold


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use. The tests of `check` have the same for themselves.

    Attributes:
      seconds: of the clock, once it is locked in.
      cpu_seconds: of work; whole.
      memory: bytes of address space, some 30 MB of the interpreter included.
      file_size: bytes of one file.
      disk: bytes of all files; looked at every 20 ms, so a little more can be written before the end.
      output: bytes printed.
    """

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory: int = 512 << 20
    file_size: int = 1 << 20
    disk: int = 16 << 20
    output: int = 64 << 10

    def __post_init__(self) -> None:
        least = {"seconds": 0.01, "cpu_seconds": 1, "memory": 64 << 20, "file_size": 0, "disk": 0, "output": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int | float if name == "seconds" else int) or not low <= value < 2**62:
                raise LmtrainError(f"sandbox limits: {name} is {value!r}, but takes a number of at least {low:g}.")


@dataclasses.dataclass(frozen=True)
class Result:
    """How it ended.

    Attributes:
      ok: of check: every test passed. Of run: it ended with status 0, which any program can do: no verdict.
      output: what it printed, cut at the limit.
      error: "" where ok; else the limit it met, the test that failed, or what it raised.
      seconds: of the clock, once it was locked in.
    """

    ok: bool
    output: str
    error: str
    seconds: float


def run(source: str, stdin: str = "", limits: Limits = Limits()) -> Result:
    """Runs a program as `python FILE` would.

    Raises:
      LmtrainError: this machine cannot lock it in; nothing was run.
    """
    with _folder() as folder, _child("program", {"source": source}, folder, limits, stdin=stdin) as program:
        return _watch(program, None, folder, limits)


def check(source: str, tests: str, entry_point: str, limits: Limits = Limits(), setup: str = "") -> Result:
    """Whether a program's function passes tests.

    Args:
      tests: Python that calls `entry_point`, or that defines `check(candidate)` (HumanEval), which is called with it; a
        test fails by raising. Arguments and results are plain values: numbers, text, lists, tuples, dicts, sets,
        iterators of these. What the program does to its arguments is not seen.
      setup: Python that runs before the tests, for helpers that they use (HumanEval's prompt). What else the program
        defines is not seen by the tests: it could define it as it likes.

    Raises:
      LmtrainError: this machine cannot lock it in; nothing was run.
    """
    if not entry_point.isidentifier():
        raise LmtrainError(f"sandbox: entry_point is {entry_point!r}, but takes the name of a function.")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_folder())
        calls, ask = os.pipe()
        hear, replies = os.pipe()
        with _closing(
            calls, ask, hear, replies
        ):  # afterwards only the two processes have them, and each sees the other end
            program = stack.enter_context(
                _child("program", {"source": source}, folder, limits, entry_point, {"calls": calls, "replies": replies})
            )
            texts = {"source": tests, "setup": setup}
            tester = stack.enter_context(
                _child("tester", texts, "", limits, entry_point, {"calls": ask, "replies": hear})
            )
        return _watch(program, tester, folder, limits)


# ---------------------------------------------------------------- one process


@dataclasses.dataclass
class _Child:
    """A process that locks itself in. `status`: the pipe on which it says so, and a tester its verdict."""

    process: subprocess.Popen[bytes]
    status: int

    def ready(self) -> bytes:
        """Waits until it is locked in. Returns what came on the pipe behind the word."""
        said, deadline = b"", time.monotonic() + _START
        with selectors.DefaultSelector() as selector:
            selector.register(self.status, selectors.EVENT_READ)
            while b"\n" not in said:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise LmtrainError(f"sandbox: {sys.executable} did not start within {_START:g} seconds.")
                part = os.read(self.status, 4096)
                if not part:  # it ended before it could say anything
                    why = self.process.stderr.read() if self.process.stderr else b""
                    last = why.decode(errors="replace").strip().rpartition("\n")[2][:300]
                    raise LmtrainError(_lacks(f"an interpreter that starts ({sys.executable}: {last or 'no message'})"))
                said += part
        word, _, rest = said.partition(b"\n")
        if word != b"ready":
            raise LmtrainError(_lacks(word.decode(errors="replace")))
        return rest


@contextlib.contextmanager
def _child(
    role: str, texts: dict[str, str], folder: str, limits: Limits, entry_point: str = "",
    pipes: dict[str, int] | None = None, stdin: str = "",
) -> Iterator[_Child]:  # fmt: skip
    """Starts a process; when the block ends, it and its group are killed, and reaped."""
    if sys.platform != "linux":
        raise LmtrainError(_lacks("Linux"))
    status, status_end = os.pipe()
    with _closing(status), contextlib.ExitStack() as until_started:
        files = {name: _file(text) for name, text in texts.items()}
        until_started.enter_context(_closing(status_end, *files.values()))
        fds = {"status": status_end, **files, **(pipes or {})}
        given = {
            "role": role, "parent": os.getpid(), "folder": folder, "entry_point": entry_point, "fds": fds,
            "limits": {n: getattr(limits, n) for n in ("memory", "cpu_seconds", "file_size")},
        }  # fmt: skip
        printed = subprocess.PIPE if role == "program" else subprocess.DEVNULL
        start = "import sys; sys.path[0] = sys.argv.pop(1); import inside; inside.main()"
        stdin_file = until_started.enter_context(os.fdopen(_file(stdin), "rb"))
        process = subprocess.Popen(
            [sys.executable, "-u", "-S", "-s", "-c", start, str(Path(__file__).parent), json.dumps(given)],
            stdin=stdin_file, stdout=printed, stderr=printed, cwd=folder or "/", env=_environment(folder),
            pass_fds=tuple(fds.values()), start_new_session=True, bufsize=0,
        )  # fmt: skip
        try:
            until_started.close()
            yield _Child(process, status)
        finally:
            _kill(process)
            for pipe in (process.stdout, process.stderr):
                if pipe:
                    pipe.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and its group, as long as its number is its own, and waits for its end."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment(folder: str) -> dict[str, str]:
    """Nothing of the trainer's but the search path of shared libraries, which some interpreters need to start."""
    keep = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    fixed = {"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "TZ": "UTC", "PATH": "/usr/bin:/bin"}
    return {**keep, **fixed, "HOME": folder or "/", "TMPDIR": folder or "/"}


def _file(text: str) -> int:
    """A nameless file in memory with this text, to be read from its beginning."""
    fd = os.memfd_create("lmtrain", os.MFD_CLOEXEC)
    data, at = text.encode("utf-8", "surrogatepass"), 0
    while at < len(data):
        at += os.pwrite(fd, data[at:], at)
    return fd


@contextlib.contextmanager
def _closing(*fds: int) -> Iterator[None]:
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="lmtrain-sandbox-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lacks(what: str) -> str:
    return (
        f"sandbox: this machine cannot lock a program in, and nothing was run. It lacks: {what}."
        " It takes Linux 5.13 or later with Landlock and seccomp, on x86_64 or aarch64."
    )


# ---------------------------------------------------------------- both, to their end


def _watch(program: _Child, tester: _Child | None, folder: str, limits: Limits) -> Result:
    """Waits for the verdict, or for the end of a program without tests; ends what goes over a limit."""
    program.ready()
    verdict = bytearray(tester.ready() if tester else b"")
    printed, complaints = bytearray(), bytearray()
    begin = time.monotonic()
    reason = ""
    with selectors.DefaultSelector() as selector:

        def read(wait: float) -> bool:
            """Takes in what there is to read."""
            events = selector.select(wait)
            for key, _ in events:
                part = os.read(key.fd, 1 << 16)
                key.data.extend(part)
                if not part:
                    selector.unregister(key.fd)
            return bool(events)

        for pipe, sink in ((program.process.stdout, printed), (program.process.stderr, complaints)):
            selector.register(_fd(pipe), selectors.EVENT_READ, sink)
        if tester:
            selector.register(tester.status, selectors.EVENT_READ, verdict)
        while not reason:
            left = begin + limits.seconds - time.monotonic()
            if left <= 0:
                reason = f"time limit: {limits.seconds:g} seconds"
            elif not selector.get_map():  # it closed its output and goes on
                time.sleep(min(left, _TICK))
            else:
                read(min(left, _TICK))
            if len(printed) + len(complaints) > limits.output:
                reason = f"output limit: {limits.output} bytes"
            reason = reason or _too_much(folder, limits)
            if (tester or program).process.poll() is not None or b"\n" in verdict:
                break
        seconds = time.monotonic() - begin
        code = program.process.poll()  # None: it goes on
        for child in (program, tester):
            if child:
                _kill(child.process)
        while selector.get_map() and len(printed) + len(complaints) <= limits.output and read(0):
            pass
    output = printed[: limits.output].decode(errors="replace")
    last = complaints.decode(errors="replace").strip().rpartition("\n")[2][:500]
    error = (
        _failed(bytes(verdict), reason, _ended(code, last))
        if tester
        else reason or (_ended(code, last) if code else "")
    )
    return Result(not error, output, error, seconds)


def _ended(code: int | None, last: str) -> str:
    """How the program ended, with the last line it complained with."""
    if code is None:
        return ""
    if code < 0:
        name = signal.Signals(-code).name
        return f"{name}, as for the limit of CPU seconds" if name == "SIGKILL" else name
    return last or f"exit status {code}"


def _failed(verdict: bytes, reason: str, ended: str) -> str:
    """Why the tests did not pass; "" where they did."""
    if not verdict.endswith(b"\n"):
        return reason or "the tests ended without a verdict"
    error: str = json.loads(verdict)["error"]
    if not error.startswith("the program ended"):
        return error
    return reason or ": ".join(filter(None, (error, ended)))


def _too_much(folder: str, limits: Limits) -> str:
    """The limit that the folder's files are over, or ""."""
    with os.scandir(folder) as entries:
        sizes = [entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries]
    if len(sizes) > _FILES:
        return f"limit of {_FILES} files"
    return f"disk limit: {limits.disk} bytes" if sum(sizes) > limits.disk else ""


def _fd(pipe: IO[Any] | None) -> int:
    assert pipe is not None
    return pipe.fileno()
