"""The KL is in the loss exactly once, and so is its gradient, however the layer is called."""

import keras
import numpy as np
import pytest
from keras import layers

from tests.cases import CASES, array, posteriors, randomize

WEIGHT = 0.01


def alone(case):
    return keras.Sequential([keras.Input(case.shape[1:]), case.make()])


def called_twice(case):
    x, layer = keras.Input(case.shape[1:]), case.make()
    return keras.Model(x, layers.Add()([layer(x), layer(2.0 * x)]))


def time_distributed(case):
    return keras.Sequential([keras.Input((3, *case.shape[1:])), layers.TimeDistributed(case.make())])


def nested(case):
    inner = keras.Sequential([keras.Input(case.shape[1:]), case.make()])
    return keras.Sequential([keras.Input(case.shape[1:]), keras.Sequential([inner])])


def rematerialised(case):
    with keras.RematScope(mode="full"):
        layer = case.make()
    return keras.Sequential([keras.Input(case.shape[1:]), layer])


def bidirectional(case):
    return keras.Sequential([keras.Input(case.shape[1:]), layers.Bidirectional(case.make(go_backwards=False))])


def stacked(case):
    rest = {"units": 3, "kl_weight": WEIGHT, "kernel_prior": "ard"}
    cells = [case.cls(**{**case.keras, **case.ours, **rest}) for _ in range(2)]
    return keras.Sequential([keras.Input(case.shape[1:]), layers.RNN(cells)])


SETTINGS = [(case, setting) for case in CASES for setting in (alone, called_twice, time_distributed, nested)]
SETTINGS += [(case, bidirectional) for case in CASES if case.is_rnn]
SETTINGS += [(case, stacked) for case in CASES if case.is_cell]
# `keras.layers.RNN` itself does not run within a RematScope.
SETTINGS += [(case, rematerialised) for case in CASES if not case.is_rnn and not case.is_cell]


def ard(case):
    """The case with priors whose KL and gradient have a closed form."""
    ours = {**case.ours, "kernel_prior": "ard", "kl_weight": WEIGHT}
    if "bias_prior" in ours:
        ours["bias_prior"] = "ard"
    return type(case)(**{**vars(case), "ours": ours})


def expected_kl(model):
    """Σ weight·½·log(1 + loc²/variance) by NumPy, over the model's posteriors."""
    kl = [0.5 * np.log1p(array(w.loc) ** 2 * np.exp(-array(w.log_variance))).sum() for w in posteriors(model)]
    return WEIGHT * sum(kl)


@pytest.mark.parametrize("subject, setting", SETTINGS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_kl_is_counted_once(subject, setting):
    model = setting(ard(subject))
    randomize(model)
    total = sum(float(array(loss)) for loss in model.losses)
    np.testing.assert_allclose(total, expected_kl(model), rtol=1e-4)

    # With a data loss of nothing, the loss that Keras reports and descends is the KL.
    model.compile(keras.optimizers.SGD(1.0), lambda y, prediction: 0.0 * keras.ops.sum(prediction))
    x = np.random.default_rng(0).normal(size=(3, *model.input_shape[1:])).astype("float32")
    y = np.zeros(model.compute_output_shape(x.shape), "float32")
    before = [(array(w.loc), array(w.log_variance)) for w in posteriors(model)]
    np.testing.assert_allclose(model.train_on_batch(x, y), total, rtol=1e-4)
    for weight, (loc, log_variance) in zip(posteriors(model), before):
        ratio = loc**2 * np.exp(-log_variance)
        by_loc = WEIGHT * loc * np.exp(-log_variance) / (1 + ratio)
        by_log_variance = -0.5 * WEIGHT * ratio / (1 + ratio)
        np.testing.assert_allclose(loc - array(weight.loc), by_loc, atol=2e-6)
        np.testing.assert_allclose(log_variance - array(weight.log_variance), by_log_variance, atol=2e-6)


def test_frozen_layer_has_no_kl(case):
    model = alone(ard(case))
    model.trainable = False
    assert sum(float(array(loss)) for loss in model.losses) == 0.0


@pytest.mark.parametrize("frozen", ["loc", "log_variance"])
def test_half_frozen_posterior_keeps_its_kl(case, frozen):
    model = alone(ard(case))
    randomize(model)
    for weight in posteriors(model):
        getattr(weight, frozen).trainable = False
    total = sum(float(array(loss)) for loss in model.losses)
    np.testing.assert_allclose(total, expected_kl(model), rtol=1e-4)


def test_user_regularizer_is_added(case):
    layer = ard(case).make(kernel_regularizer=keras.regularizers.L2(0.5))
    layer(case.inputs())
    total = sum(float(array(loss)) for loss in layer.losses)
    kernel = getattr(layer, "cell", layer).kernel
    expected = expected_kl(layer) + 0.5 * float((array(kernel.loc) ** 2).sum())
    np.testing.assert_allclose(total, expected, rtol=1e-4)
