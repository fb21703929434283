"""Statistics of BatchNormalization after training."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_vdrop as kv
from tests.cases import array

KL = {"kl_weight": 1e-3}


def network(dropout=0.0, **arguments):
    """Two normalizations, the second one of what the first one gives, behind noise of weights."""
    return keras.Sequential(
        [
            keras.Input((3,)),
            kv.VariationalDense(4, name="first", **KL),
            layers.BatchNormalization(name="inner", **arguments),
            layers.Dropout(dropout),
            layers.Dense(5, activation="relu", name="second"),
            layers.BatchNormalization(name="outer", **arguments),
        ]
    )


def inputs(rows=600):
    return np.random.default_rng(0).normal(2.0, 3.0, (rows, 3)).astype("float32")


def expected(model, x, epsilon=1e-3):
    """Mean and variance of what comes into either normalization, at the means of the weights."""
    first, second = (model.get_layer(name) for name in ("first", "second"))
    h = x.astype("float64") @ array(first.kernel.loc) + array(first.bias)
    inner = h.mean(0), h.var(0)
    h = (h - inner[0]) / np.sqrt(inner[1] + epsilon)
    h = np.maximum(h @ array(second.kernel) + array(second.bias), 0.0)
    return {"inner": inner, "outer": (h.mean(0), h.var(0))}


def check(model, statistics, rtol=1e-4):
    for name, (mean, variance) in statistics.items():
        layer = model.get_layer(name)
        np.testing.assert_allclose(array(layer.moving_mean), mean, rtol=rtol, atol=rtol)
        np.testing.assert_allclose(array(layer.moving_variance), variance, rtol=rtol, atol=rtol)


def test_one_batch_has_the_statistics_without_noise_and_dropout():
    model, x = network(dropout=0.5), inputs()
    assert kv.update_batch_normalization(model, x, batch_size=1000) is model
    check(model, expected(model, x))


def test_batches_are_averaged_by_their_rows():
    model, x = network(), inputs(500)
    kv.update_batch_normalization(model, x, batch_size=200)
    parts = [expected(model, x[begin : begin + 200]) for begin in (0, 200, 400)]
    check(model, {name: np.average([part[name] for part in parts], 0, [2, 2, 1]) for name in parts[0]})


@pytest.mark.parametrize("with_targets", [False, True])
def test_a_dataset_is_as_good_as_arrays(with_targets):
    x = inputs(500)
    batches = [x[begin : begin + 200] for begin in (0, 200, 400)]
    one, other = network(), network()
    other.set_weights(one.get_weights())
    kv.update_batch_normalization(one, x, batch_size=200)
    kv.update_batch_normalization(other, ((each, each) if with_targets else each for each in batches))
    for first, second in zip(one.get_weights(), other.get_weights()):
        np.testing.assert_allclose(first, second, rtol=1e-6, atol=1e-6)


def test_only_the_statistics_change_and_the_layers_are_as_they_were():
    model, x = network(momentum=0.7), inputs()
    moments = ("moving_mean", "moving_variance")
    before = {each.path: array(each) for each in model.weights if each.name not in moments}
    kv.update_batch_normalization(model, x)
    for each in model.weights:
        if each.name not in moments:
            np.testing.assert_array_equal(array(each), before[each.path])
    layer = model.get_layer("inner")
    assert layer.momentum == 0.7 and "call" not in vars(layer)
    kept = array(layer.moving_mean)
    model(x[:50], training=False)
    np.testing.assert_array_equal(array(layer.moving_mean), kept)


def test_a_frozen_layer_keeps_its_statistics():
    model, x = network(), inputs()
    model.get_layer("inner").trainable = False
    kv.update_batch_normalization(model, x)
    np.testing.assert_array_equal(array(model.get_layer("inner").moving_mean), np.zeros(4))
    assert np.abs(array(model.get_layer("outer").moving_mean)).max() > 0


def test_layers_of_inner_models_and_of_variational_blocks():
    x = inputs()
    block = keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.BatchNormalization()])
    model = keras.Sequential([keras.Input((3,)), kv.Variational(block, **KL), layers.Dense(1)])
    kv.update_batch_normalization(model, x, batch_size=1000)
    h = x @ array(block.layers[0].kernel) + array(block.layers[0].bias)
    np.testing.assert_allclose(array(block.layers[1].moving_mean), h.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(array(block.layers[1].moving_variance), h.var(0), rtol=1e-4)


@pytest.mark.slow
def test_noise_in_training_shifts_the_variance_and_this_shifts_it_back():
    model, x = network(), inputs()
    model.get_layer("first").kernel.log_variance.assign(np.zeros((3, 4)))
    model.compile("sgd", "mse")
    model.optimizer.learning_rate.assign(0.0)
    model.fit(x, np.zeros((600, 5)), batch_size=100, epochs=100, verbose=0)
    _, clean = expected(model, x)["inner"]
    layer = model.get_layer("inner")
    assert np.all(array(layer.moving_variance) > clean + 5.0)  # Σ x²·1 is 3·(9 + 4) of noise
    kv.update_batch_normalization(model, x, batch_size=1000)
    np.testing.assert_allclose(array(layer.moving_variance), clean, rtol=1e-4)


def test_a_model_without_it_stays_as_it_is():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    before = model.get_weights()
    kv.update_batch_normalization(model, inputs(5))
    np.testing.assert_array_equal(model.get_weights()[0], before[0])


def test_what_it_cannot_do_is_said():
    model = network()
    with pytest.raises(ValueError, match="at least one row"):
        kv.update_batch_normalization(model, inputs(0))
    with pytest.raises(ValueError, match="same number of rows"):
        kv.update_batch_normalization(model, [inputs(5), inputs(4)])
    with pytest.raises(ValueError, match="batch_size"):
        kv.update_batch_normalization(model, inputs(5), batch_size=0)
    with pytest.raises(ValueError, match=r"`\.model`"):
        kv.update_batch_normalization(kv.MonteCarlo(model, 3), inputs(5))
    layer = model.get_layer("inner")
    assert "call" not in vars(layer)
    with pytest.raises(ValueError):  # of the model itself: the layers are as before after that too
        kv.update_batch_normalization(model, np.zeros((5, 7), "float32"))
    assert "call" not in vars(layer) and layer.momentum == 0.99


def test_a_layer_that_is_called_several_times_averages_over_its_calls():
    x = inputs(64)[:, None] + 10.0 * np.arange(5, dtype="float32")[:, None]  # (64, 5, 3): one call for each time step
    normalization = layers.BatchNormalization()
    model = keras.Sequential([keras.Input((5, 3)), layers.TimeDistributed(normalization)])
    kv.update_batch_normalization(model, x, batch_size=16)
    np.testing.assert_allclose(array(normalization.moving_mean), x.mean((0, 1)), rtol=1e-4)
    variances = x.reshape(4, 16, 5, 3).var(1).mean((0, 1))
    np.testing.assert_allclose(array(normalization.moving_variance), variances, rtol=1e-3)


def test_batches_that_are_lists_are_inputs_and_targets_as_in_fit():
    x = inputs(60)
    one, other = network(), network()
    other.set_weights(one.get_weights())
    kv.update_batch_normalization(one, x, batch_size=20)
    kv.update_batch_normalization(other, [[x[i : i + 20], np.zeros(20)] for i in (0, 20, 40)].__iter__())
    for a, b in zip(one.weights, other.weights):
        np.testing.assert_allclose(array(a), array(b), rtol=1e-6)
