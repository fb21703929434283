"""Metrics over batches equal the functions on all rows, with weights and masks, within `fit` and out of it."""

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from keras_vdrop.scores import calibration, regression
from tests.cases import scale_of

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(200, 4)).astype("float32") * 2
PROBABILITY = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
LABELS = RNG.integers(0, 4, size=200)
OUTPUTS = RNG.normal(size=(200, 2)).astype("float32")
Y = RNG.normal(size=200).astype("float32")


def normal(outputs):
    return outputs[:, 0], scale_of(outputs[:, 1])


def coverage(outputs, y):
    return regression.interval_coverage(*regression.normal_interval(*normal(outputs), 0.8), y)


# metric, its outputs, its targets, the function of (outputs, targets) that it equals
CASES = {
    "ece": (
        lambda: kv.metrics.ExpectedCalibrationError(10, from_logits=True),
        LOGITS,
        LABELS,
        lambda p, y: calibration.expected_calibration_error(softmax(p), y, 10),
    ),
    "brier": (
        lambda: kv.metrics.BrierScore(from_logits=True),
        LOGITS,
        LABELS,
        lambda p, y: calibration.brier_score(softmax(p), y),
    ),
    "crps": (kv.metrics.NormalCRPS, OUTPUTS, Y, lambda p, y: regression.normal_crps(*normal(p), y)),
    "coverage": (lambda: kv.metrics.NormalCoverage(0.8), OUTPUTS, Y, coverage),
}
CASES |= {
    "rmse": (
        kv.metrics.RootMeanSquaredError,
        OUTPUTS,
        Y,
        lambda p, y: np.sqrt(np.mean((p[:, 0].astype("float64") - y) ** 2)),
    ),
    "mae": (kv.metrics.MeanAbsoluteError, OUTPUTS, Y, lambda p, y: np.abs(p[:, 0].astype("float64") - y).mean()),
    "nll": (
        kv.metrics.NegativeLogLikelihood,
        OUTPUTS,
        Y,
        lambda p, y: regression.normal_negative_log_likelihood(*normal(p), y),
    ),
}
METRICS = pytest.mark.parametrize("make, outputs, y, function", CASES.values(), ids=CASES)


def softmax(logits):
    exp = np.exp(logits.astype("float64"))
    return exp / exp.sum(-1, keepdims=True)


def value(metric):
    return float(keras.ops.convert_to_numpy(metric.result()))


@METRICS
def test_batches_add_up(make, outputs, y, function):
    metric = make()
    assert value(metric) == 0.0
    for rows in np.array_split(np.arange(200), 7):
        metric.update_state(y[rows], outputs[rows])
    np.testing.assert_allclose(value(metric), function(outputs, y), rtol=1e-5)
    metric.reset_state()
    metric.update_state(y[:50, None], outputs[:50])  # targets as columns
    np.testing.assert_allclose(value(metric), function(outputs[:50], y[:50]), rtol=1e-5)


@METRICS
def test_weights_and_masks_count_rows(make, outputs, y, function):
    weight = RNG.integers(0, 4, size=200)
    expected = function(np.repeat(outputs, weight, axis=0), np.repeat(y, weight))
    for shape in ((200,), (200, 1)):
        metric = make()
        metric.update_state(y, outputs, sample_weight=weight.reshape(shape))
        np.testing.assert_allclose(value(metric), expected, rtol=1e-5)
    # 40 sequences of 5 steps: a weight for each sequence
    metric = make()
    metric.update_state(y.reshape(40, 5), outputs.reshape(40, 5, -1), sample_weight=weight[:40])
    count = np.repeat(weight[:40], 5)
    np.testing.assert_allclose(
        value(metric), function(np.repeat(outputs, count, axis=0), np.repeat(y, count)), rtol=1e-5
    )
    # or for each step, some of which are masked
    mask, weight = RNG.uniform(size=(40, 5)) < 0.7, weight.reshape(40, 5)
    count = np.ravel(weight * mask)
    steps = outputs.reshape(40, 5, -1) * mask[..., None]
    model = keras.Sequential([keras.Input(steps.shape[1:]), keras.layers.Masking(0.0)])
    metric = make()
    model.compile(loss=lambda y, outputs: 0.0 * keras.ops.sum(outputs, axis=-1), weighted_metrics=[metric])
    model.evaluate(steps, y.reshape(40, 5), sample_weight=weight, verbose=0)
    np.testing.assert_allclose(
        value(metric), function(np.repeat(outputs, count, axis=0), np.repeat(y, count)), rtol=1e-5
    )


