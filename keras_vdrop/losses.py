"""Likelihoods as losses: −log p(y | outputs) of one example, in nats, for `compile`.

With one of these losses and a KL weight of 1 / (number of training examples), the loss of `fit` is the negative ELBO
per example: they sum over all numbers of an example's `y`, where Keras's losses take the mean. For classes, use Keras's
`SparseCategoricalCrossentropy` or `BinaryCrossentropy`. Keras's mean squared error is a likelihood for one fixed noise
level only, which `ELBO(likelihood_scale=...)` specifies.

The last axis of the outputs holds the parameters of the distribution. `functional.likelihoods.scale_of` maps a raw
scale to a scale of at least 0.001; it starts near 0.7, so standardise y. If y is of the order of 1,000, or of 0.001,
the network spends its first steps on reaching that scale. End the model without an activation, which would restrict the
range of the scale; `check_outputs`, which `ELBO` calls, warns about one.

Keras's metrics treat the outputs as predictions, so `metrics=["mse"]` also compares y with the raw scale. Metrics such
as `metrics.RootMeanSquaredError` compare y with the mean.
"""

import warnings

import keras
import numpy as np
from keras import layers, ops

from keras_vdrop.checks import check_finite, check_positive_int
from keras_vdrop.functional import likelihoods


def targets(y_true, y_pred, what, size=None):
    """Return the targets (B, ...) of outputs (B, ..., n); a last axis of 1 is added or removed as needed.

    Raises:
        ValueError: For targets of another shape than the outputs', or n other than `size`, if given.
    """
    y = aligned(y_true, y_pred.shape[:-1], ops.shape(y_pred)[:-1])
    if y is None or size not in (None, y_pred.shape[-1]):
        raise ValueError(f"Expected {what}. Received: shapes {tuple(y_true.shape)} and {tuple(y_pred.shape)}")
    return y


def aligned(y, shape, sizes=None):
    """Return `y` in the given shape, or None if it has another one.

    A last axis of 1 is added or removed as needed. Other shapes must not be broadcast: that would compare the numbers
    of one example with those of others.

    Args:
        y: Tensor.
        shape: Tuple of ints, with None for a size that is not known before the graph runs.
        sizes: The same shape with the sizes known when the graph runs, or None. If given, `y` is reshaped to it where
            `shape` leaves a size open, so that `y` of other sizes fails at run time instead of being broadcast.
    """
    if not _has_rank(y):
        return None if sizes is None else ops.reshape(y, sizes)
    if len(y.shape) == len(shape) + 1 and y.shape[-1] == 1:
        y = ops.squeeze(y, axis=-1)
    elif len(y.shape) == len(shape) - 1 and shape[-1] == 1:
        y = ops.expand_dims(y, axis=-1)
    if len(y.shape) != len(shape) or any(None not in pair and pair[0] != pair[1] for pair in zip(y.shape, shape)):
        return None
    known = sizes is None or None not in (*y.shape[1:], *shape[1:])
    return y if known else ops.reshape(y, sizes)


def _has_rank(tensor):
    """Return whether the number of axes is known. It is not in a graph that TensorFlow traced for several ranks."""
    return getattr(tensor.shape, "rank", 0) is not None


def weights_of(sample_weight, values):
    """Reshape sample weights so that they broadcast to values (B, ...), with which they share the leading axes.

    Args:
        sample_weight: Tensor of shape (), (B,), (B, T), ..., or (..., 1). Along an axis of size 1, the weight is
            shared.
        values: Tensor (B, ...).

    Raises:
        ValueError: For another shape, or in TensorFlow, an unknown number of axes.
    """
    weight, rank = sample_weight, len(values.shape)
    if not _has_rank(weight):
        raise ValueError(
            "TensorFlow does not know how many axes the weights have, as they had another number of them in a call "
            "before: call `compile` again, or give weights of one shape. Received: sample_weight of unknown shape"
        )
    if len(weight.shape) == rank + 1 and weight.shape[-1] == 1:
        weight = ops.squeeze(weight, axis=-1)
    pairs = zip(weight.shape, values.shape)
    if len(weight.shape) > rank or any(size not in (1, None) and other not in (size, None) for size, other in pairs):
        raise ValueError(
            f"Weights must have the shape of what they weigh, {tuple(values.shape)}, or of its leading axes. "
            f"Received: sample_weight of the shape {tuple(sample_weight.shape)}"
        )
    return ops.reshape(weight, (*ops.shape(weight), *[1] * (rank - len(weight.shape))))


def mask_of(tensor):
    """Return the mask that Keras attaches to a tensor, or None. Only a layer has public access to it."""
    if not (ops.is_tensor(tensor) or isinstance(tensor, keras.KerasTensor)):
        return None
    if keras.backend.backend() == "torch":
        return getattr(tensor, "_keras_mask", None)  # code that PyTorch compiles cannot create a layer
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


