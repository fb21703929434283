"""Metrics of calibration and error for `compile(metrics=[...])`, computed over all batches of an epoch.

Each metric equals the function of `functional` that it names, applied to all rows that it has seen. Metrics that Keras
has are not here: the NLL of classes (`SparseCategoricalCrossentropy`), accuracy, `AUC`. If the outputs are the
parameters of a distribution, as the losses of `losses` take them, Keras's regression metrics compare y with all
parameters; the metrics here compare y with the mean of the distribution.
"""

import math
import statistics
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_vdrop.checks import check_fraction, check_positive_int
from keras_vdrop.functional import likelihoods
from keras_vdrop.losses import NegativeLogLikelihood as Likelihood
from keras_vdrop.losses import NormalNLL
from keras_vdrop.scores.calibration import EDGE
from keras_vdrop.targets import aligned, mask_of, outside, targets, weights_of

if TYPE_CHECKING:
    from typing_extensions import Self


@keras.saving.register_keras_serializable(package="keras_vdrop")
class ExpectedCalibrationError(keras.metrics.Metric):
    """`scores.calibration.expected_calibration_error`, with bins of equal width.

    Args:
        num_bins: Positive int.
        from_logits: Whether the model returns logits. If not, the result is NaN if a value outside [0, 1] counts.
        name: The name in the logs.
        dtype: The dtype of the sums.
        ignore_class: Int, a label that does not count, such as 255 for pixels without a label; or None.

    Call arguments:
        y_true: Class numbers (B, ...) or (B, ..., 1), in [0, C). The result is NaN if another number counts.
        y_pred: Probabilities or logits (B, ..., C); with C = 1, those of class 1.
        sample_weight: Optional, one for each class number or each row: how many rows it counts as.

    Raises:
        ValueError: If `num_bins` is not a positive int, or the shape of y does not match that of the outputs.

    Examples:
        >>> import keras_vdrop as kv
        >>> metric = kv.metrics.ExpectedCalibrationError()
        >>> metric.update_state([0, 0, 1, 1], [[0.75, 0.25]] * 4)
        >>> float(metric.result())
        0.25

    Reference:
        On Calibration of Modern Neural Networks, Guo et al., 2017, https://arxiv.org/abs/1706.04599
    """

    def __init__(
        self,
        num_bins: int = 15,
        from_logits: bool = False,
        name: str = "ece",
        dtype: str | keras.DTypePolicy | None = None,
        ignore_class: int | None = None,
    ):
        check_positive_int("num_bins", num_bins)
        super().__init__(name=name, dtype=dtype)
        self.ignore_class = ignore_class
        self.num_bins = num_bins
        self.from_logits = from_logits
        self._direction = "down"
        self.gaps = self.add_variable((num_bins,), initializer="zeros", name="gaps")
        self.rows = self.add_variable((), initializer="zeros", name="rows")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        labels, probability = _classification(y_true, y_pred, self.from_logits, self.dtype)
        weight = _weight(labels, y_pred, sample_weight, self.dtype)
        weight = _weight_of_labels(labels, probability, weight, self.ignore_class)
        confidence = ops.max(probability, axis=-1)
        correct = ops.cast(ops.equal(ops.cast(ops.argmax(probability, axis=-1), labels.dtype), labels), self.dtype)
        bins = ops.cast(ops.ceil(confidence * self.num_bins - EDGE), "int32") - 1
        bins = ops.clip(bins, 0, self.num_bins - 1)
        gaps = ops.reshape(weight * (correct - confidence), (-1,))
        self.gaps.assign_add(ops.segment_sum(gaps, ops.reshape(bins, (-1,)), num_segments=self.num_bins))
        self.rows.assign_add(ops.sum(weight))

    def result(self) -> Any:
        return ops.divide_no_nan(ops.sum(ops.abs(self.gaps)), self.rows)

    def get_config(self) -> dict[str, Any]:
        own = {"num_bins": self.num_bins, "from_logits": self.from_logits, "ignore_class": self.ignore_class}
        return {**super().get_config(), **own}


class _Mean(keras.metrics.Metric):
    """The weighted mean of a value for every row, which a subclass computes."""

    # For a metric that takes the parameters of a distribution: how to compute the same from `MonteCarlo`'s predictions.
    of_prediction = None

    def __init__(self, name: str, dtype: str | keras.DTypePolicy | None = None):
        super().__init__(name=name, dtype=dtype)
        self.total = self.add_variable((), initializer="zeros", name="total")
        self.rows = self.add_variable((), initializer="zeros", name="rows")

    def values(self, y_true: Any, y_pred: Any) -> Any:
        raise NotImplementedError

    def weight(self, y_true: Any, y_pred: Any, weight: Any) -> Any:
        """Return the weight of each value, given that by masks and sample weights."""
        return weight

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        values = self.values(y_true, y_pred)
        weight = self.weight(y_true, y_pred, _weight(values, y_pred, sample_weight, self.dtype))
        self.total.assign_add(ops.sum(weight * values))
        self.rows.assign_add(ops.sum(weight))

    def result(self) -> Any:
        return ops.divide_no_nan(self.total, self.rows)


