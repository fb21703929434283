"""Likelihoods as losses: −log p(y | outputs) of one example, in nats, for `compile`.

With one of these losses and a KL weight of 1 / (number of training examples), the loss of `fit` is the negative ELBO
per example: they sum over all numbers of an example's `y`, where Keras's losses take the mean. For classes, use Keras's
`SparseCategoricalCrossentropy` or `BinaryCrossentropy`. Keras's mean squared error is a likelihood for one fixed noise
level only, which `ELBO(likelihood_scale=...)` specifies.

The last axis of the outputs holds the parameters of the distribution. `functional.likelihoods.scale_of` maps a raw
scale to a scale of at least 0.001; it starts near 0.7, so standardise y. If y is of the order of 1,000, or of 0.001,
the network spends its first steps on reaching that scale. End the model without an activation, which would restrict the
range of the scale; `ELBO` warns about one.

Keras's metrics treat the outputs as predictions, so `metrics=["mse"]` also compares y with the raw scale. Metrics such
as `metrics.RootMeanSquaredError` compare y with the mean.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import keras
from keras import layers, ops

from keras_vdrop.checks import check_positive, check_positive_int
from keras_vdrop.functional import likelihoods
from keras_vdrop.functional.tensors import equal_parts
from keras_vdrop.targets import aligned, mask_of, targets, weights_of

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "DistributionNLL",
    "LaplaceNLL",
    "NegativeLogLikelihood",
    "NormalMixtureNLL",
    "NormalNLL",
    "StudentTNLL",
    "learned_scale",
]

_ReductionName: TypeAlias = Literal["sum_over_batch_size", "sum", "mean", "mean_with_sample_weight", "none"] | None


class _Reduction(keras.losses.Loss):
    """Keras's reduction of values that are already computed for each example."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return y_pred


class NegativeLogLikelihood(keras.losses.Loss):
    """−Σ log p(y | outputs), summed over all numbers of an example's y. A subclass defines `log_prob` and `moments`.

    With sample weights w and a mask m that Keras attaches to the outputs, the loss of an example is −Σ w·m·log p. The
    mean is always over the B examples, however much of them is masked: a padded sequence contributes its real steps.

    Attributes:
        num_parameters: Int, the size of the last axis of the outputs; None for any.

    Args:
        name, reduction, dtype: As for every Keras loss. "mean_with_sample_weight" divides by the sum of the examples'
            weights, where the weight of an example is the mean of the weights of its numbers.

    Call arguments:
        y_true: Numbers (B, ...) or (B, ..., 1).
        y_pred: The parameters (B, ..., `num_parameters`).
        sample_weight: Optional, one weight for each example, (B,) or (B, 1), for each step, (B, T), or for each number.

    Returns:
        By default a scalar, the mean over the B examples.

    Raises:
        ValueError: If the shape of y, the weights or the mask does not match that of the outputs.

    Examples:
        >>> import keras, keras_vdrop as kv, numpy as np
        >>> class ExponentialNLL(kv.losses.NegativeLogLikelihood):
        ...     num_parameters = 1  # the log of the rate
        ...
        ...     def log_prob(self, y, parameters):
        ...         return parameters[..., 0] - keras.ops.exp(parameters[..., 0]) * y
        ...
        ...     def moments(self, parameters):
        ...         mean = keras.ops.exp(-parameters[..., 0])
        ...         return mean, mean**2
        >>> float(ExponentialNLL()(np.array([2.0, 4.0]), np.zeros((2, 1))))  # the mean of 2 and 4
        3.0
    """

    num_parameters: int | None = 2

    def __init__(
        self,
        name: str | None = None,
        reduction: _ReductionName = "sum_over_batch_size",
        dtype: str | keras.DTypePolicy | None = None,
    ):
        super().__init__(name=name, reduction=reduction, dtype=dtype)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        mask = mask_of(y_pred)
        if mask is None and sample_weight is None:
            return super().__call__(y_true, y_pred)
        y_true, y_pred = (ops.convert_to_tensor(each, dtype=self.dtype) for each in (y_true, y_pred))
        values = self.values(y_true, y_pred)
        weight = ops.ones_like(values)
        if sample_weight is not None:
            weight *= weights_of(ops.convert_to_tensor(sample_weight, dtype=self.dtype), values)
        counted = weight if mask is None else weight * weights_of(ops.cast(mask, self.dtype), values)
        totals = _total(values * counted)
        if self.reduction == "mean_with_sample_weight":
            examples = ops.mean(ops.reshape(weight, (ops.shape(weight)[0], -1)), axis=-1)
            totals = ops.expand_dims(ops.divide_no_nan(ops.sum(totals), ops.sum(examples)), axis=0)
        return _Reduction(self.name, self.reduction, self.dtype)(totals, totals)

    def log_prob(self, y: Any, parameters: Any) -> Any:
        """Compute log p of each number: a tensor of the shape of y, (B, ...).

        Raises:
            NotImplementedError: If the subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define log_prob(y, parameters).")

    def moments(self, parameters: Any) -> tuple[Any, Any]:
        """Compute the mean and the variance of each number: two tensors (B, ...).

        Raises:
            NotImplementedError: If the subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define moments(parameters).")

    def values(self, y_true: Any, y_pred: Any) -> Any:
        """Compute −log p of each number, (B, ...), from `y_true` and `y_pred` as tensors."""
        what = f"`y_true` (B, ...) and parameters (B, ..., {self.num_parameters})"
        y = targets(y_true, y_pred, what, self.num_parameters)
        return -self.log_prob(y, y_pred)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return _total(self.values(y_true, y_pred))


