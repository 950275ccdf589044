"""The roll, over real sockets, with several processes played by threads of this one."""

import socket
import threading
import time

import pytest

from lmtrain.hosts import local, roll
from lmtrain.hosts.place import Place
from lmtrain.types import HostGone, LmtrainError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(roll, "BEAT", 0.05)
    monkeypatch.setattr(roll, "GRACE", 0.1)
    monkeypatch.setattr(roll, "SILENCE", 1.0)


def at_once(work, count):
    """work(i) of each in a thread; what they returned or raised."""
    out = [None] * count

    def run(i):
        try:
            out[i] = work(i)
        except Exception as error:
            out[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    return out


def meet(count, here=None, meet=10.0, port=None, names=None):
    """Rolls of the processes `here` of so many, and what ended each: (message, status)."""
    port = port or local.free_ports()
    ends = {}
    here = range(count) if here is None else here

    def join(k):
        i = list(here)[k]
        place = Place("coordinator", f"127.0.0.1:{port}", count, i)
        return roll.Roll(place, f"n{i}", lambda *end: ends.setdefault(i, end), meet=meet)

    rolls = at_once(join, len(list(here)))
    if len(rolls) == count:
        assert all(isinstance(r, roll.Roll) for r in rolls), rolls
    return rolls, ends


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def test_all_hear_the_judgement_of_process_0():
    rolls, _ = meet(3)
    judged = []

    def judge(rows):
        judged.append({p: r["x"] for p, r in rows.items()})
        return "" if len(judged) == 1 else f"{rows[2]['name']} is odd"

    assert at_once(lambda i: rolls[i].agree({"x": i * i}, judge), 3) == [None] * 3
    said = {str(e) for e in at_once(lambda i: rolls[i].agree({"x": i}, judge), 3)}
    assert judged == [{0: 0, 1: 1, 2: 4}, {0: 0, 1: 1, 2: 2}]
    (message,) = said  # the same in every process
    assert "process 2 (host n2" in message and "is odd" in message


def test_clocks_are_compared_with_process_0s(monkeypatch):
    rolls, _ = meet(2)
    true = time.time
    monkeypatch.setattr(roll.time, "time", lambda: true() - 40 * (threading.current_thread().name == "late"))
    seen = {}

    def ask():
        rolls[1].agree({}, lambda rows: "")

    late = threading.Thread(target=ask, name="late")
    late.start()
    rolls[0].agree({}, lambda rows: seen.update({p: r["behind"] for p, r in rows.items()}) or "")
    late.join()
    assert seen[0] == 0 and seen[1] == pytest.approx(40, abs=1)


@pytest.mark.parametrize("slow", [0, 1])
def test_a_host_that_comes_late_to_the_comparison_has_no_other_clock(slow):
    """Its folder may be on a slow file system, and takes a while to look at."""
    rolls, _ = meet(3)
    seen = {}

    def ask(i):
        time.sleep(1.0 * (i == slow))
        rolls[i].agree({}, lambda rows: seen.update({p: r["behind"] for p, r in rows.items()}) or "")

    assert at_once(ask, 3) == [None] * 3
    assert all(abs(behind) < 0.3 for behind in seen.values()), seen


def test_one_that_ends_while_they_are_compared_is_no_refusal():
    rolls, _ = meet(3)
    rolls[1].close()
    errors = at_once(lambda i: rolls[i].agree({}, lambda rows: "") if i != 1 else None, 3)
    for error in (errors[0], errors[2]):
        assert isinstance(error, HostGone) and "process 1 (host n1" in str(error) and error.status == 76


def test_a_lost_process_is_named_by_all_the_others():
    rolls, ends = meet(4)
    for r in rolls:
        r.start()
    rolls[2].report(lambda: {"step": 17})
    until(lambda: rolls[0]._lines[2].beat.get("step") == 17)
    rolls[2]._leaving = True  # its process is killed: the system closes its connections, and nothing is said
    rolls[2]._lines[0].sock.shutdown(socket.SHUT_RDWR)
    until(lambda: set(ends) == {0, 1, 3})
    for message, status in ends.values():
        assert "process 2 (host n2" in message and "gone, after step 17" in message and status == roll.GONE == 76


def test_a_lost_coordinator_is_named_by_all_the_others():
    rolls, ends = meet(3)
    for r in rolls:
        r.start()
    rolls[0]._leaving = True
    for line in rolls[0]._lines.values():
        line.sock.shutdown(socket.SHUT_RDWR)
    until(lambda: set(ends) == {1, 2})
    assert all("process 0 (host n0" in message and status == 76 for message, status in ends.values())


def test_a_silent_process_is_lost_too():
    rolls, ends = meet(2)
    rolls[0].start()  # and process 1 is stopped before its thread says anything
    until(lambda: 0 in ends)
    assert "process 1 (host n1" in ends[0][0] and "nothing heard of it for 1 s" in ends[0][0]


def test_who_says_goodbye_is_not_missed():
    rolls, ends = meet(3)
    for r in rolls:
        r.start()
    for leaving in (1, 0, 2):
        rolls[leaving].close()
        time.sleep(0.3)
        assert not ends


def test_the_failure_of_one_ends_all_with_its_reason_and_status():
    rolls, ends = meet(3)
    for r in rolls:
        r.start()
    rolls[1].fail("the disk is full", 74)
    until(lambda: set(ends) == {0, 2})
    assert all("process 1 (host n1" in m and "the disk is full" in m and status == 74 for m, status in ends.values())


def test_those_who_do_not_come_are_named():
    (found, other), _ = meet(4, here=(0, 2), meet=0.5)
    assert isinstance(found, HostGone) and "have not come within 0.5 s: 1, 3" in str(found)
    assert isinstance(other, HostGone) and "have not come within 0.5 s: 1, 3" in str(other)


def test_a_process_without_a_coordinator_says_where_it_looked():
    (found,), _ = meet(2, here=(1,), meet=0.3)
    assert isinstance(found, HostGone) and "process 0 does not answer at 127.0.0.1:" in str(found)


def test_two_that_claim_one_place_are_refused():
    port = local.free_ports()

    def join(i):
        place = Place("coordinator", f"127.0.0.1:{port}", 3, (0, 1, 1)[i])
        return roll.Roll(place, f"n{i}", meet=5)

    errors = at_once(join, 3)
    assert all(isinstance(e, LmtrainError) and "both are process 1" in str(e) for e in errors)


def test_processes_that_disagree_on_their_number_are_refused():
    port = local.free_ports()
    errors = at_once(lambda i: roll.Roll(Place("coordinator", f"127.0.0.1:{port}", (2, 3)[i], i), "n", meet=5), 2)
    assert all(isinstance(e, LmtrainError) and "says there are 3 processes" in str(e) for e in errors)


def test_a_stranger_is_not_counted():
    port = local.free_ports()

    def work(i):
        if i < 2:
            return roll.Roll(Place("coordinator", f"127.0.0.1:{port}", 2, i), "n", meet=10)
        end = time.monotonic() + 3
        while time.monotonic() < end:  # it may come too late
            try:
                with socket.create_connection(("127.0.0.1", port + 1)) as s:
                    s.sendall(b"GET / HTTP/1.1\n\n")
                return None
            except ConnectionRefusedError:
                time.sleep(0.01)

    found = at_once(work, 3)
    assert all(isinstance(r, roll.Roll) for r in found[:2])


@pytest.mark.parametrize(
    "own, step, name",
    [
        ({"a": 0.01, "b": 0.01, "c": 0.3}, 0.5, "c"),
        ({"a": 0.01, "b": 0.01, "c": 0.03}, 0.5, None),  # three times the others', and nothing beside the step
        ({"a": 0.2, "b": 0.25, "c": 0.3}, 0.5, None),
        ({"a": 0.01, "b": None}, 0.5, None),
        ({"a": 0.01, "b": 0.3}, None, None),
    ],
)
def test_a_slow_host_is_named_by_its_own_time(own, step, name):
    found = roll.slowest(own, step)
    assert (found.name if found else None) == name


def test_process_0_that_fails_leaves_after_the_others_have_heard_of_it():
    rolls, ends = meet(3)
    for r in rolls:
        r.start()
    rolls[0].fail("the disk is full", 74)
    for i in (1, 2):
        text, code = ends[i]
        assert text.startswith("process 0 (host n0") and "failed: the disk is full" in text and code == 74
