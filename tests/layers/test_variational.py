"""`Variational`: what holds of any layer or model that it runs on drawn weights."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_vdrop as kv
from keras_vdrop import priors
from tests.cases import array, posteriors, randomize
from tests.statistics import assert_mean


@keras.saving.register_keras_serializable(package="tests")
class Block(layers.Layer):
    """As users write them: its parts are made in its constructor, and built when they are first called."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.attention = layers.MultiHeadAttention(2, 3, dropout=0.1, seed=0)
        self.normalization = layers.BatchNormalization(momentum=0.5)
        self.dropout = layers.Dropout(0.2, seed=0)
        self.dense = layers.Dense(units, activity_regularizer=keras.regularizers.L2(0.1))

    def call(self, x, training=False):
        x = self.normalization(self.attention(x, x), training=training)
        return self.dense(self.dropout(x, training=training))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="tests")
class Gated(keras.Model):
    """A subclassed model of two inputs, one of them by keyword."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense, self.gate = layers.Dense(units), layers.Dense(units, activation="sigmoid", name="gate")

    def call(self, x, by=None):
        return self.dense(x) * self.gate(x if by is None else by)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


# What is not about the weight of the KL does not set one.
pytestmark = pytest.mark.filterwarnings("ignore:The KL weight of these")

X = np.random.default_rng(0).normal(size=(16, 4, 6)).astype("float32")


@pytest.mark.slow
def test_draws_are_of_the_posterior():
    layer = kv.Variational(layers.Dense(3, use_bias=False), seed=0)
    layer(np.eye(4, dtype="float32"))
    randomize(layer)
    (weight,) = posteriors(layer)
    draws = np.stack([array(layer(np.eye(4, dtype="float32"), training=True)) for _ in range(2_000)])
    loc, variance = array(weight.loc), np.exp(array(weight.log_variance.value))
    assert_mean(draws - loc, 0.0)
    assert_mean((draws - loc) ** 2 / variance, 1.0)
    # every weight is drawn for itself
    scaled = ((draws - loc) / np.sqrt(variance)).reshape(len(draws), -1)
    correlation = np.corrcoef(scaled.T) - np.eye(scaled.shape[1])
    assert np.abs(correlation).max() < 5 / np.sqrt(len(draws))


def test_one_draw_serves_the_batch_and_the_next_call_draws_anew():
    layer = kv.Variational(layers.LSTM(3))
    x = np.repeat(X[:1], 2, axis=0)
    one, other = array(layer(x, training=True)), array(layer(x, training=True))
    np.testing.assert_allclose(one[0], one[1], rtol=1e-6)
    assert not np.allclose(one, other)


def test_means_are_the_variables_of_the_layer():
    inner = layers.Dense(3)
    before = array(inner(X))
    layer = kv.Variational(inner)
    assert layer.built
    np.testing.assert_array_equal(before, array(layer(X)))
    assert layer.drawn["kernel"].loc is inner.kernel
    assert [each.shape for each in layer.stock_variables()] == [(6, 3), (3,)]


@pytest.mark.slow
def test_learns_by_fit_what_is_opaque():
    """An LSTM over a user's block of attention, moments, dropout and a penalty."""
    x = keras.Input((4, 6))
    hidden = kv.Variational(Block(8))(x)
    model = keras.Model(x, layers.Dense(1)(kv.Variational(layers.LSTM(8))(hidden)))
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    y = X[:, :1, 0]
    history = model.fit(X, y, epochs=40, batch_size=8, verbose=0, callbacks=[kv.ELBO(50_000)]).history
    assert history["nll"][-1] < 0.5 * history["nll"][0]
    moved = [array(weight.log_variance.value).std() for weight in posteriors(model)]
    assert min(moved) > 0.01
    block = model.layers[1].layer
    assert not np.allclose(array(block.normalization.moving_mean), 0.0)


