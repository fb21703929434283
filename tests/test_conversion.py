"""Back to Keras's own layers."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_vdrop as kv
from tests.cases import array, randomize, stock


def test_wrappers_and_models_within_models():
    inner = keras.Sequential([keras.Input((6,)), kv.VariationalDense(5), kv.MonteCarloDropout(0.5)], name="inner")
    x = keras.Input((4, 3))
    h = layers.TimeDistributed(kv.VariationalDense(7, bias_prior="normal"))(x)
    h = layers.BatchNormalization()(h)
    h = layers.Bidirectional(kv.VariationalGRU(3, kernel_prior=kv.priors.Normal(trainable=True)))(h)
    model = keras.Model(x, kv.ConcreteDropout(layers.Dense(2), name="last")(inner(h)))
    randomize(model)
    twin = kv.to_deterministic(model)
    assert stock(twin)
    data = np.random.default_rng(0).normal(size=(5, 4, 3)).astype("float32")
    np.testing.assert_allclose(array(twin(data)), array(model(data)), rtol=1e-5, atol=1e-6)
    assert [layer.name for layer in twin.layers] == [layer.name for layer in model.layers]


def test_pruned_units_of_gaussian_dropout_are_0():
    model = keras.Sequential([keras.Input((5, 4)), kv.VariationalGaussianDropout(0.5)])
    model.layers[0].scale.log_variance.assign([-5.0, 9.0, -5.0, 9.0])
    kv.prune(model)
    x = np.ones((2, 5, 4), "float32")
    np.testing.assert_array_equal(array(kv.to_deterministic(model)(x))[0, 0], [1, 0, 1, 0])


@pytest.mark.slow
@pytest.mark.parametrize("convert", [kv.to_deterministic, lambda model: kv.compact(model, 0.0)])
def test_what_is_done_with_the_result_leaves_the_model_alone(convert):
    """JAX gives away the buffers of variables while it trains and evaluates."""
    noise = [kv.VariationalGaussianDropout(0.5), kv.MonteCarloDropout(0.5)]
    inside = [kv.VariationalDense(5), layers.BatchNormalization(), *noise, layers.Dense(4), kv.VariationalDense(2)]
    model = keras.Sequential([keras.Input((3,)), *inside])
    x, y = np.random.default_rng(0).normal(size=(8, 3)).astype("float32"), np.zeros((8, 2), "float32")
    before = model.get_weights()
    result = convert(model)
    result.compile("adam", "mse")
    result.evaluate(x, y, verbose=0)
    result.fit(x, y, verbose=0)
    for one, other in zip(model.get_weights(), before):
        np.testing.assert_array_equal(one, other)
    weights = convert(model).get_weights()
    model.compile("adam", "mse")
    model.evaluate(x, y, verbose=0)
    result = convert(model)
    model.layers[0].kl_weight = model.layers[2].kl_weight = model.layers[-1].kl_weight = 0.1
    model.fit(x, y, verbose=0)
    for one, other in zip(result.get_weights(), weights):
        np.testing.assert_array_equal(one, other)


def test_the_twin_needs_nothing_of_ours(tmp_path):
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(3)])
    twin = kv.to_deterministic(model)
    twin.save(tmp_path / "twin.keras")
    assert "keras_vdrop" not in twin.to_json()


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = kv.VariationalDense(2)

    def call(self, x):
        return self.dense(x)


def test_bad_input():
    with pytest.raises(ValueError, match=r"Functional or Sequential.*Subclassed"):
        kv.to_deterministic(Subclassed())
    with pytest.raises(ValueError, match="has not been built"):
        kv.to_deterministic(keras.Sequential([kv.VariationalDense(2)]))
    within = keras.Sequential([keras.Input((4, 3)), layers.TimeDistributed(kv.VariationalGaussianDropout(0.5))])
    with pytest.raises(ValueError, match="within a wrapper"):
        kv.to_deterministic(within)


@keras.saving.register_keras_serializable(package="tests")
class Extended(kv.VariationalDense):
    pass


@pytest.mark.slow
def test_layers_without_a_counterpart():
    with pytest.raises(ValueError, match=r"Extended.*no counterpart"):
        kv.to_deterministic(keras.Sequential([keras.Input((3,)), Extended(2, name="extended")]))
    if keras.backend.backend() == "tensorflow":
        lookup = layers.IntegerLookup(name="lookup")
        lookup.adapt([1, 2, 3])
        with pytest.raises(ValueError, match="vocabulary of 'lookup' is neither"):
            kv.to_deterministic(keras.Sequential([keras.Input((3,), dtype="int64"), lookup]))


def test_functions_that_are_not_registered():
    def own(x):
        return 2.0 * x

    model = keras.Sequential([keras.Input((3,)), kv.VariationalDense(2, activation=own, name="dense")])
    with pytest.raises(ValueError, match=r"'dense', a VariationalDense.*register_keras_serializable"):
        kv.to_deterministic(model)


def test_frozen_layers():
    model = keras.Sequential([keras.Input((3,)), kv.VariationalDense(4, bias_prior="ard"), kv.VariationalDense(2)])
    model.layers[0].trainable = False
    randomize(model)
    x = np.ones((2, 3), "float32")
    np.testing.assert_allclose(array(kv.to_deterministic(model)(x)), array(model(x)), rtol=1e-5)


@pytest.mark.parametrize("convert", [kv.to_deterministic, kv.compact])
def test_of_a_monte_carlo_its_model_is_asked_for(convert):
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(2, kl_weight=0.1)], name="mine")
    sampler = kv.MonteCarlo(model, 2)
    with pytest.raises(ValueError, match=r"MonteCarlo.*Pass the wrapped model, its attribute `model` \('mine'\)"):
        convert(sampler)
    convert(sampler.model)
