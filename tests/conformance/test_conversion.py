"""Every layer has a twin of Keras's own that predicts the same, and so do they when they are compacted."""

import keras
import numpy as np

import keras_vdrop as kv
from tests.cases import array, posteriors, randomize, stock


def test_deterministic_twin_predicts_the_same(case):
    model = case.model()
    randomize(model)
    if posteriors(model):
        kv.prune(model, 0.0)
    twin = kv.to_deterministic(model)
    assert stock(twin)
    np.testing.assert_allclose(array(twin(case.inputs())), array(model(case.inputs())), rtol=1e-5, atol=1e-6)


def test_compacted_model_predicts_the_same(case):
    x = case.input()
    h = case.call(case.make(), x)
    model = keras.Model(x, keras.layers.Dense(2)(h))
    randomize(model)
    small = kv.compact(model, 0.0)
    if posteriors(model):
        kv.prune(model, 0.0)
    assert stock(small)
    np.testing.assert_allclose(array(small(case.inputs())), array(model(case.inputs())), rtol=1e-5, atol=1e-5)
