"""Choice of the threshold for pruning, by what it costs in a metric on validation data."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import keras
import numpy as np

from keras_vdrop.checks import check_finite, check_non_negative
from keras_vdrop.functional.tensors import to_numpy
from keras_vdrop.posterior import VariationalWeight, require_prunable_weights
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
    "likelihood",
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
_MORE = (
    "acc",
    "auc",
    "precision",
    "recall",
    "f1",
    "fbeta",
    "r2",
    "iou",
    "true_",
    "similarity",
    "sensitivity",
    "specificity",
)


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
        mode: "max" if higher is better, "min" if lower is better, or "auto" to tell by the metric or its name.
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

    Examples:
        >>> import keras, keras_vdrop as kv, numpy as np
        >>> model = keras.Sequential([keras.Input((2,)), kv.VariationalDense(1, kernel_initializer="ones")])
        >>> _ = model.layers[0].kernel.log_variance.assign([[-6.0], [1.0]])  # the log alphas, as the means are 1
        >>> model.compile(loss="mse", metrics=["mae"])
        >>> x, y = np.array([[1.0, 0.0], [1.0, 0.1]]), np.array([[1.0], [1.1]])
        >>> choice = kv.select_threshold(model, x, y, tolerance=0.1, metric="mae", thresholds=[0.0, 3.0])
        >>> choice.threshold, choice.chosen.ratio
        (0.0, 2.0)
    """
    check_non_negative("tolerance", tolerance)
    if mode not in ("auto", "max", "min"):
        raise ValueError(f'`mode` must be "auto", "max" or "min". Received: mode={mode!r}')
    weights = require_prunable_weights(model)
    thresholds = _default_thresholds(weights) if thresholds is None else _checked(thresholds)
    if isinstance(x, Iterator):
        raise ValueError(
            "`x` is evaluated once for every threshold, and a generator can be read only once. Pass arrays, a "
            f"`tf.data.Dataset` or a `keras.utils.PyDataset`. Received: x={x!r}"
        )

    evaluate = functools.partial(_evaluate, model, x, y, metric, batch_size, prepare)
    variables = [*(weight.loc for weight in weights), *(weight.mask for weight in weights)]
    if prepare is not None:
        variables += model.non_trainable_variables
    states = [(variable, to_numpy(variable)) for variable in variables]
    candidates = []
    try:
        reference = evaluate()
        mode = _better(model, metric) if mode == "auto" else mode  # metrics exist only after a first evaluation
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


def _checked(thresholds: Iterable[float]) -> list[float]:
    thresholds = [*thresholds]
    if not thresholds:
        raise ValueError("`thresholds` must have at least one candidate. Received: thresholds=[]")
    for threshold in thresholds:
        check_finite("thresholds", threshold)
    return thresholds


def _evaluate(
    model: keras.Model,
    x: Any,
    y: Any,
    metric: str,
    batch_size: int | None,
    prepare: Callable[[keras.Model], Any] | None,
) -> float:
    """Return the value of the metric for the model as it is."""
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


def _better(model: keras.Model, metric: str) -> Literal["min", "max"]:
    """Return "max" if higher values of a metric are better, else "min": as the metric says, or by its name."""
    for each in model.metrics:
        for one in (each, *getattr(each, "metrics", ())):
            direction = getattr(one, "_direction", None)
            if direction is not None and (metric == one.name or metric.endswith(f"_{one.name}")):
                return "max" if direction == "up" else "min"
    less, more = (any(part in metric.lower() for part in parts) for parts in (_LESS, _MORE))
    if less == more:
        raise ValueError(
            f"The name {metric!r} does not tell whether higher values are better. "
            'Pass mode="max" if they are, or mode="min" if not.'
        )
    return "min" if less else "max"


def _default_thresholds(weights: Sequence[VariationalWeight], count: int = 20, factor: float = 0.8) -> list[float]:
    """Return the highest threshold of the weights, and lower ones that each keep `factor` times as many weights."""
    highest = max(weight.threshold for weight in weights)
    pairs = ([to_numpy(each) for each in (one.log_alpha(), one.mask)] for one in weights)
    log_alpha = np.concatenate([values[mask] for values, mask in pairs])
    left = np.sort(log_alpha[log_alpha <= highest])
    if not len(left):
        return [highest]
    indices = np.ceil(len(left) * factor ** np.arange(1, count + 1)).astype(int) - 1
    return sorted({highest, *left[indices].tolist()})


def _restore(states: Iterable[tuple[Any, Any]]) -> None:
    for variable, value in states:
        variable.assign(value)
