"""`select_threshold` finds the highest ratio within a tolerance, and leaves the model as it was."""

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from tests.cases import array, posteriors, randomize


@pytest.fixture(scope="module")
def judged():
    """A model that needs its first input alone, in which weights of other inputs go at thresholds 2, 1, 0."""
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(1, use_bias=False, kl_weight=0.1)])
    (weight,) = posteriors(model)
    weight.loc.assign([[1.0], [1e-3], [1e-3], [1e-3]])
    weight.log_variance.assign(np.array([[-9.0], *([value + np.log(1e-6)] for value in (2.2, 1.2, 0.2))]))
    model.compile("sgd", "mse", metrics=["mae", keras.metrics.BinaryAccuracy("accuracy", threshold=0.5)])
    x = np.random.default_rng(0).uniform(size=(200, 4)).astype("float32")
    return model, x, x[:, :1]


def test_threshold_of_the_highest_ratio_within_the_tolerance(judged):
    model, x, y = judged
    before = model.get_weights()
    choice = kv.select_threshold(model, x, y, tolerance=0.01, metric="mae", thresholds=[-20.0, 0.0, 3.0, 1.0, 2.0])
    assert [row.threshold for row in choice.candidates] == [3.0, 2.0, 1.0, 0.0, -20.0]
    assert [row.left for row in choice.candidates] == [4, 3, 2, 1, 0]
    assert [row.within for row in choice.candidates] == [True] * 4 + [False]
    assert choice.threshold == 0.0 and choice.chosen.ratio == 4.0
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)
    assert str(choice).count("chosen") == 1 and "out of tolerance" in str(choice)
    # what it says of the metric is what is seen once the model is pruned
    kept = keras.models.clone_model(model)
    kept.set_weights(before)
    kv.prune(kept, choice.threshold)
    error = np.abs(array(kept(x)) - y).mean()
    np.testing.assert_allclose(choice.chosen.value, error, rtol=1e-5)


def test_where_more_is_better_and_where_nothing_will_do(judged):
    model, x, y = judged
    labels = (y > 0.5).astype("float32")
    choice = kv.select_threshold(model, x, labels)
    assert choice.threshold is not None and choice.limit == choice.reference - 0.01
    assert choice.chosen.left == 1
    nothing = kv.select_threshold(model, x, labels, thresholds=[-20.0])
    assert nothing.chosen is None
    with pytest.raises(ValueError, match=r"No candidate.*accuracy"):
        _ = nothing.threshold


def interval_score(y, p):
    return abs(y - p)


def negative_log_likelihood(y, p):
    return abs(y - p)


def test_the_metric_or_its_name_tells_which_direction_is_better(judged):
    fixture, x, y = judged
    model = keras.models.clone_model(fixture)
    model.set_weights(fixture.get_weights())
    score = keras.metrics.MeanAbsoluteError(name="accuracy_gap")  # more would be better, by its name alone
    model.compile("sgd", "mse", metrics=[score, negative_log_likelihood, interval_score])
    for metric in ("accuracy_gap", "negative_log_likelihood"):
        choice = kv.select_threshold(model, x, y, metric=metric, thresholds=[-20.0, 0.0])
        assert [row.within for row in choice.candidates] == [True, False]
    with pytest.raises(ValueError, match="'interval_score' does not tell"):
        kv.select_threshold(model, x, y, metric="interval_score")


def test_candidates_leave_four_fifths_each():
    model = keras.Sequential([keras.Input((100,)), kv.VariationalDense(50, kl_weight=0.1)])
    randomize(model)
    model.compile("sgd", "mse", metrics=["mae"])
    x, y = np.ones((2, 100)), np.ones((2, 50))
    left = [row.left for row in kv.select_threshold(model, x, y, metric="mae").candidates]
    np.testing.assert_allclose(np.array(left[1:]) / left[:-1], 0.8, atol=0.01)
    assert left[0] == kv.sparsity(model, 3.0).left and len(left) == 21


def test_a_failure_leaves_the_model_as_it_was(judged, monkeypatch):
    model, x, y = judged
    before = model.get_weights()
    with monkeypatch.context() as patch:
        patch.setattr("keras_vdrop.selection.sparsity", None)
        with pytest.raises(TypeError):
            kv.select_threshold(model, x, y, metric="mae", thresholds=[-20.0])
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"mode": "most"}, "mode='most'"),
        ({"thresholds": []}, "at least one"),
        ({"thresholds": [np.nan]}, "must be a finite number"),
        ({"metric": "loss"}, "The loss includes the KL"),
        ({"metric": "wellness"}, r"one of \['accuracy', 'mae'\]"),
        ({"metric": "ece"}, r"one of \['accuracy', 'mae'\]"),
        ({"metric": "auc"}, r"one of \['accuracy', 'mae'\]"),
    ],
)
def test_bad_input_to_select_threshold(arguments, message, judged):
    with pytest.raises(ValueError, match=message):
        kv.select_threshold(*judged, **arguments)


def test_a_generator_is_refused(judged):
    model, x, y = judged
    with pytest.raises(ValueError, match="read only once"):
        kv.select_threshold(model, ((x, y) for _ in range(3)))


def test_what_prepares_the_model_runs_before_each_evaluation_and_is_put_back():
    model = keras.Sequential(
        [keras.Input((4,)), kv.VariationalDense(6, kl_weight=0.1), keras.layers.BatchNormalization()]
    )
    randomize(model)
    model.compile("sgd", "mse", metrics=["mae"])
    x = np.random.default_rng(0).normal(size=(100, 4)).astype("float32")
    y = np.zeros((100, 6), "float32")
    before = model.get_weights()
    thresholds = [3.0, -1.0]

    def prepare(model):
        kv.update_batch_normalization(model, x, batch_size=100)

    choice = kv.select_threshold(model, x, y, metric="mae", thresholds=thresholds, prepare=prepare)
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)
    values = []
    for threshold in [None, *thresholds]:
        model.set_weights(before)
        if threshold is not None:
            kv.prune(model, threshold)
        prepare(model)
        values.append(np.abs(array(model(x))).mean())
    found = [choice.reference, *(row.value for row in choice.candidates)]
    np.testing.assert_allclose(found, values, rtol=1e-5)
    assert values[2] < values[1]  # a column of which nothing is left stays 0
