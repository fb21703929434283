"""Decompositions against NumPy and against cases whose answer is known."""

import numpy as np
from scipy import stats

from keras_vdrop.functional import uncertainty
from tests.cases import array

RNG = np.random.default_rng(0)


def arrays(result):
    return {name: array(value) for name, value in result.items()}


def test_moments():
    samples = RNG.normal(size=(7, 3, 2)).astype("float32")
    result = arrays(uncertainty.moments(samples))
    np.testing.assert_allclose(result["mean"], samples.mean(0), rtol=1e-5)
    np.testing.assert_allclose(result["variance"], samples.var(0), rtol=1e-5)


def test_a_small_variance_far_from_zero_is_not_lost():
    samples = (1e4 + 0.1 * RNG.normal(size=(50, 3))).astype("float32")
    result = arrays(uncertainty.moments(samples))
    np.testing.assert_allclose(result["variance"], samples.astype("float64").var(0), rtol=1e-3)


def test_categorical_against_scipy():
    probability = RNG.dirichlet(np.ones(4), size=(6, 5)).astype("float32")
    result = arrays(uncertainty.categorical(probability))
    mean = probability.mean(0)
    predictive, expected = stats.entropy(mean, axis=-1), stats.entropy(probability, axis=-1).mean(0)
    np.testing.assert_allclose(result["probability"], mean, rtol=1e-5)
    np.testing.assert_allclose(result["predictive_entropy"], predictive, rtol=1e-5)
    np.testing.assert_allclose(result["expected_entropy"], expected, rtol=1e-5)
    np.testing.assert_allclose(result["mutual_information"], predictive - expected, atol=1e-6)


def test_agreement_has_no_mutual_information_and_disagreement_all_of_it():
    agree = np.tile(np.array([[[0.5, 0.5]]], "float32"), (4, 1, 1))
    disagree = np.array([[[1.0, 0.0]], [[0.0, 1.0]]], "float32")
    one, other = arrays(uncertainty.categorical(agree)), arrays(uncertainty.categorical(disagree))
    np.testing.assert_allclose([one["mutual_information"][0], one["expected_entropy"][0]], [0, np.log(2)], atol=1e-6)
    np.testing.assert_allclose(
        [other["mutual_information"][0], other["expected_entropy"][0]], [np.log(2), 0], atol=1e-6
    )


def test_bernoulli_is_categorical_with_two_classes():
    probability = RNG.uniform(size=(6, 5)).astype("float32")
    two = arrays(uncertainty.categorical(np.stack([1 - probability, probability], -1)))
    one = arrays(uncertainty.bernoulli(probability))
    np.testing.assert_allclose(one["mutual_information"], two["mutual_information"], atol=1e-6)
    np.testing.assert_allclose(one["probability"], probability.mean(0), rtol=1e-5)


def test_normal_splits_the_variance_of_the_mixture():
    loc, scale = RNG.normal(size=(2, 50, 3)).astype("float32")
    result = arrays(uncertainty.normal(loc, np.abs(scale)))
    draws = loc + np.abs(scale) * RNG.normal(size=(20_000, 50, 3))
    total = result["aleatoric_variance"] + result["epistemic_variance"]
    np.testing.assert_allclose(total, draws.var(axis=(0, 1)), rtol=0.02)
    np.testing.assert_allclose(result["mean"], loc.mean(0), rtol=1e-5, atol=1e-6)