@METRICS
def test_config_is_complete(make, outputs, y, function):
    metric = make()
    again = keras.metrics.deserialize(keras.metrics.serialize(metric))
    assert type(again) is type(metric) and again.get_config() == metric.get_config()
    for one in (metric, again):
        one.update_state(y, outputs)
    assert value(metric) == value(again)


def test_probabilities_and_two_classes():
    for metric, function in (
        (kv.metrics.ExpectedCalibrationError, calibration.expected_calibration_error),
        (kv.metrics.BrierScore, calibration.brier_score),
    ):
        plain = metric()
        plain.update_state(LABELS, PROBABILITY)
        np.testing.assert_allclose(value(plain), function(softmax(LOGITS), LABELS), rtol=1e-5)
        labels, logits = LABELS % 2, LOGITS[:, :1]
        chance = 1 / (1 + np.exp(-logits[:, 0].astype("float64")))
        expected = function(np.stack([1 - chance, chance], axis=-1), labels)
        for one in (metric(from_logits=True), metric()):
            one.update_state(labels, logits if one.from_logits else chance[:, None])
            np.testing.assert_allclose(value(one), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True])
def test_in_compile(jit):
    """After an epoch and in `evaluate`, with the weights that Keras gives weighted metrics, and in mixed precision."""
    x = RNG.normal(size=(50, 3)).astype("float32")
    weight = RNG.integers(1, 4, size=50).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((3,)),
            kv.VariationalDense(8, kl_weight=0.01, dtype="mixed_bfloat16"),
            keras.layers.Dense(4, dtype="float32"),
        ]
    )
    model.compile(
        "sgd",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[CASES["ece"][0](), CASES["brier"][0]()],
        weighted_metrics=[kv.metrics.BrierScore(from_logits=True, name="weighted")],
        jit_compile=jit,
    )
    history = model.fit(x, LABELS[:50], batch_size=16, sample_weight=weight, verbose=0).history
    assert {"ece", "brier", "weighted"} <= set(history) and np.isfinite(history["ece"]).all()
    logs = model.evaluate(x, LABELS[:50], batch_size=16, sample_weight=weight, verbose=0, return_dict=True)
    probability, count = softmax(model.predict(x, verbose=0)), weight.astype(int)
    np.testing.assert_allclose(
        logs["ece"], calibration.expected_calibration_error(probability, LABELS[:50], 10), rtol=1e-4
    )
    np.testing.assert_allclose(logs["brier"], calibration.brier_score(probability, LABELS[:50]), rtol=1e-4)
    expected = calibration.brier_score(np.repeat(probability, count, axis=0), np.repeat(LABELS[:50], count))
    np.testing.assert_allclose(logs["weighted"], expected, rtol=1e-4)


def test_a_compiled_model_comes_back_with_its_metrics(tmp_path):
    model = keras.Sequential([keras.Input((3,)), kv.VariationalDense(2, kl_weight=0.01)])
    metrics = [kv.metrics.NormalCRPS(), kv.metrics.NormalCoverage(0.5, name="half")]
    model.compile("sgd", "mse", metrics=metrics)
    model.save(tmp_path / "m.keras")
    x, y = RNG.normal(size=(20, 3)).astype("float32"), Y[:20, None] * np.ones((1, 1), "float32")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    assert {"crps", "half"} <= set(expected)
    assert loaded.evaluate(x, y, verbose=0, return_dict=True) == pytest.approx(expected)


LIKELIHOODS = [
    kv.losses.LaplaceNLL(),
    kv.losses.StudentTNLL(df=5.0),
    kv.losses.NormalMixtureNLL(num_components=2),
]


