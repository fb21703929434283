"""Likelihoods as losses: −log p(y | outputs) of one example, in nats, for `compile`.

With one of them the loss of `fit` is the negative ELBO per example, as the KL is weighed for it: everything that an
example's `y` holds is summed, where Keras's own losses take the mean. Keras has those of classes:
`SparseCategoricalCrossentropy`, `BinaryCrossentropy`. Its mean squared error is a likelihood only for one noise level,
which `ELBO(likelihood_scale=...)` states.

Outputs have the parameters of the distribution on their last axis. A raw scale becomes a scale of at least 0.001 by
`functional.likelihoods.scale_of`: standardise y.
"""

import keras
from keras import layers, ops

from keras_vdrop.functional import likelihoods
from keras_vdrop.layers.base import check_finite, check_positive_int


def targets(y_true, y_pred, what, size=None):
    """The targets (B, ...) of outputs (B, ..., n), n = `size` if given; either may have a last axis of 1 besides."""
    y = aligned(y_true, y_pred.shape[:-1])
    if y is None or size not in (None, y_pred.shape[-1]):
        raise ValueError(f"Expected {what}. Received: shapes {tuple(y_true.shape)} and {tuple(y_pred.shape)}")
    return y


def aligned(y, shape):
    """`y` of that shape, but for a last axis of 1 that either may have; None where its sizes are others.

    Of other sizes, the numbers of an example would be compared with those of other examples.
    """
    if len(y.shape) == len(shape) + 1 and y.shape[-1] == 1:
        y = ops.squeeze(y, axis=-1)
    elif len(y.shape) == len(shape) - 1 and shape[-1] == 1:
        y = ops.expand_dims(y, axis=-1)
    fits = len(y.shape) == len(shape) and all(None in pair or pair[0] == pair[1] for pair in zip(y.shape, shape))
    return y if fits else None


def mask_of(tensor):
    """The mask that Keras keeps with a tensor, or None. Keras tells layers of it, and nobody else."""
    if not (ops.is_tensor(tensor) or isinstance(tensor, keras.KerasTensor)):
        return None
    found = []
    _MaskReader(found.append)(tensor)
    return found[0]


class _MaskReader(layers.Layer):
    def __init__(self, tell):
        super().__init__(name="mask_reader", autocast=False)
        self.supports_masking = True
        self._tell = tell

    def call(self, inputs, mask=None):
        self._tell(mask)
        return inputs


class NegativeLogLikelihood(keras.losses.Loss):
    """−Σ log p(y | outputs), over all that an example's y holds. A subclass defines `log_prob` and `moments`.

    Attributes:
        num_parameters: How many numbers the last axis of the outputs has; None for any.

    Args:
        name, reduction, dtype: As for every Keras loss.

    Call arguments:
        y_true: Numbers (B, ...) or (B, ..., 1).
        y_pred: The parameters (B, ..., `num_parameters`).

    Returns:
        By default a scalar, the mean over the B examples.
    """

    num_parameters = 2

    def __init__(self, name=None, reduction="sum_over_batch_size", dtype=None):
        super().__init__(name=name, reduction=reduction, dtype=dtype)

    def __call__(self, y_true, y_pred, sample_weight=None):
        if mask_of(y_pred) is not None:
            raise ValueError(
                f"{self.name!r} sums over all that an example holds, and cannot leave out the steps that the outputs' "
                "mask does. End the mask before the outputs, or predict one step an example."
            )
        return super().__call__(y_true, y_pred, sample_weight)

    def log_prob(self, y, parameters):
        """log p of each number: a tensor of the shape of y, (B, ...)."""
        raise NotImplementedError(f"{type(self).__name__} must define log_prob(y, parameters).")

    def moments(self, parameters):
        """The mean and the variance of each number: two tensors (B, ...)."""
        raise NotImplementedError(f"{type(self).__name__} must define moments(parameters).")

    def call(self, y_true, y_pred):
        what = f"numbers (B, ...) and parameters (B, ..., {self.num_parameters})"
        y = targets(y_true, y_pred, what, self.num_parameters)
        return _total(-self.log_prob(y, y_pred))


