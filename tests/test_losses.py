"""Likelihoods: SciPy's densities, sums over what an example holds, and the ELBO that they make."""

import warnings

import keras
import numpy as np
import pytest
from scipy import stats

import keras_vdrop as kv
from keras_vdrop import losses
from keras_vdrop.functional import likelihoods
from keras_vdrop.outputs import check_outputs
from keras_vdrop.targets import with_mask
from tests.cases import array, posteriors, scale_of

RNG = np.random.default_rng(0)
Y = RNG.normal(size=(6, 3)).astype("float32")
LOC = RNG.normal(size=(6, 3)).astype("float32")
RAW = RNG.normal(size=(6, 3)).astype("float32")
SCALE = scale_of(RAW)
TWO = np.stack([LOC, RAW], axis=-1)


def mixture():
    """Outputs of three components, and the log density of each number of Y."""
    logits, loc, raw = (RNG.normal(size=(6, 3, 3)).astype("float32") for _ in range(3))
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    density = (weights * stats.norm.pdf(Y[..., None], loc, scale_of(raw))).sum(axis=-1)
    return np.concatenate([logits, loc, raw], axis=-1), np.log(density)


THREE, OF_MIXTURE = mixture()
CASES = {
    "normal": (losses.NormalNLL, {}, TWO, stats.norm.logpdf(Y, LOC, SCALE)),
    "laplace": (losses.LaplaceNLL, {}, TWO, stats.laplace.logpdf(Y, LOC, SCALE)),
    "student_t": (losses.StudentTNLL, {"df": 3.0}, TWO, stats.t.logpdf(Y, 3.0, LOC, SCALE)),
    "mixture": (losses.NormalMixtureNLL, {"num_components": 3}, THREE, OF_MIXTURE),
}
OVER_CASES = pytest.mark.parametrize("cls, arguments, outputs, log_prob", CASES.values(), ids=CASES)


@OVER_CASES
def test_sum_over_an_example_and_mean_over_examples(cls, arguments, outputs, log_prob):
    loss = cls(**arguments)
    np.testing.assert_allclose(array(loss(Y, outputs)), -log_prob.sum(axis=1).mean(), rtol=1e-5)
    each = cls(**arguments, reduction="none")(Y, outputs)
    np.testing.assert_allclose(array(each), -log_prob.sum(axis=1), rtol=1e-4)
    weights = np.arange(6.0)
    weighted = loss(Y, outputs, sample_weight=weights)
    np.testing.assert_allclose(array(weighted), -(weights * log_prob.sum(axis=1)).mean(), rtol=1e-5)


@OVER_CASES
def test_a_last_axis_of_one_and_a_single_number(cls, arguments, outputs, log_prob):
    loss = cls(**arguments)
    expected = -log_prob[:, 0].mean()
    for y in (Y[:, 0], Y[:, :1]):
        np.testing.assert_allclose(array(loss(y, outputs[:, 0])), expected, rtol=1e-5)
    np.testing.assert_allclose(array(loss(Y[:, :1], outputs[:, :1])), expected, rtol=1e-5)


@pytest.mark.slow(keep=1)
@OVER_CASES
def test_learns_is_saved_and_goes_on(cls, arguments, outputs, log_prob, tmp_path):
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(outputs.shape[-1], seed=0)])
    model.compile(keras.optimizers.Adam(0.01), cls(**arguments))
    x, y = RNG.normal(size=(64, 4)).astype("float32"), RNG.normal(size=64).astype("float32")
    history = model.fit(x, y, epochs=3, callbacks=[kv.ELBO(64)], verbose=0).history
    assert history["nll"][-1] < history["nll"][0]
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.evaluate(x, y, verbose=0), model.evaluate(x, y, verbose=0), rtol=1e-6)


