"""The plots draw what they are given, on the axes they are given."""

import keras
import matplotlib
import numpy as np
import pytest

import keras_vdrop as kv
from tests.cases import array, randomize

matplotlib.use("Agg")
import matplotlib.pyplot as plt

pytestmark = pytest.mark.any_backend


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
    # nor do they come back where an optimizer moves them on
    model.layers[0].kernel.loc.assign_add(np.ones((4, 30)))
    kept = kv.sparsity(model, 0.5).left
    assert texts(kv.plots.log_alpha_histogram(model, 0.5))[0] == f"kept ({kept})"
    plt.close("all")


def test_log_alpha_histogram_has_the_threshold_of_each_layer():
    layers = [kv.VariationalDense(30, kernel_prior="ard", threshold=0.5), kv.VariationalDense(30, threshold=1.0)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    randomize(model)
    report = kv.sparsity(model)
    ax = kv.plots.log_alpha_histogram(model)
    counts = [f"kept ({report.left:,})", f"pruned ({report.weights - report.left:,})"]
    assert texts(ax) == [*counts, "threshold 0.5", "threshold 1"]
    # no bin holds both kept and pruned weights of the first layer, and the line ends below the legend
    edges = np.array([bar.get_x() for bar in ax.patches])
    assert np.abs(edges - 0.5).min() < 1e-6 and line(ax)[:, 1].max() < ax.get_ylim()[1] / 10
    plt.close("all")


def test_reliability_diagram_leaves_out_masked_steps():
    probability = np.array([[[0.9, 0.1], [0.3, 0.7]], [[0.8, 0.2], [0.6, 0.4]]])
    steps = kv.montecarlo.Predictions(
        probability=probability, predictive_entropy=np.ones((2, 2)), mask=np.array([[True, False], [True, True]])
    )
    labels = np.array([[0, -1], [0, 1]])  # the padded step has no label
    shown = kv.plots.reliability_diagram(steps, labels)
    kept = kv.plots.reliability_diagram(probability.reshape(4, 2)[[0, 2, 3]], [0, 0, 1])
    assert texts(shown) == texts(kept)
    plt.close("all")


def test_weight_histogram_shows_what_pruning_would_remove():
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(30, kl_weight=0.1, bias_prior="normal")])
    randomize(model)
    report = kv.sparsity(model, 0.5)
    ax = kv.plots.weight_histogram(model, 0.5)
    assert texts(ax) == ["before pruning (120)", f"after pruning ({report.left})"]
    assert sum(bar.get_height() for bar in ax.patches) == 120 + report.left
    kv.prune(model, 0.5)
    assert texts(kv.plots.weight_histogram(model, 9.0)) == [f"{t} pruning ({report.left})" for t in ("before", "after")]
    plt.close("all")


def test_posterior_intervals_are_sorted_by_signal_to_noise():
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(30, kl_weight=0.1)])
    randomize(model)
    weight = model.layers[0].kernel
    kv.prune(model, 1.0)
    left = kv.sparsity(model).left
    ax = kv.plots.posterior_intervals(weight, num_weights=1000)
    assert ax.get_title() == f"Posterior of {model.layers[0].name}/kernel"
    kept, pruned = (np.array(bars[0].get_xydata()) for bars in ax.containers)
    assert len(kept) == left and len(kept) + len(pruned) == 120 and not pruned[:, 1].any()
    (reaches,) = ax.containers[0][2]
    stddev = np.array([np.ptp(segment[:, 1]) / 2 for segment in reaches.get_segments()])
    ratio = np.abs(kept[:, 1]) / stddev
    assert (np.diff(ratio) <= 1e-4 * ratio[:-1]).all()
    variance = np.exp(array(weight.log_variance)).ravel()[array(weight.mask).ravel() > 0]
    np.testing.assert_allclose(np.sort(stddev**2), np.sort(variance), rtol=1e-3)
    assert sum(len(bars[0].get_xydata()) for bars in kv.plots.posterior_intervals(weight, 7).containers) == 7
    plt.close("all")


