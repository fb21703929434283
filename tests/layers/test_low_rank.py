"""Low-rank updates of a kernel that stays: W + lora_alpha / lora_rank·A·B, with a posterior over A."""

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from tests.cases import array, posteriors, randomize
from tests.statistics import assert_mean, assert_variance, sample

# What is not about the weight of the KL does not set one.
pytestmark = pytest.mark.filterwarnings("ignore:The KL weight of these")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 5)).astype("float32")
LAYERS = {
    "dense": (kv.VariationalDense, {"units": 4}, X),
    "einsum_dense": (
        kv.VariationalEinsumDense,
        {"equation": "abc,cde->abde", "output_shape": (None, 2, 4), "bias_axes": "e"},
        RNG.normal(size=(3, 2, 5)).astype("float32"),
    ),
    "conv_1d": (kv.VariationalConv1D, {"filters": 4, "kernel_size": 2}, RNG.normal(size=(3, 4, 5)).astype("float32")),
    "conv_2d": (
        kv.VariationalConv2D,
        {"filters": 4, "kernel_size": 2, "strides": 2, "data_format": "channels_first"},
        RNG.normal(size=(3, 5, 4, 4)).astype("float32"),
    ),
    "embedding": (kv.VariationalEmbedding, {"input_dim": 6, "output_dim": 4}, np.array([[0, 1, 0], [5, 2, 3]])),
}


def adapted(name, **arguments):
    cls, keras_arguments, x = LAYERS[name]
    layer = cls(**keras_arguments, **{"lora_rank": 2, "lora_alpha": 3, "kl_weight": 0.1, **arguments})
    layer(x)
    return layer, x


@pytest.mark.parametrize("name", LAYERS)
def test_the_kernel_stays_and_the_update_starts_at_nothing(name):
    layer, x = adapted(name)
    kernel = layer._adapted()
    assert not kernel.trainable and not isinstance(kernel, kv.VariationalWeight)
    assert [weight.name for weight in posteriors(layer)] == ["lora_a"]
    np.testing.assert_array_equal(array(layer(x)), array(layer(x, training=True)))
    randomize(layer)
    layer.lora_b.assign(RNG.normal(size=layer.lora_b.shape))
    assert not np.allclose(array(layer(x)), array(layer(x, training=True)))
    np.testing.assert_array_equal(array(layer(x)), array(layer(x)))


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("name", LAYERS)
def test_mean_and_variance_are_those_of_the_posterior(name):
    """By the outputs of the layer with the kernel W + s·a·B, which are linear in each number of a."""
    layer, x = adapted(name)
    layer.lora_a.loc.assign(RNG.normal(size=layer.lora_a.shape))
    layer.lora_a.log_variance.assign(RNG.uniform(-2, 0, size=layer.lora_a.log_variance.shape))
    layer.lora_b.assign(RNG.normal(size=layer.lora_b.shape))
    mean = array(layer(x))
    loc = array(layer.lora_a.loc)
    deviation = np.broadcast_to(np.exp(0.5 * array(layer.lora_a.log_variance.value)), loc.shape)
    variance = np.zeros_like(mean)
    for index in np.ndindex(*loc.shape):
        moved = loc.copy()
        moved[index] += deviation[index]
        layer.lora_a.loc.assign(moved)
        variance += (array(layer(x)) - mean) ** 2
    layer.lora_a.loc.assign(loc)
    samples = sample(layer, keras.ops.convert_to_tensor(x), 3_000)
    assert_mean(samples, mean)
    assert_variance(samples, np.maximum(variance, 1e-9))