@keras.saving.register_keras_serializable(package="keras_vdrop")
class BrierScore(_Mean):
    """`scores.calibration.brier_score`: the mean of Σ_c (p_c − 1[c is the label])² over classes c, from 0 to 2.

    Args:
        from_logits: Whether the model returns logits. If not, the result is NaN if a value outside [0, 1] counts.
        name: The name in the logs.
        dtype: The dtype of the sums.
        ignore_class: As for `ExpectedCalibrationError`.

    Call arguments:
        y_true, y_pred, sample_weight: As for `ExpectedCalibrationError`.

    Raises:
        ValueError: If the shape of y does not match that of the outputs.

    Examples:
        >>> import keras_vdrop as kv
        >>> metric = kv.metrics.BrierScore()
        >>> metric.update_state([0, 1], [[0.5, 0.5], [0.0, 1.0]])
        >>> float(metric.result())
        0.25

    Reference:
        Verification of Forecasts Expressed in Terms of Probability, Brier, 1950, Monthly Weather Review,
        https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2
    """

    def __init__(
        self,
        from_logits: bool = False,
        name: str = "brier",
        dtype: str | keras.DTypePolicy | None = None,
        ignore_class: int | None = None,
    ):
        super().__init__(name, dtype)
        self.from_logits = from_logits
        self.ignore_class = ignore_class
        self._direction = "down"

    def values(self, y_true: Any, y_pred: Any) -> Any:
        labels, probability = _classification(y_true, y_pred, self.from_logits, self.dtype)
        # Not `ops.one_hot`, which on PyTorch refuses labels that are ignored.
        truth = ops.cast(ops.equal(labels[..., None], ops.arange(probability.shape[-1])), self.dtype)
        return ops.sum(ops.square(probability - truth), axis=-1)

    def weight(self, y_true: Any, y_pred: Any, weight: Any) -> Any:
        labels, probability = _classification(y_true, y_pred, self.from_logits, self.dtype)
        return _weight_of_labels(labels, probability, weight, self.ignore_class)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "from_logits": self.from_logits, "ignore_class": self.ignore_class}


@keras.saving.register_keras_serializable(package="keras_vdrop")
class NormalCRPS(_Mean):
    """`scores.regression.normal_crps` of a model whose outputs are those that `losses.NormalNLL` takes.

    Args:
        name: The name in the logs.
        dtype: The dtype of the sums.

    Call arguments:
        y_true: Numbers (B, ...) or (B, ..., 1).
        y_pred: The model's outputs (B, ..., 2), as `MonteCarlo(likelihood="normal")` takes them.
        sample_weight: Optional, one for each number or each row.

    Raises:
        ValueError: If the shape of y does not match that of the outputs.

    Examples:
        >>> import keras_vdrop as kv
        >>> metric = kv.metrics.NormalCRPS()
        >>> metric.update_state([3.0], [[1.0, -50.0]])  # a scale of 0.001: the CRPS is about |y − loc|
        >>> round(float(metric.result()), 2)
        2.0

    Reference:
        Strictly Proper Scoring Rules, Prediction, and Estimation, Gneiting, Raftery, 2007,
        https://doi.org/10.1198/016214506000001437
    """

    of_prediction = "Call `scores.regression.normal_crps(predicted.mean, predicted.stddev(), y)`."

    def __init__(self, name: str = "crps", dtype: str | keras.DTypePolicy | None = None):
        super().__init__(name, dtype)
        self._direction = "down"

    def values(self, y_true: Any, y_pred: Any) -> Any:
        scale, z = _standardised(y_true, y_pred, self.dtype)
        density = ops.exp(-0.5 * ops.square(z)) / math.sqrt(2.0 * math.pi)
        return scale * (z * ops.erf(z / math.sqrt(2.0)) + 2.0 * density - 1.0 / math.sqrt(math.pi))


