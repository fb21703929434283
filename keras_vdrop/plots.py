"""Plots of a variational model. Each function takes and returns a matplotlib `Axes`; matplotlib is imported on use.

Functions of predictions take arrays, or the `Predictions` that `MonteCarlo.predict` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import keras
import numpy as np
from numpy.typing import ArrayLike

from keras_vdrop.functional.tensors import to_numpy
from keras_vdrop.montecarlo import Predictions
from keras_vdrop.posterior import VariationalWeight, require_prunable_weights
from keras_vdrop.pruning import row_name
from keras_vdrop.scores import calibration, checks, detection, regression
from keras_vdrop.selection import ThresholdChoice

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LOG_ALPHA = "log α (log noise-to-signal ratio)"


def _axes(ax: Axes | None) -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1] if ax is None else ax


def _pruned(weight: VariationalWeight, threshold: float | None) -> np.ndarray:
    """Return a flat boolean array, True for each number of a weight that is pruned or would be at the threshold."""
    return ~np.broadcast_to(to_numpy(weight.keep_mask(threshold)), weight.shape).ravel()


def _numbers(weights: Iterable[VariationalWeight], of: Callable[[VariationalWeight], Any]) -> np.ndarray:
    """Return the values of `of(weight)`, a tensor, of all weights in one flat array."""
    return np.concatenate([np.ravel(to_numpy(of(weight))) for weight in weights])


def _statistic(predictions: Mapping[str, Any], name: str, likelihood: str) -> np.ndarray:
    """Return one statistic of `Predictions`, or raise a `ValueError` that names the likelihood it needs."""
    if name not in predictions:
        raise ValueError(
            f"The predictions must contain `{name}`. Use a MonteCarlo with likelihood={likelihood}. "
            f"Received: {sorted(predictions)}"
        )
    return np.asarray(predictions[name])


def _uncertainty(values: Any) -> Any:
    """Return the uncertainty of each row of `Predictions`; return arrays unchanged."""
    return Predictions(values).uncertainty() if isinstance(values, dict) else values


def _class_rows(probability: Any, labels: Any) -> tuple[Any, Any]:
    """Return the class probabilities (N, C) of `Predictions` and the labels (N,): all that are not masked."""
    if not isinstance(probability, dict):
        return probability, labels
    values = _statistic(probability, "probability", '"categorical" or "bernoulli"')
    if values.shape == np.shape(probability["predictive_entropy"]):  # probabilities of class 1 only
        values = np.stack([1.0 - values, values], axis=-1)
    labels = np.asarray(labels)
    given, expected = (
        shape[:-1] if len(shape) > 1 and shape[-1] == 1 else shape for shape in (labels.shape, values.shape[:-1])
    )
    if given != expected:
        raise ValueError(f"Expected labels of the shape {values.shape[:-1]}. Received: shape {labels.shape}")
    kept = np.asarray(probability.get("mask", np.ones(values.shape[:-1])), bool)
    return values[kept].reshape(-1, values.shape[-1]), labels.reshape(values.shape[:-1])[kept].ravel()


def log_alpha_histogram(
    model: keras.Model, threshold: float | None = None, ax: Axes | None = None, bins: int = 60
) -> Axes:
    """Plot a histogram of log alpha = log(variance / loc²) of the weights, and the threshold for pruning.

    Args:
        model: A built model with variational weights. Its biases are left out.
        threshold: Float, in units of log alpha, or None for each layer's own: weights above it are shown as pruned.
        ax: A matplotlib `Axes`, or None for a new one.
        bins: Positive int.

    Returns:
        The `Axes`.

    Raises:
        ValueError: If the model has no weights that can be pruned, or has not been built.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> head = kv.VariationalDense(2, kernel_initializer="ones", name="head")
        >>> model = keras.Sequential([keras.Input((4,)), head])
        >>> ax = kv.plots.log_alpha_histogram(model)
        >>> sorted(ax.get_legend_handles_labels()[1])
        ['kept (8)', 'pruned (0)', 'threshold 3']
    """
    ax = _axes(ax)
    weights = require_prunable_weights(model)
    values = _numbers(weights, lambda weight: weight.log_alpha())
    # The log alpha of a weight that is 0, such as a pruned one, is huge: it is counted, but does not set the axis.
    zero = _numbers(weights, lambda weight: weight.mean()) == 0
    limits = sorted({weight.threshold for weight in weights}) if threshold is None else [threshold]
    shown = np.concatenate([values[~zero], [limits[0] - 1, limits[-1] + 1]])
    width = np.ptp(shown) / bins
    # A threshold is an edge, so that no bin holds both kept and pruned weights.
    first, last = (shown.min() - limits[0]) / width, (shown.max() - limits[0]) / width
    edges = limits[0] + width * np.arange(np.floor(first - 1e-6), np.ceil(last + 1e-6) + 1)
    pruned = np.concatenate([_pruned(weight, threshold) for weight in weights])
    ax.hist(values[~pruned], edges, color=COLORS[0], label=f"kept ({(~pruned).sum():,})")
    ax.hist(values[pruned], edges, color="0.75", label=f"pruned ({pruned.sum():,})")
    ax.set(yscale="log", xlabel=LOG_ALPHA, ylabel="weights", title="Distribution of log α")
    top = ax.get_ylim()[1]
    for limit in limits:
        ax.plot([limit, limit], [0.5, top], color=COLORS[1], linestyle="--", label=f"threshold {limit:g}")
    ax.set_ylim(0.5, 20 * top)  # room for the legend
    ax.legend(loc="upper left")
    return ax


def log_alpha_by_layer(
    model: keras.Model, threshold: float | None = None, ax: Axes | None = None, bins: int = 60
) -> Axes:
    """Plot a histogram of log alpha for each prunable weight tensor, one below the other, and its threshold.

    All histograms have the same height. Grey weights are pruned at the threshold; those that are 0 already are not
    shown.

    Args:
        model: A built model with variational weights. Its biases are left out.
        threshold: Float, in units of log alpha, or None for each layer's own.
        ax: A matplotlib `Axes`, or None for a new one whose height fits the number of weight tensors.
        bins: Positive int.

    Returns:
        The `Axes`.

    Raises:
        ValueError: If the model has no weights that can be pruned, or has not been built.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> head = kv.VariationalDense(2, kernel_initializer="ones", name="head")
        >>> model = keras.Sequential([keras.Input((4,)), head])
        >>> ax = kv.plots.log_alpha_by_layer(model)
        >>> [label.get_text().splitlines() for label in ax.get_yticklabels()]
        [['head', '8 of 8 kept']]
    """
    import matplotlib.pyplot as plt

    weights = require_prunable_weights(model)
    if ax is None:
        ax = plt.subplots(figsize=(6.4, 1.4 + 0.8 * len(weights)), layout="constrained")[1]
    values = [np.ravel(to_numpy(weight.log_alpha())) for weight in weights]
    # The log alpha of a weight that is 0 is huge: the weight is counted, but not plotted.
    alive = [np.ravel(to_numpy(weight.mean())) != 0 for weight in weights]
    limits = [weight.threshold if threshold is None else threshold for weight in weights]
    shown = np.concatenate([value[live] for value, live in zip(values, alive)] + [np.asarray(limits, "float64")])
    edges = np.linspace(shown.min() - 1, shown.max() + 1, bins + 1)
    left_of = []
    for row, (weight, value, live, limit) in enumerate(zip(weights, values, alive, limits)):
        left = ~_pruned(weight, threshold)
        kept, pruned = (np.histogram(value[live & which], edges)[0] for which in (left, ~left))
        left_of.append(f"{left.sum():,} of {left.size:,} kept")
        heights = np.cumsum([np.zeros_like(kept), kept, pruned], axis=0)
        heights = -row + 0.8 * heights / max(heights.max(), 1)
        labels = ("kept", "pruned", "threshold") if row == 0 else (None, None, None)
        ax.stairs(heights[1], edges, baseline=heights[0], fill=True, color=COLORS[0], label=labels[0])
        ax.stairs(heights[2], edges, baseline=heights[1], fill=True, color="0.75", label=labels[1])
        ax.plot([limit, limit], [-row, 0.9 - row], color=COLORS[1], linestyle="--", label=labels[2])
    layers = [row_name(model, weight) for weight in weights]
    names = [f"{layer}/{w.name}" if layers.count(layer) > 1 else layer for layer, w in zip(layers, weights)]
    ax.set_yticks([0.4 - row for row in range(len(weights))], [f"{a}\n{b}" for a, b in zip(names, left_of)])
    ax.tick_params(axis="y", length=0)
    ax.set(xlabel=LOG_ALPHA, title="Distribution of log α by layer", xlim=edges[[0, -1]])
    ax.set_ylim(0.8 - len(weights), 1.6)
    ax.legend(loc="upper left", ncols=3, fontsize="small", handlelength=1.4, columnspacing=1.2)
    return ax


def weight_histogram(
    model: keras.Model, threshold: float | None = None, ax: Axes | None = None, bins: int = 60
) -> Axes:
    """Plot a histogram of the posterior means of all weights, and of those that pruning would keep.

    Args:
        model: A built model with variational weights, before `prune`: weights that are pruned already, and thus 0, are
            left out, and so are biases.
        threshold: Float, in units of log alpha, or None for each layer's own.
        ax: A matplotlib `Axes`, or None for a new one.
        bins: Positive int.

    Returns:
        The `Axes`.

    Raises:
        ValueError: If the model has no weights that can be pruned, or has not been built.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> head = kv.VariationalDense(2, kernel_initializer="ones", name="head")
        >>> model = keras.Sequential([keras.Input((4,)), head])
        >>> ax = kv.plots.weight_histogram(model)
        >>> sorted(ax.get_legend_handles_labels()[1])
        ['after pruning (8)', 'before pruning (8)']
    """
    ax = _axes(ax)
    weights = require_prunable_weights(model)
    values = _numbers(weights, lambda weight: weight.mean())
    alive = _numbers(weights, lambda weight: weight.mask)
    kept = ~np.concatenate([_pruned(weight, threshold) for weight in weights])[alive]
    values = values[alive]
    edges = np.histogram_bin_edges(values, bins)
    ax.hist(values, edges, color="0.75", label=f"before pruning ({values.size:,})")
    ax.hist(values[kept], edges, color=COLORS[0], label=f"after pruning ({kept.sum():,})")
    counts, _ = np.histogram(values, edges)
    ax.set_ylim(0.5, 30 * max(counts.max(), 1))  # room for the legend
    ax.set(
        yscale="log", xlabel="posterior mean of a weight", ylabel="weights", title="Weights before and after pruning"
    )
    ax.legend(loc="upper left")
    return ax


def posterior_intervals(weight: VariationalWeight, num_weights: int = 60, ax: Axes | None = None) -> Axes:
    """Plot posterior mean ± standard deviation of the weights of a tensor, by falling signal-to-noise ratio.

    Args:
        weight: A `VariationalWeight`, such as `layer.kernel`.
        num_weights: Positive int, the number of weights to show, evenly spaced in that order.
        ax: A matplotlib `Axes`, or None for a new one.

    Returns:
        The `Axes`.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> head = kv.VariationalDense(2, kernel_initializer="ones", name="head")
        >>> model = keras.Sequential([keras.Input((4,)), head])
        >>> ax = kv.plots.posterior_intervals(head.kernel)
        >>> ax.get_title(), ax.get_xlabel()
        ('Posterior of head/kernel', '8 of 8 weights, by signal-to-noise ratio')
    """
    ax = _axes(ax)
    mean, mask = (np.ravel(to_numpy(each)) for each in (weight.mean(), weight.mask))
    log_variance = to_numpy(weight.log_variance.value)
    stddev = np.broadcast_to(np.exp(0.5 * log_variance), weight.shape).ravel() * mask
    pruned = _pruned(weight, None)
    ratio = np.abs(mean) / np.maximum(stddev, np.finfo("float32").tiny)
    order = np.lexsort((-ratio, pruned))  # kept weights first
    order = order[np.unique(np.linspace(0, len(order) - 1, num_weights).round().astype(int))]
    rank = np.arange(len(order))
    groups = ((~pruned[order], COLORS[0], "kept"), (pruned[order], "0.6", "pruned"))
    for shown, color, label in groups:
        if shown.any():
            chosen = order[shown]
            ax.errorbar(
                rank[shown], mean[chosen], stddev[chosen], fmt="o", color=color, markersize=3, linewidth=1, label=label
            )
    ax.axhline(0.0, color="0.5", linewidth=1)
    ax.set(
        xlabel=f"{len(order):,} of {len(mean):,} weights, by signal-to-noise ratio",
        ylabel="mean ± standard deviation",
        title=f"Posterior of {weight.owner.name}/{weight.name}",
    )
    low, high = ax.get_ylim()
    ax.set_ylim(top=high + 0.2 * (high - low))  # room for the legend
    ax.legend(loc="upper center", ncols=2)
    return ax


def training_curves(
    history: keras.callbacks.History | Mapping[str, Sequence[float]],
    axes: Sequence[Axes] | np.ndarray | None = None,
) -> list[Axes]:
    """Plot the logs of `fit` over the epochs: the NLL, the KL, β and the share of kept weights, one below the other.

    Args:
        history: What `fit` returned, or its dict `history`. `ELBO` logs `nll`, `val_nll`, `kl` and `beta`, and
            `SparsityLogger` logs `weights_left`; logs that are missing are left out.
        axes: Sequence of one matplotlib `Axes` for each of the panels, or None for a new figure.

    Returns:
        A list of the `Axes`.

    Raises:
        ValueError: If `history` has none of these logs, or `axes` another number than the panels.

    Examples:
        >>> import keras_vdrop as kv
        >>> axes = kv.plots.training_curves({"nll": [2.0, 1.0], "kl": [5.0, 6.0]})  # or what `fit` returned
        >>> [ax.get_ylabel() for ax in axes]
        ['NLL', 'KL (nats)']
    """
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    logs: Any = getattr(history, "history", history)
    panels = [
        (label, [(log, name) for log, name in lines if log in logs])
        for label, lines in (
            ("NLL", [("nll", "training"), ("val_nll", "validation")]),
            ("KL (nats)", [("kl", None)]),
            ("β", [("beta", None)]),
            ("kept weights", [("weights_left", None)]),
        )
    ]
    panels = [(label, lines) for label, lines in panels if lines]
    if not panels:
        raise ValueError(
            "`history` must have logs of `ELBO` or `SparsityLogger`. Pass them as callbacks to `fit`. "
            f"Received: the logs {sorted(logs)}"
        )
    if axes is None:
        size = (6.4, 1.2 + 1.5 * len(panels))
        axes = plt.subplots(len(panels), 1, sharex=True, squeeze=False, figsize=size, layout="constrained")[1][:, 0]
    axes = list(np.asarray(axes, object).ravel())
    if len(axes) != len(panels):
        names = ", ".join(label for label, _ in panels)
        raise ValueError(f"`axes` must be one for each of {names}. Received: {len(axes)} axes")
    for ax, (label, lines) in zip(axes, panels):
        for color, (log, name) in zip(COLORS, lines):
            ax.plot(np.arange(1, len(logs[log]) + 1), logs[log], color=color, label=name)
        ax.set_ylabel(label)
        ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        if label == "kept weights":
            ax.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, symbol=" %"))
            ax.set_ylim(bottom=0.0)
        if len(lines) > 1:
            ax.legend(loc="best")
    axes[0].set_title("Training")
    axes[-1].set_xlabel("epoch")
    return axes


def metric_against_ratio(choice: ThresholdChoice, ax: Axes | None = None) -> Axes:
    """Plot a metric against weights ÷ weights kept, and mark the chosen threshold.

    Args:
        choice: What `select_threshold` returned.
        ax: A matplotlib `Axes`, or None for a new one.

    Returns:
        The `Axes`.

    Examples:
        >>> import keras, keras_vdrop as kv, numpy as np
        >>> model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(1, kl_weight=1 / 8)])
        >>> model.compile("adam", "mse", metrics=["mae"])
        >>> choice = kv.select_threshold(model, np.ones((8, 4)), np.ones((8, 1)), metric="mae")
        >>> ax = kv.plots.metric_against_ratio(choice)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('weights ÷ kept weights', 'mae')
    """
    from matplotlib import ticker

    ax = _axes(ax)
    rows = [row for row in choice.candidates if row.left]
    ax.axhline(choice.reference, color="0.5", linewidth=1, label="unchanged")
    ax.axhline(choice.limit, color="0.5", linestyle=":", label="limit")
    ax.plot([row.ratio for row in rows], [row.value for row in rows], color=COLORS[0], marker="o", markersize=4)
    if choice.chosen is not None and choice.chosen.left:
        label = f"chosen: threshold {choice.threshold:.3g}, {choice.chosen.ratio:.3g}x"
        ax.plot(choice.chosen.ratio, choice.chosen.value, "D", color=COLORS[1], markersize=8, label=label)
    ax.set(xscale="log", xlabel="weights ÷ kept weights", ylabel=choice.metric, title="Cost of pruning")
    ax.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}x"))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    ax.legend(loc="best")
    return ax


def metric_against_weights(
    left: ArrayLike,
    samples: ArrayLike,
    mean: ArrayLike | None = None,
    chosen: int | None = None,
    metric: str = "accuracy",
    ax: Axes | None = None,
) -> Axes:
    """Plot a metric, with its spread over Monte Carlo draws, against the number of weights kept.

    Args:
        left: Array (K,), weights kept at each of K thresholds.
        samples: Array (K, S), the metric of each of S draws.
        mean: Optional array (K,), the metric at the posterior mean.
        chosen: Optional int, the number of weights kept at the chosen threshold.
        metric: Name of the metric, for the axis.
        ax: A matplotlib `Axes`, or None for a new one.

    Returns:
        The `Axes`.

    Examples:
        >>> import keras_vdrop as kv
        >>> ax = kv.plots.metric_against_weights(left=[100, 50, 10], samples=[[0.9, 0.8], [0.9, 0.8], [0.6, 0.5]])
        >>> ax.get_title(), ax.get_ylabel()
        ('Accuracy against size', 'accuracy')
    """
    from matplotlib import ticker

    ax = _axes(ax)
    left, samples = np.asarray(left), np.asarray(samples)
    low, middle, high = np.percentile(samples, [5, 50, 95], axis=1)
    ax.fill_between(left, low, high, color=COLORS[0], alpha=0.25, linewidth=0, label="one draw, 5–95 %")
    ax.plot(left, middle, color=COLORS[0], marker="o", markersize=3, label="one draw, median")
    if mean is not None:
        ax.plot(left, mean, color=COLORS[2], marker="s", markersize=3, label="posterior mean")
    if chosen is not None:
        ax.axvline(chosen, color=COLORS[1], linestyle="--", label=f"chosen: {chosen:,}")
    ax.set(xscale="log", xlabel="kept weights", ylabel=metric, title=f"{metric.capitalize()} against size")
    wide = max(left) > 50 * max(min(left), 1)
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1,) if wide else (1, 2, 5)))
    ax.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    ax.legend(loc="best")
    return ax


def reliability_diagram(
    probability: ArrayLike | Predictions,
    labels: ArrayLike,
    num_bins: int = 15,
    binning: Literal["width", "mass"] = "width",
    ax: Axes | None = None,
) -> Axes:
    """Plot accuracy against confidence for bins of rows. A calibrated model is on the diagonal.

    Error bars extend two standard errors each way: a bin whose bar crosses the diagonal may deviate by chance. With
    bins of equal width, grey bars show the share of the rows in each bin.

    Args:
        probability: Array (B, C), or `Predictions` of classes, one or several in a row.
        labels: Array (B,) of ints in [0, C), or (B, ...) in the shape of the predictions.
        num_bins, binning: As for `scores.calibration.expected_calibration_error`.
        ax: A matplotlib `Axes`, or None for a new one.

    Returns:
        The `Axes`.

    Raises:
        ValueError: As for `scores.calibration.reliability`; for `Predictions` that are not of classes, or labels of
            another shape than theirs.

    Examples:
        >>> import keras_vdrop as kv
        >>> ax = kv.plots.reliability_diagram([[0.75, 0.25]] * 4, [0, 0, 1, 1])
        >>> sorted(ax.get_legend_handles_labels()[1])
        ['calibrated', 'model, ECE 25.0 %', 'share of rows']
    """
    ax = _axes(ax)
    probability, labels = _class_rows(probability, labels)
    bins = calibration.reliability(probability, labels, num_bins, binning)
    error = calibration.expected_calibration_error(probability, labels, num_bins, binning)
    share = bins.count / bins.count.sum()
    # The standard error follows from the confidence: from the accuracy, it is 0 in a bin without a wrong answer.
    spread = 2 * np.sqrt(bins.confidence * (1 - bins.confidence) / bins.count)
    if binning == "width":
        centre = (np.ceil(bins.confidence * num_bins - calibration.EDGE) - 0.5) / num_bins
        ax.bar(centre, share, 0.96 / num_bins, color="0.85", label="share of rows")
    ax.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="calibrated")
    label = f"model, ECE {100 * error:.1f} %"
    low, high = np.minimum(spread, bins.accuracy), np.minimum(spread, 1 - bins.accuracy)
    ax.errorbar(
        bins.confidence, bins.accuracy, [low, high], color=COLORS[0], marker="o", markersize=5, capsize=2, label=label
    )
    ax.set(xlim=(0, 1), ylim=(0, 1.25), xlabel="confidence", ylabel="accuracy", title="Reliability diagram")
    ax.set_yticks(np.linspace(0, 1, 6))  # above is room for the legend
    ax.legend(loc="upper center", ncols=2)
    return ax


def entropy_histogram(
    inside: ArrayLike | Predictions,
    outside: ArrayLike | Predictions,
    name: str | None = None,
    ax: Axes | None = None,
    bins: int = 40,
) -> Axes:
    """Plot histograms of an uncertainty on data like the training data and on other data, with the AUROC between them.

    Args:
        inside: Array (N,), `predictive_entropy` or another score that is high if the model is uncertain; or
            `Predictions`, whose `uncertainty()` is used. In distribution.
        outside: Array (M,), or `Predictions`. Out of distribution.
        name: Name of the score, with its unit, for the axis; None for the predictive entropy in nats, or the predictive
            variance if `inside` are `Predictions` of numbers.
        ax: A matplotlib `Axes`, or None for a new one.
        bins: Positive int.

    Returns:
        The `Axes`.

    Raises:
        ValueError: For NaN or infinity, no rows, or another number of axes.

    Examples:
        >>> import keras_vdrop as kv
        >>> ax = kv.plots.entropy_histogram(inside=[0.1, 0.2], outside=[0.8, 0.9])
        >>> ax.get_title()
        'In and out of distribution: AUROC 1.000'
    """
    from matplotlib import ticker

    ax = _axes(ax)
    if name is None:
        of_numbers = isinstance(inside, dict) and "predictive_entropy" not in inside
        name = "predictive variance" if of_numbers else "predictive entropy (nats)"
    inside, outside = _uncertainty(inside), _uncertainty(outside)
    area = detection.auroc(inside, outside)
    inside, outside = checks.numbers("inside", inside), checks.numbers("outside", outside)
    edges = np.histogram_bin_edges(np.concatenate([inside, outside]), bins)
    sets = ((inside, "in distribution", COLORS[0]), (outside, "out of distribution", COLORS[1]))
    for values, label, color in sets:
        heights = np.histogram(values, edges)[0] / len(values)
        ax.stairs(heights, edges, fill=True, color=color, alpha=0.35)
        ax.stairs(heights, edges, color=color, linewidth=1.5, label=f"{label} ({len(values):,})")
    ax.set(xlabel=name, ylabel="share of rows", title=f"In and out of distribution: AUROC {area:.3f}")
    ax.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, symbol=" %"))
    ax.legend(loc="best")
    return ax


def uncertainty_map(
    uncertainty: ArrayLike | Predictions,
    image: ArrayLike | None = None,
    name: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the uncertainty of each pixel of an image, over the image in grey if it is given.

    Args:
        uncertainty: Array (H, W) or (1, H, W, ...), such as the `predictive_entropy` of one image; or `Predictions` of
            one image, whose predictive entropy or variance is used. Axes after the third are summed over.
        image: Optional array (H, W), (H, W, 1) or (H, W, 3) with values in [0, 1].
        name: Name of the uncertainty, with its unit, for the colour bar; None for the predictive entropy in nats, or
            the predictive variance of numbers.
        ax: A matplotlib `Axes`, or None for a new one.

    Returns:
        The `Axes`.

    Raises:
        ValueError: For an array of another shape, or `Predictions` of several images.

    Examples:
        >>> import keras_vdrop as kv
        >>> ax = kv.plots.uncertainty_map([[0.1, 0.2], [0.3, 0.4]])  # an image of 2 by 2 pixels
        >>> ax.get_title()
        'Uncertainty of each pixel'
    """
    ax = _axes(ax)
    of_classes = not isinstance(uncertainty, dict) or "predictive_entropy" in uncertainty
    values = np.asarray(uncertainty if not isinstance(uncertainty, dict) else _of_places(uncertainty))
    if values.ndim > 2:
        if len(values) != 1:
            raise ValueError(
                "A map needs the uncertainty of one image, (H, W) or (1, H, W). Select one, such as "
                f"`uncertainty[0]`. Received: shape {values.shape}"
            )
        values = values[0].reshape(*values.shape[1:3], -1).sum(-1) if values.ndim > 3 else values[0]
    if values.ndim != 2:
        raise ValueError(f"A map needs an uncertainty of shape (H, W) or (1, H, W). Received: shape {values.shape}")
    if image is not None:
        image = np.squeeze(np.asarray(image, "float32"))
        if image.shape[:2] != values.shape or image.ndim not in (2, 3):
            raise ValueError(f"`image` must have the size {values.shape}. Received: shape {image.shape}")
        ax.imshow(image if image.ndim == 2 else image.mean(-1), cmap="gray", vmin=0.0, vmax=1.0)
    highest = max(float(np.max(values)), np.finfo("float32").tiny)
    # A certain pixel shows the image, an uncertain one the colour of its uncertainty.
    alpha = None if image is None else np.clip(values / highest, 0.0, 1.0)
    shown = ax.imshow(values, cmap="magma", vmin=0.0, vmax=highest, alpha=alpha)
    label = name or ("predictive entropy (nats)" if of_classes else "predictive variance")
    ax.figure.colorbar(shown, ax=ax, label=label, shrink=0.8)
    ax.set(xticks=[], yticks=[], title="Uncertainty of each pixel")
    return ax


