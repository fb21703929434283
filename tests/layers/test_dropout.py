"""Noise on activations: its moments, its KL, and that what is learned of it is right."""

import keras
import numpy as np
import pytest
from scipy import integrate, optimize

import keras_vdrop as kv
from tests.cases import array
from tests.statistics import assert_mean, assert_uncorrelated, assert_variance, draws

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 5)).astype("float32")


def built(layer, shape=(None, 5)):
    layer.build(shape)
    return layer


class TestGaussian:
    @pytest.mark.slow(keep=1)
    @pytest.mark.parametrize("alpha", ["unit", "layer", "fixed"])
    def test_noise_has_mean_one_and_variance_alpha(self, alpha):
        """Not alpha², nor mean 0."""
        layer = built(kv.VariationalGaussianDropout(0.2, alpha, kl_weight=0.1))
        samples = draws(lambda: layer(X, training=True), 3000)
        assert_mean(samples, X)
        assert_variance(samples, 0.25 * X**2)
        assert_uncorrelated(samples[:, 0, 0], samples[:, 1, 0])

    def test_units_have_an_alpha_each_along_the_axis(self):
        layer = built(kv.VariationalGaussianDropout(axis=1, kl_weight=0.1), (None, 2, 4))
        layer.scale.log_variance.assign([-40.0, 0.0])
        x = np.ones((6, 2, 4), "float32")
        noise = array(layer(x, training=True)) - x
        assert np.abs(noise[:, 0]).max() < 1e-6 < np.abs(noise[:, 1]).min()

    def test_kl_is_that_of_each_unit(self):
        per_unit, per_layer = (
            built(kv.VariationalGaussianDropout(0.3, alpha, prior="ard", kl_weight=1.0)) for alpha in ("unit", "layer")
        )
        expected = 5 * 0.5 * np.log1p(0.7 / 0.3)
        for layer in (per_unit, per_layer):
            np.testing.assert_allclose(array(kv.kl_divergence(layer)), expected, rtol=1e-5)
        assert per_layer.scale.log_variance.shape == (1,)
        assert not built(kv.VariationalGaussianDropout(alpha="fixed")).variables[:-1]

    def test_cubic_keeps_alpha_at_or_below_one(self):
        layer = kv.VariationalGaussianDropout(0.9, prior=kv.priors.LogUniform("cubic"), kl_weight=1.0)
        model = keras.Sequential([keras.Input((5,)), layer])
        model.compile(keras.optimizers.SGD(1.0), lambda y, prediction: 0.0 * keras.ops.sum(prediction))
        assert array(layer.scale.log_variance).max() == 0.0
        layer.scale.log_variance.assign([-3.0] * 5)
        for _ in range(20):  # nothing but the KL, which asks for more noise
            model.train_on_batch(X, X)
        np.testing.assert_array_equal(array(layer.scale.log_variance), np.zeros(5))

    @pytest.mark.slow
    def test_alpha_falls_on_informative_inputs_and_rises_on_noise(self):
        rng, number = np.random.default_rng(0), 256
        informative = rng.normal(size=(number, 4))
        y = informative.sum(axis=1, keepdims=True) + 0.5 * rng.normal(size=(number, 1))
        # Noise that has nothing to do with y, not even by chance: orthogonal to it and to what is informative.
        basis, _ = np.linalg.qr(np.concatenate([y, informative, rng.normal(size=(number, 4))], axis=1))
        x = np.concatenate([informative, basis[:, 5:] * np.sqrt(number)], axis=1)

        layer = kv.VariationalGaussianDropout(0.3, threshold=0.5)
        dense = keras.layers.Dense(1, kernel_initializer="zeros")
        model = keras.Sequential([keras.Input((8,)), layer, dense])
        epochs, steps = 10, 200
        rate = keras.optimizers.schedules.PolynomialDecay(0.05, epochs * steps, 0.0)
        model.compile(keras.optimizers.Adam(rate), lambda y, mean: keras.ops.square(y - mean) / (2 * 0.5**2))
        before = array(layer.scale.log_alpha())
        data = np.tile(x, (steps, 1)).astype("float32"), np.tile(y, (steps, 1)).astype("float32")
        model.fit(*data, batch_size=number, epochs=epochs, shuffle=False, callbacks=[kv.ELBO(number)], verbose=0)
        after = array(layer.scale.log_alpha())
        assert (after[:4] < before[:4] - 2).all() and (after[4:] > before[4:] + 1).all()

        # Past the threshold, so that pruning leaves the informative ones, and the answer as it was.
        predicted = model.predict(x, verbose=0)
        report = kv.prune(model)
        assert (report.weights, report.left) == (8, 4)
        np.testing.assert_array_equal(array(layer.scale.mask), [1, 1, 1, 1, 0, 0, 0, 0])
        np.testing.assert_allclose(model.predict(x, verbose=0), predicted, atol=0.1)
        assert np.abs(array(layer(x, training=True))[:, 4:]).max() < 1e-6

    def test_one_alpha_for_all_prunes_nothing(self):
        layer = built(kv.VariationalGaussianDropout(0.99, "layer", kl_weight=0.1))
        assert kv.prune(layer).weights == 0 and array(layer.scale.mask).all()


