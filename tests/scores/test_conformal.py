"""What the sets and intervals promise, by simulation: whatever the model, over calibration rows and new ones."""

import math

import numpy as np
import pytest

from keras_vdrop.scores import conformal, regression
from tests.statistics import assert_mean


def test_quantile_by_hand():
    scores = [5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 8.0, 7.0, 6.0]
    assert conformal.quantile(scores, 0.9) == 9.0  # the 9th of 9
    assert conformal.quantile(scores, 0.85) == 9.0  # ⌈8.5⌉
    assert conformal.quantile(range(1, 100), 0.07) == 7.0  # for all that 100·0.07 is rounded to more than 7
    assert conformal.quantile([*scores, np.inf], 0.9) == np.inf  # ⌈9.9⌉ = 10 of 10


@pytest.mark.parametrize("rows, coverage", [(8, 0.9), (18, 0.95), (98, 0.99)])
def test_too_few_rows(rows, coverage):
    with pytest.raises(ValueError, match=rf"at least {rows + 1} calibration rows\. .* at most .*Received: {rows} rows"):
        conformal.quantile(np.zeros(rows), coverage)
    conformal.quantile(np.zeros(rows + 1), coverage)


@pytest.mark.parametrize("score, coverage", [("lac", 0.8), ("lac", 0.95), ("aps", 0.8)])
def test_sets_hold_the_label_so_often(score, coverage):
    rng, rows = np.random.default_rng(0), 49

    def share():
        """Of 20 new labels, in the sets of an overconfident model, its threshold from 49 others."""
        logits = rng.normal(size=(rows + 20, 4))
        labels = (logits + rng.gumbel(size=logits.shape)).argmax(-1)
        probability = np.exp(3 * logits) / np.exp(3 * logits).sum(-1, keepdims=True)
        threshold = conformal.set_threshold(probability[:rows], labels[:rows], coverage, score)
        sets = conformal.prediction_sets(probability[rows:], threshold, score)
        return sets[np.arange(20), labels[rows:]].mean()

    # no two scores about the threshold are equal, so that it is exact
    assert_mean([share() for _ in range(2000)], math.ceil((rows + 1) * coverage) / (rows + 1))


def test_equal_scores_only_add():
    probability = np.tile([0.5, 0.3, 0.2], (39, 1))
    threshold = conformal.set_threshold(probability, [0] * 20 + [1] * 12 + [2] * 7, 0.9, "aps")
    assert threshold == 1.0 and conformal.prediction_sets([[0.9, 0.06, 0.04]], threshold, "aps").all()


@pytest.mark.parametrize("scaled", [False, True])
def test_intervals_hold_y_so_often(scaled):
    rng, rows = np.random.default_rng(1), 39

    def share():
        x = rng.uniform(0.2, 2.0, size=rows + 20)
        y = np.sin(x) + x * rng.standard_t(3, size=len(x))
        prediction, scale = 0.5 * x, x if scaled else None
        old, new = slice(rows), slice(rows, None)
        part = (lambda rows: None) if scale is None else (lambda rows: scale[rows])
        threshold = conformal.interval_threshold(prediction[old], y[old], part(old), coverage=0.9)
        lower, upper = conformal.prediction_intervals(prediction[new], threshold, part(new))
        return regression.interval_coverage(lower, upper, y[new])

    assert_mean([share() for _ in range(2000)], 36 / 40)


def test_scores_by_hand():
    probability = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    for threshold, sets in [(0.4, [[0, 0, 0], [0, 0, 1]]), (0.75, [[1, 1, 0], [0, 0, 1]]), (1.0, np.ones((2, 3)))]:
        np.testing.assert_array_equal(conformal.prediction_sets(probability, threshold), sets)
    for threshold, sets in [(0.6, [[1, 0, 0], [0, 0, 0]]), (0.85, [[1, 1, 0], [0, 0, 1]])]:
        np.testing.assert_array_equal(conformal.prediction_sets(probability, threshold, "aps"), sets)
    lower, upper = conformal.prediction_intervals([1.0, 1.0], 2.0, scale=[0.5, 3.0])
    np.testing.assert_allclose([lower, upper], [[0, -5], [2, 7]])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="softmax"):
        conformal.set_threshold([[3.0, -1.0]], [0])
    with pytest.raises(ValueError, match="softmax"):
        conformal.prediction_sets([[3.0, -1.0]], 0.5)
    with pytest.raises(ValueError, match="score='raps'"):
        conformal.prediction_sets([[0.5, 0.5]], 0.5, score="raps")
    with pytest.raises(ValueError, match="coverage=90"):
        conformal.quantile([0.0], coverage=90)
    with pytest.raises(ValueError, match="NaN in 1 of 2 rows"):
        conformal.quantile([0.0, np.nan])
    with pytest.raises(ValueError, match="same shape"):
        conformal.interval_threshold([0.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="above 0"):
        conformal.interval_threshold([0.0] * 9, [0.0] * 9, scale=[0.0] * 9)
