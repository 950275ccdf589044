"""The alarm is raised for a run that learned its text by heart, and for no other."""

import numpy as np
import pytest

from lmtrain import runs
from lmtrain.eval import overfitting
from lmtrain.eval.estimates import Estimate
from lmtrain.eval.subject import Missing, Settings
from lmtrain.evaluate import subject
from lmtrain.record import open_record


@pytest.mark.slow
def test_the_alarm_is_raised_where_a_run_overfits_and_not_elsewhere(overfit):
    found = {name: overfitting.run(subject(runs.load(folder), Settings())) for name, folder in overfit.items()}
    page, book = found["page"], found["book"]
    assert len(page.alarms) == 2 and "by heart" in page.alarms[0] and "rose from" in page.alarms[1]
    assert not book.alarms and book.details["trend"]["last"] <= 1.02 * book.details["trend"]["best"]
    assert page.scores["gap"].low > 3 * book.scores["gap"].high
    assert page.json()["alarms"] == page.alarms and page.details["thresholds"] == {"gap": 0.2, "trend": 0.02}


@pytest.mark.slow
def test_the_losses_are_those_that_training_reports(overfit):
    """All held-out rows: the held-out loss of the last line of metrics.jsonl."""
    for folder in overfit.values():
        run = runs.load(folder)
        held = overfitting.run(subject(run, Settings(rows=0))).scores["held-out rows"]
        assert held.value == pytest.approx(run.metrics[-1]["heldout_loss"], rel=1e-4)


@pytest.mark.slow
def test_rows_are_drawn_from_those_learned_from(overfit):
    """Of the book, 150 steps of 8 rows have read only a part: every row drawn must be one of these."""
    run = runs.load(overfit["book"])
    record = open_record(run)
    source = record.stages[-1].sides[0]
    given = {source.pick(k) for k in range(150 * 8)}
    learned, held = record.drawn_rows(64, 0)
    assert source.rows > 150 * 8 and set(learned.picks) <= given and len(set(learned.picks)) == 64
    assert learned.table is not held.table and len(held.picks) == 64
    assert set(record.drawn_rows(64, 1)[0].picks) != set(learned.picks)
    tokens = {pick: learned.table.batch([pick])["tokens_BT"].tobytes() for pick in learned.picks[:8]}
    first = [source.next()["tokens_BT"].tobytes() for _ in range(150 * 8)]
    assert set(tokens.values()) <= set(first)


def metrics(held, loss):
    return [{"step": 10 * k, "heldout_loss": h, "loss": n} for k, (h, n) in enumerate(zip(held, loss, strict=True))]


@pytest.mark.parametrize(
    ("held", "loss", "alarm"),
    [
        ([6, 3, 2, 2.5, 3], [6, 3, 2, 1, 0.5], True),  # the usual picture
        ([6, 3, 2, 1.9, 1.8], [6, 3, 2, 1, 0.5], False),  # still learning
        ([6, 3, 2, 2.01, 2.03], [6, 3, 2, 1.9, 1.8], False),  # within 2 %
        ([6, 3, 2, 2.5, 3], [6, 3, 2, 2.5, 3], False),  # both rise: it diverges, it does not overfit
        ([1, 3, 2.5, 2.2, 2.1], [1, 3, 2.5, 2.2, 2.1], False),  # line 0 is another stage's model
    ],
)
def test_a_trend_is_an_alarm_where_held_out_rises_and_training_falls(held, loss, alarm):
    trend = overfitting.trend_of(metrics(held, loss))
    assert bool(overfitting.trend_alarm(trend)) == alarm


def test_two_evaluations_make_no_trend():
    assert overfitting.trend_of(metrics([6, 2, 3], [6, 2, 1])) == {}
    assert overfitting.trend_of([{"step": 1, "loss": 1.0}]) == {}


def test_a_gap_is_an_alarm_where_its_whole_interval_is_above_a_fifth():
    assert overfitting.gap_alarm(Estimate(0.5, 0.41, 0.6, 10), 2.0)
    assert not overfitting.gap_alarm(Estimate(0.5, 0.39, 0.6, 10), 2.0)


@pytest.mark.slow
def test_a_model_from_elsewhere_has_no_record(overfit):
    s = subject(runs.load(overfit["page"]), Settings())
    s.record = None
    with pytest.raises(Missing, match="suite overfitting reads the run's own record"):
        overfitting.run(s)
    assert np.isfinite(overfitting.GAP)