@pytest.mark.slow(keep=2)
@OVER_CASES
def test_an_outlier_among_the_inputs_does_no_harm(cls, arguments, outputs, log_prob):
    """It makes raw scales of −1,000s, of which softplus is 0."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(outputs.shape[-1])])
    model.compile("adam", cls(**arguments))
    x = np.array([[1.0], [-1e4], [1e4]], "float32")
    history = model.fit(x, np.zeros(3), epochs=5, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert np.isfinite(array(model(x))).all()


def test_few_degrees_of_freedom_are_heavy_tails_and_many_are_normal():
    y, one = np.array([6.0], "float32"), np.ones(1, "float32")
    few, many, normal = (
        float(array(value)[0])
        for value in (
            likelihoods.student_t(y, 2.0, 0.0 * one, one),
            likelihoods.student_t(y, 1e5, 0.0 * one, one),
            likelihoods.normal(y, 0.0 * one, one),
        )
    )
    assert few > normal + 10
    np.testing.assert_allclose(many, normal, rtol=0.02)


@pytest.mark.slow
def test_a_learned_scale_is_that_of_the_residuals():
    x = RNG.uniform(-1, 1, size=(512, 1)).astype("float32")
    y = (2 * x + 0.3 * RNG.normal(size=x.shape)).astype("float32")
    inputs = keras.Input((1,))
    model = keras.Model(inputs, losses.learned_scale(keras.layers.Dense(1)(inputs)))
    model.compile(keras.optimizers.Adam(0.05), losses.NormalNLL())
    model.fit(x, y, batch_size=64, epochs=30, verbose=0)
    outputs = model.predict(x, verbose=0)
    scale = scale_of(outputs[..., 1])
    residual = y - outputs[..., 0]
    assert np.ptp(scale) == 0
    np.testing.assert_allclose(scale[0, 0], np.sqrt((residual**2).mean()), rtol=0.1)
    np.testing.assert_allclose(array(kv.compact(model)(x)), outputs, atol=1e-6)


def test_monte_carlo_reads_what_the_normal_likelihood_is_given():
    inputs = keras.Input((4,))
    hidden = kv.VariationalDense(3, kl_weight=0.1, initial_log_variance=-2.0)(inputs)
    model = keras.Model(inputs, losses.learned_scale(hidden))
    found = kv.MonteCarlo(model, num_samples=8, likelihood="normal").predict(np.ones((5, 4), "float32"), verbose=0)
    raw_scale = array(model.get_layer("raw_scale").bias)
    expected = np.broadcast_to(scale_of(raw_scale) ** 2, (5, 3))
    np.testing.assert_allclose(found["aleatoric_variance"], expected, rtol=1e-5)
    assert (found["epistemic_variance"] > 0).all()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TFP is for TensorFlow")
def test_any_distribution():
    from tensorflow_probability import distributions as tfd

    @keras.saving.register_keras_serializable(package="tests")
    def counts(outputs):
        return tfd.Poisson(log_rate=outputs)

    loss = losses.DistributionNLL(counts)
    y = np.array([[0.0, 2.0], [3.0, 1.0]])
    log_prob = stats.poisson.logpmf(y, np.exp(LOC[:2, :2]))
    np.testing.assert_allclose(array(loss(y, LOC[:2, :2])), -log_prob.sum(axis=1).mean(), rtol=1e-5)
    again = losses.DistributionNLL.from_config(loss.get_config())
    np.testing.assert_allclose(array(again(y, LOC[:2, :2])), array(loss(y, LOC[:2, :2])))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TFP is for TensorFlow")
def test_a_distributions_y_has_the_shape_of_a_draw():
    """Or (B,) would be compared with (B, 1) as every example with every other."""
    from tensorflow_probability import distributions as tfd

    column = losses.DistributionNLL(lambda outputs: tfd.Poisson(log_rate=outputs))
    flat = losses.DistributionNLL(lambda outputs: tfd.Poisson(log_rate=outputs[..., 0]))
    y, outputs = np.array([0.0, 2.0, 3.0], "float32"), LOC[:3, :1]
    expected = -stats.poisson.logpmf(y, np.exp(outputs[:, 0])).mean()
    for loss in (column, flat):
        for shape in ((3,), (3, 1)):
            np.testing.assert_allclose(array(loss(y.reshape(shape), outputs)), expected, rtol=1e-5)
        with pytest.raises(ValueError, match="shape of a draw"):
            loss(np.zeros((3, 2), "float32"), outputs)
    vectors = losses.DistributionNLL(lambda outputs: tfd.MultivariateNormalDiag(outputs))
    y, outputs = np.zeros((3, 2), "float32"), LOC[:3, :2]
    np.testing.assert_allclose(array(vectors(y, outputs)), -stats.norm.logpdf(outputs).sum(axis=1).mean(), rtol=1e-5)


def test_y_has_the_shape_of_what_it_is_compared_with():
    y, outputs = Y[:, 0], LOC[:, None, :2]  # (B,) and (B, 1, 2), as `learned_scale` makes them
    expected = array(losses.NormalNLL()(y, outputs[:, 0]))
    for each in (y, y[:, None], y[:, None, None]):
        np.testing.assert_allclose(array(losses.NormalNLL()(each, outputs)), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"\(6, 3\) and \(6, 1, 2\)"):
        losses.NormalNLL()(Y, outputs)


STEPS = [(8, 5), (6, 6)]
NORMAL = losses.NormalNLL


def sequences(batch, steps, seed=0):
    """Outputs of sequences, y, weights of steps and a mask, the last one of an example all masked; and −log p."""
    rng = np.random.default_rng(seed)
    y, outputs = rng.normal(size=(batch, steps)), rng.normal(size=(batch, steps, 2))
    weight, mask = rng.uniform(0.2, 2.0, size=(batch, steps)), rng.uniform(size=(batch, steps)) < 0.6
    mask[-1] = False
    nll = -stats.norm.logpdf(y, outputs[..., 0], scale_of(outputs[..., 1]))
    return *(each.astype("float32") for each in (y, outputs, weight)), mask, nll


@pytest.mark.parametrize(("batch", "steps"), STEPS)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("kind", ["example", "column", "step", "number", "row", None])
def test_weights_and_masks_of_steps(batch, steps, masked, kind):
    """Σ w·m·nll over an example, whatever the sizes."""
    y, outputs, weight, mask, nll = sequences(batch, steps)
    given, each = {
        None: (None, np.ones_like(weight)),
        "example": (weight[:, 0], weight[:, :1]),
        "column": (weight[:, :1], weight[:, :1]),
        "step": (weight, weight),
        "number": (weight[..., None], weight),
        "row": (weight[:1], weight[:1]),
    }[kind]
    each = np.broadcast_to(each, nll.shape)
    totals = (each * (mask if masked else 1.0) * nll).sum(axis=1)
    expected = {
        "sum_over_batch_size": totals.mean(),
        "mean": totals.mean(),
        "sum": totals.sum(),
        "none": totals,
        None: totals,
        "mean_with_sample_weight": totals.sum() / each.mean(axis=1).sum(),
    }
    tensor = keras.ops.convert_to_tensor(outputs)
    tensor = with_mask(tensor, keras.ops.convert_to_tensor(mask)) if masked else tensor
    for reduction, value in expected.items():
        got = NORMAL(reduction=reduction)(y, tensor, sample_weight=given)
        np.testing.assert_allclose(array(got), value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize(("batch", "steps"), STEPS)
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_weights_and_masks_in_fit_and_evaluate(batch, steps, known):
    """Of one batch, whose steps may be known only when the graph runs; with gradients of what counts alone."""
    y, _, weight, mask, _ = sequences(batch, steps)
    x = np.random.default_rng(1).normal(size=(batch, steps, 3)) * mask[..., None]
    model = keras.Sequential(
        [keras.Input((steps if known else None, 3)), keras.layers.Masking(0.0), keras.layers.Dense(2)]
    )
    outputs = model.predict(x, verbose=0)
    nll = -stats.norm.logpdf(y, outputs[..., 0], scale_of(outputs[..., 1]))
    model.compile(keras.optimizers.SGD(0.1), NORMAL())
    expected = (weight * mask * nll).sum() / batch
    for targets in (y, y[..., None]):
        got = model.evaluate(x, targets, sample_weight=weight, batch_size=batch, verbose=0)
        np.testing.assert_allclose(got, expected, rtol=1e-4)
    np.testing.assert_allclose(model.evaluate(x, y, batch_size=batch, verbose=0), (mask * nll).sum() / batch, rtol=1e-4)
    bias = array(model.layers[-1].bias)
    model.fit(x, y, sample_weight=weight, batch_size=batch, verbose=0)
    scale = scale_of(outputs[..., 1])
    gradient = (weight * mask * (outputs[..., 0] - y) / scale**2).sum() / batch
    np.testing.assert_allclose(bias[0] - array(model.layers[-1].bias)[0], 0.1 * gradient, rtol=1e-3, atol=1e-5)


def test_a_mask_or_a_weight_of_all_that_an_image_holds():
    rng = np.random.default_rng(0)
    y, outputs = rng.normal(size=(3, 4, 3)), rng.normal(size=(3, 4, 3, 2))
    nll = -stats.norm.logpdf(y, outputs[..., 0], scale_of(outputs[..., 1]))
    for shape in ((3,), (3, 1), (3, 4), (3, 4, 1), (3, 4, 3), (3, 1, 3), ()):
        weight = rng.uniform(size=shape)
        whole = weight.reshape(*shape, *[1] * (3 - len(shape)))
        got = NORMAL()(y, outputs, sample_weight=weight)
        np.testing.assert_allclose(array(got), (whole * nll).sum() / 3, rtol=1e-4)


@pytest.mark.parametrize("shape", [(5,), (8, 8), (5, 8), (8, 5, 2), (8, 5, 1, 1)])
def test_weights_and_masks_of_another_layout_are_refused(shape):
    y, outputs, *_ = sequences(8, 5)
    with pytest.raises(ValueError, match=r"\(8, 5\).*\(" + ", ".join(map(str, shape))):
        NORMAL()(y, outputs, sample_weight=np.ones(shape))
    masked = with_mask(keras.ops.convert_to_tensor(outputs), keras.ops.ones(shape, "bool"))
    with pytest.raises(ValueError, match=r"\(8, 5\).*\(" + ", ".join(map(str, shape))):
        NORMAL()(y, masked)


@pytest.mark.parametrize("shape", [(4, 1), (4, 6), (4, 5, 2)])
def test_y_of_another_layout_is_refused_where_steps_are_unknown_too(shape):
    """(B, 1) would be compared with every step."""
    model = keras.Sequential([keras.Input((None, 3)), keras.layers.Dense(2)])
    model.compile("sgd", NORMAL())
    with pytest.raises(Exception, match=r"shape"):
        model.fit(np.ones((4, 5, 3)), np.ones(shape), verbose=0)


def two_headed(activation):
    inputs = keras.Input((3,))
    heads = {name: keras.layers.Dense(2, activation=activation)(inputs) for name in ("b", "a")}
    return keras.Model(inputs, heads)


@pytest.mark.parametrize(
    ("activation", "reach"),
    [("relu", "at least 0.694"), ("softplus", "at least 0.694"), ("sigmoid", "between 0.694 and 1.31")],
)
def test_an_activation_before_a_raw_scale_is_said(activation, reach):
    one = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation=activation)])
    inside = keras.Sequential([keras.Input((3,)), one])
    after = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Activation(activation)])
    for model in (one, inside, after):
        model.compile("sgd", NORMAL())
        with pytest.warns(UserWarning, match=f"{activation!r}.*{reach}"):
            check_outputs(model)
    several = two_headed(activation)
    several.compile("sgd", {"a": NORMAL(), "b": "mse"})
    with pytest.warns(UserWarning, match=f"for 'a'.*{activation!r}"):
        check_outputs(several)


@pytest.mark.parametrize("metric", ["mse", "mae", keras.metrics.RootMeanSquaredError()])
def test_a_metric_of_all_parameters_is_said(metric):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", NORMAL(), metrics=[metric])
    with pytest.warns(UserWarning, match="raw scale"):
        check_outputs(model)
    model.compile("sgd", NORMAL(), metrics=[kv.metrics.RootMeanSquaredError()])
    check_outputs(model)
    model.compile("sgd", "mse", metrics=[metric])
    check_outputs(model)
    several = two_headed(None)
    several.compile("sgd", {"a": NORMAL(), "b": "mse"}, metrics={"a": [metric]})
    with pytest.warns(UserWarning, match="raw scale"):
        check_outputs(several)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("with_input", [True, False])
def test_elbo_says_it_at_the_beginning_of_fit(with_input):
    """Of a model that its first batch builds, after that."""

    def model_of(loss, activation):
        own = [keras.Input((3,))] if with_input else []
        model = keras.Sequential([*own, kv.VariationalDense(2, activation=activation)])
        model.compile(keras.optimizers.SGD(0.0), loss, metrics=["mse"])
        return model

    def fit(model):
        y = np.zeros((8, 2 if model.loss == "mse" else 1))
        model.fit(np.ones((8, 3)), y, callbacks=[kv.ELBO(8)], verbose=0)

    with pytest.warns(UserWarning, match="'relu'") as said:
        fit(model_of(NORMAL(), "relu"))
    counts = [sum(words in str(each.message) for each in said) for words in ("'relu'", "including the raw scale")]
    assert counts == [1, 1]
    with warnings.catch_warnings(record=True) as said:
        fit(model_of("mse", "relu"))
    assert not [each for each in said if "raw scale" in str(each.message) or "'relu'" in str(each.message)]


class Nameless(keras.metrics.MeanSquaredError):
    def get_config(self):
        raise NotImplementedError


@pytest.mark.parametrize("metric", [lambda y, outputs: 0.0, Nameless()], ids=["lambda", "without_config"])
def test_metrics_that_cannot_be_saved_are_no_hindrance(metric):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation="relu")])
    model.compile("sgd", NORMAL(), metrics=[metric])
    with pytest.warns(UserWarning) as said:
        check_outputs(model)
    assert ["relu" in str(each.message) for each in said if each.category is UserWarning] == [True]


def test_scale_of_a_mean_squared_error():
    """mse·D/(2σ²) + KL/N and mse + (2σ²/D)·KL/N have one minimum: the KL's weight is that of the latter."""
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(2)])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
    model.fit(x, y, callbacks=[kv.ELBO(8, likelihood_scale=0.5)], verbose=0)
    (weight,) = posteriors(model)
    np.testing.assert_allclose(array(weight.owner.kl_weight), 2 * 0.5**2 / 2 / 8, rtol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="df=0"):
        losses.StudentTNLL(df=0)
    with pytest.raises(ValueError, match="num_components=0"):
        losses.NormalMixtureNLL(0)
    with pytest.raises(ValueError, match="distribution_fn='normal'"):
        losses.DistributionNLL("normal")
    with pytest.raises(ValueError, match=r"\(6, 3\) and \(6, 3\)"):
        losses.NormalNLL()(Y, LOC)
    with pytest.raises(ValueError, match=r"parameters \(B, \.\.\., 2\).*\(6, 3, 9\)"):
        losses.NormalNLL()(Y, THREE)
    with pytest.raises(ValueError, match="likelihood_scale=0"):
        kv.ELBO(8, likelihood_scale=0)
    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, kv.VariationalDense(2)(inputs))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="labels_per_example"):
        model.fit(np.ones((2, 3, 4)), np.ones((2, 3, 2)), callbacks=[kv.ELBO(2, likelihood_scale=1.0)], verbose=0)