@pytest.mark.parametrize("training", [False, True])
def test_updates_and_penalties_are_those_of_the_layer_itself(training):
    """Without variance it moves moments and seeds, and adds losses, as the layer does when it is called alone."""
    plain, inner = Block(5), Block(5)
    plain(X), inner(X)
    inner.set_weights(plain.get_weights())
    layer = kv.Variational(inner, initial_log_variance=-80.0)
    plain.dropout.seed_generator.state.assign(inner.dropout.seed_generator.state)
    for _ in range(2):
        expected, found = plain(X, training=training), layer(X, training=training)
        np.testing.assert_allclose(array(found), array(expected), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        array(inner.normalization.moving_mean), array(plain.normalization.moving_mean), rtol=1e-5
    )
    states = [array(each.dropout.seed_generator.state) for each in (inner, plain)]
    np.testing.assert_array_equal(*states)
    kl = layer.kl_weight * kv.kl_divergence(layer)
    np.testing.assert_allclose(array(sum(layer.losses) - kl), array(sum(plain.losses)), rtol=1e-3)


def test_a_penalty_on_activities_is_in_the_loss_of_fit_once():
    def model(wrap):
        keras.utils.set_random_seed(0)
        dense = layers.Dense(2, kernel_initializer="ones", activity_regularizer=keras.regularizers.L2(1.0))
        found = keras.Sequential([keras.Input((6,)), wrap(dense)])
        found.compile("sgd", "mse")
        return found

    x, y = X[:, 0], np.zeros((16, 2))
    wrapped = model(lambda layer: kv.Variational(layer, kl_weight=0.0, initial_log_variance=-80.0))
    plain = model(lambda layer: layer)
    np.testing.assert_allclose(wrapped.evaluate(x, y, verbose=0), plain.evaluate(x, y, verbose=0), rtol=1e-5)
    np.testing.assert_allclose(wrapped.train_on_batch(x, y), plain.train_on_batch(x, y), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "paths"),
    [
        ({}, ["dense/kernel", "gate/kernel"]),
        ({"include": "gate"}, ["gate/kernel", "gate/bias"]),
        ({"include": ["kernel$"], "exclude": "^gate"}, ["dense/kernel"]),
        ({"exclude": ["dense"]}, ["gate/kernel"]),
    ],
)
def test_which_weights_are_drawn(arguments, paths):
    model = Gated(3)
    model.dense.name = "dense"
    layer = kv.Variational(model, **arguments)
    layer(X[:, 0])
    assert list(layer.drawn) == paths
    assert len(posteriors(layer)) == len(paths)
    biases = [weight.prunable for path, weight in layer.drawn.items() if "bias" in path]
    assert not any(biases)


def test_layers_of_one_name_are_drawn_each_for_itself():
    class Twice(layers.Layer):
        def __init__(self):
            super().__init__()
            self.first, self.second = layers.Dense(6, name="dense"), layers.Dense(6, name="dense")
            self.third = layers.Dense(6, name="dense_1")

        def call(self, x):
            return self.first(x) + self.second(x) + self.third(x)

    layer = kv.Variational(Twice())
    layer(X)
    assert list(layer.drawn) == ["dense/kernel", "dense/kernel_1", "dense_1/kernel"]
    assert sorted(weight.name for weight in posteriors(layer)) == ["kernel", "kernel_1", "kernel_2"]


@pytest.mark.slow
def test_takes_what_the_layer_takes():
    layer = kv.Variational(Gated(3), seed=0)
    x, by = X[:, 0], X[:, 1]
    np.testing.assert_allclose(array(layer(x, by=by)), array(layer.layer(x, by=by)), rtol=1e-6)
    attention = kv.Variational(layers.MultiHeadAttention(2, 3))
    found, scores = attention(X, X[:, :2], return_attention_scores=True, use_causal_mask=True)
    assert tuple(found.shape) == (16, 4, 6) and tuple(scores.shape) == (16, 2, 4, 2)
    rnn = kv.Variational(layers.GRU(3, return_state=True))
    assert [tuple(each.shape) for each in rnn(X, initial_state=np.ones((16, 3), "float32"))] == [(16, 3), (16, 3)]


