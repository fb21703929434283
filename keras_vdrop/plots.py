"""Pictures of a variational model. Each takes and returns a matplotlib `Axes`; matplotlib is imported on use."""

import numpy as np
from keras import ops

from keras_vdrop.posterior import prunable_weights

# Okabe and Ito's palette, which the colour-blind tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def _axes(ax):
    import matplotlib.pyplot as plt

    return plt.subplots()[1] if ax is None else ax


def log_alpha_histogram(model, threshold=3.0, ax=None, bins=60):
    """Histogram of log alpha = log(variance / loc²) over the weights, and the threshold above which they go.

    Args:
        model: A built model with variational weights. Its biases are left out.
        threshold: Float, in units of log alpha.
        ax: A matplotlib `Axes`, or None for a new one.
        bins: Positive int.

    Returns:
        The `Axes`.
    """
    ax = _axes(ax)
    weights = prunable_weights(model)
    values = np.concatenate([np.ravel(ops.convert_to_numpy(weight.log_alpha())) for weight in weights])
    # A weight that is 0, as after pruning, has no finite log alpha: counted, but out of the picture.
    zero = np.concatenate([np.ravel(ops.convert_to_numpy(weight.mean())) for weight in weights]) == 0
    low, high = (values[~zero].min(), values[~zero].max()) if not zero.all() else (threshold, threshold)
    edges = np.linspace(min(low, threshold - 1), max(high, threshold + 1), bins + 1)
    pruned = values > threshold
    ax.hist(values[~pruned], edges, color=COLORS[0], label=f"kept ({(~pruned).sum():,})")
    ax.hist(values[pruned], edges, color="0.75", label=f"pruned ({pruned.sum():,})")
    ax.axvline(threshold, color=COLORS[1], linestyle="--", label=f"threshold {threshold:g}")
    ax.set(yscale="log", xlabel="log α (noise over signal)", ylabel="weights", title="How noisy each weight is")
    ax.set_ylim(top=20 * ax.get_ylim()[1])  # room for the legend
    ax.legend(loc="upper left")
    return ax


def metric_against_ratio(choice, ax=None):
    """What pruning costs: a metric against weights ÷ weights left, and what was chosen of it.

    Args:
        choice: What `select_threshold` returned.
        ax: A matplotlib `Axes`, or None for a new one.

    Returns:
        The `Axes`.
    """
    from matplotlib import ticker

    ax = _axes(ax)
    rows = [row for row in choice.candidates if row.left]
    ax.axhline(choice.reference, color="0.5", linewidth=1, label="as it is")
    ax.axhline(choice.limit, color="0.5", linestyle=":", label="limit")
    ax.plot([row.ratio for row in rows], [row.value for row in rows], color=COLORS[0], marker="o", markersize=4)
    if choice.chosen is not None and choice.chosen.left:
        label = f"chosen: threshold {choice.threshold:.3g}, {choice.chosen.ratio:.3g}x"
        ax.plot(choice.chosen.ratio, choice.chosen.value, "D", color=COLORS[1], markersize=8, label=label)
    ax.set(xscale="log", xlabel="weights ÷ weights left", ylabel=choice.metric, title="What pruning costs")
    ax.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}x"))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    ax.legend(loc="best")
    return ax


def metric_against_weights(left, samples, mean=None, chosen=None, metric="accuracy", ax=None):
    """A metric, with its spread over Monte-Carlo draws, against the number of weights that are left.

    Args:
        left: Array (K,), weights left at each of K thresholds.
        samples: Array (K, S), the metric of every draw.
        mean: Optional array (K,), the metric of the posterior mean.
        chosen: Optional int, the number of weights left at the chosen threshold.
        metric: Its name, for the axis.
        ax: A matplotlib `Axes`, or None for a new one.

    Returns:
        The `Axes`.
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
    ax.set(xscale="log", xlabel="weights left", ylabel=metric, title=f"{metric.capitalize()} against size")
    wide = max(left) > 50 * max(min(left), 1)
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1,) if wide else (1, 2, 5)))
    ax.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    ax.legend(loc="lower right")
    return ax
