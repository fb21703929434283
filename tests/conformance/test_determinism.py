"""Layers are noisy only in training and in a sampling scope. Equal seeds give equal noise; each call draws afresh."""

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from tests.cases import array, randomize


def draws(case, seed, calls=2):
    layer = case.built(seed=seed)
    randomize(layer)
    return [array(case.call(layer, case.inputs(), training=True)) for _ in range(calls)]


def test_prediction_is_deterministic(case):
    layer, x = case.built(), case.inputs()
    randomize(layer)
    one, other = array(case.call(layer, x)), array(case.call(layer, x, training=False))
    np.testing.assert_array_equal(one, other)
    case.call(layer, x, training=True)
    np.testing.assert_array_equal(one, array(case.call(layer, x)))


def test_same_seed_same_output_and_other_seed_other_output(case):
    np.testing.assert_array_equal(draws(case, 1), draws(case, 1))
    assert not np.array_equal(draws(case, 1), draws(case, 2))


def test_neighbouring_seeds_do_not_share_draws(case):
    one, other = draws(case, 1, calls=4), draws(case, 2, calls=4)
    assert not any(np.array_equal(a, b) for a in one for b in other)


def test_every_call_draws_afresh(case):
    one, other = draws(case, 1)
    assert not np.array_equal(one, other)


def test_global_seed_decides_where_none_is_given(case):
    runs = []
    for _ in range(2):
        keras.utils.set_random_seed(7)
        runs.append(draws(case, None))
    np.testing.assert_array_equal(*runs)


def test_sampling_scope_draws_without_training(case):
    layer, x = case.built(), case.inputs()
    randomize(layer)
    mean = array(case.call(layer, x))
    with kv.sampling():
        one, other = array(case.call(layer, x)), array(case.call(layer, x, training=False))
    assert not np.array_equal(one, other) and not np.array_equal(one, mean)
    np.testing.assert_array_equal(array(case.call(layer, x)), mean)


def test_integers_give_what_equal_floats_give(case):
    """Integers are numbers. In a table they are indices, and Keras's `Dropout` does not take them."""
    if "embedding" in case.name or issubclass(case.cls, keras.layers.Dropout):
        pytest.skip("no numbers")
    numbers = np.random.default_rng(0).integers(-3, 4, case.inputs().shape)
    outputs = []
    for x in (numbers.astype("int32"), numbers.astype("float32")):
        layer = case.built(seed=1)
        randomize(layer)
        outputs.append(array(case.call(layer, x, training=True)))
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)