def test_masks_reach_the_layer_and_leave_it():
    rnn = kv.Variational(layers.LSTM(2))
    x = ops.convert_to_tensor(X[:2])
    masked = array(rnn(x, mask=np.array([[1, 1, 0, 0]] * 2, bool)))
    np.testing.assert_allclose(masked, array(rnn(x[:, :2])), rtol=1e-5, atol=1e-6)
    # from layer to layer, as far as they hand it on
    indices = np.array([[1, 2, 0, 0], [3, 1, 2, 0]])
    embedding = kv.Variational(layers.Embedding(4, 6, mask_zero=True))
    embedded = embedding(indices)
    np.testing.assert_array_equal(array(embedded._keras_mask), indices != 0)
    assert getattr(rnn(embedded), "_keras_mask", None) is None
    i = keras.Input((None,), dtype="int32")
    model = keras.Model(i, rnn(embedding(i)))
    np.testing.assert_allclose(array(model(indices))[0], array(model(indices[:, :2]))[0], rtol=1e-5, atol=1e-6)


def test_saved_and_loaded_as_layer_and_as_model(tmp_path):
    x = keras.Input((4, 6))
    nested = keras.Model(x, layers.Dense(1)(kv.Variational(Block(8), include="attention.*kernel", prior="ard")(x)))
    subclassed = kv.Variational(Gated(3), exclude="gate")
    subclassed(X)
    for model in (nested, subclassed):
        randomize(model)
        kv.prune(model, -1.0)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(array(loaded(X)), array(model(X)))
        for ours, theirs in zip(posteriors(model), posteriors(loaded), strict=True):
            np.testing.assert_array_equal(array(ours.log_variance.value), array(theirs.log_variance.value))
            np.testing.assert_array_equal(array(ours.mask), array(theirs.mask))


@pytest.mark.slow
def test_a_model_trains_evaluates_and_predicts_as_one():
    model = kv.Variational(Gated(1), prior="normal")
    x, y = X[:, 0], X[:, 0, :1]
    model.compile(keras.optimizers.Adam(1e-2), "mse", metrics=["mae"])
    model.fit(x, y, epochs=2, verbose=0, callbacks=[kv.ELBO(len(x))])
    assert set(model.evaluate(x, y, verbose=0, return_dict=True)) >= {"loss", "mae"}
    predictions = kv.MonteCarlo(model, 8, seed=0).predict(x, verbose=0)
    assert predictions["variance"].shape == (16, 1) and (predictions["variance"] > 0).all()


def test_a_stateful_layer_keeps_its_state():
    plain, inner = layers.LSTM(3, stateful=True), layers.LSTM(3, stateful=True)
    plain(X), inner(X)
    inner.set_weights(plain.get_weights())
    layer = kv.Variational(inner)
    plain.reset_state(), inner.reset_state()
    first = array(layer(X))
    np.testing.assert_allclose(first, array(plain(X)), rtol=1e-5, atol=1e-6)
    second = array(layer(X))
    np.testing.assert_allclose(second, array(plain(X)), rtol=1e-5, atol=1e-6)
    assert not np.allclose(first, second)


def test_a_model_within_a_model_is_exported(tmp_path):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("SavedModel is TensorFlow's.")
    import tensorflow as tf

    model = keras.Sequential([keras.Input((4, 6)), kv.Variational(layers.LSTM(3)), layers.Dense(1)])
    alone = kv.Variational(layers.LSTM(3))
    alone(X)
    for number, each in enumerate((model, alone)):
        each.export(tmp_path / str(number), verbose=False)
        loaded = tf.saved_model.load(tmp_path / str(number))
        np.testing.assert_allclose(loaded.serve(X).numpy(), array(each(X)), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_consistent_draws_are_one_function():
    model = kv.Variational(Block(3))
    model(X)
    randomize(model)
    sampler = kv.MonteCarlo(model, 4, output="samples", seed=0, consistent=True)
    whole = sampler.predict(X, batch_size=16, verbose=0)
    parts = sampler.predict(X, batch_size=5, verbose=0)
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-4)
    with kv.sampling(consistent=True):
        np.testing.assert_array_equal(array(model(X)), array(model(X)))


