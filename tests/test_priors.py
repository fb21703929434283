"""Priors: their KL, how they are named, saved and turned into TFP distributions."""

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from keras_vdrop import priors
from tests.cases import array, randomize

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
tensorflow_only = pytest.mark.skipif(not ON_TENSORFLOW, reason="TFP is TensorFlow's")
LOC = np.array([-2.0, 0.0, 0.3, 1.0], "float32")
LOG_VARIANCE = np.array([-3.0, -1.0, 0.5, -8.0], "float32")


def dense(**arguments):
    layer = kv.VariationalDense(3, kl_weight=0.1, **arguments)
    layer.build((None, 4))
    randomize(layer)
    return layer


@pytest.mark.parametrize(
    "name, cls",
    [
        ("log_uniform", priors.LogUniform),
        ("ard", priors.ARD),
        ("normal", priors.Normal),
        ("scale_mixture", priors.ScaleMixture),
    ],
)
def test_names(name, cls):
    assert type(priors.get(name)) is cls
    assert priors.get(None) is None


def test_instances_and_configs_are_taken():
    prior = priors.Normal(0.3)
    assert priors.get(prior) is prior
    again = priors.get(priors.serialize(prior))
    assert again.get_config() == {"scale": 0.3, "trainable": False}
    assert repr(again) == "Normal(scale=0.3, trainable=False)"
    assert priors.serialize(None) is None


@pytest.mark.parametrize("wrong", ["loguniform", 3, object(), keras.initializers.Zeros()])
def test_unknown_prior_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match="'ard', 'log_uniform', 'normal', 'scale_mixture'"):
        kv.VariationalDense(2, kernel_prior=wrong)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_scale_must_be_positive(scale):
    with pytest.raises(ValueError, match="scale="):
        priors.Normal(scale)


@pytest.mark.parametrize(
    "cls, arguments",
    [
        (priors.LogUniform, {"form": "quartic"}),
        (priors.ARD, {"group_axis": 0.5}),
        (priors.ARD, {"group_axis": True}),
        (priors.ARD, {"blocks": 0}),
        (priors.ARD, {"blocks": 2}),
        (priors.ScaleMixture, {"probability": 1.0}),
        (priors.ScaleMixture, {"probability": 0.0}),
        (priors.ScaleMixture, {"narrow_scale": 2.0}),
        (priors.ScaleMixture, {"narrow_scale": 0.0}),
    ],
)
def test_bad_arguments_name_the_value(cls, arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        cls(**arguments)


def test_a_group_axis_that_a_weight_lacks():
    with pytest.raises(ValueError, match="group_axis=2"):
        dense(kernel_prior=priors.ARD(group_axis=2)).kernel.kl()


@pytest.mark.parametrize("form", priors.LogUniform.FORMS)
def test_forms_of_the_log_uniform_agree_where_all_hold(form):
    """For alpha ≤ 1 each within its stated error of the exact one, and a saved layer keeps its form."""
    prior = priors.get(priors.serialize(priors.LogUniform(form)))
    loc, log_variance = np.ones(9, "float32"), np.linspace(-8, 0, 9, dtype="float32")
    expected = array(priors.LogUniform("exact").kl(loc, log_variance))
    bound = {"sigmoid": 0.0051, "exact": 0.0, "cubic": 0.041}[prior.form]
    assert np.abs(array(prior.kl(loc, log_variance)) - expected).max() <= bound
    dense(kernel_prior=prior).kernel.kl()


def test_pruning_by_groups():
    layer = kv.VariationalDense(3, kl_weight=0.1, kernel_prior=priors.ARD(group_axis=0), initial_log_variance=0.0)
    layer.build((None, 4))
    layer.kernel.loc.assign(np.array([[9.0, 9, 0.01], [0.05, 0.05, 0.05], [0.01, 0.02, 0.01], [9, 9, 9]]))
    assert kv.prune(layer).left == 6
    np.testing.assert_array_equal(array(layer.kernel.mask).sum(axis=1), [3, 0, 0, 3])


class TestTrainableScale:
    def test_it_is_learned_to_be_the_root_mean_square(self):
        """With nothing but the KL, and the posterior held fixed, the best scale is sqrt(mean(loc² + variance))."""
        layer = dense(kernel_prior=priors.Normal(1.0, trainable=True))
        weight = layer.kernel
        best = np.sqrt(np.mean(array(weight.loc) ** 2 + np.exp(array(weight.log_variance))))
        weight.loc.trainable = False
        model = keras.Sequential([keras.Input((4,)), layer])
        model.compile(keras.optimizers.Adam(0.05), lambda y, prediction: 0.0 * keras.ops.sum(prediction))
        keep = array(weight.log_variance)
        for _ in range(200):
            model.train_on_batch(np.ones((1, 4)), np.ones((1, 3)))
            weight.log_variance.assign(keep)
        np.testing.assert_allclose(np.exp(array(weight.prior_parameters["log_scale"])), best, rtol=1e-2)

    def test_each_weight_has_its_own_and_it_is_saved(self, tmp_path):
        prior = priors.Normal(0.5, trainable=True)
        model = keras.Sequential(
            [keras.Input((4,)), *(kv.VariationalDense(4, kernel_prior=prior, kl_weight=0.1) for _ in range(2))]
        )
        scales = [layer.kernel.prior_parameters["log_scale"] for layer in model.layers]
        assert scales[0] is not scales[1]
        scales[0].assign(-3.0)
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(
            [array(layer.kernel.prior_parameters["log_scale"]) for layer in again.layers], [-3.0, np.log(0.5)]
        )
        np.testing.assert_allclose(array(kv.kl_divergence(again)), array(kv.kl_divergence(model)), rtol=1e-6)

    def test_a_fixed_scale_is_no_variable(self):
        assert dense(kernel_prior=priors.Normal(1.0)).kernel.prior_parameters == {}

    def test_it_starts_at_the_size_of_the_weights(self):
        layer = kv.VariationalDense(3, kl_weight=0.1, kernel_prior=priors.Normal(trainable=True))
        layer.build((None, 4))
        rms = np.sqrt(np.mean(array(layer.kernel.loc) ** 2))
        np.testing.assert_allclose(np.exp(array(layer.kernel.prior_parameters["log_scale"])), 2 * rms, rtol=1e-5)


class TestScaleOfTheWeights:
    def test_it_is_twice_their_size_and_stays(self):
        layer = kv.VariationalDense(3, kl_weight=0.1, kernel_prior="normal", bias_prior="normal")
        model = keras.Sequential([keras.Input((4,)), layer])
        weights = layer.kernel, layer.bias
        expected = [2 * np.sqrt(np.mean(array(layer.kernel.loc) ** 2)), 1.0]
        model.compile("adam", "mse")
        model.fit(np.ones((4, 4)), np.ones((4, 3)), verbose=0)
        log_scales = [weight.prior_parameters["log_scale"] for weight in weights]
        np.testing.assert_allclose([np.exp(array(log_scale)) for log_scale in log_scales], expected, rtol=1e-5)
        assert not any(log_scale.trainable for log_scale in log_scales)
        for weight, scale in zip(weights, expected):
            same = priors.Normal(float(scale)).kl(array(weight.loc), array(weight.log_variance))
            np.testing.assert_allclose(array(weight.kl()), array(same).sum(), rtol=1e-5)

    def test_it_is_saved(self, tmp_path):
        model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(3, kl_weight=0.1, kernel_prior="normal")])
        randomize(model)
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        assert again.layers[0].kernel_prior.scale is None
        np.testing.assert_allclose(array(kv.kl_divergence(again)), array(kv.kl_divergence(model)), rtol=1e-6)

    def test_a_config_that_names_a_scale_keeps_it(self):
        prior = priors.get(
            {
                "module": "keras_vdrop.priors",
                "class_name": "Normal",
                "config": {"scale": 1.0, "trainable": False},
                "registered_name": "keras_vdrop>Normal",
            }
        )
        assert prior.scale == 1.0 and dense(kernel_prior=prior).kernel.prior_parameters == {}