@keras.saving.register_keras_serializable(package="keras_vdrop")
class NormalNLL(NegativeLogLikelihood):
    """½·log(2π) + log scale + ½·((y − loc) / scale)²: outputs are (loc, raw scale), with a noise level for each input.

    For one noise level shared by all inputs, make the outputs with `learned_scale`. `MonteCarlo(likelihood="normal")`
    accepts both.

    Args:
        name, reduction, dtype: As for every Keras loss.

    Call arguments:
        y_true: Numbers (B, ...) or (B, ..., 1).
        y_pred: Outputs (B, ..., 2).

    Raises:
        ValueError: If the shape of y does not match that of the outputs.

    Examples:
        >>> import keras, keras_vdrop as kv, numpy as np
        >>> model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(2, kl_weight=1 / 8)])
        >>> model.compile("adam", kv.losses.NormalNLL())
        >>> history = model.fit(np.ones((8, 4)), np.ones(8), verbose=0)

    Reference:
        Estimating the mean and variance of the target probability distribution, Nix, Weigend, 1994,
        https://doi.org/10.1109/ICNN.1994.374138
    """

    def log_prob(self, y: Any, parameters: Any) -> Any:
        return likelihoods.normal(y, parameters[..., 0], likelihoods.scale_of(parameters[..., 1]))

    def moments(self, parameters: Any) -> tuple[Any, Any]:
        return parameters[..., 0], ops.square(likelihoods.scale_of(parameters[..., 1]))


@keras.saving.register_keras_serializable(package="keras_vdrop")
class LaplaceNLL(NegativeLogLikelihood):
    """log(2·scale) + |y − loc| / scale: outputs are (loc, raw scale); heavier tails than `NormalNLL`.

    Args:
        name, reduction, dtype: As for every Keras loss.

    Call arguments:
        y_true: Numbers (B, ...) or (B, ..., 1).
        y_pred: Outputs (B, ..., 2).

    Raises:
        ValueError: If the shape of y does not match that of the outputs.

    Examples:
        >>> import keras_vdrop as kv, numpy as np
        >>> loss = kv.losses.LaplaceNLL()
        >>> round(float(loss(np.array([3.0]), np.array([[3.0, 0.0]]))), 3)  # log(2·scale), scale = log 2 + 0.001
        0.328
    """

    def log_prob(self, y: Any, parameters: Any) -> Any:
        return likelihoods.laplace(y, parameters[..., 0], likelihoods.scale_of(parameters[..., 1]))

    def moments(self, parameters: Any) -> tuple[Any, Any]:
        return parameters[..., 0], 2.0 * ops.square(likelihoods.scale_of(parameters[..., 1]))


