"""Which threshold to prune at: what it costs in a metric on validation data."""

import dataclasses

import numpy as np
from keras import ops

from keras_vdrop.layers.base import check_finite, check_non_negative
from keras_vdrop.posterior import prunable_weights
from keras_vdrop.pruning import sparsity


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A row of the table: a model pruned at one threshold.

    Attributes:
        threshold: On log alpha.
        left: How many weights are left, biases not counted.
        ratio: weights ÷ left; infinite where none is left.
        value: The metric.
        within: Whether that is within the tolerance.
    """

    threshold: float
    left: int
    ratio: float
    value: float
    within: bool


@dataclasses.dataclass(frozen=True)
class ThresholdChoice:
    """What `select_threshold` found; prints as a table, and `plots.metric_against_ratio` draws it.

    Attributes:
        metric: Name of the metric.
        reference: Its value for the model as it is.
        limit: The worst value within the tolerance.
        candidates: Tuple of `Candidate`, by falling threshold.
        chosen: The `Candidate` of the highest ratio within the tolerance, or None.
    """

    metric: str
    reference: float
    limit: float
    candidates: tuple
    chosen: Candidate | None

    @property
    def threshold(self):
        """The chosen threshold, for `prune` and `compact`.

        Raises:
            ValueError: Where no candidate is within the tolerance.
        """
        if self.chosen is None:
            raise ValueError(
                f"No candidate is within the tolerance: {self.metric} may go to {self.limit:.4g}. Allow more, or name "
                "higher thresholds."
            )
        return self.chosen.threshold

    def __str__(self):
        lines = [f"{'threshold':>9}  {'left':>11}  {'ratio':>9}  {self.metric:>12}"]
        lines += ["-" * len(lines[0])]
        for row in self.candidates:
            note = "  chosen" if row is self.chosen else "" if row.within else "  out of tolerance"
            lines.append(f"{row.threshold:>9.2f}  {row.left:>11,}  {row.ratio:>8.1f}x  {row.value:>12.4f}{note}")
        return "\n".join([*lines, lines[1], f"{'as it is':>9}  {'':>11}  {'':>9}  {self.reference:>12.4f}"])


# Parts of the names of Keras's metrics, of which less is better, and more.
_LESS = (
    "loss",
    "error",
    "nll",
    "entropy",
    "divergence",
    "mse",
    "mae",
    "mape",
    "msle",
    "bce",
    "hinge",
    "logcosh",
    "false_",
    "ece",
    "brier",
    "crps",
)
_MORE = ("acc", "auc", "precision", "recall", "f1", "score", "iou", "true_", "similarity", "sensitivity", "specificity")


def select_threshold(
    model, x, y=None, tolerance=0.01, metric="accuracy", mode="auto", thresholds=None, batch_size=None, prepare=None
):
    """Find the threshold of the highest ratio at which a metric is no worse than the model's by more than a tolerance.

    The model is pruned at each threshold, evaluated, and put back: it ends as it was.

    Args:
        model: A compiled model with at least one variational kernel.
        x, y: Validation data, as for `model.evaluate`: none that it was trained on, and none that is to judge it.
        tolerance: Float ≥ 0, in units of the metric: 0.01 of an accuracy is one point.
        metric: Its name among what `model.evaluate` returns. Not "loss", which has the KL in it.
        mode: "max" where more is better, "min" where less is, or "auto", which goes by the metric's name.
        thresholds: The candidates, floats in units of log alpha; None for the highest of the layers' own, 3 for single
            weights, and the 20 below it, each of which leaves four fifths of the weights that the one before leaves.
        batch_size: As for `model.evaluate`, which takes 32 rows at once: a small network is several times as fast with
            1,000.
        prepare: None, or a function of the model that is called before every evaluation. With BatchNormalization,
            `lambda model: update_batch_normalization(model, x_train)`.

    Returns:
        `ThresholdChoice`, with `.threshold`, `.chosen` and `.candidates`.

    Raises:
        ValueError: For a tolerance or thresholds out of range, a metric that is unknown or of which it is unknown
            whether more is better, or a model without a weight that could be pruned.
    """
    check_non_negative("tolerance", tolerance)
    if mode not in ("auto", "max", "min"):
        raise ValueError(f'`mode` must be "auto", "max" or "min". Received: mode={mode!r}')
    weights = prunable_weights(model)
    if not weights:
        raise ValueError(f"There is nothing in {model.name!r} that could be pruned.")
    thresholds = _candidates(weights) if thresholds is None else [*thresholds]
    if not thresholds:
        raise ValueError("`thresholds` must have at least one candidate. Received: thresholds=[]")
    for threshold in thresholds:
        check_finite("thresholds", threshold)
    if mode == "auto":
        less, more = (any(part in metric.lower() for part in parts) for parts in (_LESS, _MORE))
        if less == more:
            raise ValueError(f'Is more of {metric!r} better? Pass mode="max", or mode="min".')
        mode = "min" if less else "max"

    def evaluate():
        if prepare is not None:
            prepare(model)
        values = model.evaluate(x, y, batch_size=batch_size, verbose=0, return_dict=True)
        if metric == "loss" or metric not in values:
            known = sorted(set(values) - {"loss"})
            raise ValueError(
                f"`metric` must be one of {known}, which the model was compiled with; its loss has the KL in it. "
                f"Received: metric={metric!r}"
            )
        return float(values[metric])

    variables = [*(weight.loc for weight in weights), *(weight.mask for weight in weights)]
    if prepare is not None:
        variables += model.non_trainable_variables
    states = [(variable, ops.convert_to_numpy(variable)) for variable in variables]
    candidates = []
    try:
        reference = evaluate()
        limit = reference - tolerance if mode == "max" else reference + tolerance
        for threshold in sorted(thresholds, reverse=True):
            _restore(states)
            for weight in weights:
                weight.prune(threshold)
            value, report = evaluate(), sparsity(model, threshold)
            within = value >= limit if mode == "max" else value <= limit
            candidates.append(Candidate(float(threshold), report.left, report.ratio, value, within))
    finally:
        _restore(states)
    chosen = max((row for row in candidates if row.within), key=lambda row: row.ratio, default=None)
    return ThresholdChoice(metric, reference, limit, tuple(candidates), chosen)


def _candidates(weights, count=20, factor=0.8):
    """Thresholds that leave fewer weights in equal ratios, below the highest of the weights' own."""
    highest = max(weight.threshold for weight in weights)
    log_alpha = np.concatenate(
        [ops.convert_to_numpy(weight.log_alpha())[ops.convert_to_numpy(weight.mask)] for weight in weights]
    )
    left = np.sort(log_alpha[log_alpha <= highest])
    if not len(left):
        return [highest]
    places = np.ceil(len(left) * factor ** np.arange(1, count + 1)).astype(int) - 1
    return sorted({highest, *left[places].tolist()})


def _restore(states):
    for variable, value in states:
        variable.assign(value)