def test_training_curves_have_a_panel_for_each_log():
    x, y = RNG.normal(size=(40, 4)), RNG.normal(size=(40, 1))
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(1)])
    model.compile("adam", "mse")
    callbacks = [kv.ELBO(40, schedule=lambda epoch: epoch / 2), kv.SparsityLogger()]
    history = model.fit(x, y, epochs=3, validation_data=(x, y), callbacks=callbacks, verbose=0)
    axes = kv.plots.training_curves(history)
    assert [ax.get_ylabel() for ax in axes] == ["NLL", "KL (nats)", "β", "kept weights"]
    assert texts(axes[0]) == ["training", "validation"] and axes[-1].get_xlabel() == "epoch"
    np.testing.assert_allclose(line(axes[2]), [[1, 0], [2, 0.5], [3, 1]])
    np.testing.assert_allclose(line(axes[0], 1)[:, 1], history.history["val_nll"])
    _, own = plt.subplots(2)
    found = kv.plots.training_curves({"kl": [3.0, 2.0], "weights_left": [1.0, 0.5], "loss": [1.0, 1.0]}, own)
    assert all(a is b for a, b in zip(found, own))
    with pytest.raises(ValueError, match="one for each of KL"):
        kv.plots.training_curves({"kl": [3.0, 2.0]}, own)
    with pytest.raises(ValueError, match="logs of `ELBO`"):
        kv.plots.training_curves({"loss": [1.0]})
    plt.close("all")


def test_uncertainty_map_shows_each_pixel():
    model = keras.Sequential([keras.Input((6, 5, 1)), kv.VariationalConv2D(3, 1, initial_log_variance=-2.0)])
    x = RNG.uniform(size=(2, 6, 5, 1)).astype("float32")
    found = kv.MonteCarlo(model, 4, "categorical").predict(x[:1], verbose=0)
    for given in (found, found.predictive_entropy, found.predictive_entropy[0]):
        ax = kv.plots.uncertainty_map(given, x[0])
        image, shown = ax.images
        np.testing.assert_allclose(shown.get_array(), found.predictive_entropy[0])
        np.testing.assert_allclose(image.get_array(), x[0, ..., 0])
        assert shown.colorbar.ax.get_ylabel() == "predictive entropy (nats)"
    numbers = kv.MonteCarlo(model, 4).predict(x[:1], verbose=0)
    (shown,) = kv.plots.uncertainty_map(numbers).images
    np.testing.assert_allclose(shown.get_array(), numbers.variance[0].sum(-1), rtol=1e-5)
    assert shown.colorbar.ax.get_ylabel() == "predictive variance"
    for wrong, image in ((np.ones((2, 6, 5)), None), (np.ones(6), None), (np.ones((6, 5)), np.ones((5, 6)))):
        with pytest.raises(ValueError, match="Received: shape"):
            kv.plots.uncertainty_map(wrong, image)
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
    assert texts(ax) == ["unchanged", "limit", "chosen: threshold 0, 10x"]
    np.testing.assert_allclose(ax.lines[2].get_xdata(), [1, 10])  # nothing left has no place on a log axis
    plt.close("all")


RNG = np.random.default_rng(0)


def test_log_alpha_by_layer_counts_what_is_left_of_each():
    model = keras.Sequential(
        [keras.Input((4, 2)), kv.VariationalLSTM(5, kl_weight=0.1), kv.VariationalDense(300, kl_weight=0.1)]
    )
    randomize(model)
    report = kv.sparsity(model, 0.5)
    ax = kv.plots.log_alpha_by_layer(model, 0.5)
    lstm, dense = model.layers
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert [name.split("\n")[0] for name in names] == [
        f"{lstm.name}/cell/kernel",
        f"{lstm.name}/cell/recurrent_kernel",
        dense.name,
    ]
    left = [int(name.split("\n")[1].split(" of ")[0].replace(",", "")) for name in names]
    assert sum(left) == report.left and left[2] == report.layers[1].left
    assert texts(ax) == ["kept", "pruned", "threshold"]
    # pruned weights are counted, have no log alpha to show, and do not stretch the picture
    kv.prune(model, 0.5)
    _, other = plt.subplots()
    assert kv.plots.log_alpha_by_layer(model, 0.5, ax=other) is other
    assert [text.get_text() for text in other.get_yticklabels()] == names and other.get_xlim()[1] < 10
    plt.close("all")


