"""The roll: every process keeps one TCP connection to process 0, so that whoever is lost is named, at once and by all.

JAX's own service notices a lost process too, but names no host, and its survivors wait for one another. The roll is
called before JAX starts (so that what differs between the hosts is refused first, another version of JAX included) and
goes on, a line a second, until the run ends. A connection that closes without a goodbye, or is silent for SILENCE
seconds, is a lost process: process 0 tells the others, and each says who is gone and ends. A thread does this, for the
main thread then waits inside a collective that never comes back.

Lines of JSON, each way: {"beat": {...}} | {"bye": true} | {"gone": TEXT} | {"failed": TEXT, "code": N} | {"ask": ...} |
{"answer": TEXT}.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import selectors
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from lmtrain.hosts.place import Place
from lmtrain.types import HostGone, LmtrainError

BEAT = 1.0  # seconds between two lines
SILENCE = 12.0  # seconds without one after which a process counts as lost
MEET = 300.0  # seconds that processes wait for one another at the start
GRACE = 2.0  # seconds that a process has to fail by itself once another has
GONE = HostGone.status

Row = dict[str, Any]


class _Line:
    """One connection, read and written in lines of JSON."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.name = ""  # "process 2 (host n2, pid 71)"
        self.left = False  # said goodbye
        self.closed = False
        self.beat: Row = {}
        self._half = b""
        self._lock = threading.Lock()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, row: Row) -> None:
        """Sends one line; a connection that is gone is noticed by who reads it."""
        with contextlib.suppress(OSError), self._lock:
            self.sock.settimeout(SILENCE)
            self.sock.sendall(json.dumps(row).encode() + b"\n")

    def read(self, wait: float | None = None) -> list[Row]:
        """The lines that are there now, waiting for some (so many seconds at most); [] where it is closed."""
        if wait is not None:
            self.sock.settimeout(wait)
        while True:
            try:
                data = self.sock.recv(1 << 20)
            except OSError:
                data = b""
            if not data:
                self.closed = True
                return []
            *whole, self._half = (self._half + data).split(b"\n")
            if whole:
                return [json.loads(line) for line in whole]


@dataclasses.dataclass
class Slow:
    """A host whose own share of a step is far above the others'."""

    name: str
    seconds: float
    others: float


