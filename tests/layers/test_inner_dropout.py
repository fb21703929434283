"""Dropout within a layer that `Variational` wraps: Keras's own, or also active where weights are drawn."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_vdrop as kv
from tests.cases import array, posteriors, stock
from tests.statistics import STANDARD_ERRORS, assert_mean

pytestmark = pytest.mark.filterwarnings("ignore:The KL weight of these")
X = np.random.default_rng(0).normal(size=(8, 4, 6)).astype("float32")


@keras.saving.register_keras_serializable(package="tests")
class Dropping(layers.Layer):
    """Two kinds of dropout, and one within attention, that only the layer's own code knows of."""

    def build(self, input_shape):
        self.dense = layers.Dense(6)
        self.parts = [layers.Dropout(0.5), layers.SpatialDropout1D(0.25)]
        self.attention = layers.MultiHeadAttention(2, 3, dropout=0.5)
        self.dense.build(input_shape)
        self.attention.build(input_shape, input_shape)

    def call(self, x, training=False):
        x = self.dense(x)
        for part in self.parts:
            x = part(x, training=training)
        return x + 0.0 * self.attention(x, x, training=training)


def quiet(layer):
    """Call the layer once, so that it is built, and remove the noise of its weights."""
    layer(X)
    for weight in posteriors(layer):
        weight.log_variance.assign(np.full(weight.log_variance.shape, -30.0))
    return layer


def masks(outputs, layer):
    """Return what dropout multiplied the outputs of the dense layer by: 0 or 1 / (0.5·0.75)."""
    return np.round(outputs / array(layer.layer.dense(X)), 3)


def drawn(layer, **scope):
    with kv.sampling(**scope):
        return array(layer(X))


def test_left_to_keras_it_is_active_in_training_only():
    layer = quiet(kv.Variational(Dropping()))
    np.testing.assert_allclose(drawn(layer), array(layer(X)), rtol=1e-4, atol=1e-5)
    assert (array(layer(X, training=True)) == 0).any()


@pytest.mark.parametrize("training", [False, True], ids=["sampling", "training"])
def test_it_drops_at_its_rate(training):
    layer = quiet(kv.Variational(Dropping(), dropout="monte_carlo", seed=0))
    np.testing.assert_allclose(masks(array(layer(X)), layer), 1.0, rtol=1e-3)
    outputs = [array(layer(X, training=True)) if training else drawn(layer) for _ in range(200)]
    found = np.stack([masks(each, layer) for each in outputs])
    assert np.allclose(found[found != 0], 1 / (0.5 * 0.75), rtol=1e-2)
    # independent groups: a channel of an example, dropped as a whole by one of the layers
    assert_mean(found.mean(2).reshape(200, -1), 1.0)
    whole = (found == 0).all(2)  # by SpatialDropout1D, or by all four of Dropout's masks
    assert_mean(whole.reshape(200, -1), 0.25 + 0.75 * 0.5**4)


def test_consistent_draws_share_masks_and_layers_do_not():
    layer = quiet(kv.Variational(Dropping(), dropout="monte_carlo", seed=0))
    found = masks(drawn(layer, consistent=True), layer)
    assert (found == found[:1]).all()
    assert len(np.unique(found)) == 2
    rows = [masks(drawn(layer, consistent=True), layer) for _ in range(20)]
    assert len(np.unique(np.stack(rows)[:, 0].reshape(20, -1), axis=0)) > 1
    # masks of layers of one rate and shape differ
    two = keras.Sequential([keras.Input((200,)), layers.Dense(200), layers.Dropout(0.5), layers.Dropout(0.5)])
    two = kv.Variational(two, dropout="monte_carlo")
    with kv.sampling(consistent=True):
        kept = (array(two(np.ones((1, 200), "float32"))) != 0).mean()
    assert abs(kept - 0.25) < STANDARD_ERRORS * np.sqrt(0.25 * 0.75 / 200)


def test_monte_carlo_draws_it_without_a_warning_and_leaves_the_model_as_it_was():
    x = keras.Input((4, 6))
    inner = kv.Variational(Dropping(), dropout="monte_carlo")
    model = keras.Model(x, inner(x))
    quiet(inner)
    before = [array(variable) for variable in model.variables]
    sampler = kv.MonteCarlo(model, 20, output="samples", seed=1)
    samples = sampler.predict(X, verbose=0)
    assert len(np.unique((samples[0] == 0).reshape(20, -1), axis=0)) == 20
    np.testing.assert_array_equal(kv.MonteCarlo(model, 20, output="samples", seed=1).predict(X, verbose=0), samples)
    for old, variable in zip(before, model.variables):
        np.testing.assert_array_equal(array(variable), old)
    np.testing.assert_allclose(model.predict(X, verbose=0), array(inner.layer.dense(X)), rtol=1e-4, atol=1e-5)


def test_it_is_saved(tmp_path):
    x = keras.Input((4, 6))
    model = keras.Model(x, kv.Variational(Dropping(), dropout="monte_carlo", kl_weight=0.1)(x))
    model.compile("sgd", "mse")
    model.fit(X, X, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    expected, found = (array(drawn(each)) for each in (model, again))
    assert (expected == 0).any()
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(again.train_on_batch(X, X), model.train_on_batch(X, X))


@pytest.mark.parametrize("kind", ["monte_carlo", "variational"])
def test_conversion_draws_what_is_within_a_layer_it_wraps(kind):
    x = keras.Input((4, 6))
    model = keras.Model(x, Dropping(name="opaque")(x))
    converted = kv.to_variational(model, dropout=kind, print_fn=lambda line: None)
    assert (drawn(converted) == 0).any() and not (array(converted(X)) == 0).any()
    back = kv.to_deterministic(converted)
    assert stock(back)
    np.testing.assert_allclose(array(back(X)), array(model(X)), rtol=1e-4, atol=1e-5)
    for each in (model, back):  # Keras's own dropout: not drawn, active in training
        with pytest.raises(ValueError, match="Nothing was drawn"):
            drawn(each)
        assert (array(each(X, training=True)) == 0).any()
    assert not (drawn(kv.to_variational(model, print_fn=lambda line: None)) == 0).any()


def test_a_bad_value_is_named():
    with pytest.raises(ValueError, match="dropout='gaussian'"):
        kv.Variational(layers.Dense(3), dropout="gaussian")
