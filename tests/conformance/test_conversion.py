"""Every layer has a twin of Keras's own that predicts the same."""

import numpy as np

import keras_vdrop as kv
from tests.cases import array, randomize, stock


def test_deterministic_twin_predicts_the_same(case):
    model = case.model()
    randomize(model)
    if case.is_kernel:
        kv.prune(model, 0.0)
    twin = kv.to_deterministic(model)
    assert stock(twin)
    np.testing.assert_allclose(array(twin(case.inputs())), array(model(case.inputs())), rtol=1e-5, atol=1e-6)