def test_shared_within_a_model_an_example_keeps_its_draw():
    x, layer = keras.Input((6,)), kv.Variational(layers.Dense(3))
    model = keras.Model(x, layers.Subtract()([layer(x), layer(x)]))
    randomize(model)
    samples = kv.MonteCarlo(model, 4, output="samples").predict(X[:, 0], verbose=0)
    np.testing.assert_allclose(samples, 0.0, atol=1e-6)


def test_variational_layers_within_keep_their_posteriors():
    inner = keras.Sequential([keras.Input((6,)), kv.VariationalDense(4, kl_weight=0.1), layers.Dense(3)])
    model = kv.Variational(inner, kl_weight=0.1)
    assert list(model.drawn) == [f"{inner.layers[1].name}/kernel"]
    assert len(posteriors(model)) == 2
    loss = 0.1 * sum(weight.kl() for weight in posteriors(model))
    np.testing.assert_allclose(array(sum(model.losses)), array(loss), rtol=1e-5)
    samples = kv.MonteCarlo(model, 4, output="samples").predict(X[:, 0], verbose=0)
    assert samples.std(axis=1).min() > 0


def test_mixed_precision_keeps_what_is_stored_in_float32():
    layer = kv.Variational(layers.Dense(3, dtype="mixed_float16"))
    y = layer(X, training=True)
    assert keras.backend.standardize_dtype(y.dtype) == "float16"
    (weight,) = posteriors(layer)
    assert weight.loc.dtype == weight.log_variance.dtype == "float32"
    normalized = kv.Variational(
        keras.Sequential([layers.Dense(3, dtype="mixed_float16"), layers.BatchNormalization(dtype="mixed_float16")])
    )
    normalized(X, training=True)
    moments = [each for each in normalized.layer.layers[1].non_trainable_variables if "moving" in each.name]
    assert {each.dtype for each in moments} == {"float32"}
    assert not np.array_equal(array(moments[0]), array(moments[0]).astype("float16"))


def test_frozen_it_has_no_kl_and_stays():
    layer = kv.Variational(layers.Dense(3), kl_weight=1e-3)
    layer(X)
    layer.trainable = False
    assert not layer.losses and not layer.trainable_variables
    frozen = layers.Dense(3)
    frozen(X)
    frozen.trainable = False
    assert list(kv.Variational(frozen).drawn) == ["kernel"]


def test_prune_and_sparsity():
    model = keras.Sequential([keras.Input((6,)), kv.Variational(layers.Dense(3))])
    (weight,) = posteriors(model)
    variances = np.full((6, 3), -20.0)
    variances[:, 0] = 20.0
    weight.log_variance.assign(variances)
    report = kv.prune(model)
    assert (report.weights, report.left) == (18, 12)
    assert report.layers[0].bytes == 4 * 21
    kernel = array(model.layers[0].layer.kernel)
    assert not kernel[:, 0].any() and kernel[:, 1:].all()
    with kv.sampling():
        np.testing.assert_array_equal(array(model(X[:, 0]))[:, 0], 0.0)


def test_sparsity_around_a_learned_rate():
    """The posterior of `ConcreteDropout` has no mean."""
    inner = keras.Sequential([keras.Input((6,)), kv.ConcreteDropout(layers.Dense(3))])
    model = keras.Sequential([keras.Input((6,)), kv.Variational(inner)])
    report = kv.sparsity(model)
    assert (report.weights, report.bytes) == (18, 4 * 21)