def test_reliability_diagram():
    confidence = RNG.uniform(0.5, 1.0, size=400)
    probability = np.stack([confidence, 1 - confidence], axis=-1)
    labels = (RNG.uniform(size=400) > confidence - 0.2).astype(int)
    bins = kv.scores.calibration.reliability(probability, labels)
    error = kv.scores.calibration.expected_calibration_error(probability, labels)
    _, ax = plt.subplots()
    assert kv.plots.reliability_diagram(probability, labels, ax=ax) is ax
    assert texts(ax) == ["calibrated", "share of rows", f"model, ECE {100 * error:.1f} %"]
    points = next(line for line in ax.lines if line.get_marker() == "o")
    np.testing.assert_allclose(points.get_xydata(), np.stack([bins.confidence, bins.accuracy], axis=-1))
    np.testing.assert_allclose(sum(bar.get_height() for bar in ax.patches), 1.0)
    assert "share of rows" not in texts(kv.plots.reliability_diagram(probability, labels, binning="mass"))
    plt.close("all")


def test_entropy_histogram():
    inside, outside = RNG.uniform(0, 1, 300), RNG.uniform(0.5, 2, 100)
    _, ax = plt.subplots()
    assert kv.plots.entropy_histogram(inside, outside, ax=ax) is ax
    assert texts(ax) == ["in distribution (300)", "out of distribution (100)"]
    assert f"AUROC {kv.scores.detection.auroc(inside, outside):.3f}" in ax.get_title()
    for patch in ax.patches:
        np.testing.assert_allclose(patch.get_data().values.sum(), 1.0)
    plt.close("all")


def test_risk_coverage_draws_a_curve_a_call():
    uncertainty, loss = RNG.uniform(size=100), RNG.integers(0, 2, size=100)
    _, ax = plt.subplots()
    assert kv.plots.risk_coverage(uncertainty, loss, "one", ax=ax) is ax
    kv.plots.risk_coverage(loss, loss, "two", ax=ax)
    area = kv.scores.detection.aurc(uncertainty, loss)
    assert texts(ax)[:3] == [f"one, AURC {area:.3g}", "one, best order", texts(ax)[2]] and "two, AURC" in texts(ax)[2]
    assert ax.lines[0].get_color() == ax.lines[1].get_color() != ax.lines[2].get_color()
    np.testing.assert_allclose(ax.lines[2].get_ydata(), ax.lines[1].get_ydata())
    # a loss of 0 has a scale, too
    assert kv.plots.risk_coverage(uncertainty, np.zeros(100)).get_ylim() == (0, 1)
    plt.close("all")


def test_regression_band():
    x = RNG.uniform(size=50)
    mean, aleatoric, epistemic = x**2, np.full(50, 0.09), np.full(50, 0.16)
    _, ax = plt.subplots()
    assert kv.plots.regression_band(x, mean, aleatoric, epistemic, observed=(x, mean), level=0.5, ax=ax) is ax
    kv.plots.regression_band(x[:, None], mean, aleatoric, epistemic)
    assert texts(ax) == ["50 % epistemic and aleatoric", "50 % epistemic", "mean", "observed"]
    order = np.argsort(x)
    np.testing.assert_allclose(ax.lines[0].get_xydata(), np.stack([x, mean], axis=-1)[order])
    # the quartiles of a normal distribution are 0.674 standard deviations off, and 0.5² = 0.09 + 0.16
    for band, scale in zip(ax.collections, (0.5, 0.4)):
        ends = band.get_paths()[0].vertices
        reach = [np.ptp(ends[np.isclose(ends[:, 0], x[0]), 1])]
        np.testing.assert_allclose(reach, 2 * 0.67449 * scale, rtol=1e-5)
    # a model that is certain
    kv.plots.regression_band(x, mean, aleatoric, np.zeros(50))
    plt.close("all")


