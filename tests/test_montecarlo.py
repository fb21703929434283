"""Monte-Carlo prediction: distinct draws, right moments, an untouched model."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_vdrop as kv
from tests.cases import CASES, array, randomize
from tests.statistics import assert_mean, assert_uncorrelated, assert_variance

X = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")


def network(**arguments):
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(2, kl_weight=0.1, **arguments)])
    randomize(model)
    return model


def samples(model, x, count, **arguments):
    return kv.MonteCarlo(model, count, output="samples", **arguments).predict(x, verbose=0)


@pytest.mark.parametrize("estimator", ["local_reparameterization", "flipout", "reparameterization"])
def test_samples_have_the_moments_of_the_posterior(estimator):
    model = network(estimator=estimator)
    draws = np.swapaxes(samples(model, X, 4000), 0, 1)
    kernel = model.layers[0].kernel
    assert_mean(draws, X @ array(kernel.loc))
    if estimator != "flipout":
        assert_variance(draws, X**2 @ np.exp(array(kernel.log_variance)))
    assert_uncorrelated(draws[1:, 0, 0], draws[:-1, 0, 0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layer_draws_distinct_samples(case):
    model = case.model()
    randomize(model)
    x = case.inputs()
    mean = model.predict(x, verbose=0)
    draws = samples(model, x, 5)
    assert draws.shape == (len(x), 5, *mean.shape[1:])
    for i in range(5):
        assert not any(np.array_equal(draws[:, i], draws[:, j]) for j in range(i))
    np.testing.assert_array_equal(model.predict(x, verbose=0), mean)


def test_batches_and_calls_draw_anew():
    model = kv.MonteCarlo(network(), 2, output="samples")
    x = np.repeat(X[:1], 4, axis=0)
    one, other = model.predict(x, batch_size=2, verbose=0), model.predict(x, batch_size=2, verbose=0)
    assert len(np.unique(np.concatenate([one, other])[..., 0])) == 16


@pytest.mark.parametrize("case", CASES, ids=str)
def test_consistent_draws_are_one_function_for_all_rows(case):
    model = case.model()
    randomize(model)
    x = np.repeat(case.inputs()[:1], 5, axis=0)
    sampler = kv.MonteCarlo(model, 6, output="samples", consistent=True)
    draws = sampler.predict(x, batch_size=2, verbose=0)
    np.testing.assert_allclose(draws, np.repeat(draws[:1], 5, axis=0), rtol=1e-4, atol=1e-5)
    assert np.ptp(draws, axis=1).max() > 1e-3
    np.testing.assert_allclose(sampler.predict(x, batch_size=3, verbose=0), draws, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ["local_reparameterization", "flipout", "reparameterization"])
def test_consistent_draws_have_the_moments_of_the_posterior(estimator):
    model = network(estimator=estimator)
    draws = np.swapaxes(samples(model, X, 4000, consistent=True), 0, 1)
    kernel = model.layers[0].kernel
    assert_mean(draws, X @ array(kernel.loc))
    assert_variance(draws, X**2 @ np.exp(array(kernel.log_variance)))


def test_seed():
    model = network()
    one, other = samples(model, X, 3, seed=1), samples(model, X, 3, seed=1)
    np.testing.assert_array_equal(one, other)
    assert not np.array_equal(one, samples(model, X, 3, seed=2))


def test_jit():
    model = kv.MonteCarlo(network(), 2000, output="samples")
    model.compile(jit_compile=True)
    draws = np.swapaxes(model.predict(X, verbose=0), 0, 1)
    kernel = model.model.layers[0].kernel
    assert_mean(draws, X @ array(kernel.loc))
    assert_variance(draws, X**2 @ np.exp(array(kernel.log_variance)))


def test_everything_else_stays_in_inference_mode():
    model = keras.Sequential(
        [keras.Input((4,)), layers.BatchNormalization(), layers.Dropout(0.9), kv.VariationalDense(2, kl_weight=0.1)]
    )
    model.layers[-1].kernel.log_variance.assign(np.full((4, 2), -45.0))
    moving = array(model.layers[0].moving_mean)
    draws = samples(model, X, 6)
    np.testing.assert_allclose(draws, np.repeat(model.predict(X, verbose=0)[:, None], 6, axis=1), atol=1e-5)
    np.testing.assert_array_equal(array(model.layers[0].moving_mean), moving)


def test_masks_alone_are_noise_enough():
    lstm = kv.VariationalLSTM(3, kernel_prior=None, dropout=0.5)
    model = keras.Sequential([keras.Input((5, 4)), lstm])
    draws = samples(model, np.ones((2, 5, 4), "float32"), 8)
    assert draws.std(axis=1).min() > 0


STATISTICS = {
    None: {"mean": (3, 2), "variance": (3, 2)},
    "categorical": {"probability": (3, 2)}
    | dict.fromkeys(["predictive_entropy", "expected_entropy", "mutual_information"], (3,)),
    "bernoulli": dict.fromkeys(["probability", "predictive_entropy", "expected_entropy", "mutual_information"], (3, 2)),
    "normal": dict.fromkeys(["mean", "aleatoric_variance", "epistemic_variance"], (3,)),
}


@pytest.mark.parametrize("likelihood", STATISTICS)
def test_statistics(likelihood):
    result = kv.MonteCarlo(network(), 16, likelihood=likelihood).predict(X, verbose=0)
    assert {name: value.shape for name, value in result.items()} == STATISTICS[likelihood]
    assert all(np.isfinite(value).all() for value in result.values())
    if "mutual_information" in result:
        total = result["expected_entropy"] + result["mutual_information"]
        np.testing.assert_allclose(total, result["predictive_entropy"], atol=1e-5)
        assert result["mutual_information"].max() > 1e-3


def test_statistics_are_those_of_the_samples():
    model = network()
    statistics = kv.MonteCarlo(model, 64, seed=3).predict(X, verbose=0)
    draws = samples(model, X, 64, seed=3)
    np.testing.assert_allclose(statistics["mean"], draws.mean(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics["variance"], draws.var(axis=1), rtol=1e-3)


def test_from_probabilities():
    model = keras.Sequential([network(), layers.Softmax()])
    from_logits = kv.MonteCarlo(model.layers[0], 16, likelihood="categorical", seed=3).predict(X, verbose=0)
    direct = kv.MonteCarlo(model, 16, likelihood="categorical", from_logits=False, seed=3).predict(X, verbose=0)
    np.testing.assert_allclose(from_logits["probability"], direct["probability"], rtol=1e-4)


def test_saves_and_loads(tmp_path):
    model = kv.MonteCarlo(network(), 4, likelihood="categorical", seed=5)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    ours, theirs = model.get_config(), again.get_config()
    assert ours.pop("model")["class_name"] == theirs.pop("model")["class_name"] and ours == theirs
    np.testing.assert_array_equal(array(again.model.layers[0].kernel.loc), array(model.model.layers[0].kernel.loc))
    one, other = model.predict(X, verbose=0), again.predict(X, verbose=0)
    np.testing.assert_allclose(one["probability"], other["probability"], rtol=1e-5)


@pytest.mark.parametrize(
    "arguments", [{"num_samples": 0}, {"num_samples": 2.5}, {"likelihood": "poisson"}, {"output": "mean"}]
)
def test_bad_arguments(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name}="):
        kv.MonteCarlo(network(), **arguments)


def test_a_model_without_noise_is_refused():
    with pytest.raises(ValueError, match="no variational layer"):
        kv.MonteCarlo(keras.Sequential([keras.Input((4,)), layers.Dropout(0.5), layers.Dense(2)]))
    with pytest.raises(ValueError, match="not been built"):
        kv.MonteCarlo(keras.Sequential([kv.VariationalDense(2)]))
