"""Without variance a layer is its Keras twin."""

import numpy as np
import pytest

from keras_vdrop.posterior import VariationalWeight
from tests.cases import array, posteriors


def copy_weights(layer, twin):
    """Give the twin the posterior means, weight by weight."""
    ours, theirs = getattr(layer, "cell", layer), getattr(twin, "cell", twin)
    for name in ("kernel", "recurrent_kernel", "bias"):
        weight = getattr(ours, name, None)
        if weight is not None:
            value = weight.loc if isinstance(weight, VariationalWeight) else weight
            getattr(theirs, name).assign(np.random.default_rng(1).normal(size=value.shape))
            value.assign(array(getattr(theirs, name)))


@pytest.mark.parametrize("training", [False, True])
def test_equals_keras_twin_as_variance_vanishes(case, training):
    layer, twin, x = case.make(), case.make_twin(), case.inputs()
    layer(x), twin(x)
    copy_weights(layer, twin)
    for weight in posteriors(layer):
        weight.log_variance.assign(np.full(weight.shape, -45.0))
    np.testing.assert_allclose(array(layer(x, training=training)), array(twin(x)), rtol=2e-5, atol=2e-5)
    # ... and with variance it is not, so that the line above says something
    for weight in posteriors(layer):
        weight.log_variance.assign(np.full(weight.shape, 0.0))
    assert np.allclose(array(layer(x, training=training)), array(twin(x)), rtol=2e-5, atol=2e-5) == (not training)


def test_mask_zeroes_weights_and_their_noise(case):
    layer, twin, x = case.make(), case.make_twin(), case.inputs()
    layer(x), twin(x)
    copy_weights(layer, twin)
    for weight in posteriors(layer):
        weight.mask.assign(np.zeros(weight.shape, bool))
    for name in ("kernel", "recurrent_kernel", "bias"):
        ours, theirs = (getattr(getattr(one, "cell", one), name, None) for one in (layer, twin))
        if isinstance(ours, VariationalWeight):
            theirs.assign(np.zeros(ours.shape))
    np.testing.assert_allclose(array(layer(x, training=True)), array(twin(x)), atol=1e-6)