def test_what_a_weight_starts_from_again():
    layer = kv.Variational(layers.Dense(3), prior=priors.Normal(centered=True))
    layer(X)
    (weight,) = posteriors(layer)
    loc = 2.0 + np.random.default_rng(0).normal(size=(6, 3))
    weight.assign(loc)
    weight.restart()
    rms = np.sqrt((loc**2).mean())
    np.testing.assert_allclose(array(weight.log_variance.value), 2 * np.log(rms) - 3.0, rtol=1e-5)
    np.testing.assert_allclose(array(weight.prior_parameters["center"]), loc, rtol=1e-6)
    np.testing.assert_allclose(array(weight.prior_parameters["log_scale"]), np.log(2 * rms), rtol=1e-5)
    # at the center, only the widths are left
    variance, scale = rms**2 * np.exp(-3.0), 2 * rms
    expected = 18 * (np.log(scale) - 0.5 * np.log(variance) + 0.5 * variance / scale**2 - 0.5)
    np.testing.assert_allclose(array(weight.kl()), expected, rtol=1e-5)
    weight.restart(relative_variance=0.01)
    np.testing.assert_allclose(array(weight.log_variance.value), np.log(0.01 * loc**2), rtol=1e-4, atol=1e-4)


def test_relative_variances_of_zeros_are_finite():
    layer = kv.VariationalDense(3, bias_prior="normal")
    layer(X)
    layer.bias.restart(relative_variance=0.1)
    assert np.isfinite(array(layer.bias.log_variance.value)).all()
    layer.kernel.assign(np.pad(np.ones((5, 3)), ((1, 0), (0, 0))))
    layer.kernel.restart(relative_variance=0.1)
    found = array(layer.kernel.log_variance.value)
    np.testing.assert_allclose(found[1:], np.log(0.1), rtol=1e-5)
    assert np.isfinite(found[0]).all() and (found[0] < np.log(0.1)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": layers.Dense}, "must be an instance of a Keras layer"),
        ({"include": "attention"}, "`include` matches no weight"),
        ({"include": ["kernel", "kernels"]}, "'kernels'"),
        ({"exclude": "bais"}, "`exclude` matches no weight"),
        ({"exclude": "kernel"}, "matched against these paths"),
        ({"include": "("}, "regular expression"),
        ({"include": 3}, "regular expression"),
        ({"layer": layers.ReLU()}, "select no weight"),
        ({"prior": None}, "use the layer itself"),
        ({"prior": "wide"}, "Unknown prior"),
        ({"dtype": "mixed_float16"}, "Pass `dtype` to that layer"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"initial_log_variance": 90.0}, "initial_log_variance"),
        ({"log_variance_rate": 0.0}, "log_variance_rate"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        kv.Variational(**{"layer": layers.Dense(3), **arguments})(X)


def test_a_failed_first_call_is_forgotten():
    layer = kv.Variational(keras.layers.Dense(3))
    with pytest.raises(Exception, match="ndim"):
        layer(np.ones(3, "float32"))
    assert layer(np.ones((2, 4), "float32")).shape == (2, 3)


def test_quantization_within_is_refused():
    """Keras quantizes the layers within a `Variational`, which replaces the variables that it draws."""
    block = keras.Sequential([keras.Input((4,)), layers.Dense(8, "relu"), layers.Dense(3)])
    model = keras.Sequential([keras.Input((4,)), kv.Variational(block, kl_weight=0.1)])
    x = np.ones((2, 4), "float32")
    model(x)
    model.quantize("int8")
    with pytest.raises(ValueError, match="quantized"):
        model(x, training=True)


def test_a_layer_that_assigns_to_a_weight_that_is_drawn_is_refused():
    layer = kv.Variational(layers.SpectralNormalization(layers.Dense(4)), kl_weight=0.1)
    x = np.ones((2, 3), "float32")
    layer(x)
    with pytest.raises(ValueError, match="exclude"):
        layer(x, training=True)
    block = keras.Sequential([layers.SpectralNormalization(layers.Dense(4), name="normalized"), layers.Dense(2)])
    without = kv.Variational(block, kl_weight=0.1, exclude="normalized")
    without(x)
    assert not np.array_equal(array(without(x, training=True)), array(without(x, training=True)))