@keras.saving.register_keras_serializable(package="keras_vdrop")
class NormalNLL(NegativeLogLikelihood):
    """½·log(2π) + log scale + ½·((y − loc) / scale)²: outputs are (loc, raw scale), the noise that of each input.

    `learned_scale` makes outputs of one noise level for all inputs, and `MonteCarlo(likelihood="normal")` takes either.

    Args:
        name, reduction, dtype: As for every Keras loss.

    Call arguments:
        y_true: Numbers (B, ...) or (B, ..., 1).
        y_pred: Outputs (B, ..., 2).

    Example:
        >>> import keras, keras_vdrop as kv, numpy as np
        >>> model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(2, kl_weight=1 / 8)])
        >>> model.compile("adam", kv.losses.NormalNLL())
        >>> history = model.fit(np.ones((8, 4)), np.ones(8), verbose=0)

    Reference:
        Estimating the mean and variance of the target probability distribution, Nix, Weigend, 1994,
        https://doi.org/10.1109/ICNN.1994.374138
    """

    def log_prob(self, y, parameters):
        return likelihoods.normal(y, parameters[..., 0], likelihoods.scale_of(parameters[..., 1]))

    def moments(self, parameters):
        return parameters[..., 0], ops.square(likelihoods.scale_of(parameters[..., 1]))


@keras.saving.register_keras_serializable(package="keras_vdrop")
class LaplaceNLL(NegativeLogLikelihood):
    """log(2·scale) + |y − loc| / scale: outputs are (loc, raw scale); tails heavier than the normal ones.

    Args:
        name, reduction, dtype: As for every Keras loss.

    Call arguments:
        y_true: Numbers (B, ...) or (B, ..., 1).
        y_pred: Outputs (B, ..., 2).
    """

    def log_prob(self, y, parameters):
        return likelihoods.laplace(y, parameters[..., 0], likelihoods.scale_of(parameters[..., 1]))

    def moments(self, parameters):
        return parameters[..., 0], 2.0 * ops.square(likelihoods.scale_of(parameters[..., 1]))


@keras.saving.register_keras_serializable(package="keras_vdrop")
class StudentTNLL(NegativeLogLikelihood):
    """−log of Student's t density: outputs are (loc, raw scale); few degrees of freedom make outliers cheap.

    See `functional.likelihoods.student_t`.

    Args:
        df: Float > 0, the degrees of freedom.
        name, reduction, dtype: As for every Keras loss.

    Call arguments:
        y_true: Numbers (B, ...) or (B, ..., 1).
        y_pred: Outputs (B, ..., 2).

    Raises:
        ValueError: For `df` that is not above 0.
    """

    def __init__(self, df=4.0, name=None, reduction="sum_over_batch_size", dtype=None):
        check_finite("df", df)
        if df <= 0:
            raise ValueError(f"`df` must be above 0. Received: df={df!r}")
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.df = float(df)

    def log_prob(self, y, parameters):
        return likelihoods.student_t(y, self.df, parameters[..., 0], likelihoods.scale_of(parameters[..., 1]))

    def moments(self, parameters):
        if self.df <= 2:
            raise ValueError(f"With 2 degrees of freedom or fewer, the variance is infinite. Received: df={self.df:g}")
        return parameters[..., 0], self.df / (self.df - 2.0) * ops.square(likelihoods.scale_of(parameters[..., 1]))

    def get_config(self):
        return {**super().get_config(), "df": self.df}