@keras.saving.register_keras_serializable(package="keras_vdrop")
class StudentTNLL(NegativeLogLikelihood):
    """−log of Student's t density: outputs are (loc, raw scale). With few degrees of freedom, outliers cost little.

    See `functional.likelihoods.student_t`.

    Args:
        df: Float > 0, the degrees of freedom.
        name, reduction, dtype: As for every Keras loss.

    Call arguments:
        y_true: Numbers (B, ...) or (B, ..., 1).
        y_pred: Outputs (B, ..., 2).

    Raises:
        ValueError: If `df` is not > 0.

    Examples:
        >>> import keras_vdrop as kv, numpy as np
        >>> y, outputs = np.array([100.0]), np.array([[0.0, 0.0]])  # an outlier
        >>> bool(kv.losses.StudentTNLL()(y, outputs) < kv.losses.LaplaceNLL()(y, outputs))
        True

    Reference:
        Robust Statistical Modeling Using the t Distribution, Lange, Little, Taylor, 1989,
        https://doi.org/10.1080/01621459.1989.10478852
    """

    def __init__(
        self,
        df: float = 4.0,
        name: str | None = None,
        reduction: _ReductionName = "sum_over_batch_size",
        dtype: str | keras.DTypePolicy | None = None,
    ):
        check_positive("df", df)
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.df = float(df)

    def log_prob(self, y: Any, parameters: Any) -> Any:
        return likelihoods.student_t(y, self.df, parameters[..., 0], likelihoods.scale_of(parameters[..., 1]))

    def moments(self, parameters: Any) -> tuple[Any, Any]:
        if self.df <= 2:
            raise ValueError(f"`df` must be above 2, or the variance is infinite. Received: df={self.df:g}")
        return parameters[..., 0], self.df / (self.df - 2.0) * ops.square(likelihoods.scale_of(parameters[..., 1]))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "df": self.df}


@keras.saving.register_keras_serializable(package="keras_vdrop")
class NormalMixtureNLL(NegativeLogLikelihood):
    """−log Σ_k softmax(logits)_k·N(y; loc_k, scale_k²): a mixture density network, for multimodal y.

    Args:
        num_components: Positive int, K.
        name, reduction, dtype: As for every Keras loss.

    Call arguments:
        y_true: Numbers (B, ...) or (B, ..., 1).
        y_pred: Outputs (B, ..., 3·K): K logits, K locs, K raw scales.

    Raises:
        ValueError: If `num_components` is not a positive int, or the shape of y does not match that of the outputs.

    Examples:
        >>> import keras_vdrop as kv, numpy as np
        >>> mixture = kv.losses.NormalMixtureNLL(2)(np.array([1.0]), np.zeros((1, 6)))  # of two equal normals
        >>> bool(abs(mixture - kv.losses.NormalNLL()(np.array([1.0]), np.zeros((1, 2)))) < 1e-5)
        True

    Reference:
        Mixture Density Networks, Bishop, 1994, https://publications.aston.ac.uk/id/eprint/373/
    """

    def __init__(
        self,
        num_components: int,
        name: str | None = None,
        reduction: _ReductionName = "sum_over_batch_size",
        dtype: str | keras.DTypePolicy | None = None,
    ):
        check_positive_int("num_components", num_components)
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.num_components = num_components
        self.num_parameters = 3 * num_components

    def log_prob(self, y: Any, parameters: Any) -> Any:
        logits, loc, raw_scale = equal_parts(parameters, 3)
        return likelihoods.normal_mixture(y, logits, loc, likelihoods.scale_of(raw_scale))

    def moments(self, parameters: Any) -> tuple[Any, Any]:
        logits, loc, raw_scale = equal_parts(parameters, 3)
        share = ops.softmax(logits, axis=-1)
        mean = ops.sum(share * loc, axis=-1, keepdims=True)
        variance = ops.square(likelihoods.scale_of(raw_scale)) + ops.square(loc - mean)
        return ops.squeeze(mean, axis=-1), ops.sum(share * variance, axis=-1)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "num_components": self.num_components}