class _MaskWriter(layers.Layer):
    def __init__(self, mask):
        super().__init__(name="mask_writer", autocast=False)
        self.supports_masking = True
        self._mask = mask

    def call(self, inputs):
        return inputs

    def compute_mask(self, inputs, previous_mask=None):
        return self._mask


def with_mask(tensor, mask):
    """Return the tensor with a mask attached as Keras does; unchanged if the mask is None."""
    return tensor if mask is None else _MaskWriter(mask)(tensor)


class _Reduction(keras.losses.Loss):
    """Keras's reduction of values that are already computed for each example."""

    def call(self, y_true, y_pred):
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
    """

    num_parameters = 2

    def __init__(self, name=None, reduction="sum_over_batch_size", dtype=None):
        super().__init__(name=name, reduction=reduction, dtype=dtype)

    def __call__(self, y_true, y_pred, sample_weight=None):
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

    def log_prob(self, y, parameters):
        """Compute log p of each number: a tensor of the shape of y, (B, ...)."""
        raise NotImplementedError(f"{type(self).__name__} must define log_prob(y, parameters).")

    def moments(self, parameters):
        """Compute the mean and the variance of each number: two tensors (B, ...)."""
        raise NotImplementedError(f"{type(self).__name__} must define moments(parameters).")

    def values(self, y_true, y_pred):
        """Compute −log p of each number, (B, ...), from `y_true` and `y_pred` as tensors."""
        what = f"numbers (B, ...) and parameters (B, ..., {self.num_parameters})"
        y = targets(y_true, y_pred, what, self.num_parameters)
        return -self.log_prob(y, y_pred)

    def call(self, y_true, y_pred):
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
    """log(2·scale) + |y − loc| / scale: outputs are (loc, raw scale); heavier tails than `NormalNLL`.

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
    """−log of Student's t density: outputs are (loc, raw scale). With few degrees of freedom, outliers cost little.

    See `functional.likelihoods.student_t`.

    Args:
        df: Float > 0, the degrees of freedom.
        name, reduction, dtype: As for every Keras loss.

    Call arguments:
        y_true: Numbers (B, ...) or (B, ..., 1).
        y_pred: Outputs (B, ..., 2).

    Raises:
        ValueError: If `df` is not above 0.
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
    """−log Σ_k softmax(logits)_k·N(y; loc_k, scale_k²): a mixture density network, for multimodal y.

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
    """−log p(y) of the `tfp.distributions.Distribution` that a function makes from the outputs. TensorFlow only.

    Args:
        distribution_fn: Callable that maps the outputs to a distribution over as many numbers as an example's y has.
            Register it with `keras.saving.register_keras_serializable` to save a compiled model with it.
        name, reduction, dtype: As for every Keras loss.

    Call arguments:
        y_true: (B, ...), the shape of a sample of the distribution, except for a last axis of 1 that either may have.
        y_pred: Outputs (B, ...), as the function takes them.

    Raises:
        ValueError: For y of another shape. It would compare the numbers of one example with those of others.

    Example, for counts:
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

    def values(self, y_true, y_pred):
        distribution = self.distribution_fn(y_pred)
        drawn = (*distribution.batch_shape, *distribution.event_shape)
        sizes = ops.concatenate([distribution.batch_shape_tensor(), distribution.event_shape_tensor()])
        y = aligned(y_true, drawn, sizes)
        if y is None:
            raise ValueError(
                f"Expected y of the shape of a draw of the distribution. Received: shapes {tuple(y_true.shape)} and "
                f"{drawn}"
            )
        return -distribution.log_prob(y)

    def moments(self, parameters):
        """Return the mean and the variance of the distribution."""
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
    """Make outputs (loc, raw scale) with one learned raw scale for each of D outputs, shared by all inputs.

    Use it with `NormalNLL` and similar losses if all data have the same noise level. It consists of stock Keras layers.

    Args:
        loc: Symbolic tensor (B, ..., D), the means that a model predicts.
        name: Name of the layer whose bias is the raw scale.

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
    """Sum the numbers of each example: (B,)."""
    return ops.sum(ops.reshape(values, (ops.shape(values)[0], -1)), axis=-1)


def output_names(model):
    """Return the names of a model's outputs, in order, as in `compile(loss={...})`; None if they are not known."""
    if isinstance(model, keras.Sequential):
        return (model.layers[-1].name,)
    if not hasattr(model, "output_names"):
        return None
    return tuple(sorted(model.output)) if isinstance(model.output, dict) else tuple(model.output_names)


