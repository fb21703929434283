"""Scores against scikit-learn, and on predictions whose score is known."""

import numpy as np
import pytest
from sklearn import metrics

from keras_vdrop.functional import calibration

RNG = np.random.default_rng(0)
PROBABILITY = RNG.dirichlet(np.ones(4), size=500)
LABELS = RNG.integers(0, 4, size=500)


def test_against_scikit_learn():
    np.testing.assert_allclose(
        calibration.negative_log_likelihood(PROBABILITY, LABELS), metrics.log_loss(LABELS, PROBABILITY)
    )
    expected = metrics.accuracy_score(LABELS, PROBABILITY.argmax(-1))
    np.testing.assert_allclose(calibration.accuracy(PROBABILITY, LABELS), expected)


def test_calibrated_predictions_have_little_error_and_overconfident_ones_much():
    confidence = RNG.uniform(0.5, 1.0, size=100_000)
    probability = np.stack([confidence, 1 - confidence], axis=-1)
    labels = (RNG.uniform(size=len(confidence)) > confidence).astype(int)
    # With n rows in 8 bins, each gap has a standard error of at most ½/√(n/8).
    assert calibration.expected_calibration_error(probability, labels) < 5 * 0.5 / np.sqrt(len(labels) / 8)
    certain = np.stack([np.ones(1000), np.zeros(1000)], axis=-1)
    half = np.arange(1000) % 2
    np.testing.assert_allclose(calibration.expected_calibration_error(certain, half), 0.5)


def test_bins_by_hand():
    probability = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]])
    labels = np.array([0, 1, 0])
    # two bins: all three in the upper one; accuracy 2/3, mean confidence 2.3/3
    np.testing.assert_allclose(calibration.expected_calibration_error(probability, labels, num_bins=2), 0.1)


def test_no_probability_for_the_label_is_infinite():
    assert calibration.negative_log_likelihood([[1.0, 0.0]], [1]) == np.inf


@pytest.mark.parametrize("score", [calibration.accuracy, calibration.expected_calibration_error])
def test_logits_and_shapes_are_refused(score):
    with pytest.raises(ValueError, match="softmax"):
        score([[3.0, -1.0]], [0])
    with pytest.raises(ValueError, match="shapes"):
        score([[0.5, 0.5]], [0, 1])
    with pytest.raises(ValueError, match="sum to 1"):
        score([[np.nan, 0.5]], [0])
