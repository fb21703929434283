"""Scores of detection against scikit-learn, with and without ties, and by hand."""

import itertools

import numpy as np
import pytest
from sklearn import metrics

from keras_vdrop.scores import detection
from tests.statistics import assert_mean

RNG = np.random.default_rng(0)
APART = RNG.normal(size=301), RNG.normal(1.0, 1.5, size=200)
TIES = RNG.integers(0, 6, size=301), RNG.integers(2, 9, size=200)
PAIRS = pytest.mark.parametrize("inside, outside", [APART, TIES], ids=["continuous", "ties"])


@PAIRS
def test_against_scikit_learn(inside, outside):
    y = np.r_[np.zeros(len(inside)), np.ones(len(outside))]
    scores = np.r_[inside, outside]
    np.testing.assert_allclose(detection.auroc(inside, outside), metrics.roc_auc_score(y, scores))
    np.testing.assert_allclose(detection.aupr(inside, outside), metrics.average_precision_score(y, scores))
    expected = metrics.average_precision_score(1 - y, -scores)
    np.testing.assert_allclose(detection.aupr(-np.asarray(outside), -np.asarray(inside)), expected)
    fpr, tpr, _ = metrics.roc_curve(y, scores, drop_intermediate=False)
    for level in (0.05, 0.5, 0.8, 0.95):
        np.testing.assert_allclose(detection.fpr_at_tpr(inside, outside, level), fpr[tpr >= level - 1e-12].min())


def test_auroc_is_mann_and_whitneys_u():
    inside, outside = RNG.integers(0, 3, size=7), RNG.integers(0, 4, size=5)
    wins = np.mean([(o > i) + 0.5 * (o == i) for i, o in itertools.product(inside, outside)])
    np.testing.assert_allclose(detection.auroc(inside, outside), wins)
    np.testing.assert_allclose(detection.auroc(outside, inside), 1 - wins)


def test_the_best_and_the_worst_score():
    low, high = [0.1, 0.2], [0.3, np.inf]
    assert detection.auroc(low, high) == detection.aupr(low, high) == 1.0
    assert detection.fpr_at_tpr(low, high) == 0.0
    assert detection.auroc(high, low) == 0.0 and detection.fpr_at_tpr(high, low) == 1.0
    same = np.ones(10)
    assert detection.auroc(same, same) == 0.5 and detection.fpr_at_tpr(same, same) == 1.0
    np.testing.assert_allclose(detection.aupr(np.ones(30), same), 0.25)


def test_risk_coverage_by_hand():
    coverage, risk = detection.risk_coverage([0.3, 0.1, 0.2, 0.4], [1, 0, 0, 1])
    np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(risk, [0, 0, 1 / 3, 0.5])
    np.testing.assert_allclose(detection.aurc([0.3, 0.1, 0.2, 0.4], [1, 0, 0, 1]), (1 / 3 + 1 / 2) / 4)
    assert detection.excess_aurc([0.3, 0.1, 0.2, 0.4], [1, 0, 0, 1]) == 0
    # the worst order: 1, 1, 2/3, 1/2
    np.testing.assert_allclose(detection.excess_aurc([0.1, 0.4, 0.3, 0.2], [1, 0, 0, 1]), (1 + 1 + 1 / 3) / 4)


def test_ties_are_the_mean_over_their_orders():
    uncertainty, loss = np.array([1, 1, 1, 0, 2]), np.array([1.0, 0.0, 0.5, 0.2, 0.7])
    orders = [[3, *order, 4] for order in itertools.permutations([0, 1, 2])]
    expected = np.mean([np.cumsum(loss[order]) / np.arange(1, 6) for order in orders], axis=0)
    np.testing.assert_allclose(detection.risk_coverage(uncertainty, loss)[1], expected)
    shuffled = [4, 2, 0, 3, 1]
    np.testing.assert_allclose(detection.risk_coverage(uncertainty[shuffled], loss[shuffled])[1], expected)


def test_an_uncertainty_that_tells_nothing_has_the_mean_loss():
    rng = np.random.default_rng(1)
    loss = rng.uniform(size=50)
    np.testing.assert_allclose(detection.aurc(np.zeros(50), loss), loss.mean())
    assert_mean([detection.aurc(rng.uniform(size=50), loss) for _ in range(500)], loss.mean())


@pytest.mark.parametrize("score", [detection.auroc, detection.aupr, detection.fpr_at_tpr, detection.aurc])
def test_bad_input_is_refused(score):
    with pytest.raises(ValueError, match="NaN in 1 of 2 rows"):
        score([0.1, np.nan], [0.0, 1.0])
    with pytest.raises(ValueError, match="shape"):
        score([], [0.0])
    with pytest.raises(ValueError, match="1 axis"):
        score([[0.1]], [0.1])


def test_out_of_range():
    with pytest.raises(ValueError, match="tpr=95"):
        detection.fpr_at_tpr([0.1], [0.2], tpr=95)
    with pytest.raises(ValueError, match="same shape"):
        detection.risk_coverage([0.1, 0.2], [1])
    with pytest.raises(ValueError, match="NaN or infinity"):
        detection.aurc([0.1, 0.2], [1, np.inf])