def _of_places(predictions: Mapping[str, Any]) -> Any:
    """Return the uncertainty (B, H, W, ...) of `Predictions` at each place, not summed over a row."""
    if "predictive_entropy" in predictions:
        return predictions["predictive_entropy"]
    return Predictions(predictions).stddev() ** 2


def risk_coverage(
    uncertainty: ArrayLike | Predictions,
    loss: ArrayLike,
    label: str = "model",
    name: str = "error",
    ax: Axes | None = None,
) -> Axes:
    """Plot the mean loss of the least uncertain rows against their share of all rows, also for the best order.

    A further call with the same `Axes` adds another curve.

    Args:
        uncertainty: Array (B,), or `Predictions`, whose `uncertainty()` is used.
        loss: Array (B,), such as 1 for a wrong answer and 0 for a right one.
        label: Name of the curve, for the legend.
        name: Name of the loss, for the axis.
        ax: A matplotlib `Axes`, or None for a new one.

    Returns:
        The `Axes`.

    Raises:
        ValueError: As for `scores.detection.risk_coverage`.

    Examples:
        >>> import keras_vdrop as kv
        >>> ax = kv.plots.risk_coverage(uncertainty=[0.9, 0.1], loss=[1, 0])
        >>> sorted(ax.get_legend_handles_labels()[1])
        ['model, AURC 0.25', 'model, best order']
    """
    from matplotlib import ticker

    ax = _axes(ax)
    uncertainty, loss = _uncertainty(uncertainty), checks.numbers("loss", loss)
    color = COLORS[len([line for line in ax.lines if line.get_linestyle() == "-"]) % len(COLORS)]
    coverage, risk = detection.risk_coverage(uncertainty, loss)
    area = f"AURC {detection.aurc(uncertainty, loss):.3g}"
    ax.plot(coverage, risk, color=color, label=f"{label}, {area}")
    ax.plot(*detection.risk_coverage(loss, loss), color=color, linestyle=":", label=f"{label}, best order")
    ax.set(xlim=(0, 1), xlabel="coverage (rows answered, least uncertain first)", ylabel=f"risk ({name} of these rows)")
    ax.set_title("Risk against coverage")
    ax.xaxis.set_major_formatter(ticker.PercentFormatter(1.0, symbol=" %"))
    if loss.min() >= 0 and loss.max() <= 1:
        ax.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, symbol=" %"))
    # At the left, means of a few rows vary widely: they do not set the scale.
    highest = max(np.asarray(line.get_ydata())[np.asarray(line.get_xdata()) >= 0.02].max() for line in ax.lines)
    ax.set_ylim(min(0.0, loss.min()), 1.3 * highest if highest > 0 else 1.0)
    ax.legend(loc="best")
    return ax


