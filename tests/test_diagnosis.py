"""What is said of a posterior by the way that it has gone."""

import warnings

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from keras_vdrop.diagnosis import Record
from tests.cases import array

EXAMPLES = 100
TO_AND_FRO = np.random.default_rng(1).uniform(-1.0, 1.0, size=20)


def model_with(spread):
    """A weight tensor whose log variances are as they are made, or as a training has left them."""
    model = keras.Sequential([keras.Input((20,)), kv.VariationalDense(10, initial_log_variance=-8.0)])
    weight = model.layers[0].kernel
    weight.log_variance.assign_add(spread * np.random.default_rng(0).normal(size=weight.shape))
    return model


def said(moves, kl, spread=0.0, steps=10, beta=1.0, nll=1.0, temperature=1.0, start_kl=0.0, **arguments):
    """Names of the warnings after log variances have been at those places, relative to their start.

    Args:
        moves: Numbers.
        kl: An example's.
        spread: The standard deviation of the log variances among each other.
        steps: From each place to the next.
        start_kl: An example's, at first.
    """
    model = model_with(spread)
    log_variance = model.layers[0].kernel.log_variance
    start = array(log_variance.value)
    record = Record(model)
    record._start_kl = start_kl * EXAMPLES
    for move in moves:
        log_variance.assign(start + move)
        if record.step(beta, steps):
            record.look()
    record.add(nll, kl * EXAMPLES)
    record.end()
    return list(record.warnings(model, EXAMPLES, temperature, **arguments))


STRAIGHT = np.linspace(0.0, 1.0, 21)[1:]


@pytest.mark.parametrize(
    ("moves", "spread", "kl", "expected"),
    [
        (0.9 * STRAIGHT, 0.0, 5.0, ["stays"]),
        (3.0 * STRAIGHT, 0.0, 5.0, []),  # on its way, or there
        (3.0 * STRAIGHT, 0.0, 50.0, ["dwarfs"]),
        (0.0 * STRAIGHT, 0.0, 5.0, ["stays"]),
        (0.01 * TO_AND_FRO, 0.0, 5.0, ["stays"]),  # noise, and no place that it has found
        (0.5 * TO_AND_FRO, 0.0, 5.0, []),
        (0.5 * TO_AND_FRO, 0.0, 50.0, ["dwarfs"]),
        (0.9 * STRAIGHT, 2.0, 5.0, ["stays"]),
        (0.01 * TO_AND_FRO, 2.0, 5.0, []),  # where a training before has led it
        (0.0 * STRAIGHT, 2.0, 5.0, []),
        (0.0 * STRAIGHT, 2.0, 50.0, ["dwarfs"]),
        (0.9 * STRAIGHT, 0.0, 0.5, []),
    ],
)
def test_a_posterior_at_its_place_is_told_from_one_that_stays(moves, spread, kl, expected):
    assert said(moves, kl, spread) == expected


@pytest.mark.parametrize("steps, long_enough, in_a_loop", [(2, False, False), (3, True, False), (10, True, True)])
def test_it_takes_steps_and_more_of_them_in_a_loop(steps, long_enough, in_a_loop):
    """Twenty times as many."""
    assert bool(said(0.1 * STRAIGHT, 50.0, steps=steps)) == long_enough
    assert bool(said(0.1 * STRAIGHT, 50.0, steps=steps, is_one_of_many=True)) == in_a_loop


@pytest.mark.slow
def test_a_kl_that_has_fallen_is_that_of_a_posterior_that_has_moved():
    """As that of slow log variances, whose means go to 0 first; it is given time."""
    assert said(0.1 * STRAIGHT, 5.0, start_kl=9.0) == ["stays"]
    assert said(0.1 * STRAIGHT, 5.0, start_kl=11.0) == []
    assert said(0.1 * STRAIGHT, 50.0, start_kl=110.0) == ["dwarfs"]
    assert said(0.1 * STRAIGHT, 50.0, start_kl=110.0, steps=5) == []


