"""pass@k and majority@k against every subset, intervals against what they promise."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.eval import passk
from lmtrain.types import LmtrainError


def subsets(items, k):
    return list(itertools.combinations(items, k))


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        found = [any(s) for s in subsets([True] * c + [False] * (n - c), k)]
        assert passk.pass_at_k(n, c, k) == pytest.approx(np.mean(found), abs=1e-12)


def test_pass_at_k_is_unbiased_and_the_plug_in_is_not():
    """Over every outcome of 6 samples that are right with chance .3, its mean is the chance for 3 new ones."""
    p, n, k = 0.3, 6, 3
    chance = np.array([math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)])
    c = np.arange(n + 1)
    truth = 1 - (1 - p) ** k
    assert (chance * passk.pass_at_k(n, c, k)).sum() == pytest.approx(truth, abs=1e-12)
    assert (chance * (1 - (1 - c / n) ** k)).sum() < truth - 0.02


def test_pass_at_k_takes_arrays_and_large_counts():
    n, c = np.array([4, 10, 200, 5000]), np.array([[0, 10, 3, 1], [4, 0, 200, 2500]])
    got = passk.pass_at_k(n, c, 4)
    assert got.shape == (2, 4) and got.dtype == np.float64
    exact = [[1 - math.comb(int(m - b), 4) / math.comb(int(m), 4) for m, b in zip(n, row, strict=True)] for row in c]
    np.testing.assert_allclose(got, exact, atol=1e-10)
    assert passk.pass_at_k(10, np.array([0, 10]), 10).tolist() == [0, 1]
    np.testing.assert_allclose(passk.pass_at_k(10, c[0] % 11, np.ones(4, int)), c[0] % 11 / 10)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (4, 2.0, 1), (0, 0, 1)])
def test_counts_that_cannot_be_are_refused(n, c, k):
    with pytest.raises(LmtrainError, match="pass@k"):
        passk.pass_at_k(n, c, k)


def vote(chosen):
    """The chance that a vote among (answer, right) pairs is right, ties by lot."""
    votes = Counter(answer for answer, _ in chosen if answer != "")
    if not votes:
        return 0.0
    winners = [a for a, count in votes.items() if count == max(votes.values())]
    return np.mean([dict(chosen)[a] for a in winners])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["", "1", "2", "3", "4"]), min_size=1, max_size=8), st.data())
def test_majority_is_the_mean_vote_over_all_subsets(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    right = {"1": True, "2": data.draw(st.booleans())}
    row = [(a, right.get(a, False)) for a in answers]
    brute = np.mean([vote(chosen) for chosen in subsets(row, k)])
    assert passk.majority([answers], [[r for _, r in row]], k) == pytest.approx(brute, abs=1e-12)


def test_majority_at_one_is_the_mean_and_at_all_is_the_vote():
    answers = [["a", "a", "b"], ["a", "b", "b"]]
    right = [[True, True, False], [True, False, False]]
    assert passk.majority(answers, right, 1) == pytest.approx(0.5)
    assert passk.majority(answers, right) == passk.majority(answers, right, 3) == 0.5
    assert passk.majority([["a", "b"]], [[True, False]]) == 0.5  # a tie
    assert passk.majority([["", "", "a"]], [[False, False, True]]) == 1  # no answer has no vote
    assert passk.majority([["", ""]], [[False, False]]) == 0


def test_a_share_of_right_counts_where_equal_answers_differ_in_it():
    assert passk.majority([["a", "a", "a", "b"]], [[True, False, False, False]]) == pytest.approx(1 / 3)


def test_a_large_majority_is_quick():
    answers = [[str(i % 40) for i in range(64)]]
    assert 0 < passk.majority(answers, [[a == "1" for a in answers[0]]], 16) < 0.2


def test_majority_refuses_what_does_not_fit():
    for answers, right, k in (
        ([], [], 0),
        ([["a"]], [[True, True]], 0),
        ([["a"]], [[True]], 2),
        ([["a"], ["a", "b"]], [[1], [1]], 0),
    ):
        with pytest.raises(LmtrainError, match="majority"):
            passk.majority(answers, right, k)


def test_wilson_is_where_the_normal_approximation_puts_the_share_at_z():
    """Its ends are the shares p from which the observation x lies z of p's own standard errors away."""
    for right, n in ((1, 10), (7, 20), (50, 400)):
        for p in passk.wilson(right, n):
            assert abs(right / n - p) == pytest.approx(passk.Z95 * math.sqrt(p * (1 - p) / n), abs=1e-9)
    assert passk.wilson(0, 10)[0] == 0 and 0 < passk.wilson(0, 10)[1] < 0.35
    assert passk.wilson(10, 10)[1] == 1
    low, high = passk.wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5])
def test_wilson_holds_the_truth_about_95_times_in_100(p):
    n = 100
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    held = sum(q for c, q in enumerate(chance) if passk.wilson(c, n)[0] <= p <= passk.wilson(c, n)[1])
    assert 0.92 < held < 0.99


def test_bootstrap_over_rows_holds_the_truth_and_one_over_samples_would_not():
    """Rows differ in difficulty, so their samples are not independent."""
    rng = np.random.default_rng(0)
    rows, samples, trials = 60, 16, 200
    held, narrow = 0, 0
    for trial in range(trials):
        difficulty_R = rng.beta(0.5, 0.5, rows)
        scores_RS = (rng.random((rows, samples)) < difficulty_R[:, None]).astype(float)
        low, high = passk.bootstrap(scores_RS.mean(1), draws=400, seed=trial)
        held += low <= 0.5 <= high
        low, high = passk.wilson(scores_RS.sum(), scores_RS.size)
        narrow += low <= 0.5 <= high
    assert held / trials > 0.88
    assert narrow / trials < 0.75


def test_an_interval_is_chosen_by_what_there_is():
    binary = np.array([[1.0], [0.0], [0.0], [1.0]])
    assert passk.interval(binary) == passk.wilson(2, 4)
    partial = np.array([[0.5], [0.0], [0.3], [1.0]])
    assert passk.interval(partial) == passk.bootstrap(partial.mean(1))
    assert passk.interval(np.repeat(binary, 3, 1)) == passk.bootstrap(binary.mean(1))
    nothing = passk.interval(np.zeros((50, 16)))
    assert nothing == passk.wilson(0, 50) and nothing[1] > 0.05, "50 rows without a right one are not certainty"
    assert passk.interval(np.ones((1, 1)))[0] < 0.3
    for low, high in (passk.interval(binary), passk.interval(partial), nothing):
        assert 0 <= low <= high <= 1 and isinstance(low, float)


def test_the_same_scores_give_the_same_interval_and_more_rows_a_narrower_one():
    rng = np.random.default_rng(1)
    few, many = rng.random((20, 4)), rng.random((2000, 4))
    assert passk.interval(few) == passk.interval(few)
    assert np.diff(passk.interval(many))[0] < np.diff(passk.interval(few))[0] / 5


@pytest.mark.parametrize("scores", [np.zeros((0, 4)), np.zeros(4), [[1.5]], [[float("nan")]]])
def test_an_interval_of_nonsense_is_refused(scores):
    with pytest.raises(LmtrainError, match="interval"):
        passk.interval(scores)
    with pytest.raises(LmtrainError, match="interval"):
        passk.wilson(2, 1)
