"""The plots draw what they are given, on the axes they are given."""

import keras
import matplotlib
import numpy as np

import keras_vdrop as kv
from tests.cases import randomize

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_log_alpha_histogram_counts_every_weight_once():
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(30, kl_weight=0.1, bias_prior="normal")])
    randomize(model)
    report = kv.sparsity(model, 0.5)
    _, ax = plt.subplots()
    assert kv.plots.log_alpha_histogram(model, 0.5, ax=ax) is ax
    counts = [f"kept ({report.left})", f"pruned ({report.weights - report.left})", "threshold 0.5"]
    assert texts(ax) == counts
    assert sum(bar.get_height() for bar in ax.patches) == report.weights
    # pruned weights have no log alpha to show, and do not stretch the picture
    kv.prune(model, 0.5)
    again = kv.plots.log_alpha_histogram(model, 0.5)
    assert texts(again) == counts and again.get_xlim()[1] < 10
    plt.close("all")


def test_metric_against_weights():
    left, samples = [10, 100], np.array([[0.5, 0.6], [0.8, 0.9]])
    _, ax = plt.subplots()
    assert kv.plots.metric_against_weights(left, samples, mean=[0.6, 0.9], chosen=100, metric="accuracy", ax=ax) is ax
    assert ax.get_xscale() == "log" and ax.get_ylabel() == "accuracy" and "chosen: 100" in texts(ax)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.55, 0.85])
    plt.close("all")


def test_metric_against_ratio():
    rows = [(3.0, 100, 1.0, 0.9, True), (0.0, 10, 10.0, 0.89, True), (-5.0, 0, np.inf, 0.1, False)]
    candidates = tuple(kv.selection.Candidate(*row) for row in rows)
    choice = kv.selection.ThresholdChoice("accuracy", 0.9, 0.88, candidates, candidates[1])
    _, ax = plt.subplots()
    assert kv.plots.metric_against_ratio(choice, ax=ax) is ax
    assert texts(ax) == ["as it is", "limit", "chosen: threshold 0, 10x"]
    np.testing.assert_allclose(ax.lines[2].get_xdata(), [1, 10])  # nothing left has no place on a log axis
    plt.close("all")