def last_layer(model, name=None):
    """Return the layer that computes the named output, or the only output; None if it cannot be determined."""
    if isinstance(model, keras.Sequential):
        last = model.layers[-1]
    elif hasattr(model, "operations"):
        # The names of outputs are the keys of a dict, and otherwise the names of their layers.
        place = 0 if name is None else output_names(model).index(name)
        names = model.output_names
        found = [each for each in model.operations if each.name == names[place]]
        if (name is None and len(names) > 1) or names.count(names[place]) > 1 or not found:
            return None
        (last,) = found
    else:
        return None
    while isinstance(last, keras.layers.Wrapper):
        last = last.layer
    return last_layer(last) if isinstance(last, keras.Model) else last


def last_activation(layer):
    """Return Keras's name of the activation of a layer; None if it has none, or one that Keras does not know."""
    for cls in (layers.Softmax, layers.ReLU, layers.LeakyReLU, layers.ELU):
        if isinstance(layer, cls):
            return cls.__name__.lower()
    activation = getattr(layer, "activation", None)
    name = keras.activations.serialize(activation) if callable(activation) else None
    return name if isinstance(name, str) and name != "linear" else None


def check_activation(model, name=None, stacklevel=2):
    """Warn if outputs that are the parameters of a distribution end in an activation.

    Args:
        model: A built model. The check can inspect the last layer of Sequential and Functional models only.
        name: Name of the output, if there are several.
        stacklevel: As for `warnings.warn`.

    Warns:
        UserWarning: Names the activation and the range of scales that it allows.
    """
    layer = last_layer(model, name)
    activation = last_activation(layer)
    if activation is None:
        return
    grid = np.linspace(-100.0, 100.0, 2001, dtype="float32")
    function = layer if isinstance(layer, (layers.Softmax, layers.ReLU, layers.LeakyReLU, layers.ELU)) else None
    function = function or keras.activations.get(activation)
    raw = ops.convert_to_numpy(function(ops.convert_to_tensor(np.stack([-grid, grid], axis=-1))))[:, 1]
    scale = np.logaddexp(0.0, raw.astype("float64")) + likelihoods.LEAST_SCALE
    least, most = (f"{end:.3g}" for end in (scale.min(), scale.max()))
    reach = f"at least {least}" if raw.max() > 50 else f"between {least} and {most}"
    warnings.warn(
        f"The outputs of {model.name!r}{f' for {name!r}' if name else ''} are a distribution's parameters, and end in "
        f"the activation {activation!r}: of a raw scale it makes one whose scale is {reach}, and it binds the mean as "
        "well. End the model without an activation; the loss makes the scale positive.",
        stacklevel=stacklevel + 1,
    )


# Names of Keras's metrics of point predictions, in lower case and without underscores.
_OF_A_POINT = {
    "mse",
    "mae",
    "mape",
    "meansquarederror",
    "meanabsoluteerror",
    "meanabsolutepercentageerror",
    "rootmeansquarederror",
    "r2score",
}


def check_outputs(model, stacklevel=2):
    """Warn about mistakes with outputs that are the parameters of a distribution, as far as they can be detected.

    Args:
        model: A compiled, built model.
        stacklevel: As for `warnings.warn`.

    Warns:
        UserWarning: If an output whose loss is a `NegativeLogLikelihood` ends in an activation, or has a Keras metric
            that compares y with all parameters, including the raw scale.
    """
    names = output_names(model) or ()
    try:
        config = compile_config(model)
    except Exception:  # an object has no config, so the metrics are unknown
        config = {}
    for place, name in enumerate(names):
        loss = _of_output(model.loss, name, place, len(names))
        if not isinstance(loss, NegativeLogLikelihood):
            continue
        check_activation(model, name if len(names) > 1 else None, stacklevel + 1)
        given = [_of_output(config.get(kind), name, place, len(names)) for kind in ("metrics", "weighted_metrics")]
        wrong = [metric for metric in _keras_names(given) if metric.lower().replace("_", "") in _OF_A_POINT]
        if wrong:
            warnings.warn(
                f"The metric {wrong[0]!r} compares y with all the parameters that {model.name!r} gives, the raw scale "
                "among them: use `keras_vdrop.metrics.RootMeanSquaredError`, or `MeanAbsoluteError`, which take the "
                "mean.",
                stacklevel=stacklevel + 1,
            )


def compile_config(model):
    """Return the arguments of `compile` as Keras saves them. Raises what the `get_config` of an argument raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about lambdas, which need not be serialized here
        return model.get_compile_config() or {}


def _of_output(given, name, place, count):
    """Return the entry for one output of an argument of `compile`."""
    if isinstance(given, dict):
        return given.get(name)
    if isinstance(given, (list, tuple)) and count > 1:
        return given[place]
    return given


def _keras_names(metrics):
    """Return the names of Keras's own metrics in a config of `compile`."""
    if isinstance(metrics, str):
        return [metrics]
    if isinstance(metrics, dict) and "class_name" in metrics:
        return [] if metrics.get("registered_name") else [metrics["class_name"]]
    if isinstance(metrics, (list, tuple)):
        return [name for each in metrics for name in _keras_names(each)]
    return []