def _band_of(x: ArrayLike, predictions: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """Return x, and the mean and both variances of `Predictions` of one number in each row, each (B,)."""
    mean = _statistic(predictions, "mean", '"normal" or None')
    if "variance" in predictions:
        variances = np.zeros_like(mean), np.asarray(predictions["variance"])
    else:
        variances = (np.asarray(predictions[f"{kind}_variance"]) for kind in ("aleatoric", "epistemic"))
    if mean.size != len(mean):
        raise ValueError(
            "A band needs one number per row. Select one output, such as `predictions.mean[:, 0]`, and pass its "
            f"variances too. Received: a `mean` of shape {mean.shape}"
        )
    return (np.ravel(each) for each in (x, mean, *variances))


def regression_band(
    x: ArrayLike,
    mean: ArrayLike | Predictions,
    aleatoric_variance: ArrayLike | None = None,
    epistemic_variance: ArrayLike | None = None,
    observed: Sequence[ArrayLike] | None = None,
    level: float = 0.9,
    ax: Axes | None = None,
) -> Axes:
    """Plot a predicted mean over one input, with a band of the epistemic uncertainty, and one with the aleatoric added.

    Args:
        x: Array (B,) or (B, 1), in any order.
        mean, aleatoric_variance, epistemic_variance: Arrays (B,), as `MonteCarlo(likelihood="normal")` gives them; or
            `Predictions` of one number in each row as `mean`, in place of all three. Those of a `MonteCarlo` without a
            likelihood have only the band of the model.
        observed: Optional pair of arrays, the x and y of observations.
        level: Float in (0, 1), the probability that each band holds, for a normal distribution.
        ax: A matplotlib `Axes`, or None for a new one.

    Returns:
        The `Axes`.

    Raises:
        ValueError: For NaN or infinity, no rows, or shapes that differ; for a level outside (0, 1); or for
            `Predictions` of classes, or of several numbers in a row.

    Examples:
        >>> import keras_vdrop as kv
        >>> ax = kv.plots.regression_band([0.0, 1.0], [2.0, 3.0], [0.1, 0.1], [0.2, 0.3])
        >>> sorted(ax.get_legend_handles_labels()[1])
        ['90 % epistemic', '90 % epistemic and aleatoric', 'mean']
    """
    ax = _axes(ax)
    if isinstance(mean, dict):
        x, mean, aleatoric_variance, epistemic_variance = _band_of(x, mean)
    columns = checks.alike(
        x=np.ravel(x), mean=mean, aleatoric_variance=aleatoric_variance, epistemic_variance=epistemic_variance
    )
    order = np.argsort(columns[0])
    x, mean, aleatoric, epistemic = (column[order] for column in columns)
    model, both = (np.sqrt(np.maximum(v, 1e-300)) for v in (epistemic, epistemic + aleatoric))
    percent = f"{100 * level:g} %"
    if aleatoric.any():
        lower, upper = regression.normal_interval(mean, both, level)
        ax.fill_between(
            x, lower, upper, color=COLORS[5], alpha=0.35, linewidth=0, label=f"{percent} epistemic and aleatoric"
        )
    lower, upper = regression.normal_interval(mean, model, level)
    ax.fill_between(x, lower, upper, color=COLORS[0], alpha=0.45, linewidth=0, label=f"{percent} epistemic")
    ax.plot(x, mean, color=COLORS[0], label="mean")
    if observed is not None:
        ax.plot(*observed, ".", color="0.15", markersize=4, label="observed")
    ax.set(xlabel="x", ylabel="y", title="Epistemic and aleatoric uncertainty")
    ax.margins(x=0)
    low, high = ax.get_ylim()
    ax.set_ylim(top=high + 0.3 * (high - low))  # room for the legend
    ax.legend(loc="upper center", ncols=2)
    return ax
