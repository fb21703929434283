"""Without variance a layer equals its Keras twin."""

import numpy as np
import pytest

from tests.cases import CASES, array, posteriors, rates

# Cases without a KL drop inputs at a fixed rate, so they have no learned variance that can go to 0.
QUIETABLE = [case for case in CASES if case.has_kl]


def copy_weights(layer, twin):
    """Give each weight of the layer and its twin the same random values. For posteriors these are the means."""
    own = (".loc", "_loc", "bias", "kernel", "embeddings", "gamma", "beta")
    ours = [variable for variable in layer.weights if variable.name.endswith(own)]
    for variable, theirs in zip(ours, twin.weights, strict=True):
        theirs.assign(np.random.default_rng(1).normal(size=theirs.shape))
        variable.assign(array(theirs))


def set_noise(layer, log_variance):
    for weight in posteriors(layer):
        weight.log_variance.assign(np.full(weight.log_variance.shape, log_variance))
    for posterior in rates(layer):
        posterior.owner.rate_logit.assign(log_variance)


def both(case):
    layer, twin = case.built(), case.make_twin()
    case.call(twin, case.inputs())
    if twin.weights:
        copy_weights(layer, twin)
    return layer, twin


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("subject", QUIETABLE, ids=str)
def test_equals_keras_twin_as_variance_vanishes(subject, training):
    layer, twin = both(subject)
    x = subject.inputs()
    expected = array(subject.call(twin, x))
    set_noise(layer, -45.0)
    np.testing.assert_allclose(array(subject.call(layer, x, training=training)), expected, rtol=2e-5, atol=2e-5)
    # With variance, the output in training must differ. Otherwise the assertion above would prove nothing.
    set_noise(layer, 0.0)
    output = array(subject.call(layer, x, training=training))
    assert np.allclose(output, expected, rtol=2e-5, atol=2e-5) == (not training)


def test_equals_keras_twin_in_prediction(case):
    layer, twin = both(case)
    x = case.inputs()
    np.testing.assert_allclose(array(case.call(layer, x)), array(case.call(twin, x)), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("subject", [case for case in CASES if case.is_kernel], ids=str)
def test_mask_zeroes_weights_and_their_noise(subject):
    layer, twin = both(subject)
    x = subject.inputs()
    for weight in posteriors(layer):
        weight.mask.assign(np.zeros(weight.shape, bool))
    pruned = {weight.name for weight in posteriors(layer)}
    for variable in twin.weights:
        if variable.name in pruned:
            variable.assign(np.zeros(variable.shape))
    np.testing.assert_allclose(array(subject.call(layer, x, training=True)), array(subject.call(twin, x)), atol=1e-6)