class Roll:
    """This process's part of the roll.

    Args:
      place: of several processes.
      name: how the others call this one's host.
      end: what ends the process, given a message and an exit status; by default one line and os._exit.
      meet: seconds to wait for the others.

    Raises:
      LmtrainError: they do not come within that time; names those missing.
    """

    def __init__(
        self, place: Place, name: str, end: Callable[[str, int], None] | None = None, meet: float = MEET
    ) -> None:
        self.place, self._end = place, end or end_process
        self.name = f"process {place.process} (host {name}, pid {os.getpid()})"
        self._lines: dict[int, _Line] = {}  # of process 0: every other's; of another: process 0's
        self.token = secrets.token_hex(4)  # the same in all processes of this start
        self._status: Callable[[], Row] = dict
        self._leaving = False
        self._thread: threading.Thread | None = None
        host, port = place.address
        if place.process == 0:
            self._gather(port + 1, meet)
        else:
            self._join(host, port + 1, meet)

    # ------------------------------------------------------------------------------------------------------- meeting
    def _gather(self, port: int, meet: float) -> None:
        deadline = time.monotonic() + meet
        with _listen(port) as server:
            while len(self._lines) < self.place.processes - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    sock, _ = server.accept()
                    sock.settimeout(10)
                    line = _Line(sock)
                    hello = line.read()[0]
                    process, count = int(hello["process"]), int(hello["processes"])
                    line.name = str(hello["name"])
                except TimeoutError:
                    missing = sorted(set(range(1, self.place.processes)) - set(self._lines))
                    raise self._refuse(
                        HostGone,
                        f"of {self.place.processes} processes these have not come within {meet:g} s: "
                        f"{', '.join(map(str, missing))}. Their own logs say why, if they started at all.",
                    ) from None
                except (OSError, ValueError, KeyError, IndexError, TypeError):
                    continue  # not one of ours
                self._lines.setdefault(process, line)
                if count != self.place.processes:
                    raise self._refuse(
                        LmtrainError, f"{line.name} says there are {count} processes, {self.name} {len(self)}.", line
                    )
                if self._lines[process] is not line or not 0 < process < count:
                    other = self._lines[process].name if process else self.name
                    raise self._refuse(LmtrainError, f"{line.name} and {other} both are process {process}.", line)
        for line in self._lines.values():
            line.send({"name": self.name, "token": self.token})

    def _join(self, host: str, port: int, meet: float) -> None:
        deadline = time.monotonic() + meet
        while True:
            try:
                sock = socket.create_connection((host, port), timeout=10)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise HostGone(
                        f"hosts: process 0 does not answer at {host}:{port} within {meet:g} s ({error}). Is it "
                        f"running, and are ports {port - 1} and {port} open between the hosts?"
                    ) from None
                time.sleep(0.2)
        line = self._lines[0] = _Line(sock)
        line.name = f"process 0 (host {host})"
        line.send({"process": self.place.process, "processes": self.place.processes, "name": self.name})
        row = (line.read(meet + 10) or [{}])[0]
        if "name" not in row:
            raise (HostGone if row.get("gone", True) else LmtrainError)(
                f"hosts: {row.get('answer') or f'{line.name} ended before all had come; its log says why.'}"
            )
        line.name, self.token = row["name"], row["token"]

    def _refuse(self, kind: type[LmtrainError], text: str, extra: _Line | None = None) -> LmtrainError:
        for line in {*self._lines.values(), *([extra] if extra else [])}:
            line.send({"answer": text, "gone": kind is HostGone})
        return kind(f"hosts: {text}")

    def __len__(self) -> int:
        return self.place.processes

    # ------------------------------------------------------------------------------------- before the thread: questions
    def agree(self, row: Row, judge: Callable[[Mapping[int, Row]], str]) -> None:
        """Process 0 judges the rows of all, by process; what it finds wrong every process raises. Before `start`.

        `judge` is called in process 0 alone. To each row it gets adds "name", and "behind": how many seconds that
        host's clock is behind process 0's.

        Raises:
          LmtrainError: what the judge says.
        """
        if self.place.process:
            line = self._lines[0]
            line.send({"ask": row})
            while answer := (line.read(MEET) or [{}])[0]:
                if "answer" in answer:
                    break
                line.send({"time": time.time()})
            else:
                raise HostGone(f"hosts: {line.name} ended while the hosts were compared; its log says why.")
            text, gone = answer["answer"], answer["gone"]
        else:
            rows = {0: {**row, "name": self.name, "behind": 0.0}}
            lost = []
            for process, line in self._lines.items():
                if (got := line.read(MEET)) and (behind := self._behind(line)) is not None:
                    rows[process] = got[0]["ask"] | {"name": line.name, "behind": behind}
                else:
                    lost.append(line.name)
            gone = bool(lost)
            text = f"{' and '.join(lost)} ended while the hosts were compared." if gone else judge(rows)
            for line in self._lines.values():
                line.send({"answer": text, "gone": gone})
        if text:
            raise (HostGone if gone else LmtrainError)(f"hosts: {text}")

    def _behind(self, line: _Line) -> float | None:
        """How many seconds a host's clock is behind this one's; None: it is gone. Asked for when the host waits for it,
        so that what it did before, such as looking at a slow folder, does not count."""
        asked = time.time()
        line.send({"clock": True})
        got = line.read(MEET)
        return (asked + time.time()) / 2 - got[0]["time"] if got else None

    # ------------------------------------------------------------------------------------------------- the thread
    def start(self) -> None:
        """From now on a lost process ends this one."""
        self._thread = threading.Thread(target=self._watch, name="roll", daemon=True)
        self._thread.start()

    def report(self, status: Callable[[], Row]) -> None:
        """What the beats carry from now on: {"step": ..., "own": seconds of a step that are the host's own}."""
        self._status = status

    def slow(self) -> Slow | None:
        """In process 0: the host whose own share of a step is largest, where it is more than twice the median host's
        and more than a tenth of a step."""
        status = self._status()
        beats = {0: (self.name, status)} | {p: (line.name, line.beat) for p, line in self._lines.items()}
        return slowest({name: beat.get("own") for name, beat in beats.values()}, status.get("whole"))

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, line in self._lines.items():
                selector.register(line.sock, selectors.EVENT_READ, process)
            quiet = dict.fromkeys(
                self._lines, 0.0
            )  # by ticks, so that a process which was stopped itself blames nobody
            last = time.monotonic()
            while not self._leaving:
                for key, _ in selector.select(timeout=BEAT / 2):
                    line = self._lines[key.data]
                    quiet[key.data] = 0.0
                    rows = line.read()
                    for row in rows:
                        self._hear(key.data, row)
                    if line.closed:
                        selector.unregister(line.sock)
                        if not (line.left or self._leaving):
                            self._lost(key.data, "its connection closed")
                now = time.monotonic()
                if now - last >= BEAT:
                    for process, line in self._lines.items():
                        quiet[process] += min(now - last, 5 * BEAT)
                        line.send({"beat": self._status()})
                        if quiet[process] > SILENCE and not (line.left or line.closed):
                            self._lost(process, f"nothing heard of it for {SILENCE:g} s")
                    last = now

    def _hear(self, process: int, row: Row) -> None:
        line = self._lines[process]
        if "beat" in row:
            line.beat = row["beat"]
        elif "bye" in row:
            line.left = True
        elif "gone" in row:
            self._stop(row["gone"], GONE)
        elif "failed" in row:
            if not self._leaving:
                for other in self._lines.values():
                    if other is not line:
                        other.send(row)
                # It is likely that this process fails for the same reason, and says so better. Process 0 leaves last,
                # for JAX aborts the others once it is gone.
                time.sleep(GRACE if self.place.process else 2 * GRACE)
            if not self._leaving:
                self._stop(row["failed"], row["code"])

    def _lost(self, process: int, how: str) -> None:
        line = self._lines[process]
        at = f", after step {line.beat['step']}" if line.beat.get("step") else ""
        text = f"{line.name} is gone{at}: {how}. The same command goes on from the newest checkpoint."
        for other in self._lines.values():
            if other is not line:
                other.send({"gone": text})
        time.sleep(0 if self.place.process else GRACE / 4)  # the others hear it before JAX aborts them
        self._stop(text, GONE)

    def _stop(self, text: str, code: int) -> None:
        self._leaving = True
        self._end(text, code)

    # ------------------------------------------------------------------------------------------------------- leaving
    def fail(self, text: str, code: int, patience: float | None = None) -> None:
        """Tells the others that this process ends with an error, and that they should, with this exit status. Process 0
        waits for them so many seconds (default: 3 GRACE)."""
        self._leaving = True
        for line in self._lines.values():
            line.send({"failed": f"{self.name} failed: {text}", "code": code})
        if self.place.process == 0:
            self._outlast(3 * GRACE if patience is None else patience)

    def _outlast(self, seconds: float) -> None:
        """Waits until the others have ended: JAX aborts them, with stacks of its own, once process 0 is gone."""
        deadline = time.monotonic() + seconds
        if self._thread is not None:
            self._thread.join(timeout=seconds)  # it reads the same lines
        for line in self._lines.values():
            while not line.closed:
                line.read(max(0.01, deadline - time.monotonic()))

    def close(self) -> None:
        """Goodbye: the others may go on without this process."""
        self._leaving = True
        for line in self._lines.values():
            line.send({"bye": True})
        if self._thread is not None:
            self._thread.join(timeout=2 * BEAT)
        for line in self._lines.values():
            line.sock.close()


def slowest(own: Mapping[str, float | None], step: float | None) -> Slow | None:
    """The host whose own seconds of a step are more than twice the median host's and a tenth of a step; None: none."""
    known = {name: seconds for name, seconds in own.items() if seconds is not None}
    if len(known) < 2 or not step:
        return None
    name = max(known, key=lambda n: known[n])
    others = statistics.median(v for n, v in known.items() if n != name)
    slow = known[name] > 2 * others and known[name] - others > 0.1 * step
    return Slow(name, known[name], others) if slow else None


def end_process(text: str, code: int) -> None:
    """Says why, and ends at once: a normal exit would wait for the processes that are gone."""
    print(f"lmtrain: {text}", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


def _listen(port: int) -> socket.socket:
    """A socket that all addresses of this host reach."""
    for _ in range(50):  # the process before it may not be quite gone
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
            return socket.create_server(("", port), backlog=1024)
        except OSError as error:
            reason = error
            time.sleep(0.2)
    raise LmtrainError(f"hosts: port {port} of this host cannot be listened on ({reason.strerror}); set another port.")