@keras.saving.register_keras_serializable(package="keras_vdrop")
class NormalCoverage(_Mean):
    """`scores.regression.interval_coverage` of the `normal_interval`, for models as in `NormalCRPS`.

    It equals `level` if the model is calibrated.

    Args:
        level: Float in (0, 1).
        name: The name in the logs.
        dtype: The dtype of the sums.

    Call arguments:
        y_true, y_pred, sample_weight: As for `NormalCRPS`.

    Raises:
        ValueError: If `level` is not in (0, 1), or the shape of y does not match that of the outputs.

    Examples:
        >>> import keras_vdrop as kv
        >>> metric = kv.metrics.NormalCoverage(level=0.9)
        >>> metric.update_state([0.0, 100.0], [[0.0, 0.0], [0.0, 0.0]])  # one inside, one far outside
        >>> float(metric.result())
        0.5
    """

    of_prediction = "Call `scores.regression.interval_coverage(*predicted.interval(level), y)`."

    def __init__(self, level: float = 0.9, name: str = "coverage", dtype: str | keras.DTypePolicy | None = None):
        check_fraction("level", level)
        super().__init__(name, dtype)
        self.level = float(level)

    def values(self, y_true: Any, y_pred: Any) -> Any:
        _, z = _standardised(y_true, y_pred, self.dtype)
        return ops.cast(ops.abs(z) <= statistics.NormalDist().inv_cdf(0.5 + 0.5 * self.level), self.dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "level": self.level}


class _OfParameters(_Mean):
    """A mean over numbers y, for outputs that are the parameters of a distribution of y."""

    def __init__(self, likelihood: Likelihood | None, name: str, dtype: str | keras.DTypePolicy | None = None):
        likelihood = NormalNLL() if likelihood is None else likelihood
        if not isinstance(likelihood, Likelihood):
            raise ValueError(
                f"`likelihood` must be a loss of `keras_vdrop.losses`, such as `NormalNLL()`. "
                f"Received: likelihood={likelihood!r}"
            )
        super().__init__(name, dtype)
        self.likelihood = likelihood
        self._direction = "down"

    def values(self, y_true: Any, y_pred: Any) -> Any:
        return self.score(ops.cast(y_true, self.dtype), ops.cast(y_pred, self.dtype))

    def score(self, y_true: Any, y_pred: Any) -> Any:
        raise NotImplementedError

    def errors(self, y_true: Any, y_pred: Any) -> Any:
        """Return y − mean for each number."""
        size = self.likelihood.num_parameters
        if size is None:
            mean, _ = self.likelihood.moments(y_pred)
            y = aligned(y_true, mean.shape, ops.shape(mean))
            if y is None:
                raise ValueError(
                    "`y_true` must have the shape of the distribution's mean. "
                    f"Received: y_true of shape {tuple(y_true.shape)} and a mean of shape {tuple(mean.shape)}"
                )
        else:
            y = targets(y_true, y_pred, f"numbers (B, ...) and parameters (B, ..., {size})", size)
            mean, _ = self.likelihood.moments(y_pred)
        return y - mean

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "likelihood": keras.losses.serialize(self.likelihood)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Self":
        return cls(**{**config, "likelihood": keras.losses.deserialize(config["likelihood"])})


@keras.saving.register_keras_serializable(package="keras_vdrop")
class RootMeanSquaredError(_OfParameters):
    """The square root of the mean of (y − mean)², for a model whose outputs are the parameters of a distribution.

    Args:
        likelihood: The loss of `losses` that defines what the outputs mean; None for `NormalNLL()`.
        name: The name in the logs.
        dtype: The dtype of the sums.

    Call arguments:
        y_true: Numbers (B, ...) or (B, ..., 1).
        y_pred: The parameters; (B, ..., 2) for `NormalNLL`.
        sample_weight: Optional, one for each number, step or row.

    Raises:
        ValueError: If `likelihood` is not a loss of `losses`, or the shape of y does not match that of the outputs.

    Examples:
        >>> import keras_vdrop as kv
        >>> metric = kv.metrics.RootMeanSquaredError()
        >>> metric.update_state([1.0, 2.0], [[1.0, -5.0], [4.0, 5.0]])
        >>> round(float(metric.result()), 4)
        1.4142
    """

    of_prediction = "Use `keras.metrics.RootMeanSquaredError()`."

    def __init__(
        self, likelihood: Likelihood | None = None, name: str = "rmse", dtype: str | keras.DTypePolicy | None = None
    ):
        super().__init__(likelihood, name, dtype)

    def score(self, y_true: Any, y_pred: Any) -> Any:
        return ops.square(self.errors(y_true, y_pred))

    def result(self) -> Any:
        return ops.sqrt(super().result())


