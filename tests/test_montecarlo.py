"""Monte Carlo prediction: distinct draws, correct moments, an unchanged model."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from scipy import stats

import keras_vdrop as kv
from tests.cases import CASES, array, randomize, scale_of
from tests.statistics import STANDARD_ERRORS, assert_mean, assert_uncorrelated, assert_variance

X = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")


def network(**arguments):
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(2, kl_weight=0.1, **arguments)])
    randomize(model)
    return model


def samples(model, x, count, **arguments):
    return kv.MonteCarlo(model, count, output="samples", **arguments).predict(x, verbose=0)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("estimator", ["local_reparameterization", "flipout", "reparameterization"])
def test_samples_have_the_moments_of_the_posterior(estimator):
    model = network(estimator=estimator)
    draws = np.swapaxes(samples(model, X, 4000), 0, 1)
    kernel = model.layers[0].kernel
    assert_mean(draws, X @ array(kernel.loc))
    if estimator != "flipout":
        assert_variance(draws, X**2 @ np.exp(array(kernel.log_variance)))
    assert_uncorrelated(draws[1:, 0, 0], draws[:-1, 0, 0])


def test_batches_and_calls_draw_anew():
    model = kv.MonteCarlo(network(), 2, output="samples")
    x = np.repeat(X[:1], 4, axis=0)
    one, other = model.predict(x, batch_size=2, verbose=0), model.predict(x, batch_size=2, verbose=0)
    assert len(np.unique(np.concatenate([one, other])[..., 0])) == 16


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("estimator", ["local_reparameterization", "flipout", "reparameterization"])
def test_consistent_draws_have_the_moments_of_the_posterior(estimator):
    model = network(estimator=estimator)
    draws = np.swapaxes(samples(model, X, 4000, consistent=True), 0, 1)
    kernel = model.layers[0].kernel
    assert_mean(draws, X @ array(kernel.loc))
    assert_variance(draws, X**2 @ np.exp(array(kernel.log_variance)))


def test_one_draw_has_no_spread():
    with pytest.warns(UserWarning, match="num_samples=1"):
        kv.MonteCarlo(network(), 1)
    kv.MonteCarlo(network(), 1, output="samples")


class Noise(layers.Layer):
    """A user's layer that adds random numbers: from its own generator, from two that no layer owns, or from Keras's."""

    def __init__(self, source, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(0)
        elsewhere = [keras.random.SeedGenerator(0) for _ in range(2)]
        # Keras does not find what is within a function.
        self.generators = lambda: {"own": [self.seed_generator], "no layer's": elsewhere, "Keras's": [None]}[source]

    def call(self, x):
        return x + sum(keras.random.normal(ops.shape(x), seed=each) for each in self.generators())


@pytest.mark.parametrize("source", ["own", "no layer's", "Keras's"])
def test_a_users_own_noise_is_drawn_anew_for_every_draw(source):
    if source == "Keras's" and keras.backend.backend() == "jax":
        pytest.skip("Keras raises an error")
    inputs = keras.Input((1,))
    h = kv.VariationalDense(1, initial_log_variance=-1.0, kernel_initializer="ones")(inputs)
    model = keras.Model(inputs, Noise(source)(h))
    generators = [each for each in model.layers[-1].generators() if each is not None]
    before = [array(each.state) for each in generators]
    drawn = samples(model, np.ones((500, 1), "float32"), 64)[..., 0].astype("float64")
    flat = drawn.reshape(-1, 1)
    assert_mean(flat, np.ones(1))
    assert_variance(flat, np.array([max(len(generators), 1) + np.exp(-1.0)]))
    # Neither draws, nor examples, nor batches, of which there are 16, share a number.
    assert len(np.unique(drawn)) > 0.99 * drawn.size
    np.testing.assert_array_equal(before, [array(each.state) for each in generators])


@pytest.mark.parametrize("seed", [1.5, "1", True])
def test_a_seed_is_an_int(seed):
    with pytest.raises(ValueError, match="`seed` must be an int"):
        kv.MonteCarlo(network(), 2, seed=seed)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_posterior_from_within_the_warm_up_is_said(share, tmp_path):
    model = network()
    model.compile("sgd", "mse")
    model.fit(X, np.ones((3, 2)), epochs=2, verbose=0, callbacks=[kv.ELBO(3, warmup_epochs=0)])
    layer = model.layers[0]
    layer.kl_weight = share * float(array(layer.kl_weight))  # as a callback that restores an early epoch does
    with pytest.warns(UserWarning, match=rf"\['{layer.name}'\].* has {share:.2g} of its full weight.*val_loss"):
        kv.MonteCarlo(model, 2)
    model.save(tmp_path / "early.keras")
    loaded = keras.saving.load_model(tmp_path / "early.keras")
    if share == 0.0:
        with pytest.warns(UserWarning, match="of its full weight"):
            kv.MonteCarlo(loaded, 2)


@pytest.mark.slow
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


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch compiles by other means.")
def test_a_loop_within_the_model_under_jit():
    model = keras.Sequential([keras.Input((40, 4)), kv.VariationalLSTM(3, kl_weight=0.1)])
    x = np.random.default_rng(0).normal(size=(3, 40, 4)).astype("float32")
    sampler = kv.MonteCarlo(model, 6, output="samples", sample_batch_size=3)
    sampler.compile(jit_compile=True)
    draws = sampler.predict(x, verbose=0)
    assert len(np.unique(draws[0, :, 0])) == 6
    np.testing.assert_allclose(draws.mean(axis=1), model.predict(x, verbose=0), atol=0.3)


@pytest.mark.filterwarnings("ignore:Keras's own dropout")
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


def test_samples_outside_of_predict():
    model = kv.MonteCarlo(network(), 5, seed=3, sample_batch_size=2)
    draws = array(model.samples(X))
    assert draws.shape == (5, 3, 2)
    assert len(np.unique(draws)) == draws.size
    np.testing.assert_allclose(draws.swapaxes(0, 1), samples(model.model, X, 5, seed=3), rtol=1e-4, atol=1e-5)


def test_every_step_of_a_sequence_has_its_statistics():
    model = keras.Sequential([keras.Input((6, 4)), kv.VariationalDense(3, kl_weight=0.1)])
    randomize(model)
    x = np.random.default_rng(1).normal(size=(2, 6, 4)).astype("float32")
    result = kv.MonteCarlo(model, 8, likelihood="categorical").predict(x, verbose=0)
    assert result["probability"].shape == (2, 6, 3) and result["mutual_information"].shape == (2, 6)
    assert result.uncertainty().shape == result.bald().shape == (2,)
    np.testing.assert_allclose(result.bald(), result["mutual_information"].sum(axis=1), rtol=1e-6)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("sample_batch_size", [1, 4, 64])
@pytest.mark.parametrize("consistent", [False, True])
def test_side_by_side_are_the_draws_that_follow_each_other(sample_batch_size, consistent):
    """The sample batch size may divide the number of draws, leave a remainder, or exceed it."""
    arguments = dict(seed=3, consistent=consistent)
    model = network()
    draws = samples(model, X, 16, sample_batch_size=3, **arguments)
    other = samples(model, X, 16, sample_batch_size=sample_batch_size, **arguments)
    np.testing.assert_allclose(draws, other, rtol=1e-5, atol=1e-6)
    sampler = kv.MonteCarlo(model, 16, likelihood="normal", sample_batch_size=sample_batch_size, **arguments)
    statistics = sampler.predict(X, verbose=0)
    np.testing.assert_allclose(statistics["mean"], draws[..., 0].mean(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics["epistemic_variance"], draws[..., 0].var(axis=1), rtol=1e-3)
    np.testing.assert_allclose(statistics["aleatoric_variance"], (scale_of(draws[..., 1]) ** 2).mean(axis=1), rtol=1e-4)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("dense", "conv_2d", "lstm", "attention")], ids=str
)
def test_side_by_side_in_every_kind_of_layer(case):
    model = case.model()
    randomize(model)
    x = case.inputs()
    one, other = (samples(model, x, 5, seed=3, sample_batch_size=size) for size in (1, 2))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("estimator", ["auto", "local_reparameterization"])
def test_a_layer_draws_the_same_however_often_it_is_called(estimator):
    """Two calls see the same draw per example, unless the noise is not a draw of the weights. With `consistent` they
    always do."""
    layer = kv.VariationalDense(4, estimator=estimator, kl_weight=0.1)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Subtract()([layer(inputs), layer(inputs)]))
    randomize(model)
    np.testing.assert_allclose(samples(model, X, 3, consistent=True), 0.0, atol=1e-6)
    difference = np.abs(samples(model, X, 3))
    assert difference.min() > 0 if estimator == "local_reparameterization" else difference.max() < 1e-6


def test_outputs_of_any_structure():
    inputs = keras.Input((4,))
    h = kv.VariationalDense(3, kl_weight=0.1)(inputs)
    model = keras.Model(inputs, {"one": h, "other": layers.Dense(2)(h)})
    randomize(model)
    draws = samples(model, X, 5, seed=3, sample_batch_size=2)
    assert draws["one"].shape == (3, 5, 3) and draws["other"].shape == (3, 5, 2)
    result = kv.MonteCarlo(model, 5, seed=3).predict(X, verbose=0)
    np.testing.assert_allclose(result["variance"]["other"], draws["other"].var(axis=1), rtol=1e-3)
    assert result.uncertainty().shape == (3,)
    with pytest.raises(ValueError, match="applies to one output"):
        kv.MonteCarlo(model, 5, likelihood="categorical").predict(X, verbose=0)


@pytest.mark.slow
def test_evaluate_with_several_outputs():
    inputs = keras.Input((4,))
    h = kv.VariationalDense(3, kl_weight=0.1)(inputs)
    model = keras.Model(inputs, {"one": h, "other": layers.Dense(2)(h)})
    randomize(model)
    y = {"one": X[:, :3], "other": X[:, :2]}
    mean = kv.MonteCarlo(model, 5, seed=3, consistent=True).predict(X, verbose=0)["mean"]
    sampler = kv.MonteCarlo(model, 5, seed=3, consistent=True)
    sampler.compile(loss={"one": "mse", "other": "mae"})
    expected = np.mean((mean["one"] - y["one"]) ** 2) + np.mean(np.abs(mean["other"] - y["other"]))
    np.testing.assert_allclose(sampler.evaluate(X, y, verbose=0, return_dict=True)["loss"], expected, rtol=1e-4)


def test_half_precision_has_its_statistics_in_single():
    model = network(dtype="mixed_bfloat16")
    result = kv.MonteCarlo(model, 5).predict(X, verbose=0)
    assert result["mean"].dtype == result["variance"].dtype == np.float32


LOSSES = [
    kv.losses.NormalNLL(),
    kv.losses.LaplaceNLL(),
    kv.losses.StudentTNLL(df=5.0),
    kv.losses.NormalMixtureNLL(num_components=3),
]


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_a_loss_as_the_likelihood(loss, tmp_path):
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(loss.num_parameters, kl_weight=0.1)])
    randomize(model)
    sampler = kv.MonteCarlo(model, 7, likelihood=loss, seed=3)
    draws = np.swapaxes(samples(model, X, 7, seed=3), 0, 1)
    mean, variance = map(array, loss.moments(keras.ops.convert_to_tensor(draws)))
    statistics = sampler.predict(X, verbose=0)
    np.testing.assert_allclose(statistics["mean"], mean.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics["aleatoric_variance"], variance.mean(0), rtol=1e-4)
    np.testing.assert_allclose(statistics["epistemic_variance"], mean.var(0), rtol=1e-3)
    sampler.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.likelihood.get_config() == loss.get_config()


TARGETS = {"categorical": np.array([0, 1, 1]), "bernoulli": np.eye(2)[[0, 1, 1]], "normal": np.array([0.3, -1.0, 2.0])}


def expected_loss(likelihood, y, statistics):
    if likelihood == "normal":
        scale = np.sqrt(statistics["aleatoric_variance"] + statistics["epistemic_variance"])
        return -stats.norm.logpdf(y, statistics["mean"], scale)
    p = statistics["probability"]
    if likelihood == "categorical":
        return -np.log(p[np.arange(3), y])
    return -np.log(np.where(y == 1, p, 1 - p)).mean(axis=1)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("likelihood", TARGETS)
@pytest.mark.parametrize("weight", [None, np.array([1.0, 0.5, 3.0])], ids=["plain", "weighted"])
def test_evaluate_gives_the_nll_of_the_prediction(likelihood, weight):
    """The loss excludes the KL of the wrapped model, although that has a `kl_weight`."""
    sampler = kv.MonteCarlo(network(), 8, likelihood=likelihood, seed=3, consistent=True)
    sampler.compile()
    y = TARGETS[likelihood]
    result = sampler.evaluate(X, y, sample_weight=weight, verbose=0, return_dict=True)
    statistics = sampler.predict(X, verbose=0)
    losses = expected_loss(likelihood, y, statistics)
    np.testing.assert_allclose(result["loss"], np.mean(losses if weight is None else losses * weight), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["normal", "bernoulli"])
def test_evaluate_weighs_rows_and_not_batches(likelihood):
    """Every row counts equally in batches of two rows and one row, for outputs with one number per row."""
    inputs = keras.Input((4,))
    outputs = kv.VariationalDense(2, kl_weight=0.1)(inputs)
    model = keras.Model(inputs, outputs if likelihood == "normal" else outputs[:, 0])
    randomize(model)
    y = np.array([1.0, 0.0, 1.0])
    weight = np.array([1.0, 0.5, 3.0])
    sampler = kv.MonteCarlo(model, 8, likelihood=likelihood, seed=3, consistent=True)
    statistics = sampler.predict(X, verbose=0)
    point = statistics["mean" if likelihood == "normal" else "probability"]
    nll = (
        expected_loss("normal", y, statistics)
        if likelihood == "normal"
        else -np.log(np.where(y == 1, point, 1 - point))
    )
    for shape in ((3,), (3, 1)):
        sampler.compile(metrics=["mse"], weighted_metrics=["mae"])
        result = sampler.evaluate(
            X, y.reshape(shape), sample_weight=weight.reshape(shape), batch_size=2, verbose=0, return_dict=True
        )
        np.testing.assert_allclose(result["mse"], np.mean((point - y) ** 2), rtol=1e-4)
        np.testing.assert_allclose(result["mae"], np.average(np.abs(point - y), weights=weight), rtol=1e-4)
        np.testing.assert_allclose(result["loss"], np.mean(nll * weight), rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_one_evaluates_after_loading(tmp_path):
    model = kv.MonteCarlo(network(), 4, likelihood="categorical", consistent=True)
    model.compile(metrics=["accuracy"])
    before = model.evaluate(X, TARGETS["categorical"], verbose=0, return_dict=True)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.optimizer is None
    after = again.evaluate(X, TARGETS["categorical"], verbose=0, return_dict=True)
    # The loaded model draws the same functions, although it has no seed.
    assert before.keys() == after.keys()
    np.testing.assert_allclose([after[key] for key in before], list(before.values()), rtol=1e-4)


def test_after_loading_it_goes_on_where_it_was(tmp_path):
    model = kv.MonteCarlo(network(), 4, output="samples", seed=5)
    first = model.predict(X, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras").predict(X, verbose=0)
    assert not np.allclose(again, first)
    np.testing.assert_allclose(again, model.predict(X, verbose=0), rtol=1e-5)


def test_a_global_policy_is_the_wrapped_models_matter():
    model = network()
    x = np.full((3, 4), 2023.0, "float32")  # bfloat16 would round it to 2024
    expected = samples(model, x, 2, seed=3)
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        np.testing.assert_array_equal(samples(model, x, 2, seed=3), expected)
    finally:
        keras.config.set_dtype_policy(policy)


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    """A model whose `call` takes no `training`, and whose output layer is not the layer assigned last."""

    def __init__(self):
        super().__init__()
        self.head = kv.VariationalDense(2, kl_weight=0.1)
        self.gate = layers.Dense(4, activation="sigmoid")

    def call(self, inputs):
        return self.head(self.gate(inputs))


@pytest.mark.slow
def test_subclassed():
    model = Subclassed()
    model(X)
    randomize(model)
    result = kv.MonteCarlo(model, 8, likelihood="categorical").predict(X, verbose=0)
    assert result["mutual_information"].max() > 0


@pytest.mark.slow
def test_a_stateful_rnn_starts_from_its_state_and_keeps_it():
    inputs = keras.Input((5, 4), batch_size=3)
    model = keras.Model(inputs, kv.VariationalLSTM(2, stateful=True, kl_weight=0.1)(inputs))
    randomize(model)
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype("float32")
    model.predict(x, verbose=0, batch_size=3)
    state = [array(each) for each in model.layers[-1].states]
    draws = kv.MonteCarlo(model, 4, output="samples", seed=3)
    one = draws.predict(x, verbose=0, batch_size=3)
    for before, after in zip(state, model.layers[-1].states):
        np.testing.assert_array_equal(before, array(after))
    assert len(np.unique(one[0, :, 0])) == 4


def test_evaluate_with_metrics_and_a_loss():
    model = kv.MonteCarlo(network(), 8, likelihood="categorical", seed=3, consistent=True)
    model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    result = model.evaluate(X, TARGETS["categorical"], verbose=0, return_dict=True)
    statistics = model.predict(X, verbose=0)
    right = statistics["probability"].argmax(-1) == TARGETS["categorical"]
    np.testing.assert_allclose(result["accuracy"], right.mean())
    np.testing.assert_allclose(
        result["loss"], expected_loss("categorical", TARGETS["categorical"], statistics).mean(), rtol=1e-4
    )
    with pytest.raises(ValueError, match="samples"):
        drawn = kv.MonteCarlo(network(), 2, output="samples")
        drawn.compile(loss="mse")
        drawn.evaluate(X, X[:, :2], verbose=0)


def test_it_does_not_learn():
    model = kv.MonteCarlo(network(), 2)
    model.compile("sgd", "mse")
    with pytest.raises(NotImplementedError, match="fit the model that it wraps"):
        model.fit(X, X[:, :2])
    with pytest.raises(NotImplementedError, match="fit the model that it wraps"):
        model.train_on_batch(X, X[:, :2])


@pytest.mark.slow(keep=1)
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Keras exports from TensorFlow.")
@pytest.mark.parametrize("functional", [False, True], ids=["sequential", "functional"])
def test_export(functional, tmp_path):
    import tensorflow as tf

    model = network()
    if functional:
        model = keras.Model(model.inputs[0], model.outputs[0])
    model = kv.MonteCarlo(model, 6, likelihood="categorical", seed=3, consistent=True)
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    exported = served.serve(X)
    statistics = model.predict(X, verbose=0)
    for name, values in statistics.items():
        np.testing.assert_allclose(exported[name], values, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Keras exports from TensorFlow.")
def test_an_exported_one_draws_anew(tmp_path):
    import tensorflow as tf

    kv.MonteCarlo(network(), 6, seed=3).export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    one, other = (served.serve(X)["mean"].numpy() for _ in range(2))
    assert one.shape == (3, 2) and np.isfinite(one).all()
    assert not np.array_equal(one, other)


def test_rows_with_nan_are_counted():
    model = kv.MonteCarlo(network(), 3, likelihood="categorical")
    x = X.copy()
    x[1, 0] = np.nan
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        result = model.predict(x, verbose=0)
    assert list(result.abstain(coverage=0.5)) == [False, True, False]
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        samples(network(), x, 2)


@pytest.mark.slow
def test_logits_for_probabilities_and_the_other_way_round():
    softmax = keras.Sequential([network(), layers.Softmax()])
    sigmoid = keras.Sequential([network(), layers.Dense(1, activation="sigmoid")])
    wrapped = keras.Sequential([keras.Input((4,)), kv.ConcreteDropout(layers.Dense(2, activation="softmax"))])
    for model, likelihood in ((softmax, "categorical"), (sigmoid, "bernoulli"), (wrapped, "categorical")):
        with pytest.raises(ValueError, match="from_logits=False"):
            kv.MonteCarlo(model, 2, likelihood=likelihood)
        kv.MonteCarlo(model, 2, likelihood=likelihood, from_logits=False).predict(X, verbose=0)
    for likelihood in ("categorical", "bernoulli"):
        with pytest.raises(ValueError, match="from_logits=True"):
            kv.MonteCarlo(network(), 2, likelihood=likelihood, from_logits=False).predict(10 * X, verbose=0)


class Ending(keras.Model):
    """A subclassed model, whose last operation nothing shows but its outputs."""

    def __init__(self, function, units=2):
        super().__init__()
        self.function, self.inner = function, kv.VariationalDense(units)

    def call(self, x):
        return self.function(self.inner(x))


def ending(function, likelihood, x, units=2):
    model = Ending(function, units)
    model(x)
    return kv.MonteCarlo(model, 2, likelihood)


@pytest.mark.parametrize("entry", ["arrays", "batch", "dataset", "evaluate"])
def test_probabilities_of_a_subclassed_model_are_not_taken_for_logits(entry):
    import tensorflow as tf

    sampler = ending(ops.softmax, "categorical", X)
    sampler.compile()
    call = {
        "arrays": lambda: sampler.predict(X, verbose=0),
        "batch": lambda: sampler.predict_on_batch(X),
        "dataset": lambda: sampler.predict(tf.data.Dataset.from_tensors(X), verbose=0),
        "evaluate": lambda: sampler.evaluate(X, np.zeros(3), verbose=0),
    }[entry]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"sum to 1.*from_logits=False"):
            call()
    right = kv.MonteCarlo(sampler.model, 2, "categorical", from_logits=False)
    right.predict(X, verbose=0)


@pytest.mark.filterwarnings("error::UserWarning")
def test_logits_of_a_subclassed_model_are_taken_for_logits():
    for likelihood in ("categorical", "bernoulli"):
        ending(lambda x: 2.0 * x, likelihood, X).predict(X, verbose=0)


def test_probabilities_of_a_binary_subclassed_model_are_noticed():
    x = np.random.default_rng(0).normal(size=(50, 4)).astype("float32")
    with pytest.warns(UserWarning, match=r"32 of them lie between 0 and 1.*from_logits=False"):
        ending(ops.sigmoid, "bernoulli", x, 1).predict(x, verbose=0)


def test_a_functional_model_may_end_with_an_operation():
    inputs = keras.Input((4,))
    h = kv.VariationalDense(2)(inputs)
    for function, likelihood in ((ops.softmax, "categorical"), (ops.sigmoid, "bernoulli")):
        with pytest.raises(ValueError, match="from_logits=False"):
            kv.MonteCarlo(keras.Model(inputs, function(h)), 2, likelihood)
    kv.MonteCarlo(keras.Model(inputs, 2.0 * h), 2, "categorical").predict(X, verbose=0)
    two = keras.Model(inputs, {"a": layers.Reshape((2,))(ops.softmax(h)), "b": h})
    with pytest.raises(ValueError, match=r"'a'.*sum to 1"):
        kv.MonteCarlo(two, 2, {"a": "categorical", "b": None}).predict(X, verbose=0)


def predictions(likelihood):
    return kv.MonteCarlo(network(), 16, likelihood=likelihood, seed=3).predict(X, verbose=0)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("likelihood", STATISTICS)
def test_abstain_hands_over_the_most_uncertain(likelihood):
    result = predictions(likelihood)
    least = result.uncertainty().argmin()
    assert [result.abstain(coverage).sum() for coverage in (1.0, 0.7, 2 / 3, 0.5, 0.0)] == [0, 0, 1, 1, 3]
    assert list(result.abstain(1 / 3)) == [row != least for row in range(3)]
    with pytest.raises(ValueError, match="coverage="):
        result.abstain(95)


@pytest.mark.slow
def test_bald():
    categorical, bernoulli, normal = map(predictions, ("categorical", "bernoulli", "normal"))
    np.testing.assert_array_equal(categorical.bald(), categorical["mutual_information"])
    np.testing.assert_allclose(bernoulli.bald(), bernoulli["mutual_information"].sum(axis=1), rtol=1e-6)
    total = normal["aleatoric_variance"] + normal["epistemic_variance"]
    np.testing.assert_allclose(
        normal.bald(),
        stats.norm(0, total**0.5).entropy() - stats.norm(0, normal["aleatoric_variance"] ** 0.5).entropy(),
        rtol=1e-4,
    )
    with pytest.raises(ValueError, match="likelihood"):
        predictions(None).bald()


@pytest.mark.slow
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
    "arguments",
    [
        {"num_samples": 0},
        {"num_samples": 2.5},
        {"sample_batch_size": 0},
        {"likelihood": "poisson"},
        {"likelihood": keras.losses.MeanSquaredError()},
        {"output": "mean"},
    ],
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
    for layer in (kv.VariationalDense(2, kernel_prior=None), kv.MonteCarloDropout(0.0)):
        with pytest.raises(ValueError, match="no variational layer with a prior or a rate above 0"):
            kv.MonteCarlo(keras.Sequential([keras.Input((4,)), layer]))


@pytest.mark.parametrize("wrong", [kv.losses.NormalNLL, "gaussian", keras.losses.MeanSquaredError()])
def test_what_is_no_likelihood_is_refused(wrong):
    with pytest.raises(ValueError, match="`likelihood` must be one of"):
        kv.MonteCarlo(network(), 3, likelihood=wrong)


def test_a_monte_carlo_of_a_monte_carlo_is_refused():
    with pytest.raises(ValueError, match="already a MonteCarlo"):
        kv.MonteCarlo(kv.MonteCarlo(network(), 3), 3)


def test_statistics_are_completed_as_attributes():
    predicted = kv.MonteCarlo(network(), 3).predict(X, verbose=0)
    assert {"mean", "variance", "stddev"} <= set(dir(predicted))


@pytest.mark.parametrize(
    ("likelihood", "size", "message"),
    [
        ("categorical", 1, 'requires outputs .* C ≥ 2.*likelihood="bernoulli"'),
        ("normal", 1, r"requires outputs \(B, ..., 2\)"),
        ("normal", 3, r"requires outputs \(B, ..., 2\)"),
        (kv.losses.NormalMixtureNLL(2), 3, r"requires outputs \(B, ..., 6\)"),
    ],
)
def test_outputs_of_another_size_than_the_likelihoods_are_refused(likelihood, size, message):
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(size)])
    with pytest.raises(ValueError, match=message):
        kv.MonteCarlo(model, 2, likelihood=likelihood).predict(X, verbose=0)


def test_what_the_wrapped_model_was_compiled_with_need_not_load(tmp_path):
    model = network()
    model.compile("sgd", lambda y, outputs: ops.mean(outputs))
    kv.MonteCarlo(model, 2).save(tmp_path / "model.keras")
    assert keras.saving.load_model(tmp_path / "model.keras").num_samples == 2


def two_outputs(structure=dict):
    """Return a model with a regression output "a" and a classification output "b". As a list it is [b, a]."""
    inputs = keras.Input((4,))
    a = kv.VariationalDense(2, kl_weight=0.1, name="a")(inputs)
    b = kv.VariationalDense(3, kl_weight=0.1, name="b")(inputs)
    model = keras.Model(inputs, {"a": a, "b": b} if structure is dict else [b, a])
    randomize(model)
    return model


BOTH = {"a": "normal", "b": "categorical"}
Y_BOTH = {"a": TARGETS["normal"], "b": TARGETS["categorical"]}


@pytest.mark.slow
@pytest.mark.parametrize("structure", [dict, list])
def test_a_likelihood_for_each_output(structure, tmp_path):
    model = two_outputs(structure)
    sampler = kv.MonteCarlo(model, 4, BOTH, seed=3, consistent=True)
    found = sampler.predict(X, verbose=0)
    draws = samples(model, X, 4, seed=3, consistent=True)
    draws = draws if structure is dict else dict(zip("ba", draws))
    assert set(found["a"]) == set(STATISTICS["normal"]) and set(found["b"]) == set(STATISTICS["categorical"])
    assert found["b"].probability.shape == (3, 3)
    np.testing.assert_allclose(found["a"].mean, draws["a"][..., 0].mean(axis=1), rtol=1e-4, atol=1e-5)
    assert found["a"].stddev().shape == found["b"].uncertainty().shape == (3,)
    expected = sum(expected_loss(BOTH[name], Y_BOTH[name], found[name]) for name in BOTH).mean()
    weight = {"a": np.array([1.0, 0.5, 3.0]), "b": np.ones(3)}
    weighted = expected_loss("normal", Y_BOTH["a"], found["a"]) * weight["a"]
    weighted = weighted.mean() + expected_loss("categorical", Y_BOTH["b"], found["b"]).mean()
    sampler.compile(metrics={"a": ["mse"], "b": ["accuracy"]})
    for y in (Y_BOTH,) if structure is dict else (Y_BOTH, [Y_BOTH["b"], Y_BOTH["a"]]):
        logs = sampler.evaluate(X, y, verbose=0, return_dict=True)
        np.testing.assert_allclose(logs["loss"], expected, rtol=1e-4)
    assert any(np.isclose(value, np.mean((found["a"].mean - Y_BOTH["a"]) ** 2)) for value in logs.values())
    logs = sampler.evaluate(X, Y_BOTH, sample_weight=weight, verbose=0, return_dict=True)
    np.testing.assert_allclose(logs["loss"], weighted, rtol=1e-4)
    sampler.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras").predict(X, verbose=0)
    np.testing.assert_allclose(again["b"].probability, found["b"].probability, rtol=1e-4)


@pytest.mark.slow
def test_likelihoods_by_name_of_any_kind(tmp_path):
    """The likelihood per output may be a loss, None or a name, with logits or probabilities. It survives saving, and a
    model with a single output takes a dict too."""
    inputs = keras.Input((4,))
    h = kv.VariationalDense(3, kl_weight=0.1)(inputs)
    heads = {
        "loss": layers.Dense(2)(h),
        "none": layers.Dense(2)(h),
        "sure": layers.Dense(1, activation="sigmoid")(h),
        "logit": layers.Dense(1)(h),
    }
    likelihood = {"loss": kv.losses.LaplaceNLL(), "none": None, "sure": "bernoulli", "logit": "bernoulli"}
    sampler = kv.MonteCarlo(keras.Model(inputs, heads), 4, likelihood, from_logits={"sure": False}, consistent=True)
    found = sampler.predict(X, verbose=0)
    assert found["none"].mean.shape == found["none"].stddev().shape == (3, 2) and found["loss"].mean.shape == (3,)
    assert found["sure"].probability.max() < 1
    sampler.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert (
        again.from_logits == {"sure": False}
        and again.likelihood["loss"].get_config() == likelihood["loss"].get_config()
    )
    for name, values in again.predict(X, verbose=0).items():
        np.testing.assert_allclose(values.uncertainty(), found[name].uncertainty(), rtol=1e-3, atol=1e-5)
    sampler.compile()
    with pytest.raises(ValueError, match="no likelihood"):
        sampler.evaluate(X, {name: X[:, :2] if name == "none" else X[:, 0] for name in heads}, verbose=0)
    one = network()
    name = one.layers[-1].name
    alone = kv.MonteCarlo(one, 4, {name: "normal"}, seed=3).predict(X, verbose=0)
    np.testing.assert_array_equal(alone[name].mean, kv.MonteCarlo(one, 4, "normal", seed=3).predict(X, verbose=0).mean)


@pytest.mark.parametrize(
    ("likelihood", "from_logits", "message"),
    [
        ({"a": "normal"}, True, "no entry for .'b'."),
        ({**BOTH, "c": None}, True, "entries for unknown outputs .'c'."),
        ({"a": "normal", "b": "poisson"}, True, "poisson"),
        ({}, True, "likelihood={}"),
        (BOTH, {"c": True}, "'c'"),
        ("normal", {"a": True}, "`likelihood` must be a dict by output name"),
        ("normal", True, "'a', 'b'"),
    ],
)
def test_likelihoods_by_wrong_names_are_refused(likelihood, from_logits, message):
    with pytest.raises(ValueError, match=message):
        kv.MonteCarlo(two_outputs(), 2, likelihood, from_logits)


def sequence_model(outputs, masked=True, **arguments):
    masking = [layers.Masking(0.0)] if masked else []
    model = keras.Sequential([keras.Input((5, 4)), *masking, kv.VariationalDense(outputs, kl_weight=0.1, **arguments)])
    randomize(model)
    return model


STEPS = {
    "normal": (2, lambda p, y: -stats.norm.logpdf(y, p.mean, p.stddev())),
    "categorical": (3, lambda p, y: -np.log(np.take_along_axis(p.probability, y[..., None].astype(int), -1)[..., 0])),
    "bernoulli": (1, lambda p, y: -np.log(np.where(y == 1, p.probability[..., 0], 1 - p.probability[..., 0]))),
}


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", STEPS)
@pytest.mark.parametrize(("rows", "masked"), [(3, True), (5, False), (5, True)])
def test_evaluate_counts_weights_and_masks_of_steps(likelihood, rows, masked):
    """The loss is the sum over an example for numbers, and the mean over unmasked labels for classes.

    One batch has as many rows as time steps, so a mix-up of the axes would raise no error.
    """
    rng = np.random.default_rng(0)
    size, nll = STEPS[likelihood]
    x, mask = rng.normal(size=(rows, 5, 4)).astype("float32"), rng.uniform(size=(rows, 5)) < 0.6
    x, mask = (x * mask[..., None], mask) if masked else (x, np.ones_like(mask))
    y = rng.integers(0, 2, size=(rows, 5)).astype("float32")
    sampler = kv.MonteCarlo(sequence_model(size, masked), 1, likelihood, seed=3, consistent=True)
    sampler.compile(weighted_metrics=["mse"] if likelihood != "categorical" else ["accuracy"])
    found = sampler.predict(x, verbose=0)
    values = nll(found, y)
    count = rows if likelihood == "normal" else mask.sum()
    weight = rng.uniform(0.2, 2.0, size=(rows, 5)).astype("float32")
    for given, each in ((None, 1.0), (weight, weight), (weight[:, 0], weight[:, :1]), (weight[:, :1], weight[:, :1])):
        logs = sampler.evaluate(x, y, sample_weight=given, batch_size=rows, verbose=0, return_dict=True)
        np.testing.assert_allclose(logs["loss"], (each * mask * values).sum() / count, rtol=1e-4)
        sampler.compile(weighted_metrics=["mse"] if likelihood != "categorical" else ["accuracy"])
    if likelihood != "categorical":
        point = found.mean if likelihood == "normal" else found.probability[..., 0]
        logs = sampler.evaluate(x, y, sample_weight=weight, batch_size=rows, verbose=0, return_dict=True)
        error = np.average((point - y) ** 2, weights=weight * mask)
        (got,) = (value for name, value in logs.items() if name != "loss")
        np.testing.assert_allclose(got, error, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", [None, *TARGETS])
@pytest.mark.parametrize("loss", [None, "mse"])
def test_evaluate_refuses_y_and_weights_of_another_layout(likelihood, loss):
    """Other layouts are refused, because broadcasting would silently give a wrong sum."""
    size = 4 if likelihood is None else STEPS[likelihood][0]
    if likelihood is None and loss is None:
        return

    def compiled():
        """Return a new compiled sampler: on JAX, Keras leaves a model without its variables when a step fails."""
        sampler = kv.MonteCarlo(sequence_model(size, masked=False), 1, likelihood)
        sampler.compile(loss=loss)
        return sampler

    x = np.ones((3, 5, 4), "float32")
    for shape in ((3, 1), (3, 4), (3,), (3, 5, 2), (3, 2, 5)):
        sampler = compiled()
        with pytest.raises(ValueError, match=r"\(.*5.*\).*\(.*" + ", ".join(map(str, shape[1:]))):
            sampler.evaluate(x, np.zeros(shape), verbose=0)
    if likelihood is not None:
        sampler = compiled()
        with pytest.raises(ValueError, match="sample_weight or mask of shape"):
            sampler.evaluate(x, np.zeros((3, 5)), sample_weight=np.ones((3, 4)), verbose=0)


@pytest.mark.parametrize("likelihood", [None, "categorical", "normal"])
def test_masked_steps_count_neither_in_uncertainty_nor_in_bald(likelihood):
    x = np.random.default_rng(0).normal(size=(6, 5, 4)).astype("float32")
    mask = np.arange(5) < np.arange(1, 6).repeat([1, 1, 1, 1, 2])[:, None]
    sampler = kv.MonteCarlo(sequence_model(2), 8, likelihood, seed=0)
    found = sampler.predict(x * mask[..., None], verbose=0)
    np.testing.assert_array_equal(found.mask, mask)
    total = {
        None: lambda: found.variance.sum(-1),
        "categorical": lambda: found.predictive_entropy,
        "normal": lambda: found.aleatoric_variance + found.epistemic_variance,
    }[likelihood]()
    np.testing.assert_allclose(found.uncertainty(), (total * mask).sum(1), rtol=1e-5)
    if likelihood == "categorical":
        np.testing.assert_allclose(found.bald(), (found.mutual_information * mask).sum(1), rtol=1e-5)
    assert "mask" not in kv.MonteCarlo(sequence_model(2, masked=False), 2, likelihood).predict(x, verbose=0)


def test_labels_that_are_no_classes_are_refused_or_ignored():
    x = np.random.default_rng(0).normal(size=(8, 5, 4)).astype("float32")
    labels = np.random.default_rng(1).integers(0, 2, (8, 5))
    sampler = kv.MonteCarlo(sequence_model(2, masked=False), 2, "categorical", seed=0, consistent=True)
    sampler.compile(weighted_metrics=[kv.metrics.BrierScore()])
    weight = np.ones((8, 5))
    weight[:, :2] = 0.0
    right = sampler.evaluate(x, labels, sample_weight=weight, verbose=0)
    for strange in (255, -1):
        labels[:, :2] = strange
        np.testing.assert_allclose(sampler.evaluate(x, labels, sample_weight=weight, verbose=0), right, rtol=1e-5)
        with pytest.raises(ValueError, match=r"from 0 to C − 1.*16 labels"):
            sampler.evaluate(x, labels, verbose=0)


@pytest.mark.slow
def test_evaluate_sees_logits_and_rows_with_nan():
    x = np.tile(10 * X, (3, 1))
    for likelihood, y in (("categorical", np.zeros(9)), ("bernoulli", np.zeros((9, 2)))):
        logits = kv.MonteCarlo(network(), 2, likelihood=likelihood, from_logits=False)
        logits.compile()
        with pytest.raises(ValueError, match="from_logits=True"):
            logits.evaluate(x, y, batch_size=4, verbose=0)
        good = kv.MonteCarlo(keras.Sequential([network(), layers.Softmax()]), 2, likelihood, from_logits=False)
        good.compile()
        good.evaluate(x, y, batch_size=4, verbose=0)
    x[[1, 7], 0] = np.nan
    sampler = kv.MonteCarlo(network(), 2, "normal")
    sampler.compile(metrics=["mse"])
    for _ in range(2):  # each call counts from 0
        with pytest.warns(UserWarning, match="2 of 9 rows"):
            assert set(sampler.evaluate(x, np.zeros(9), batch_size=4, verbose=0, return_dict=True)) >= {"loss", "mse"}


@pytest.mark.slow
def test_targets_that_were_not_standardised_are_said():
    x = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    y = 1000.0 + 100.0 * x[:, 0]
    sampler = kv.MonteCarlo(network(), 4, "normal")
    sampler.compile()
    for batch_size in (60, 7):
        with pytest.warns(UserWarning, match=f"mean {y.mean():.3g} .* deviation {y.std():.3g} .*Standardise"):
            sampler.evaluate(x, y, batch_size=batch_size, verbose=0)
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(2, initial_log_variance=-12.0)])
    model.layers[0].kernel.loc.assign([[1.0, 0.0]] + [[0.0, 0.0]] * 3)
    fitting = kv.MonteCarlo(model, 4, "normal")
    fitting.compile()
    fitting.evaluate(x, x[:, 0], verbose=0)  # no warning


def test_an_activation_before_a_raw_scale_is_said():
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(2, activation="relu")])
    for likelihood in ("normal", kv.losses.NormalNLL()):
        with pytest.warns(UserWarning, match="'relu'.*at least 0.694"):
            kv.MonteCarlo(model, 2, likelihood)
    kv.MonteCarlo(model, 2)


def keras_dropout(**arguments):
    x = keras.Input((3, 4))
    return {
        "dropout": lambda: layers.Dropout(0.2)(x),
        "spatial": lambda: layers.SpatialDropout1D(0.2)(x),
        "gaussian": lambda: layers.GaussianDropout(0.2)(x),
        "gaussian_noise": lambda: layers.GaussianNoise(0.2)(x),
        "rnn": lambda: layers.LSTM(4, dropout=0.2, return_sequences=True)(x),
        "state": lambda: layers.GRU(4, recurrent_dropout=0.2, return_sequences=True)(x),
        "attention": lambda: layers.MultiHeadAttention(2, 2, dropout=0.2)(x, x),
        "nested": lambda: keras.Sequential([layers.Dropout(0.2)])(x),
        "off": lambda: layers.LSTM(4, return_sequences=True)(layers.Dropout(0.0)(x)),
    }, x


@pytest.mark.parametrize("kind", keras_dropout()[0])
def test_keras_dropout_is_said_to_stay_off(kind):
    kinds, x = keras_dropout()
    h = kinds[kind]()
    word = "no variational layer" if kind == "off" else "MonteCarloDropout"
    with pytest.raises(ValueError, match=word):
        kv.MonteCarlo(keras.Model(x, h))
    mixed = keras.Model(x, kv.VariationalDense(2)(h))
    if kind == "off":
        kv.MonteCarlo(mixed, 2)
        return
    with pytest.warns(UserWarning, match="stays off.*MonteCarloDropout"):
        kv.MonteCarlo(mixed, 2)


def test_rates_of_our_own_layers_are_drawn():
    x = keras.Input((3, 4))
    for h in (
        kv.VariationalLSTM(4, dropout=0.2)(x),
        kv.MonteCarloDropout(0.2)(x),
        kv.VariationalGaussianDropout(0.2)(x),
    ):
        kv.MonteCarlo(keras.Model(x, h), 2)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("likelihood", STATISTICS)
def test_predictions_are_what_every_entry_gives(likelihood):
    """Arrays in a dict, single batches and generators of batches give the same `Predictions`."""
    model = network()
    inputs = keras.Input((4,), name="x")
    by_name = keras.Model({"x": inputs}, model(inputs))
    sampler = kv.MonteCarlo(by_name, 4, likelihood, seed=3, consistent=True)
    expected = sampler.predict({"x": X}, verbose=0)

    def batches():
        yield ({"x": X[:2]},)
        yield ({"x": X[2:]},)

    for found in (sampler.predict_on_batch({"x": X}), sampler.predict(batches(), verbose=0)):
        assert type(found) is type(expected) is kv.montecarlo.Predictions
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(getattr(found, name), found[name])
    with pytest.raises(AttributeError, match="'median'"):
        _ = expected.median


@pytest.mark.slow
def test_stddev_and_interval():
    normal, plain = predictions("normal"), predictions(None)
    stddev = np.sqrt(normal["aleatoric_variance"] + normal["epistemic_variance"])
    np.testing.assert_allclose(normal.stddev(), stddev)
    np.testing.assert_allclose(plain.stddev(), np.sqrt(plain["variance"]))
    for coverage in (0.5, 0.95):
        lower, upper = normal.interval(coverage)
        np.testing.assert_allclose([lower, upper], stats.norm(normal.mean, stddev).interval(coverage), rtol=1e-5)
    assert plain.interval()[0].shape == plain.mean.shape
    one = kv.montecarlo.Predictions({name: np.append(values, np.nan) for name, values in normal.items()})
    np.testing.assert_allclose(one.interval()[1][:-1], normal.interval()[1])  # a row with NaN changes no other row
    for likelihood in ("categorical", "bernoulli"):
        for method in ("stddev", "interval"):
            with pytest.raises(ValueError, match="no standard deviation"):
                getattr(predictions(likelihood), method)()
    with pytest.raises(ValueError, match="coverage=95"):
        normal.interval(95)
    several = kv.MonteCarlo(two_outputs(), 4).predict(X, verbose=0)
    assert several.interval()[1]["b"].shape == several.stddev()["b"].shape == (3, 3)


@pytest.mark.parametrize("format", ["onnx", "litert", "openvino", "torch"])
def test_export_to_runtimes_without_its_draws_is_refused(format, tmp_path):
    with pytest.raises(ValueError, match=f"compact.*format='{format}'"):
        kv.MonteCarlo(network(), 2).export(tmp_path / "drawn", format=format)
    assert not list(tmp_path.iterdir())


# No rows


NO_ROWS = [
    ({"likelihood": "categorical"}, {"probability": (0, 2), "mutual_information": (0,)}),
    ({"likelihood": "normal"}, {"mean": (0,), "epistemic_variance": (0,)}),
    ({"consistent": True, "sample_batch_size": 1}, {"mean": (0, 2), "variance": (0, 2)}),
    ({"output": "samples"}, {None: (0, 3, 2)}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "shapes"), NO_ROWS, ids=str)
def test_no_rows_give_arrays_without_rows(arguments, shapes):
    sampler = kv.MonteCarlo(network(), 3, **arguments)
    first = np.zeros((0, 4), "float32")

    def check(found):
        found = {None: found} if None in shapes else found
        assert {name: tuple(found[name].shape) for name in shapes} == shapes

    check(sampler(ops.convert_to_tensor(first)))
    check(sampler.predict(first, verbose=0))
    check(sampler.predict_on_batch(first))
    sampler.predict(X, verbose=0)
    check(sampler.predict_on_batch(first))
    assert sampler.samples(first).shape == (3, 0, 2)


def test_predictions_of_no_rows_answer():
    x = np.zeros((0, 4))
    classes = kv.MonteCarlo(network(), 3, likelihood="categorical").predict(x, verbose=0)
    numbers = kv.MonteCarlo(network(), 3, likelihood="normal").predict(x, verbose=0)
    answers = [classes.uncertainty(), classes.bald(), classes.abstain(0.5), numbers.stddev(), *numbers.interval()]
    assert [answer.shape for answer in answers] == [(0,)] * 6
    probabilities = keras.Sequential([keras.Input((4,)), network(), layers.Softmax()])
    sampler = kv.MonteCarlo(probabilities, 3, likelihood="categorical", from_logits=False)
    assert sampler.predict(x, verbose=0).probability.shape == (0, 2)


@pytest.mark.parametrize("case", [case for case in CASES if str(case) in ("conv_2d", "embedding_mask", "gru")], ids=str)
def test_other_layers_predict_no_rows(case):
    model = case.model()
    shape = (0, *case.shape[1:])
    found = kv.MonteCarlo(model, 3).predict(case.inputs(shape=shape), verbose=0)
    assert found["mean"].shape == (0, *model.output_shape[1:])


def test_no_rows_of_several_inputs():
    inputs = {name: keras.Input((4,), name=name) for name in ("a", "b")}
    model = keras.Model(inputs, kv.VariationalDense(2)(inputs["a"] + inputs["b"]))
    found = kv.MonteCarlo(model, 3).predict(dict.fromkeys("ab", np.zeros((0, 4))), verbose=0)
    assert found["mean"].shape == (0, 2)


class NoBatches(keras.utils.PyDataset):
    def __len__(self):
        return 0

    def __getitem__(self, index):
        raise IndexError(index)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_a_data_set_without_a_batch_is_refused_and_leaves_the_model_as_it_was():
    model = network()
    mean = array(model(X))
    sampler = kv.MonteCarlo(model, 3, seed=0)
    with pytest.raises(ValueError, match=r"have no batch.*arrays of 0 rows|has length 0"):
        sampler.predict(NoBatches(), verbose=0)
    np.testing.assert_array_equal(array(model(X)), mean)
    assert sampler.predict(X, verbose=0)["mean"].shape == (3, 2)


def _data_set(change):
    """Return a changed `tf.data.Dataset` of the test data as arguments. Models accept it on every backend."""
    import tensorflow as tf

    return (change(tf.data.Dataset.from_tensor_slices((X, TARGETS["categorical"]))),)


NOTHING = {
    "arrays": lambda: (X[:0], TARGETS["categorical"][:0]),
    "a PyDataset": lambda: (NoBatches(),),
    "known to be empty": lambda: _data_set(lambda rows: rows.take(0).batch(2)),
    "found to be empty": lambda: _data_set(lambda rows: rows.filter(lambda x, y: y > 5).batch(2)),
    "a batch of no rows": lambda: _data_set(lambda rows: rows.batch(3).map(lambda x, y: (x[:0], y[:0]))),
    "a generator": lambda: ((batch for batch in ()),),
}


@pytest.mark.slow(keep=1)
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("before", [False, True], ids=["first", "after another"])
@pytest.mark.parametrize("kind", NOTHING)
def test_evaluating_no_rows_is_refused_and_leaves_the_model_as_it_was(kind, before):
    model = network()
    mean = array(model(X))
    sampler = kv.MonteCarlo(model, 1, likelihood="categorical", seed=0)
    sampler.compile(metrics=["accuracy"])
    if before:
        sampler.evaluate(X, TARGETS["categorical"], verbose=0)
    # Keras itself refuses an empty generator, with a clear message.
    with pytest.raises(ValueError, match=r"no rows to evaluate.*Received: x=|empty generator"):
        sampler.evaluate(*NOTHING[kind](), verbose=0)
    np.testing.assert_array_equal(array(model(X)), mean)
    loss, _ = sampler.evaluate(X, TARGETS["categorical"], verbose=0)
    assert np.isfinite(loss)
    assert sampler.predict(X, verbose=0).probability.shape == (3, 2)


def test_testing_on_a_batch_of_no_rows_is_refused():
    sampler = kv.MonteCarlo(network(), 3, likelihood="categorical")
    sampler.compile()
    with pytest.raises(ValueError, match="no rows to evaluate"):
        sampler.test_on_batch(X[:0], TARGETS["categorical"][:0])


def test_an_evaluation_that_fails_leaves_the_model_as_it_was():
    """On JAX, Keras has already taken the weights out of the model when the evaluation fails."""
    model = network()
    mean = array(model(X))
    sampler = kv.MonteCarlo(model, 3, likelihood="categorical")
    sampler.compile()
    sampler.evaluate(X, TARGETS["categorical"], verbose=0)
    with pytest.raises(ValueError, match="must have the shape of the prediction"):
        sampler.evaluate(X, np.zeros((3, 7)), verbose=0)
    np.testing.assert_array_equal(array(model(X)), mean)


OF_OUTPUTS = {
    "crps": (kv.metrics.NormalCRPS(), r"takes the parameters.*regression\.normal_crps\(predicted\.mean"),
    "coverage": (kv.metrics.NormalCoverage(), r"takes the parameters.*regression\.interval_coverage"),
    "rmse": (kv.metrics.RootMeanSquaredError(), r"takes the parameters.*keras\.metrics\.RootMeanSquaredError"),
    "mae": (kv.metrics.MeanAbsoluteError(), r"takes the parameters.*keras\.metrics\.MeanAbsoluteError"),
    "negative_log_likelihood": (kv.metrics.NegativeLogLikelihood(), r"takes the parameters.*loss that `evaluate`"),
}


@pytest.mark.parametrize("argument", ["metrics", "weighted_metrics"])
@pytest.mark.parametrize("name", OF_OUTPUTS)
def test_metrics_of_parameters_are_refused_by_name_with_a_way_out(name, argument):
    metric, remedy = OF_OUTPUTS[name]
    sampler = kv.MonteCarlo(network(), 3, likelihood="normal")
    with pytest.raises(ValueError, match=rf"`mean`.*{name!r} {remedy}.*Received: .*{type(metric).__name__}"):
        sampler.compile(**{argument: ["mse", metric]})
    kv.MonteCarlo(network(), 3).compile(metrics=[metric])  # without a likelihood it measures the mean output


def test_metrics_of_logits_are_refused():
    sampler = kv.MonteCarlo(network(), 3, likelihood="categorical")
    for metric in (kv.metrics.BrierScore, keras.metrics.SparseCategoricalCrossentropy):
        with pytest.raises(ValueError, match=r"`probability`.*takes logits.*from_logits=False"):
            sampler.compile(metrics=[metric(from_logits=True)])
        sampler.compile(metrics=[metric()])


def test_metrics_of_several_outputs_are_refused_by_the_name_of_theirs():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, {"a": kv.VariationalDense(2)(inputs), "b": kv.VariationalDense(3)(inputs)})
    sampler = kv.MonteCarlo(model, 3, likelihood={"a": "normal", "b": "categorical"})
    sampler.compile(metrics={"a": ["mse"], "b": [kv.metrics.BrierScore()]})
    with pytest.raises(ValueError, match=r"for 'a'.*'crps'"):
        sampler.compile(metrics={"a": [kv.metrics.NormalCRPS()]})


class DroppedWords(keras.layers.Embedding):
    """An embedding whose words are dropped: its own code takes rows of a table that is drawn."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.words = kv.MonteCarloDropout(0.5, noise_shape=(None, 1))

    def call(self, inputs):
        return keras.ops.take(self.words(keras.ops.convert_to_tensor(self.embeddings)), inputs, axis=0)


@pytest.mark.parametrize("output", ["samples", "statistics"])
def test_drawn_tables_may_be_looked_up_by_a_users_layer(output):
    indices = keras.Input((6,), dtype="int32")
    model = keras.Model(indices, DroppedWords(20, 3)(indices))
    with pytest.raises(ValueError, match=r"layers \['monte_carlo_dropout.*'\] within .* have not been built"):
        kv.MonteCarlo(model)
    words = np.random.default_rng(0).integers(0, 20, (5, 6))
    model(words)
    found = kv.MonteCarlo(model, 40, output=output, seed=0).predict(words, verbose=0)
    if output == "samples":
        assert found.shape == (5, 40, 6, 3)
        dropped = (found == 0).all(-1)
        assert abs(dropped.mean() - 0.5) < STANDARD_ERRORS * np.sqrt(0.25 / (40 * len(np.unique(words))))
        found = {"mean": found.mean(1)}
    # each word is 0 in half of the draws and doubled in the others
    table = array(model.layers[-1].embeddings)[words]
    assert (np.abs(found["mean"] - table) <= STANDARD_ERRORS * np.abs(table) / np.sqrt(40) + 1e-6).all()