@pytest.mark.parametrize("name", LAYERS)
def test_the_whole_is_the_kernel_of_a_layer_without_the_update(name):
    layer, x = adapted(name)
    randomize(layer)
    layer.lora_b.assign(RNG.normal(size=layer.lora_b.shape))
    expected = array(layer(x))
    whole = array(layer.lora_a.update.whole(layer.lora_a.mean()))
    scale = 3 / 2
    by_hand = array(layer._adapted()) + scale * array(layer.lora_a.loc) @ array(layer.lora_b)
    np.testing.assert_allclose(whole, by_hand, rtol=1e-5, atol=1e-5)
    layer.lora_b.assign(np.zeros(layer.lora_b.shape))
    layer._adapted().assign(whole)
    np.testing.assert_allclose(array(layer(x)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prior", ["log_uniform", "ard", "normal", "scale_mixture"])
def test_kl_is_that_of_every_number_of_a_and_of_nothing_else(prior):
    layer, _ = adapted("dense", kernel_prior=prior)
    randomize(layer)
    weight = layer.lora_a
    whole = np.broadcast_to(array(weight.log_variance.value), weight.shape)
    parameters = {name: keras.ops.convert_to_tensor(value) for name, value in weight.prior_parameters.items()}
    expected = weight.prior.kl(weight.loc.value, keras.ops.convert_to_tensor(whole.copy()), **parameters)
    np.testing.assert_allclose(array(weight.kl()), array(expected).sum(), rtol=1e-5)
    np.testing.assert_allclose(array(sum(layer.losses)), 0.1 * array(expected).sum(), rtol=1e-5)


def test_parameters_are_few():
    """At most 1.3 times those of Keras's own low-rank adaptation."""
    ours, plain = kv.VariationalDense(64, lora_rank=8), keras.layers.Dense(64)
    x = np.ones((1, 64), "float32")
    ours(x), plain(x)
    plain.enable_lora(8)
    count = [sum(int(np.prod(each.shape)) for each in layer.trainable_variables) for layer in (ours, plain)]
    assert count[0] <= 1.3 * count[1]


def test_attention_adapts_every_projection():
    layer = kv.VariationalMultiHeadAttention(2, 3, lora_rank=2, kl_weight=0.1)
    x = RNG.normal(size=(2, 4, 6)).astype("float32")
    layer(x, x)
    assert [weight.name for weight in posteriors(layer)] == ["lora_a"] * 4
    again = kv.VariationalMultiHeadAttention.from_config(layer.get_config())
    assert again.lora_rank == 2


@pytest.mark.parametrize("axis", [0, -1])
def test_log_alpha_of_a_factor_with_a_prior_over_groups(axis):
    """The variance of a factor may be one number for all weights; a group adds up the variances of its weights."""
    layer = kv.VariationalDense(8, lora_rank=4, kernel_prior=kv.priors.ARD(axis, blocks=2))
    layer.build((None, 6))
    factor = layer.lora_a
    loc, variance = (np.broadcast_to(array(each), factor.shape) for each in (factor.loc, np.exp(factor.log_variance)))
    parts = [np.split(each, 2, axis) for each in (variance, loc**2)]
    other = 1 - axis % 2
    variance, square = (sum(part.sum(other, keepdims=True) for part in each) for each in parts)
    expected = np.broadcast_to(np.concatenate([np.log(variance / square)] * 2, axis), factor.shape)
    np.testing.assert_allclose(array(factor.log_alpha()), expected, rtol=1e-4)


@pytest.mark.slow
def test_learns_saves_loads_and_is_sampled(tmp_path):
    x, y = RNG.normal(size=(64, 5)).astype("float32"), RNG.normal(size=(64, 1)).astype("float32")
    model = keras.Sequential([keras.Input((5,)), kv.VariationalDense(8, lora_rank=2, activation="tanh")])
    model.add(kv.VariationalDense(1, lora_rank=1))
    kernel = array(model.layers[0].kernel)
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    history = model.fit(x, y, epochs=5, verbose=0, callbacks=[kv.ELBO(len(x))]).history
    assert history["nll"][-1] < history["nll"][0]
    np.testing.assert_array_equal(array(model.layers[0].kernel), kernel)
    assert array(model.layers[0].lora_b).any()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(array(loaded(x)), array(model(x)))
    assert (kv.MonteCarlo(loaded, 4).predict(x, verbose=0)["variance"] > 0).all()
    assert kv.prune(model).weights == 0  # there is nothing of an update to prune


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (lambda: kv.VariationalConv1D(10, 2, groups=5, lora_rank=5), X[None], "groups"),
        (lambda: kv.VariationalDense(4, lora_rank=2, kernel_prior=None), X, "kernel_prior"),
        (lambda: kv.VariationalEinsumDense("ab,cb->ac", 4, lora_rank=2), X, "last"),
    ],
)
def test_what_has_no_update(layer, x, message):
    with pytest.raises(ValueError, match=message):
        layer()(x)


def test_afterwards_it_is_too_late():
    layer = kv.VariationalDense(4)
    layer(X)
    with pytest.raises(ValueError, match="lora_rank"):
        layer.enable_lora(2)


@pytest.mark.slow
def test_any_layer_learns_updates_of_its_kernels(tmp_path):
    x, y = RNG.normal(size=(64, 4, 6)).astype("float32"), RNG.normal(size=(64, 3)).astype("float32")
    lstm = keras.layers.LSTM(3)
    before = array(lstm(x))
    kernels = [array(lstm.cell.kernel), array(lstm.cell.recurrent_kernel)]
    model = keras.Sequential([keras.Input((4, 6)), kv.Variational(lstm, lora_rank=2, prior="normal")])
    np.testing.assert_array_equal(array(model(x)), before)
    shapes = {"cell/kernel": (6, 2), "cell/recurrent_kernel": (3, 2)}
    drawn = model.layers[0].drawn
    assert {path.removeprefix("lstm_"): weight.shape for path, weight in drawn.items()} == shapes
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.fit(x, y, epochs=3, verbose=0, callbacks=[kv.ELBO(len(x))])
    for kernel, value in zip((lstm.cell.kernel, lstm.cell.recurrent_kernel), kernels):
        np.testing.assert_array_equal(array(kernel), value)
    assert not np.allclose(array(model(x)), before)
    assert (kv.MonteCarlo(model, 4).predict(x, verbose=0)["variance"] > 0).all()
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(array(keras.saving.load_model(tmp_path / "model.keras")(x)), array(model(x)))
