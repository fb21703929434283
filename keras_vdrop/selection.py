"""Choice of the threshold for pruning, by what it costs in a metric on validation data."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_vdrop.checks import check_finite, check_non_negative
from keras_vdrop.posterior import some_prunable_weights
from keras_vdrop.pruning import sparsity


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A row of the table: the model pruned at one threshold.

    Attributes:
        threshold: The threshold on log alpha.
        left: The number of kept weights, without biases.
        ratio: weights / kept weights; infinite if none is kept.
        value: The value of the metric.
        within: Whether the value is within the tolerance.
    """

    threshold: float
    left: int
    ratio: float
    value: float
    within: bool


@dataclasses.dataclass(frozen=True)
class ThresholdChoice:
    """The result of `select_threshold`; prints as a table, and `plots.metric_against_ratio` plots it.

    Attributes:
        metric: The name of the metric.
        reference: The value of the metric for the model before this pruning.
        limit: The worst value within the tolerance.
        candidates: Tuple of `Candidate`, from the highest threshold to the lowest.
        chosen: The `Candidate` with the highest ratio within the tolerance, or None.
    """

    metric: str
    reference: float
    limit: float
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None

    @property
    def threshold(self) -> float:
        """The chosen threshold, for `prune` and `compact`.

        Raises:
            ValueError: If no candidate is within the tolerance.
        """
        if self.chosen is None:
            raise ValueError(
                f"No candidate is within the tolerance: the limit of {self.metric} is {self.limit:.4g}. Pass a larger "
                "`tolerance`, or higher `thresholds`."
            )
        return self.chosen.threshold

    def __str__(self) -> str:
        lines = [f"{'threshold':>9}  {'kept':>11}  {'ratio':>9}  {self.metric:>12}"]
        lines += ["-" * len(lines[0])]
        for row in self.candidates:
            note = "  chosen" if row is self.chosen else "" if row.within else "  out of tolerance"
            lines.append(f"{row.threshold:>9.2f}  {row.left:>11,}  {row.ratio:>8.1f}x  {row.value:>12.4f}{note}")
        return "\n".join([*lines, lines[1], f"{'unchanged':>9}  {'':>11}  {'':>9}  {self.reference:>12.4f}"])


# Parts of the names of metrics: those of which lower values are better, and those of which higher values are better.
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
    model: keras.Model,
    x: Any,
    y: Any = None,
    tolerance: float = 0.01,
    metric: str = "accuracy",
    mode: Literal["auto", "min", "max"] = "auto",
    thresholds: Sequence[float] | None = None,
    batch_size: int | None = None,
    prepare: Callable[[keras.Model], Any] | None = None,
) -> ThresholdChoice:
    """Find the threshold that prunes the most weights while a metric gets worse by at most a tolerance.

    The function prunes the model at each threshold, evaluates it and restores it: the model does not change.

    Args:
        model: A compiled model with at least one variational kernel.
        x, y: Validation data, as for `model.evaluate`. Use neither training data nor the test data that judge the model
            in the end.
        tolerance: Float ≥ 0, in units of the metric: 0.01 is one percentage point of accuracy.
        metric: Name of a metric that `model.evaluate` returns. Not "loss", which includes the KL.
        mode: "max" if higher is better, "min" if lower is better, or "auto" to tell by the metric's name.
        thresholds: The candidates, floats in units of log alpha. None for the highest threshold of the layers (3 by
            default for single weights) and up to 20 below it, each of which keeps four fifths of the weights that the
            one above keeps.
        batch_size: As for `model.evaluate`, whose default is 32 rows. With 1,000, a small network is several times as
            fast.
        prepare: None, or a function of the model that is called before every evaluation. With BatchNormalization, use
            `lambda model: update_batch_normalization(model, x_train)`.

    Returns:
        `ThresholdChoice`, with `.threshold`, `.chosen` and `.candidates`.

    Raises:
        ValueError: For a tolerance or a threshold out of range; for an unknown metric, or one whose better direction is
            unknown; for a generator; or for a model without prunable weights.
    """
    check_non_negative("tolerance", tolerance)
    if mode not in ("auto", "max", "min"):
        raise ValueError(f'`mode` must be "auto", "max" or "min". Received: mode={mode!r}')
    weights = some_prunable_weights(model)
    thresholds = _candidates(weights) if thresholds is None else [*thresholds]
    if not thresholds:
        raise ValueError("`thresholds` must have at least one candidate. Received: thresholds=[]")
    for threshold in thresholds:
        check_finite("thresholds", threshold)
    if mode == "auto":
        less, more = (any(part in metric.lower() for part in parts) for parts in (_LESS, _MORE))
        if less == more:
            raise ValueError(
                f"The name {metric!r} does not tell whether higher values are better. "
                'Pass mode="max" if they are, or mode="min" if not.'
            )
        mode = "min" if less else "max"

    if isinstance(x, Iterator):
        raise ValueError(
            "`x` is evaluated once for every threshold, and a generator can be read only once. Pass arrays, a "
            f"`tf.data.Dataset` or a `keras.utils.PyDataset`. Received: x={x!r}"
        )

    def evaluate():
        if prepare is not None:
            prepare(model)
        values = model.evaluate(x, y, batch_size=batch_size, verbose=0, return_dict=True)
        if metric == "loss" or metric not in values:
            known = sorted(set(values) - {"loss"})
            raise ValueError(
                f"`metric` must be one of {known}, the metrics of the model. The loss includes the KL and is excluded. "
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
    """Return the highest threshold of the weights, and lower ones that each keep `factor` times as many weights."""
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