def model_of(outputs, *hidden):
    return keras.Sequential([keras.Input((4,)), *hidden, kv.VariationalDense(outputs, initial_log_variance=-2.0)])


def line(ax, place=0):
    return ax.lines[place].get_xydata()


@pytest.mark.slow
def test_plots_take_predictions():
    x = RNG.normal(size=(40, 4)).astype("float32")
    labels = RNG.integers(0, 3, size=40)
    classes = kv.MonteCarlo(model_of(3), 4, "categorical").predict(x, verbose=0)
    two = kv.MonteCarlo(model_of(1), 4, "bernoulli").predict(x, verbose=0)
    numbers = kv.MonteCarlo(model_of(2), 4, "normal").predict(x, verbose=0)
    column = kv.MonteCarlo(model_of(1), 4).predict(x, verbose=0)
    plots = kv.plots
    band = numbers.mean, numbers.aleatoric_variance, numbers.epistemic_variance
    pairs = [
        (plots.reliability_diagram(classes, labels), plots.reliability_diagram(classes.probability, labels)),
        (plots.risk_coverage(classes, labels == 0), plots.risk_coverage(classes.predictive_entropy, labels == 0)),
        (plots.risk_coverage(numbers, labels), plots.risk_coverage(numbers.stddev() ** 2, labels)),
        (plots.regression_band(x[:, :1], numbers), plots.regression_band(x[:, 0], *band)),
    ]
    one = np.stack([1 - two.probability[:, 0], two.probability[:, 0]], axis=-1)
    for shape in ((40,), (40, 1)):
        ours = plots.reliability_diagram(two, labels.reshape(shape) % 2)
        pairs.append((ours, plots.reliability_diagram(one, labels % 2)))
    for ours, theirs in pairs:
        np.testing.assert_allclose(line(ours), line(theirs), rtol=1e-5)
        assert texts(ours) == texts(theirs)
    ax = plots.entropy_histogram(classes, kv.montecarlo.Predictions(classes))
    assert ax.get_xlabel() == "predictive entropy (nats)" and "0.500" in ax.get_title()
    assert plots.entropy_histogram(numbers, numbers).get_xlabel() == "predictive variance"
    assert texts(plots.regression_band(x[:, 0], column)) == ["90 % epistemic", "mean"]
    for plot, arguments in (
        (plots.reliability_diagram, (numbers, labels)),
        (plots.regression_band, (x[:, 0], classes)),
        (plots.reliability_diagram, (classes, labels[:20])),
    ):
        with pytest.raises(ValueError, match=r"must contain|Expected labels"):
            plot(*arguments)
    plt.close("all")


def test_plots_take_predictions_of_sequences():
    x = RNG.normal(size=(10, 5, 4)).astype("float32")
    labels = RNG.integers(0, 3, size=(10, 5))
    model = keras.Sequential([keras.Input((5, 4)), kv.VariationalDense(3, initial_log_variance=-2.0)])
    found = kv.MonteCarlo(model, 4, "categorical").predict(x, verbose=0)
    ours = kv.plots.reliability_diagram(found, labels)
    theirs = kv.plots.reliability_diagram(found.probability.reshape(50, 3), labels.ravel())
    np.testing.assert_allclose(line(ours), line(theirs))
    kv.plots.risk_coverage(found, labels.sum(axis=1))
    plt.close("all")


def test_a_new_axes_has_room_for_its_labels():
    probability = np.tile([0.7, 0.3], (10, 1))
    for ax in (
        kv.plots.reliability_diagram(probability, np.zeros(10)),
        kv.plots.entropy_histogram(np.arange(10), np.arange(5)),
        kv.plots.risk_coverage(np.arange(10), np.ones(10)),
        kv.plots.regression_band(*np.ones((4, 10))),
    ):
        figure = ax.figure
        figure.canvas.draw()
        box = ax.get_tightbbox()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    plt.close("all")


def test_a_model_of_which_nothing_is_left_has_an_empty_histogram():
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(3)])
    kv.prune(model, -100.0)
    ax = kv.plots.weight_histogram(model)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["before pruning (0)", "after pruning (0)"]
    ax.figure.canvas.draw()
    plt.close("all")
