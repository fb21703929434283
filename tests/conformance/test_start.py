"""The initial log variance of a posterior, how far one step moves it, and its unit in files."""

import pathlib

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from tests.cases import CASES, array, posteriors, randomize

DATA = pathlib.Path(__file__).parent.parent / "data"
KERNELS = [case for case in CASES if case.is_kernel]


def size(values):
    """Return the root mean square, or 0.1 if all values are 0."""
    return np.sqrt(np.mean(values**2)) or 0.1


@pytest.mark.parametrize("subject", KERNELS, ids=str)
def test_it_starts_at_the_size_of_the_weights(subject):
    for weight in posteriors(subject.built()):
        log_variance = array(weight.log_variance)
        np.testing.assert_allclose(log_variance, 2 * np.log(size(array(weight.loc))) + weight.prior.start, rtol=1e-5)


@pytest.mark.parametrize("subject", KERNELS, ids=str)
@pytest.mark.parametrize("rate", [1.0, 7.0])
def test_it_starts_where_it_is_told(subject, rate):
    for weight in posteriors(subject.built(initial_log_variance=-2.5, log_variance_rate=rate)):
        np.testing.assert_allclose(array(weight.log_variance), -2.5, rtol=1e-6)


def test_means_are_those_that_the_initializer_gives():
    def kernel(**arguments):
        keras.utils.set_random_seed(3)
        first, second = kv.VariationalDense(3, **arguments), kv.VariationalDense(3, **arguments)
        first.build((None, 4)), second.build((None, 4))
        return [array(layer.kernel.loc) for layer in (first, second)]

    np.testing.assert_array_equal(kernel(), kernel(initial_log_variance=-10.0))


def test_a_model_that_is_built_at_its_first_batch():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = kv.VariationalDense(3, kl_weight=0.1)

        def call(self, x, training=False):
            return self.dense(x, training=training)

    model = Model()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(np.ones((4, 5)), np.ones((4, 3)), verbose=0)
    kernel = model.dense.kernel
    np.testing.assert_allclose(array(kernel.log_variance), 2 * np.log(size(array(kernel.loc))) - 6, rtol=1e-5)


@pytest.mark.slow(keep=6)
@pytest.mark.parametrize("rate", [1.0, 10.0])
def test_a_step_of_adam_moves_it_by_its_rate(case, rate):
    """Adam's first step has the length of the learning rate, whatever the gradient, so it moves by 1e-3·rate."""
    if not case.is_kernel:
        pytest.skip("has no rate")
    model = case.with_prior("ard").replace(log_variance_rate=rate, kl_weight=1.0).model()
    randomize(model, log_variance=(-1.0, 0.0))
    before = [array(weight.log_variance) for weight in posteriors(model)]
    adam = keras.optimizers.Adam(1e-3, epsilon=1e-12)
    model.compile(adam, lambda y, outputs: 0.0 * keras.ops.sum(outputs), run_eagerly=True)
    x = case.inputs(shape=(3, *model.input_shape[1:]))
    model.train_on_batch(x, np.zeros((3, *model.output_shape[1:])))
    for weight, start in zip(posteriors(model), before):
        np.testing.assert_allclose(array(weight.log_variance) - start, 1e-3 * rate, rtol=0.02)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "10"])
def test_a_rate_that_is_none(value):
    with pytest.raises(ValueError, match="log_variance_rate"):
        kv.VariationalDense(3, log_variance_rate=value)


# Files


@pytest.mark.parametrize("rates", [(1.0, 10.0), (10.0, 1.0), (5.0, 5.0)])
@pytest.mark.parametrize("subject", KERNELS, ids=str)
def test_weights_files_load_at_another_rate(subject, rates, tmp_path):
    model, other = (subject.replace(log_variance_rate=rate).model() for rate in rates)
    randomize(model)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    for one, two in zip(posteriors(model), posteriors(other)):
        np.testing.assert_allclose(array(one.log_variance), array(two.log_variance), rtol=1e-6)
    np.testing.assert_allclose(array(kv.kl_divergence(model)), array(kv.kl_divergence(other)), rtol=1e-5)


def test_a_config_that_says_nothing_of_a_rate_means_one(case):
    if not case.is_kernel:
        pytest.skip("has no rate")
    layer = case.make()
    ours = getattr(layer, "cell", layer)
    config = {key: value for key, value in ours.get_config().items() if key != "log_variance_rate"}
    assert type(ours).from_config(config).get_config()["log_variance_rate"] == 1.0


def check(model, expected):
    """Assert that a model agrees with the values stored for `fixed_rate.keras`.

    An earlier keras_vdrop, which stored log variances in nats, made that file.
    """
    np.testing.assert_allclose(
        model.predict(expected["inputs"], verbose=0), expected["predictions"], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(array(kv.kl_divergence(model)), expected["kl"], rtol=1e-5)
    log_variances = np.concatenate([np.ravel(array(weight.log_variance)) for weight in posteriors(model)])
    np.testing.assert_allclose(log_variances, expected["log_variances"], rtol=1e-5)
    assert [kv.sparsity(model, threshold).left for threshold in (-2.0, 0.0, 1.0)] == expected["left"].tolist()


@pytest.mark.slow
def test_a_file_from_before_there_were_rates_loads(tmp_path):
    expected = np.load(DATA / "fixed_rate.npz")
    model = keras.saving.load_model(DATA / "fixed_rate.keras")
    check(model, expected)
    dense = model.get_layer("dense")
    assert dense.log_variance_rate == 1.0 and dense.kernel.prior.scale == 0.5
    assert model.get_layer("attention").kernel_prior.scale == 1.0 and dense.bias_prior is None
    model.save(tmp_path / "again.keras")
    check(keras.saving.load_model(tmp_path / "again.keras"), expected)
    model.fit(expected["inputs"], expected["predictions"], verbose=0)  # the optimizer's state fits


@pytest.mark.slow
def test_a_weights_file_from_before_loads_in_layers_of_today():
    expected = np.load(DATA / "fixed_rate.npz")
    model = keras.saving.load_model(DATA / "fixed_rate.keras", compile=False)

    def of_today(layer):
        config = layer.get_config()
        if "log_variance_rate" in config:
            config["log_variance_rate"] = 10.0
        for name in ("kernel_prior", "bias_prior"):
            if (config.get(name) or {}).get("config") == {"scale": 1.0, "trainable": False}:
                config[name] = "normal"
        return type(layer).from_config(config)

    other = keras.models.clone_model(model, clone_function=of_today)
    assert {weight.log_variance.factor for weight in posteriors(other)} == {1.0, 10.0}
    assert other.get_layer("attention").kernel_prior.scale is None
    other.load_weights(DATA / "fixed_rate.weights.h5")
    check(other, expected)