@keras.saving.register_keras_serializable(package="keras_vdrop")
class NormalMixtureNLL(NegativeLogLikelihood):
    """−log Σ_k softmax(logits)_k·N(y; loc_k, scale_k²): a mixture density network, for y of several likely values.

    Args:
        num_components: Positive int, K.
        name, reduction, dtype: As for every Keras loss.

    Call arguments:
        y_true: Numbers (B, ...) or (B, ..., 1).
        y_pred: Outputs (B, ..., 3·K): K logits, K locs, K raw scales.

    Reference:
        Mixture Density Networks, Bishop, 1994, https://publications.aston.ac.uk/id/eprint/373/
    """

    def __init__(self, num_components, name=None, reduction="sum_over_batch_size", dtype=None):
        check_positive_int("num_components", num_components)
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.num_components = num_components

    @property
    def num_parameters(self):
        return 3 * self.num_components

    def log_prob(self, y, parameters):
        logits, loc, raw_scale = ops.split(parameters, 3, axis=-1)
        return likelihoods.normal_mixture(y, logits, loc, likelihoods.scale_of(raw_scale))

    def moments(self, parameters):
        logits, loc, raw_scale = ops.split(parameters, 3, axis=-1)
        share = ops.softmax(logits, axis=-1)
        mean = ops.sum(share * loc, axis=-1, keepdims=True)
        variance = ops.square(likelihoods.scale_of(raw_scale)) + ops.square(loc - mean)
        return ops.squeeze(mean, axis=-1), ops.sum(share * variance, axis=-1)

    def get_config(self):
        return {**super().get_config(), "num_components": self.num_components}


@keras.saving.register_keras_serializable(package="keras_vdrop")
class DistributionNLL(NegativeLogLikelihood):
    """−log p(y) of any `tfp.distributions.Distribution` that a function makes of the outputs. TensorFlow only.

    Args:
        distribution_fn: Callable from the outputs to a distribution, of as many numbers as an example's y has; register
            it by `keras.saving.register_keras_serializable` to save a compiled model with it.
        name, reduction, dtype: As for every Keras loss.

    Call arguments:
        y_true: (B, ...), the shape of a draw of the distribution, but for a last axis of 1 that either may have.
        y_pred: Outputs (B, ...), as the function takes them.

    Raises:
        ValueError: For y of another shape: its numbers would be compared with those of other examples.

    Example, of counts:
        tfd = tensorflow_probability.distributions
        model.compile("adam", kv.losses.DistributionNLL(lambda outputs: tfd.Poisson(log_rate=outputs)))
    """

    num_parameters = None

    def __init__(self, distribution_fn, name=None, reduction="sum_over_batch_size", dtype=None):
        if not callable(distribution_fn):
            raise ValueError(
                f"`distribution_fn` must be a callable of the outputs. Received: distribution_fn={distribution_fn!r}"
            )
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.distribution_fn = distribution_fn

    def log_prob(self, y, parameters):
        return self.distribution_fn(parameters).log_prob(y)

    def call(self, y_true, y_pred):
        distribution = self.distribution_fn(y_pred)
        drawn = (*distribution.batch_shape, *distribution.event_shape)
        y = aligned(y_true, drawn)
        if y is None:
            raise ValueError(
                f"Expected y of the shape of a draw of the distribution. Received: shapes {tuple(y_true.shape)} and "
                f"{drawn}"
            )
        return _total(-distribution.log_prob(y))

    def moments(self, parameters):
        """The mean and the variance of the distribution."""
        distribution = self.distribution_fn(parameters)
        return distribution.mean(), distribution.variance()

    def get_config(self):
        function = keras.saving.serialize_keras_object(self.distribution_fn)
        return {**super().get_config(), "distribution_fn": function}

    @classmethod
    def from_config(cls, config):
        function = keras.saving.deserialize_keras_object(config["distribution_fn"])
        return cls(**{**config, "distribution_fn": function})


def learned_scale(loc, name="raw_scale"):
    """Outputs (loc, raw scale) in which the raw scale, a learned number for each of D outputs, is that of every input.

    For `NormalNLL` and its like where all data have one noise level; stock Keras layers alone make it.

    Args:
        loc: Symbolic tensor (B, ..., D), what a model of the means gives.
        name: Of the layer whose bias is the raw scale.

    Returns:
        Symbolic tensor (B, ..., D, 2).

    Example:
        >>> import keras, keras_vdrop as kv
        >>> x = keras.Input((4,))
        >>> model = keras.Model(x, kv.losses.learned_scale(kv.VariationalDense(1)(x)))
        >>> model.output_shape
        (None, 1, 2)
    """
    raw_scale = layers.Dense(loc.shape[-1], kernel_initializer="zeros", name=name)(0.0 * loc)
    return ops.stack([loc, raw_scale], axis=-1)


def _total(values):
    """What an example's numbers come to, (B,)."""
    return ops.sum(ops.reshape(values, (ops.shape(values)[0], -1)), axis=-1)
