"""Scores against scikit-learn and TFP, and on predictions whose score is known."""

import numpy as np
import pytest
from scipy import optimize, special
from sklearn import metrics

from keras_vdrop.scores import calibration
from tests.statistics import assert_mean

RNG = np.random.default_rng(0)
PROBABILITY = RNG.dirichlet(np.ones(4), size=500)
LABELS = np.where(RNG.uniform(size=500) < 0.6, PROBABILITY.argmax(-1), RNG.integers(0, 4, size=500))
SCORES = [
    calibration.accuracy,
    calibration.negative_log_likelihood,
    calibration.expected_calibration_error,
    calibration.classwise_calibration_error,
    calibration.brier_score,
    calibration.brier_decomposition,
]


def two_classes(rng, rows, excess=0.0):
    """A confidence, and a label that is right so often; or less often, by `excess`."""
    confidence = rng.uniform(0.5, 1.0, size=rows)
    labels = (rng.uniform(size=rows) > confidence - excess).astype(int)
    return np.stack([confidence, 1 - confidence], axis=-1), labels


@pytest.mark.slow
def test_against_scikit_learn():
    np.testing.assert_allclose(
        calibration.negative_log_likelihood(PROBABILITY, LABELS), metrics.log_loss(LABELS, PROBABILITY)
    )
    expected = metrics.accuracy_score(LABELS, PROBABILITY.argmax(-1))
    np.testing.assert_allclose(calibration.accuracy(PROBABILITY, LABELS), expected)
    probability, labels = two_classes(RNG, 300)
    # of two classes, scikit-learn's is half of ours
    expected = 2 * metrics.brier_score_loss(labels, probability[:, 1])
    np.testing.assert_allclose(calibration.brier_score(probability, labels), expected)


@pytest.mark.slow
def test_against_tensorflow_probability():
    from tensorflow_probability import stats

    logits = np.log(PROBABILITY)
    for bins in (1, 7, 15):
        expected = stats.expected_calibration_error(bins, logits.astype("float32"), LABELS.astype("int32"))
        ours = calibration.expected_calibration_error(PROBABILITY, LABELS, bins)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
    # TFP leaves out Σ y² = 1
    expected = 1 + np.mean(stats.brier_score(LABELS, logits))
    np.testing.assert_allclose(calibration.brier_score(PROBABILITY, LABELS), expected)


def test_calibrated_predictions_have_little_error_and_overconfident_ones_much():
    probability, labels = two_classes(RNG, 100_000)
    # With n rows in 8 bins, each gap has a standard error of at most ½/√(n/8).
    bound = 5 * 0.5 / np.sqrt(len(labels) / 8)
    assert calibration.expected_calibration_error(probability, labels) < bound
    assert calibration.classwise_calibration_error(probability, labels) < bound * np.sqrt(2)
    certain = np.stack([np.ones(1000), np.zeros(1000)], axis=-1)
    half = np.arange(1000) % 2
    np.testing.assert_allclose(calibration.expected_calibration_error(certain, half), 0.5)
    np.testing.assert_allclose(calibration.classwise_calibration_error(certain, half), 0.5)


@pytest.mark.parametrize("binning", ["width", "mass"])
@pytest.mark.parametrize("excess", [0.0, 0.2])
def test_debiased_square_is_right_on_average(binning, excess):
    rng = np.random.default_rng(1)
    sets = [two_classes(rng, 200, excess) for _ in range(500)]
    plain = np.array([calibration.expected_calibration_error(*rows, 15, binning) for rows in sets])
    debiased = np.array([calibration.expected_calibration_error(*rows, 15, binning, debiased=True) for rows in sets])
    assert_mean(debiased * np.abs(debiased), excess**2)
    if excess == 0:
        assert plain.mean() > 0.05 and plain.min() > 0.01 and abs(debiased.mean()) < 0.01


