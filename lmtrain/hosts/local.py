"""Several processes of one command on this machine, as on several hosts; started again when they fail.

python -m lmtrain.hosts.local N ARGS...  is what launch/local.sh runs.
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

FINAL = {0: "done", 2: "refused", 130: "interrupted"}  # these are not started again
STOPPED = 75
PATIENCE = 30.0  # seconds that the others have to end by themselves once one has failed
CEILING = 60.0  # longest pause before a restart


def backoff(first: float, restarts: int) -> Iterator[float]:
    """Seconds to wait before each restart: doubling, at most CEILING."""
    for i in range(restarts):
        yield min(first * 2**i, CEILING)


def outcome(codes: Sequence[int]) -> int:
    """The exit status of all together: 0 where all are done, else what says most about why they ended."""
    for wanted in (2, 130, 74, 77, 1):
        if wanted in codes:
            return wanted
    # A process killed by a signal has a negative status; the others then end with 76.
    return max(codes, default=0) if min(codes, default=0) >= 0 else 76


def environments(count: int, devices: int, base: Mapping[str, str], port: int) -> list[dict[str, str]]:
    """What each of the processes is told. devices: fake CPU devices of each; 0: the machine's own."""
    fake = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": ""} if devices else {}
    names = {"LMTRAIN_COORDINATOR": f"127.0.0.1:{port}", "LMTRAIN_PROCESSES": str(count)}
    alone = {k: v for k, v in base.items() if not k.startswith("LMTRAIN_P") and k != "LMTRAIN_COORDINATOR"}
    return [alone | fake | (names | {"LMTRAIN_PROCESS": str(i)} if count > 1 else {}) for i in range(count)]


def free_ports() -> int:
    """A port that is free together with the one after it: JAX's coordinator and the roll. Below those that the kernel
    gives to connections, one of which could take it in between."""
    while True:
        port = random.randrange(20000, 32000, 2)
        with socket.socket() as one, socket.socket() as two, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 1))
            return port


def main(argv: Sequence[str]) -> int:
    """Runs them until they are done, refused, stopped, or have ended RESTARTS times too early. Returns their status."""
    dry = argv[:1] == ["--dry-run"]
    count, *rest = argv[dry:] or [""]
    if not (count.isdigit() and int(count) and rest):
        print("usage: launch/local.sh [--dry-run] N ARGS-OF-lmtrain-run...", file=sys.stderr)
        return 2
    settings = {}
    for name, default in (("DEVICES", "1"), ("RESTARTS", "5"), ("BACKOFF", "1")):
        text = os.environ.get(name, default)
        try:
            settings[name] = float(text) if name == "BACKOFF" else int(text)
            if not 0 <= settings[name] < float("inf"):
                raise ValueError
        except ValueError:
            print(f"launch: {name} is {text!r}, but takes a number, 0 or more.", file=sys.stderr)
            return 2
    devices, restarts = int(settings["DEVICES"]), int(settings["RESTARTS"])
    command = [sys.executable, "-m", "lmtrain.cli", "run", *rest]
    if dry:
        for env in environments(int(count), devices, {}, 8476):
            print(" ".join([*(f"{k}={v}" for k, v in env.items()), shlex.join(command)]))
        return 0
    told: list[int] = []  # signals that this launcher got
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: told.append(n))
    pauses = backoff(settings["BACKOFF"], restarts)
    while True:
        status = outcome(attempt(command, environments(int(count), devices, os.environ, free_ports()), told))
        if status in FINAL or told:
            return status
        pause = next(pauses, None)
        if pause is None:
            print(f"launch: all ended with status {status}; not again, after {restarts} restarts", flush=True)
            return status
        print(f"launch: all ended with status {status}; again in {pause:g} s", flush=True)
        end = time.monotonic() + pause
        while time.monotonic() < end and not told:  # a signal does not end a sleep
            time.sleep(0.1)
        if told:
            return status


def attempt(command: Sequence[str], envs: Sequence[Mapping[str, str]], told: list[int]) -> list[int]:
    """Runs all once, each line of theirs with its number in front; returns their exit statuses."""
    processes, prints = [], []
    for i, env in enumerate(envs):
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        printer = threading.Thread(target=_print, args=(process, f"[{i}] " if len(envs) > 1 else ""))
        printer.start()
        processes.append(process)
        prints.append(printer)
    passed, deadline = 0, float("inf")
    while any(p.poll() is None for p in processes):
        for number in told[passed:]:
            for p in processes:
                p.send_signal(number)
            passed += 1
        failed = [p for p in processes if p.poll() not in (None, 0, STOPPED)]
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + PATIENCE
        if time.monotonic() > deadline:
            for p in processes:
                p.kill()
        time.sleep(0.05)
    for printer in prints:
        printer.join()
    return [p.wait() for p in processes]


def _print(process: subprocess.Popen[bytes], prefix: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.write(prefix + line.decode(errors="replace"))
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