class TestConcrete:
    @staticmethod
    def moments(rate, temperature):
        """Mean and variance of z = 1 − σ((logit p + logit u) / t) over u ~ U(0, 1)."""

        def z(u):
            return 1 / (1 + np.exp((np.log(rate / (1 - rate)) + np.log(u / (1 - u))) / temperature))

        first, second = (
            integrate.quad(lambda u, k=k: z(u) ** k, 0, 1, limit=500, points=[1 - rate])[0] for k in (1, 2)
        )
        return first, second - first**2

    def test_noise_is_the_relaxed_coin_over_its_keep_rate(self):
        layer = kv.ConcreteDropout(keras.layers.Dense(5, "linear", False, "identity"), 0.3, 0.1, kl_weight=0.1)
        layer.build((None, 5))
        samples = draws(lambda: layer(X, training=True), 3000)
        mean, variance = self.moments(0.3, 0.1)
        assert_mean(samples, X * mean / 0.7)
        standard = (samples - X * mean / 0.7) ** 2
        assert_mean(standard, X**2 * variance / 0.7**2)

    @pytest.mark.parametrize("spatial, distinct", [(False, 2 * 4 * 4 * 3), (True, 2 * 3)])
    def test_spatial_drops_whole_channels(self, spatial, distinct):
        layer = kv.ConcreteDropout(keras.layers.Conv2D(2, 1), 0.5, 1.0, spatial=spatial, kl_weight=0.1)
        layer.build((None, 4, 4, 3))
        assert len(np.unique(array(layer._drop(keras.ops.ones((2, 4, 4, 3)))))) == distinct

    @pytest.mark.slow(keep=1)
    @pytest.mark.parametrize("deviation", [1.0, 2.0])
    def test_it_recovers_the_best_rate(self, deviation):
        """A linear layer with frozen weights, inputs of one and no error of its own: J(p) has a closed form.

        J(p) = Σ w²·Var[z] / (2·deviation²·(1 − p)²) + KL(p) / N, the weights adding up to 0.
        """
        units, number, temperature = 20, 40, 0.1
        w = 0.3 * np.where(np.arange(units) % 2, 1.0, -1.0)

        def objective(rate):
            error = (w**2).sum() * self.moments(rate, temperature)[1] / (1 - rate) ** 2
            coins = units * (np.log(2) + rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
            return error / (2 * deviation**2) + ((w**2).sum() / (2 * (1 - rate)) + coins) / number

        best = optimize.minimize_scalar(objective, bounds=(0.01, 0.9), method="bounded").x
        of_data = {"kl_weight": 1 / number, "seed": 0}
        layer = kv.ConcreteDropout(keras.layers.Dense(1, use_bias=False), 0.1, temperature, **of_data)
        model = keras.Sequential([keras.Input((units,)), layer])
        layer.layer.kernel.assign(w[:, None])
        layer.layer.kernel.trainable = False
        steps = 400
        rate = keras.optimizers.schedules.PolynomialDecay(0.05, steps, 0.0)
        model.compile(keras.optimizers.Adam(rate), lambda y, mean: keras.ops.square(y - mean) / (2 * deviation**2))
        x, y = np.ones((512 * steps, units), "float32"), np.zeros((512 * steps, 1), "float32")
        model.fit(x, y, batch_size=512, verbose=0)
        assert 0.05 < best < 0.5
        assert abs(float(layer.rate) - best) < 0.02

    def test_fewer_data_mean_a_greater_rate(self):
        layer = kv.ConcreteDropout(keras.layers.Dense(3, kernel_initializer="zeros"), 0.1, kl_weight=1.0)
        model = keras.Sequential([keras.Input((5,)), layer])
        model.compile(keras.optimizers.Adam(0.1), lambda y, prediction: 0.0 * keras.ops.sum(prediction))
        for _ in range(100):
            model.train_on_batch(X, X[:, :3])
        np.testing.assert_allclose(float(layer.rate), 0.5, atol=0.01)

    @pytest.mark.parametrize("wrapped", [keras.layers.Activation("relu"), kv.VariationalDense(2)])
    def test_a_layer_without_a_plain_kernel_is_refused(self, wrapped):
        with pytest.raises(ValueError, match="plain `kernel`"):
            kv.ConcreteDropout(wrapped)(X)


class TestMonteCarlo:
    def test_it_drops_as_keras_does(self):
        layer = kv.MonteCarloDropout(0.25)
        samples = draws(lambda: layer(X, training=True), 3000)
        assert_mean(samples, X)
        dropped = samples == 0
        assert abs(dropped.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / dropped.size)
        np.testing.assert_allclose(samples[~dropped], np.broadcast_to(X / 0.75, samples.shape)[~dropped], rtol=1e-6)

    @pytest.mark.parametrize("noise_shape", [(None, 1, None), (1, 4, 8), None])
    @pytest.mark.parametrize("per_example", [True, False])
    def test_noise_shape(self, noise_shape, per_example):
        layer = kv.MonteCarloDropout(0.5, noise_shape, per_example=per_example)
        mask = array(layer(np.ones((64, 4, 8), "float32"), training=True))
        shared = [axis for axis, size in enumerate(noise_shape or ()) if size == 1] + ([] if per_example else [0])
        for axis in range(3):
            same = (mask == np.take(mask, [0], axis=axis)).all()
            assert same == (axis in shared)

    @pytest.mark.parametrize("rate, value", [(0.0, 1.0), (1.0, 0.0)])
    def test_the_ends_of_the_range(self, rate, value):
        np.testing.assert_array_equal(array(kv.MonteCarloDropout(rate)(np.ones((2, 3)), training=True)), value)

    def test_only_it_is_active_in_a_sampled_model(self):
        """MC dropout: batch statistics and Keras's own Dropout stay as in prediction."""
        model = keras.Sequential(
            [keras.Input((5,)), keras.layers.BatchNormalization(), keras.layers.Dropout(0.9), kv.MonteCarloDropout(0.5)]
        )
        samples = kv.MonteCarlo(model, 200, output="samples").predict(X, verbose=0)
        values = model.predict(X, verbose=0)[:, None]
        assert np.isclose(samples, 0).any() and np.isclose(samples, 2 * values).any()
        assert (np.isclose(samples, 0) | np.isclose(samples, 2 * values, rtol=1e-5)).all()


@pytest.mark.parametrize(
    "cls, arguments",
    [
        *[(kv.VariationalGaussianDropout, {"rate": rate}) for rate in (0.0, 1.0, -0.1, float("nan"))],
        (kv.VariationalGaussianDropout, {"alpha": "channel"}),
        (kv.VariationalGaussianDropout, {"axis": 0}),
        (kv.VariationalGaussianDropout, {"threshold": float("inf")}),
        *[(kv.MonteCarloDropout, {"rate": rate}) for rate in (-0.1, 1.5)],
        *[(kv.ConcreteDropout, {"initial_rate": rate}) for rate in (0.0, 1.0, -0.1)],
        (kv.ConcreteDropout, {"temperature": 0.0}),
        (kv.ConcreteDropout, {"prior_scale": -1.0}),
        (kv.ConcreteDropout, {"kl_weight": -1.0}),
    ],
    ids=str,
)
def test_bad_arguments_name_the_value(cls, arguments):
    ((name, value),) = arguments.items()
    wrapped = {"layer": keras.layers.Dense(2)} if cls is kv.ConcreteDropout else {}
    with pytest.raises(ValueError, match=name) as error:
        cls(**wrapped, **arguments)
    assert str(value) in str(error.value)


def test_gaussian_dropout_needs_a_prior():
    with pytest.raises(ValueError, match='alpha="fixed"'):
        kv.VariationalGaussianDropout(prior=None)


@pytest.mark.parametrize("layer", [kv.VariationalGaussianDropout(), kv.ConcreteDropout(keras.layers.Dense(2))])
def test_units_must_be_known(layer):
    with pytest.raises(ValueError, match="must be known"):
        layer.build((None, None))
