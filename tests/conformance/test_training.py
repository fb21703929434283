"""Layers train by `fit`: every weight has a finite gradient, with and without XLA, also from a bad start."""

import keras
import numpy as np
import pytest

from keras_vdrop import ELBO
from tests.cases import CASES, array, posteriors, randomize

LEARNING = [case for case in CASES if case.has_kl]
FEED_FORWARD = [case for case in LEARNING if not (case.is_rnn or case.is_cell or case.is_wrapper)]


# A step of the whole gradient can raise a log variance until its KL overflows. Dividing by a power of two is exact.
RATE = 2.0**-6


def compiled(model, jit=False):
    model.compile(keras.optimizers.SGD(RATE), "mse", jit_compile=jit)
    return model


def step(model, x):
    """Return the gradients of one step of `fit` by path, from the change that SGD made."""
    before = [array(v) for v in model.trainable_variables]
    y = np.ones((len(x), *model.output_shape[1:]), "float32")
    elbo = ELBO(len(x), labels_per_example=y[0].size)  # `ELBO` cannot infer the number for a masked output
    history = model.fit(x, y, batch_size=len(x), callbacks=[elbo], verbose=0).history
    assert set(history) == {"loss", "kl", "beta", "nll", "elbo_loss"}
    assert np.isfinite(list(history.values())).all()
    return {v.path: (b - array(v)) / RATE for v, b in zip(model.trainable_variables, before)}


STARTS = ("random", "zero", "pruned", "no_variance", "zero_input")


@pytest.mark.parametrize("subject", LEARNING, ids=str)
def test_gradients_reach_every_weight_and_are_finite_from_a_bad_start(subject):
    model = compiled(subject.model())
    before = model.get_weights()
    for start in STARTS:
        model.set_weights(before)
        if start == "random":
            randomize(model)
        for weight in posteriors(model):
            if start == "zero":
                weight.loc.assign(np.zeros(weight.shape))
            if start == "pruned":
                weight.mask.assign(np.zeros(weight.shape, bool))
            if start == "no_variance":
                weight.log_variance.assign(np.full(weight.log_variance.shape, -60.0))
        x = 0 * subject.inputs() if start == "zero_input" else subject.inputs()
        for path, gradient in step(model, x).items():
            assert np.isfinite(gradient).all(), (start, path)
            assert start != "random" or (gradient != 0).any(), path


@pytest.mark.slow(keep=4)
@pytest.mark.parametrize("subject", LEARNING, ids=str)
def test_gradients_reach_every_weight_under_xla(subject):
    model = compiled(subject.model(), jit=True)
    randomize(model)
    for path, gradient in step(model, subject.inputs()).items():
        assert np.isfinite(gradient).all(), path
        assert (gradient != 0).any(), path


@pytest.mark.parametrize("subject", FEED_FORWARD, ids=str)
def test_rematerialisation_draws_the_same_noise_twice(subject):
    """In a RematScope the gradient belongs to the output that was computed, including its noise."""
    with keras.RematScope(mode="full"):
        layer = subject.make()
    model = subject.model(layer)
    randomize(model)
    # The gradient depends on the noise ε. The loss is the sum of the outputs, so its value shows whether a replay
    # uses the same ε.
    model.compile(keras.optimizers.SGD(1e-3), lambda y, prediction: keras.ops.sum(prediction), jit_compile=False)
    layer.kl_weight = 0.0
    x = subject.inputs()
    state = keras.ops.convert_to_numpy(layer._replayed.state).copy()
    before = [array(v) for v in model.trainable_variables]
    y = np.ones((len(x), *model.output_shape[1:]), "float32")
    loss = model.train_on_batch(x, y)
    gradients = [(b - array(v)) / 1e-3 for v, b in zip(model.trainable_variables, before)]

    def replayed(values):
        for variable, value in zip(model.trainable_variables, values):
            variable.assign(value)
        layer._replayed.state.assign(state)
        return float(array(model(x, training=True)).sum())

    np.testing.assert_allclose(replayed(before), loss, rtol=1e-4)
    # The slope along the gradient is the gradient's length. The step is normalised to stay short, because attention is
    # far from linear.
    length = np.sqrt(sum((g**2).sum() for g in gradients))
    size = 1e-2
    ahead, behind = ([b + sign * size / length * g for b, g in zip(before, gradients)] for sign in (1, -1))
    slope = (replayed(ahead) - replayed(behind)) / (2 * size)
    np.testing.assert_allclose(slope, length, rtol=1e-2)


@pytest.mark.parametrize("subject", [case for case in CASES if not case.has_kl], ids=str)
def test_noise_without_a_kl_trains_among_other_layers(subject, jit):
    x = subject.input()
    outputs = keras.layers.Dense(2)(subject.call(subject.make(), x))
    model = keras.Model(x, outputs)
    model.compile("sgd", "mse", jit_compile=jit)
    y = np.ones((len(subject.inputs()), *model.output_shape[1:]), "float32")
    assert np.isfinite(model.train_on_batch(subject.inputs(), y))
    assert not model.losses
