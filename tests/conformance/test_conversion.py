"""Conversion of every layer to Keras layers and back, and its compaction, leave the predictions the same."""

import keras
import numpy as np
import pytest

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


def test_variational_twin_predicts_the_same(case, tmp_path):
    """`to_variational` of Keras's layer predicts the same at the mean, and so does its deterministic twin after a
    round trip through a file."""
    if not case.is_kernel and case.cls is not kv.Variational:
        pytest.skip("it has no weights of its own")
    model = case.model(case.make_twin())
    for index, variable in enumerate(model.weights):
        variable.assign(array(variable) + 0.1 * np.random.default_rng(index).normal(size=variable.shape))
    before = model.get_weights()
    x = case.inputs()
    expected = array(model(x))
    twin = kv.to_variational(model, print_fn=lambda line: None)
    # Layers that have a counterpart are not wrapped in `Variational`.
    assert case.cls in [*map(type, twin._flatten_layers()), kv.Variational]
    assert posteriors(twin) and not posteriors(model)
    twin.save(tmp_path / "twin.keras")
    loaded = keras.saving.load_model(tmp_path / "twin.keras")
    loaded.load_weights(tmp_path / "twin.keras")
    for other in (twin, kv.to_deterministic(loaded)):
        np.testing.assert_allclose(array(other(x)), expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(model.get_weights(), before):
        np.testing.assert_array_equal(one, other)