@pytest.mark.parametrize("loss", LIKELIHOODS, ids=lambda loss: loss.name)
def test_metrics_of_any_likelihood(loss):
    """Of two numbers a row; and in a model, with its config."""
    outputs = RNG.normal(size=(30, 2, loss.num_parameters)).astype("float32")
    y = RNG.normal(size=(30, 2)).astype("float32")
    mean = keras.ops.convert_to_numpy(loss.moments(keras.ops.convert_to_tensor(outputs))[0]).astype("float64")
    expected = {
        kv.metrics.RootMeanSquaredError: np.sqrt(np.mean((mean - y) ** 2)),
        kv.metrics.MeanAbsoluteError: np.abs(mean - y).mean(),
        kv.metrics.NegativeLogLikelihood: float(keras.ops.convert_to_numpy(loss(y, outputs))) / 2,
    }
    for cls, wanted in expected.items():
        metric = keras.metrics.deserialize(keras.metrics.serialize(cls(loss)))
        assert metric.likelihood.get_config() == loss.get_config()
        metric.update_state(y, outputs)
        np.testing.assert_allclose(value(metric), wanted, rtol=1e-5)


def test_errors_are_of_the_mean_where_keras_takes_the_raw_scale_too():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    x = RNG.normal(size=(20, 3)).astype("float32")
    model.compile("sgd", kv.losses.NormalNLL(), metrics=[kv.metrics.RootMeanSquaredError(), "mse"])
    logs = model.evaluate(x, Y[:20, None], verbose=0, return_dict=True)
    error = model.predict(x, verbose=0)[:, 0] - Y[:20]
    np.testing.assert_allclose(logs["rmse"], np.sqrt(np.mean(error**2)), rtol=1e-5)
    assert abs(logs["mse"] - np.mean(error**2)) > 0.01


def test_a_checkpoint_knows_which_way_is_better():
    assert kv.metrics.ExpectedCalibrationError()._direction == kv.metrics.BrierScore()._direction == "down"


def test_what_is_refused():
    with pytest.raises(ValueError, match="num_bins"):
        kv.metrics.ExpectedCalibrationError(num_bins=0)
    with pytest.raises(ValueError, match="level=90"):
        kv.metrics.NormalCoverage(90)
    with pytest.raises(ValueError, match="not one-hot"):
        kv.metrics.BrierScore().update_state(np.eye(4)[LABELS], PROBABILITY)
    with pytest.raises(ValueError, match="raw scale"):
        kv.metrics.NormalCRPS().update_state(OUTPUTS, OUTPUTS)
    with pytest.raises(ValueError, match="likelihood='normal'"):
        kv.metrics.RootMeanSquaredError("normal")
    with pytest.raises(ValueError, match=r"\(200,\).*\(100,\)"):
        kv.metrics.NormalCRPS().update_state(Y, OUTPUTS, sample_weight=np.ones(100))
    for size in (1, 3):
        with pytest.raises(ValueError, match="raw scale"):
            kv.metrics.NormalCoverage().update_state(np.zeros(4), np.zeros((4, size)))
        for cls in (kv.metrics.RootMeanSquaredError, kv.metrics.NegativeLogLikelihood):
            with pytest.raises(ValueError, match=r"parameters \(B, \.\.\., 2\)"):
                cls().update_state(np.zeros(4), np.zeros((4, size)))


@pytest.mark.parametrize("metric", [kv.metrics.BrierScore, kv.metrics.ExpectedCalibrationError])
def test_logits_in_place_of_probabilities(metric):
    """The result is NaN, unless the row does not count; rounding is no fault."""
    logits = np.array([[1.0005, -0.0005], [3.0, -1.0]], "float32")
    for weight, expected in (([1.0, 1.0], True), ([1.0, 0.0], False)):
        of_logits = metric()
        of_logits.update_state([0, 1], logits, sample_weight=weight)
        assert np.isnan(value(of_logits)) == expected
    binary = metric()
    binary.update_state([0, 1], [[0.5], [3.0]])
    assert np.isnan(value(binary))


@pytest.mark.parametrize("metric", [kv.metrics.BrierScore, kv.metrics.ExpectedCalibrationError])
def test_labels_that_are_no_classes(metric):
    probability = np.array([[0.9, 0.1], [0.8, 0.2]], "float32")
    right = metric()
    right.update_state([0], probability[:1])
    for strange in (255, -1, 2):
        strict, ignoring, weighed = metric(), metric(ignore_class=strange), metric()
        strict.update_state([0, strange], probability)
        assert np.isnan(value(strict))
        ignoring.update_state([0, strange], probability)
        weighed.update_state([0, strange], probability, sample_weight=[1.0, 0.0])
        assert value(ignoring) == value(weighed) == pytest.approx(value(right))
