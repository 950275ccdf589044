"""The watchdog, on a clock of its own."""

import time
from types import SimpleNamespace

import pytest

from lmtrain import log
from lmtrain.hosts import watchdog


def pulse(steps=10, median=0.5, pausing=False):
    return SimpleNamespace(steps=steps, pausing=pausing, median=lambda: median)


def seconds_until_exhausted(patience, p, tick=1.0, most=1000):
    return next((i * tick for i in range(most) if patience.exhausted(p, tick)), None)


@pytest.mark.parametrize("median, multiple, least, limit", [(0.5, 20, 3, 10), (0.5, 20, 60, 60), (4.0, 20, 60, 80)])
def test_the_limit_is_a_multiple_of_the_median_step_and_at_least_so_much(median, multiple, least, limit):
    passed = seconds_until_exhausted(watchdog.Patience(multiple, least), pulse(median=median))
    assert limit < passed <= limit + 1


def test_steps_and_pauses_start_it_afresh():
    patience, p = watchdog.Patience(20, 3), pulse()
    for _ in range(100):
        for _ in range(9):
            assert not patience.exhausted(p, 1.0)
        p.steps += 1
    p.pausing = True  # an evaluation may take as long as it takes
    assert seconds_until_exhausted(patience, p) is None
    p.pausing = False
    assert 10 <= seconds_until_exhausted(patience, p) <= 11


def test_too_few_steps_tell_nothing():
    assert seconds_until_exhausted(watchdog.Patience(20, 3), pulse(steps=4)) is None
    assert seconds_until_exhausted(watchdog.Patience(20, 3), pulse(median=None)) is None


def test_a_process_that_was_itself_stopped_for_an_hour_goes_on():
    patience, p = watchdog.Patience(20, 3), pulse()
    patience.exhausted(p, 1.0)
    assert not patience.exhausted(p, 3600.0)


def test_it_prints_the_stacks_of_all_threads_and_ends_the_process(monkeypatch, capfd):
    monkeypatch.setattr(watchdog, "TICK", 0.02)
    ended = []
    with watchdog.Watchdog(pulse(median=0.001), 20, 0.1, lambda *end: ended.append(end)):
        a_function_that_hangs(lambda: ended)
    ((message, status),) = ended
    assert status == watchdog.HUNG == 77 and "no step for" in message
    assert "a_function_that_hangs" in capfd.readouterr().err


def a_function_that_hangs(until):
    end = time.monotonic() + 10
    while not until() and time.monotonic() < end:
        time.sleep(0.01)


def test_a_multiple_of_0_turns_it_off():
    with watchdog.Watchdog(pulse(), 0, 0, lambda *end: None) as w:
        assert w._thread is None


def test_the_meter_tells_it_steps_and_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    meter = log.Meter(1.0, None, devices=1)
    meter.restart()
    for took, own in ((9.0, 1.0), (2.0, 0.5), (4.0, 0.5), (2.0, 0.5)):  # the first one compiles
        now[0] += own
        meter.ready()
        now[0] += took - own
        meter.step(10)
    with meter.paused():
        now[0] += 100
        assert meter.pausing
    assert (meter.steps, meter.median(), meter.seconds, meter.pausing) == (4, 2.0, 8.0, False)
    assert meter.status() == {"step": 4, "whole": 2.0, "own": 0.5}
    meter.restart(forget=True)
    assert meter.seconds == 0