def test_bins_by_hand():
    probability = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]])
    labels = np.array([0, 1, 0])
    # two bins: all three in the upper one; accuracy 2/3, mean confidence 2.3/3
    np.testing.assert_allclose(calibration.expected_calibration_error(probability, labels, num_bins=2), 0.1)
    # class 0: a gap of 0.3/3 in the upper bin; class 1: the same in the lower one
    np.testing.assert_allclose(calibration.classwise_calibration_error(probability, labels, num_bins=2), 0.1)
    # three bins of a row each: |1 − 0.9|, |0 − 0.8|, |1 − 0.6|
    np.testing.assert_allclose(calibration.expected_calibration_error(probability, labels, 3, "mass"), 1.3 / 3)
    bins = calibration.reliability(probability, labels, num_bins=2)
    np.testing.assert_allclose([*bins.count, *bins.confidence, *bins.accuracy], [3, 2.3 / 3, 2 / 3])
    np.testing.assert_allclose(bins.variance, np.var([0.1, -0.8, 0.4], ddof=1) / 3)


def test_equal_mass_is_a_split_of_the_sorted_rows():
    confidence, hit = PROBABILITY.max(-1), PROBABILITY.argmax(-1) == LABELS
    parts = np.array_split(np.argsort(confidence), 10)
    expected = sum(abs((hit - confidence)[rows].sum()) for rows in parts) / 500
    np.testing.assert_allclose(calibration.expected_calibration_error(PROBABILITY, LABELS, 10, "mass"), expected)