def test_a_prior_of_ones_own(tmp_path):
    @keras.saving.register_keras_serializable(package="tests")
    class Half(priors.Prior):
        def kl(self, loc, log_variance):
            return 0.5 * keras.ops.ones_like(loc)

    layer = dense(kernel_prior=Half())
    assert float(array(layer.kernel.kl())) == 6.0
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(3, kl_weight=0.1, kernel_prior=Half())])
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again.layers[0].kernel.prior) is Half


@tensorflow_only
class TestTFP:
    def test_analytic_where_registered(self):
        from tensorflow_probability import distributions as tfd

        prior = priors.get(tfd.Normal(0.5, 2.0))
        expected = tfd.kl_divergence(tfd.Normal(LOC, np.exp(0.5 * LOG_VARIANCE)), tfd.Normal(0.5, 2.0))
        np.testing.assert_allclose(array(prior.kl(LOC, LOG_VARIANCE)), expected, rtol=1e-6)

    def test_quadrature_where_not_registered(self):
        from scipy import integrate, stats
        from tensorflow_probability import distributions as tfd

        prior = priors.get(tfd.StudentT(4.0, 0.2, 0.7))
        values = array(prior.kl(LOC, LOG_VARIANCE))
        for value, loc, sd in zip(values, LOC, np.exp(0.5 * LOG_VARIANCE)):

            def integrand(x, loc=loc, sd=sd):
                q = stats.norm(loc, sd)
                return q.pdf(x) * (q.logpdf(x) - stats.t(4.0, 0.2, 0.7).logpdf(x))

            exact = integrate.quad(integrand, loc - 12 * sd, loc + 12 * sd, limit=200)[0]
            np.testing.assert_allclose(value, exact, rtol=2e-3)

    @pytest.mark.slow
    def test_mixture_prior_trains_and_is_saved(self, tmp_path):
        from tensorflow_probability import distributions as tfd

        mixture = tfd.MixtureSameFamily(
            tfd.Categorical(probs=[0.25, 0.75]), tfd.Normal(loc=[0.0, 0.0], scale=[1.0, 0.05])
        )
        layer = kv.VariationalDense(3, kl_weight=0.1, kernel_prior=mixture)
        model = keras.Sequential([keras.Input((4,)), layer])
        for jit in (False, True):
            model.compile("sgd", "mse", jit_compile=jit)
            assert np.isfinite(model.train_on_batch(np.ones((2, 4)), np.ones((2, 3))))
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(array(again.layers[0].kernel.kl()), array(layer.kernel.kl()), rtol=1e-6)

    def test_a_mixture_of_a_list_of_distributions_is_saved(self):
        from tensorflow_probability import distributions as tfd

        mixture = tfd.Mixture(tfd.Categorical(probs=[0.25, 0.75]), [tfd.Normal(0.0, 1.0), tfd.Laplace(0.0, 0.05)])
        prior = priors.get(mixture)
        again = priors.get(priors.serialize(prior))
        np.testing.assert_allclose(array(again.kl(LOC, LOG_VARIANCE)), array(prior.kl(LOC, LOG_VARIANCE)), rtol=1e-6)

    def test_a_distribution_of_ones_own_trains_but_is_not_saved(self, tmp_path):
        """Its class cannot be found when the file is loaded, and `tfd` may have another of the same name."""
        from tensorflow_probability import distributions as tfd

        class Laplace(tfd.Normal):
            pass

        model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(3, kernel_prior=Laplace(0.0, 1.0))])
        model.compile("sgd", "mse")
        model.fit(np.ones((2, 4)), np.ones((2, 3)), verbose=0, callbacks=[kv.ELBO(2)])
        with pytest.raises(ValueError, match="Laplace is not one of"):
            model.save(tmp_path / "model.keras")

    def test_a_distribution_over_vectors_is_refused(self):
        from tensorflow_probability import distributions as tfd

        with pytest.raises(ValueError, match="over scalars"):
            priors.get(tfd.MultivariateNormalDiag([0.0, 0.0]))

    @pytest.mark.parametrize(
        "prior",
        [
            "log_uniform",
            priors.LogUniform("exact"),
            "ard",
            priors.ARD(group_axis=0),
            priors.ARD(group_axis=-1, blocks=1),
            "normal",
            priors.Normal(0.2),
            priors.Normal(0.2, trainable=True),
            "tfp",
        ],
        ids=str,
    )
    def test_kl_of_the_distributions_is_the_weights(self, prior):
        from tensorflow_probability import distributions as tfd

        prior = tfd.Normal(0.5, 2.0) if prior == "tfp" else prior
        weight = dense(kernel_prior=prior).kernel
        divergence = tfd.kl_divergence(kv.tfp.posterior(weight), kv.tfp.prior(weight))
        assert divergence.shape == ()
        np.testing.assert_allclose(divergence, weight.kl(), rtol=1e-5)

    def test_scale_mixture_has_the_density_of_its_distribution(self):
        """No KL is registered for a mixture: our quadrature against that of `Distribution`, where both are smooth."""
        prior = priors.ScaleMixture(0.5, 1.0, 0.5)
        distribution = prior.distribution(LOC, LOG_VARIANCE)
        expected = priors.Distribution(distribution).kl(LOC, LOG_VARIANCE)
        np.testing.assert_allclose(prior.kl(LOC, LOG_VARIANCE), expected, atol=1e-3)
        assert kv.tfp.prior(dense(kernel_prior=prior).kernel).event_shape == (4, 3)

    def test_posterior_is_the_one_that_is_sampled(self):
        weight = dense().kernel
        posterior = kv.tfp.posterior(weight)
        assert posterior.event_shape == (4, 3)
        np.testing.assert_allclose(posterior.mean(), weight.loc)
        np.testing.assert_allclose(posterior.variance(), np.exp(weight.log_variance), rtol=1e-5)

    def test_log_uniform_density(self):
        distribution = kv.tfp.LogUniform()
        np.testing.assert_allclose(distribution.log_prob([0.5, -2.0]), [np.log(2), -np.log(2)], rtol=1e-6)
        assert kv.tfp.LogUniform is kv.tfp.LogUniform


@pytest.mark.skipif(ON_TENSORFLOW, reason="for the other backends")
def test_tfp_prior_needs_tensorflow():
    with pytest.raises(ValueError, match="TensorFlow backend"):
        priors.Distribution(None)


@pytest.mark.slow
def test_importing_the_package_does_not_import_tfp():
    import subprocess
    import sys

    script = "import sys, keras_vdrop; assert 'tensorflow_probability' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("restart", [False, True])
def test_a_centered_prior_keeps_its_center_while_the_weights_learn(restart):
    layer = kv.VariationalDense(1, kernel_prior=priors.Normal(centered=True), kl_weight=0.01)
    model = keras.Sequential([keras.Input((3,)), layer])
    if restart:
        layer.kernel.assign(np.arange(3.0)[:, None])
        layer.kernel.restart()
    start = array(layer.kernel.loc)
    model.compile("sgd", "mse")
    model.fit(np.eye(3), np.ones((3, 1)), epochs=2, verbose=0)
    np.testing.assert_array_equal(array(layer.kernel.prior_parameters["center"]), start)
    assert not np.allclose(array(layer.kernel.loc), start)
