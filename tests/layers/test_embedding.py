"""Embeddings: what is drawn for which occurrence of a word, and in all else Keras's layer."""

import itertools

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from keras_vdrop.functional import estimators
from tests.cases import array, randomize
from tests.statistics import assert_mean, assert_variance, sample

ESTIMATORS = list(estimators.ESTIMATORS)
WORDS, UNITS = 5, 3
TABLE = np.random.default_rng(1).normal(size=(WORDS, UNITS)).astype("float32")
X = np.array([[1, 2, 1, 4], [1, 0, 3, 3]], "int32")


def embedding(**arguments):
    return kv.VariationalEmbedding(WORDS, UNITS, **{"kl_weight": 0.1, "weights": TABLE, **arguments})


def quiet(**arguments):
    """A layer whose noise is below what float32 can tell."""
    return embedding(initial_log_variance=-45.0, **arguments)


def perturbations(estimator, x, count):
    """Draws around a mean of exactly 0."""
    layer = embedding(estimator=estimator, weights=0 * TABLE, initial_log_variance=0.0)
    return [array(layer(x, training=True)) for _ in range(count)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mean_and_variance_of_every_occurrence(estimator):
    layer = embedding(estimator=estimator)
    randomize(layer)
    loc, variance = array(layer.embeddings.loc), np.exp(array(layer.embeddings.log_variance))
    np.testing.assert_array_equal(array(layer(X)), loc[X])
    samples = sample(layer, X)
    assert_mean(samples, loc[X])
    assert_variance(samples, variance[X])


def test_local_reparameterization_draws_a_row_for_each_occurrence():
    for noise in perturbations("local_reparameterization", X, 3):
        assert len(np.unique(noise)) == noise.size


def test_reparameterization_draws_one_table_for_the_batch():
    for noise in perturbations("reparameterization", X, 3):
        assert len(np.unique(noise)) == WORDS * UNITS
        np.testing.assert_array_equal(noise[0, 0], noise[0, 2])
        np.testing.assert_array_equal(noise[0, 0], noise[1, 0])
        np.testing.assert_array_equal(noise[1, 2], noise[1, 3])


@pytest.mark.slow
def test_flipout_draws_one_table_and_signs_for_each_example():
    """The signs are those of an example and a unit: the same for every word of a sentence."""
    first, second = np.stack(perturbations("flipout", X, 200)).swapaxes(0, 1)
    np.testing.assert_array_equal(first[:, 0], first[:, 2])
    np.testing.assert_array_equal(second[:, 2], second[:, 3])
    np.testing.assert_array_equal(np.abs(first[:, 0]), np.abs(second[:, 0]))
    assert_mean(np.sign(first[:, 0] * second[:, 0]), 0.0)


def test_mask_is_that_of_keras():
    x = np.array([[1, 2, 0, 0], [3, 0, 4, 0]])
    twin = keras.layers.Embedding(WORDS, UNITS, mask_zero=True, weights=TABLE)
    layer = quiet(mask_zero=True)
    np.testing.assert_array_equal(array(layer.compute_mask(x)), array(twin.compute_mask(x)))
    assert embedding().compute_mask(x) is None and layer.supports_masking
    average = keras.layers.GlobalAveragePooling1D()
    for training in (False, True):
        averages = array(average(layer(x, training=training)))
        np.testing.assert_allclose(averages, array(average(twin(x))), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("x", [[[0]], X.tolist(), [[2] * 50] * 3], ids=["one", "some", "many"])
def test_kl_is_that_of_the_whole_table_once(x):
    layer = embedding(kernel_prior=kv.priors.Normal(1.0), initial_log_variance=-1.0)
    layer(np.array(x), training=True)
    expected = 0.5 * np.sum(np.exp(-1.0) + TABLE.astype("float64") ** 2 - 1.0 + 1.0)
    np.testing.assert_allclose(array(kv.kl_divergence(layer)), expected, rtol=1e-5)
    np.testing.assert_allclose(array(sum(layer.losses)), 0.1 * expected, rtol=1e-5)


def outcome(layer, x, **arguments):
    """The output, or the type of the exception."""
    try:
        return array(layer(x, **arguments))
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("index", [WORDS, 10 * WORDS, -1, -WORDS - 1])
def test_an_index_out_of_range_gives_what_keras_gives(index):
    x = np.array([[1, index]])
    expected = outcome(keras.layers.Embedding(WORDS, UNITS, weights=TABLE), x)
    for training, estimator in itertools.product((False, True), ESTIMATORS):
        result = outcome(quiet(estimator=estimator), x, training=training)
        if isinstance(expected, type):
            assert result is expected
        else:
            np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)  # and NaN where Keras has it


@pytest.mark.parametrize("dtype", ["float32", "float16", "bool", "int64", "int16", "int8", "uint8", "uint32"])
def test_indices_of_any_type(dtype):
    x = (X % 2 if dtype == "bool" else X).astype(dtype)
    expected = array(keras.layers.Embedding(WORDS, UNITS, weights=TABLE)(x))
    for training, estimator in itertools.product((False, True), ESTIMATORS):
        result = array(quiet(estimator=estimator)(x, training=training))
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prior", ["log_uniform", None])
@pytest.mark.parametrize("weights", [TABLE, [TABLE]], ids=["array", "list"])
def test_weights_are_the_mean(weights, prior):
    layer = kv.VariationalEmbedding(WORDS, UNITS, weights=weights, kernel_prior=prior, kl_weight=0.1)
    np.testing.assert_array_equal(array(layer(np.arange(WORDS))), TABLE)


def test_weights_by_position():
    layer = kv.VariationalEmbedding(WORDS, UNITS, "uniform", None, None, False, TABLE)
    np.testing.assert_array_equal(array(layer.embeddings.loc), TABLE)


def test_weights_of_another_shape():
    with pytest.raises(ValueError, match=r"\(5, 2\)"):
        embedding(weights=TABLE[:, :2])


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "3", None])
@pytest.mark.parametrize("name", ["input_dim", "output_dim"])
def test_bad_sizes_raise_what_keras_raises(name, value):
    arguments = {"input_dim": 4, "output_dim": 2, name: value}
    with pytest.raises(ValueError) as expected:
        keras.layers.Embedding(**arguments)
    with pytest.raises(ValueError) as error:
        kv.VariationalEmbedding(**arguments)
    assert f"{name}={value}" in str(error.value) and str(error.value) == str(expected.value)


def test_pruning_by_ard_drops_words_only():
    layer = embedding(kernel_prior=kv.priors.ARD(group_axis=0), initial_log_variance=-2.0)
    loc = np.where(np.abs(TABLE) < 0.5, 1e-3, TABLE)  # a weight without signal in a word that has some
    loc[[1, 3]] = 1e-3  # words that have none
    layer.embeddings.loc.assign(loc)
    report = kv.prune(layer)
    assert report.left == 3 * UNITS and (np.abs(loc[[0, 2, 4]]) == 1e-3).any()
    expected = loc * np.array([1, 0, 1, 0, 1], "float32")[:, None]
    np.testing.assert_array_equal(array(layer(np.arange(WORDS))), expected)
    samples = array(layer(np.arange(WORDS), training=True))
    np.testing.assert_allclose(samples[[1, 3]], 0.0, atol=1e-6)
    assert (samples[[0, 2, 4]] != loc[[0, 2, 4]]).all()
