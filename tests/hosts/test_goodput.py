"""The share of wall time that went into steps which counted, over starts and stops."""

from lmtrain import goodput


def test_crashes_cost_and_orderly_stops_do_not(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(goodput.time, "time", lambda: now[0])
    first = goodput.Goodput(tmp_path)
    now[0] += 100  # 80 of them in steps, of which 50 are in the checkpoint; then it is killed
    assert first.share(80.0) == 0.8
    now[0] += 100  # until it is started again
    second = goodput.Goodput(tmp_path)
    assert second.share(50.0) == 0.25
    now[0] += 100
    assert second.share(120.0) == 0.4
    second.stop()
    now[0] += 10000  # over the weekend
    third = goodput.Goodput(tmp_path)
    assert third.share(120.0) == 0.4
    now[0] += 100
    assert third.share(220.0) == 0.55