@keras.saving.register_keras_serializable(package="keras_vdrop")
class DistributionNLL(NegativeLogLikelihood):
    """−log p(y) of the `tfp.distributions.Distribution` that a function makes from the outputs. TensorFlow only.

    Args:
        distribution_fn: Callable that maps the outputs to a distribution over as many numbers as an example's y has.
            Register it with `keras.saving.register_keras_serializable` to save a compiled model with it.
        name, reduction, dtype: As for every Keras loss.

    Call arguments:
        y_true: (B, ...), the shape of a sample of the distribution, except for a last axis of 1 that either may have.
        y_pred: Outputs (B, ...), as the function takes them.

    Raises:
        ValueError: If `distribution_fn` is not callable; for y of another shape, since broadcasting would compare the
            numbers of one example with those of others.

    Examples:
        >>> import keras_vdrop as kv, numpy as np  # doctest: +SKIP
        >>> from tensorflow_probability import distributions as tfd  # doctest: +SKIP
        >>> loss = kv.losses.DistributionNLL(lambda outputs: tfd.Poisson(log_rate=outputs))  # doctest: +SKIP
        >>> round(float(loss(np.array([0.0]), np.array([[0.0]]))), 3)  # a count: the NLL is the rate  # doctest: +SKIP
        1.0
    """

    num_parameters = None

    def __init__(
        self,
        distribution_fn: Callable[[Any], Any],
        name: str | None = None,
        reduction: _ReductionName = "sum_over_batch_size",
        dtype: str | keras.DTypePolicy | None = None,
    ):
        if not callable(distribution_fn):
            raise ValueError(
                "`distribution_fn` must be a callable that takes the outputs. "
                f"Received: distribution_fn={distribution_fn!r}"
            )
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.distribution_fn = distribution_fn

    def log_prob(self, y: Any, parameters: Any) -> Any:
        return self.distribution_fn(parameters).log_prob(y)

    def values(self, y_true: Any, y_pred: Any) -> Any:
        distribution = self.distribution_fn(y_pred)
        drawn = (*distribution.batch_shape, *distribution.event_shape)
        sizes = ops.concatenate([distribution.batch_shape_tensor(), distribution.event_shape_tensor()])
        y = aligned(y_true, drawn, sizes)
        if y is None:
            raise ValueError(
                "`y_true` must have the shape of a draw from the distribution. "
                f"Received: shapes {tuple(y_true.shape)} and {drawn}"
            )
        return -distribution.log_prob(y)

    def moments(self, parameters: Any) -> tuple[Any, Any]:
        """Return the mean and the variance of the distribution."""
        distribution = self.distribution_fn(parameters)
        return distribution.mean(), distribution.variance()

    def get_config(self) -> dict[str, Any]:
        function = keras.saving.serialize_keras_object(self.distribution_fn)
        return {**super().get_config(), "distribution_fn": function}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Self":
        function = keras.saving.deserialize_keras_object(config["distribution_fn"])
        return cls(**{**config, "distribution_fn": function})


def learned_scale(loc: Any, name: str = "raw_scale") -> Any:
    """Make outputs (loc, raw scale) with one learned raw scale for each of D outputs, shared by all inputs.

    Use it with `NormalNLL` and similar losses if all data have the same noise level. It consists of stock Keras layers.

    Args:
        loc: Symbolic tensor (B, ..., D), the means that a model predicts.
        name: Name of the layer whose bias is the raw scale.

    Returns:
        Symbolic tensor (B, ..., D, 2).

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> x = keras.Input((4,))
        >>> model = keras.Model(x, kv.losses.learned_scale(kv.VariationalDense(1)(x)))
        >>> model.output_shape
        (None, 1, 2)
    """
    raw_scale = layers.Dense(loc.shape[-1], kernel_initializer="zeros", name=name)(0.0 * loc)
    return ops.stack([loc, raw_scale], axis=-1)


def _total(values: Any) -> Any:
    """Sum the numbers of each example: (B,)."""
    return ops.sum(ops.reshape(values, (ops.shape(values)[0], -1)), axis=-1)