@keras.saving.register_keras_serializable(package="keras_vdrop")
class MeanAbsoluteError(_OfParameters):
    """The mean of |y − mean|, for a model whose outputs are the parameters of a distribution.

    Args:
        likelihood, name, dtype: As for `RootMeanSquaredError`.

    Call arguments:
        y_true, y_pred, sample_weight: As for `RootMeanSquaredError`.

    Raises:
        ValueError: If `likelihood` is not a loss of `losses`, or the shape of y does not match that of the outputs.

    Examples:
        >>> import keras_vdrop as kv
        >>> metric = kv.metrics.MeanAbsoluteError()
        >>> metric.update_state([1.0, 2.0], [[1.0, -5.0], [4.0, 5.0]])  # errors of 0 and 2
        >>> float(metric.result())
        1.0
    """

    of_prediction = "Use `keras.metrics.MeanAbsoluteError()`."

    def __init__(
        self, likelihood: Likelihood | None = None, name: str = "mae", dtype: str | keras.DTypePolicy | None = None
    ):
        super().__init__(likelihood, name, dtype)

    def score(self, y_true: Any, y_pred: Any) -> Any:
        return ops.abs(self.errors(y_true, y_pred))


@keras.saving.register_keras_serializable(package="keras_vdrop")
class NegativeLogLikelihood(_OfParameters):
    """The mean of −log p(y) over numbers, in nats, for a model whose outputs are the parameters of a distribution.

    For `NormalNLL` it equals `scores.regression.normal_negative_log_likelihood`. It differs from the training loss,
    which is the sum over the numbers of an example and includes the KL.

    Args:
        likelihood, name, dtype: As for `RootMeanSquaredError`.

    Call arguments:
        y_true, y_pred, sample_weight: As for `RootMeanSquaredError`.

    Raises:
        ValueError: If `likelihood` is not a loss of `losses`, or the shape of y does not match that of the outputs.

    Examples:
        >>> import keras_vdrop as kv
        >>> metric = kv.metrics.NegativeLogLikelihood(kv.losses.LaplaceNLL())
        >>> metric.update_state([3.0], [[3.0, 0.0]])
        >>> round(float(metric.result()), 3)  # log(2·scale), scale = log 2 + 0.001
        0.328
    """

    of_prediction = "Remove it: the loss that `evaluate` returns is the NLL, summed over the numbers of an example."

    def __init__(
        self,
        likelihood: Likelihood | None = None,
        name: str = "negative_log_likelihood",
        dtype: str | keras.DTypePolicy | None = None,
    ):
        super().__init__(likelihood, name, dtype)

    def score(self, y_true: Any, y_pred: Any) -> Any:
        return self.likelihood.values(y_true, y_pred)


def _classification(y_true: Any, y_pred: Any, from_logits: bool, dtype: Any) -> tuple[Any, Any]:
    """Return class numbers (B, ...) and probabilities (B, ..., C)."""
    y_true, y_pred = ops.convert_to_tensor(y_true), ops.cast(y_pred, dtype)
    labels = targets(y_true, y_pred, "class numbers (B, ...), not one-hot, and predictions (B, ..., C)")
    if y_pred.shape[-1] == 1:
        positive = ops.sigmoid(y_pred) if from_logits else y_pred
        return ops.cast(labels, "int32"), ops.concatenate([1.0 - positive, positive], axis=-1)
    return ops.cast(labels, "int32"), ops.softmax(y_pred) if from_logits else y_pred


def _weight_of_labels(labels: Any, probability: Any, weight: Any, ignore_class: int | None) -> Any:
    """Return 0 for ignored labels, NaN for those that count and are no class or have no probabilities, else the weight.

    A model that returns logits shows itself by values outside [0, 1].
    """
    if ignore_class is not None:
        weight = ops.where(ops.equal(labels, ignore_class), ops.zeros_like(weight), weight)
    is_logit = ops.any(ops.abs(probability - 0.5) > 0.5 + 1e-3, axis=-1)
    wrong = ops.logical_or(outside(labels, probability.shape[-1]), is_logit)
    wrong = ops.logical_and(wrong, ops.not_equal(weight, 0.0))
    return ops.where(wrong, ops.full_like(weight, math.nan), weight)


def _standardised(y_true: Any, y_pred: Any, dtype: Any) -> tuple[Any, Any]:
    """Return the scale, and (y − loc) / scale."""
    y_true, y_pred = ops.cast(y_true, dtype), ops.cast(y_pred, dtype)
    what = "numbers (B, ...) and predictions (B, ..., 2), the loc and the raw scale"
    y = targets(y_true, y_pred, what, size=2)
    scale = likelihoods.scale_of(y_pred[..., 1])
    return scale, (y - y_pred[..., 0]) / scale


def _weight(values: Any, y_pred: Any, sample_weight: Any, dtype: Any) -> Any:
    """Return the weight of each value: 0 where the outputs are masked, as in Keras's own metrics."""
    weight = ops.ones_like(values, dtype=dtype)
    if sample_weight is not None:
        weight *= weights_of(ops.cast(sample_weight, dtype), values)
    mask = mask_of(y_pred)
    return weight if mask is None else weight * weights_of(ops.cast(mask, dtype), values)