def test_a_row_a_bin_has_no_variance_to_take_off():
    assert calibration.expected_calibration_error([[0.9, 0.1], [0.6, 0.4]], [0, 1], debiased=True) == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_edges_belong_to_the_bin_below_whatever_the_precision(dtype):
    high = np.array([0.4, 0.6, 0.8, 1.0], dtype)
    probability = np.stack([high, 1 - high], axis=-1)
    bins = calibration.reliability(probability, [0] * 4, num_bins=5)
    np.testing.assert_allclose(bins.confidence, [0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(bins.count, [2, 1, 1])


def test_equal_confidences_share_a_bin_of_equal_mass():
    probability = np.array([[0.9, 0.1]] * 5 + [[0.6, 0.4]])
    assert calibration.reliability(probability, [0, 0, 0, 1, 1, 0], 3, "mass").count.tolist() == [1, 5]


def test_no_probability_for_the_label_is_infinite():
    assert calibration.negative_log_likelihood([[1.0, 0.0]], [1]) == np.inf


def total(parts):
    return parts["reliability"] - parts["resolution"] + parts["uncertainty"] + parts["within"]


def test_murphys_decomposition_of_discrete_forecasts():
    chance = np.array([0.1, 0.4, 0.4, 0.8, 0.8, 0.8])
    rain = np.array([0, 0, 1, 1, 1, 0])
    parts = calibration.brier_decomposition(np.stack([1 - chance, chance], axis=-1), rain, num_bins=None)
    # by hand: groups of 1, 2 and 3 rows, in which it rained in 0, 1/2 and 2/3; both classes count the same
    reliability = 2 * (1 * 0.1**2 + 2 * 0.1**2 + 3 * (0.8 - 2 / 3) ** 2) / 6
    resolution = 2 * (1 * 0.5**2 + 3 * (2 / 3 - 0.5) ** 2) / 6
    expected = {"reliability": reliability, "resolution": resolution, "uncertainty": 0.5, "within": 0.0}
    assert parts == pytest.approx(expected)
    assert total(parts) == pytest.approx(2 * np.mean((chance - rain) ** 2))


@pytest.mark.parametrize("binning", ["width", "mass"])
@pytest.mark.parametrize("num_bins", [None, 1, 15])
def test_decomposition_is_exact(num_bins, binning):
    coarse = np.round(PROBABILITY * 10) / 10
    coarse[:, 0] = 1 - coarse[:, 1:].sum(-1)
    for probability in (PROBABILITY, np.abs(coarse) / np.abs(coarse).sum(-1, keepdims=True)):
        parts = calibration.brier_decomposition(probability, LABELS, num_bins, binning)
        assert total(parts) == pytest.approx(calibration.brier_score(probability, LABELS))
        assert all(parts[name] >= 0 for name in ("reliability", "resolution", "uncertainty"))
    if num_bins is None:
        assert parts["within"] == pytest.approx(0, abs=1e-12)
    if num_bins == 1:
        assert parts["resolution"] == pytest.approx(0, abs=1e-12)


def test_reliability_of_calibrated_forecasts_is_chance_alone():
    def reliability(rng):
        chance = rng.choice([0.2, 0.5, 0.9], size=400)
        y = (rng.uniform(size=400) < chance).astype(int)
        return calibration.brier_decomposition(np.stack([1 - chance, chance], axis=-1), y, None)["reliability"]

    rng = np.random.default_rng(2)
    # Each of a value's n rows has the variance p(1 − p), and their mean a n-th of it: Σ n/B·p(1 − p)/n, twice.
    assert_mean([reliability(rng) for _ in range(1000)], 2 * (0.16 + 0.25 + 0.09) / 400)


def nll(temperature, logits, labels):
    return -special.log_softmax(logits / temperature, axis=-1)[np.arange(len(labels)), labels].mean()


@pytest.mark.parametrize("factor", [0.05, 0.5, 1.0, 4.0, 30.0])
def test_temperature_against_scipy_whatever_the_scale(factor):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(400, 5)) * 2
    labels = (special.log_softmax(logits, axis=-1) + rng.gumbel(size=logits.shape)).argmax(-1)
    logits = factor * logits + rng.normal(size=(400, 1)) * 1000  # a constant a row tells nothing
    found = calibration.fit_temperature(logits, labels)
    expected = optimize.minimize_scalar(
        lambda t: nll(np.exp(t), logits, labels), bounds=np.log([0.01, 100]), method="bounded", options={"xatol": 1e-9}
    )
    np.testing.assert_allclose(found, np.exp(expected.x), rtol=1e-4)
    assert 0.8 * factor < found < 1.25 * factor


def test_temperature_in_closed_form():
    # two classes, a difference of 8, right in three of four: 8/T = log 3
    logits = [[8.0, 0.0], [0.0, 8.0], [8.0, 0.0], [8.0, 0.0]]
    np.testing.assert_allclose(calibration.fit_temperature(logits, [0, 1, 0, 1]), 8 / np.log(3))


def test_temperature_without_a_minimum_is_the_bound_and_says_so():
    separable = np.eye(3)[[0, 1, 2, 0]]
    with pytest.warns(UserWarning, match="use more rows"):
        assert calibration.fit_temperature(separable, [0, 1, 2, 0]) == pytest.approx(0.01)
    with pytest.warns(UserWarning, match="validation"):
        assert calibration.fit_temperature(separable, [0, 1, 2, 0], bounds=(0.5, 2.0)) == pytest.approx(0.5)
    with pytest.warns(UserWarning, match="100 is returned"):
        assert calibration.fit_temperature(-separable, [0, 1, 2, 0]) == pytest.approx(100)
    with pytest.warns(UserWarning, match="no maximum"):
        calibration.fit_temperature(np.zeros((4, 3)), [0, 1, 2, 0])


def test_temperature_refuses():
    with pytest.raises(ValueError, match="bounds=\\(0, 1\\)"):
        calibration.fit_temperature([[1.0, 0.0]], [0], bounds=(0, 1))
    with pytest.raises(ValueError, match="1 of 2 rows"):
        calibration.fit_temperature([[1.0, 0.0], [np.inf, 0.0]], [0, 1])


@pytest.mark.parametrize("score", SCORES)
def test_logits_and_shapes_are_refused(score):
    with pytest.raises(ValueError, match="softmax"):
        score([[3.0, -1.0]], [0])
    with pytest.raises(ValueError, match="shapes"):
        score([[0.5, 0.5]], [0, 1])
    with pytest.raises(ValueError, match="sum to 1"):
        score([[np.nan, 0.5]], [0])
    with pytest.raises(ValueError, match="NaN in 1 of 2 rows"):
        score([[np.nan, 0.5], [0.5, 0.5]], [0, 0])
    with pytest.raises(ValueError, match="labels from 2 to 2"):
        score([[0.5, 0.5]], [2])
    with pytest.raises(ValueError, match="ints"):
        score([[0.5, 0.5]], [0.5])
    with pytest.raises(ValueError, match="stack"):
        score([0.5, 0.5], [0, 1])
    with pytest.raises(ValueError, match="shapes"):
        score(np.zeros((0, 2)), np.zeros(0))


def test_bins_are_refused():
    with pytest.raises(ValueError, match="num_bins=0"):
        calibration.expected_calibration_error(PROBABILITY, LABELS, num_bins=0)
    with pytest.raises(ValueError, match="binning='area'"):
        calibration.classwise_calibration_error(PROBABILITY, LABELS, binning="area")