def test_the_kl_counts_by_its_weight():
    moves = 3.0 * STRAIGHT
    assert said(moves, 50.0) == ["dwarfs"]
    assert said(moves, 50.0, temperature=0.1) == said(moves, 50.0, beta=0.1) == said(moves, 50.0, beta=0.0) == []
    assert said(moves, 50.0, nll=None) == []


def test_an_nll_of_about_0_is_no_measure():
    assert said(0.1 * STRAIGHT, 0.05, nll=0.001) == []
    assert said(3.0 * STRAIGHT, 0.5, nll=-0.001) == []
    assert said(3.0 * STRAIGHT, 1.5, nll=-0.001) == ["dwarfs"]


def test_steps_count_from_where_the_kl_has_about_its_weight():
    model = model_with(0.0)

    def after(betas, count=1):
        record = Record(model)
        record._start_kl = 0.0
        for beta in betas:
            if record.step(beta, count):
                record.look()
        record.add(1.0, 50.0 * EXAMPLES)
        record.end()
        return list(record.warnings(model, EXAMPLES, 1.0))

    assert after([0.0] * 100 + [1.0] * 40) == []
    assert after([0.0] * 100 + [1.0] * 60) == ["stays"]
    assert after(list(np.linspace(0.6, 1.0, 60))) == ["stays"]  # never the same, and hardly another
    assert after(list(np.linspace(0.0, 1.0, 60))) == []
    assert after([0.0, 1.0], count=60) == ["stays"]  # in one call


def test_what_is_frozen_or_given_up_is_not_looked_at():
    model = model_with(0.0)
    weight = model.layers[0].kernel
    weight.log_variance.trainable = False
    assert Record(model)._log_variances().size == 0
    weight.log_variance.trainable = True
    weight.assign(np.ones((20, 10)))
    gone = np.arange(200).reshape(20, 10) % 4 > 0
    weight.log_variance.assign(np.where(gone, 40.0, -8.0))
    np.testing.assert_allclose(Record(model)._log_variances(), np.full(50, -8.0), rtol=1e-6)
    weight.log_variance.assign(np.full((20, 10), 40.0))
    assert Record(model)._log_variances().size == 0


def test_looks_are_few_however_many_steps():
    record, looks = Record(model_with(0.0)), 0
    for _ in range(20_000):
        if record.step(1.0, 1):
            record.look()
            looks += 1
    assert 50 < looks < 150


def with_normalization(first, frozen=False):
    return keras.Sequential(
        [keras.Input((20,)), first, keras.layers.BatchNormalization(trainable=not frozen), kv.VariationalDense(2)]
    )


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: with_normalization(kv.VariationalDense(10)), True),
        (lambda: with_normalization(kv.Variational(keras.layers.Dense(10))), True),
        (lambda: with_normalization(kv.VariationalDense(10), frozen=True), False),
        (lambda: with_normalization(keras.layers.Dense(10)), False),  # the noise comes after it
        (lambda: keras.Sequential([keras.Input((20,)), kv.VariationalDense(10)]), False),
    ],
)
@pytest.mark.parametrize("steps", [10, 60])
def test_statistics_of_noise_are_said(model, expected, steps):
    model = model()
    model.compile(keras.optimizers.SGD(1e-3), "mse", jit_compile=False)
    x, y = np.zeros((steps, 20)), np.zeros((steps, *model.output_shape[1:]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        elbo = kv.ELBO(steps, start_epoch=0, warmup_epochs=0)
        model.fit(x, y, batch_size=1, epochs=2, callbacks=[elbo], verbose=0)
        model.fit(x, y, batch_size=1, epochs=2, callbacks=[elbo], verbose=0)
    found = [str(each.message) for each in caught if "BatchNormalization" in str(each.message)]
    assert len(found) == (expected and 2 * steps >= 50)
    if found:
        assert "update_batch_normalization" in found[0] and "batch_normalization" in found[0]
