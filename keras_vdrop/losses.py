"""Likelihoods as losses: −log p(y | outputs) of one example, in nats, for `compile`.

With one of them the loss of `fit` is the negative ELBO per example, as the KL is weighed for it: everything that an
example's `y` holds is summed, where Keras's own losses take the mean. Keras has those of classes:
`SparseCategoricalCrossentropy`, `BinaryCrossentropy`. Its mean squared error is a likelihood only for one noise level,
which `ELBO(likelihood_scale=...)` states.

Outputs have the parameters of the distribution on their last axis. A raw scale becomes a scale of at least 0.001 by
`functional.likelihoods.scale_of`, which is 0.7 at first: standardise y. Where y is of the order of 1,000, or of 0.001,
the network spends its steps on the way there. End the model without an activation, which would keep the scale from
most values; `check_outputs` tells, and `ELBO` calls it.

Keras's own metrics take outputs for predictions: `metrics=["mse"]` compares y with the raw scale too.
`metrics.RootMeanSquaredError` and its like compare it with the mean.
"""

import warnings

import keras
import numpy as np
from keras import layers, ops

from keras_vdrop.functional import likelihoods
from keras_vdrop.layers.base import check_finite, check_positive_int


def targets(y_true, y_pred, what, size=None):
    """The targets (B, ...) of outputs (B, ..., n), n = `size` if given; either may have a last axis of 1 besides."""
    y = aligned(y_true, y_pred.shape[:-1], ops.shape(y_pred)[:-1])
    if y is None or size not in (None, y_pred.shape[-1]):
        raise ValueError(f"Expected {what}. Received: shapes {tuple(y_true.shape)} and {tuple(y_pred.shape)}")
    return y


def aligned(y, shape, sizes=None):
    """`y` of that shape, but for a last axis of 1 that either may have; None where its sizes are others.

    Of other sizes, the numbers of an example would be compared with those of other examples.

    Args:
        y: Tensor.
        shape: Tuple of ints, and of None where a size is not known before the graph runs.
        sizes: The shape as the graph knows it. With it, y of other sizes fails then, where it might be broadcast.
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
    """Whether it is known how many axes there are: not in TensorFlow, once a graph has been given y of either."""
    return getattr(tensor.shape, "rank", 0) is not None


def weights_of(sample_weight, values):
    """Sample weights in a shape that broadcasts to values (B, ...), whose leading axes they have.

    Args:
        sample_weight: Tensor of shape (), (B,), (B, T), ..., or (..., 1); a size of 1 stands for one weight for all.
        values: Tensor (B, ...).

    Raises:
        ValueError: For another shape.
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
    """The mask that Keras keeps with a tensor, or None. Keras tells layers of it, and nobody else."""
    if not (ops.is_tensor(tensor) or isinstance(tensor, keras.KerasTensor)):
        return None
    if keras.backend.backend() == "torch":
        return getattr(tensor, "_keras_mask", None)  # where PyTorch compiles, no layer can be made
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
    """The tensor, with a mask kept as Keras keeps it; None for none."""
    return tensor if mask is None else _MaskWriter(mask)(tensor)


class _Reduction(keras.losses.Loss):
    """What examples have come to, reduced as Keras reduces."""

    def call(self, y_true, y_pred):
        return y_pred


class NegativeLogLikelihood(keras.losses.Loss):
    """−Σ log p(y | outputs), over all that an example's y holds. A subclass defines `log_prob` and `moments`.

    With weights w, and a mask m that Keras keeps with the outputs, an example comes to −Σ w·m·log p. The mean is over
    the B examples, whatever is masked of them: a padded sequence counts for what it holds.

    Attributes:
        num_parameters: How many numbers the last axis of the outputs has; None for any.

    Args:
        name, reduction, dtype: As for every Keras loss. "mean_with_sample_weight" divides by the sum of the examples'
            weights, which are the means of those of their numbers.

    Call arguments:
        y_true: Numbers (B, ...) or (B, ..., 1).
        y_pred: The parameters (B, ..., `num_parameters`).
        sample_weight: Optional, one weight for each example, (B,) or (B, 1), for each step, (B, T), or for each number.

    Returns:
        By default a scalar, the mean over the B examples.

    Raises:
        ValueError: For y, weights or a mask of another layout than the outputs'.
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
        """log p of each number: a tensor of the shape of y, (B, ...)."""
        raise NotImplementedError(f"{type(self).__name__} must define log_prob(y, parameters).")

    def moments(self, parameters):
        """The mean and the variance of each number: two tensors (B, ...)."""
        raise NotImplementedError(f"{type(self).__name__} must define moments(parameters).")

    def values(self, y_true, y_pred):
        """−log p of each number, (B, ...), of tensors as the loss takes them."""
        what = f"numbers (B, ...) and parameters (B, ..., {self.num_parameters})"
        y = targets(y_true, y_pred, what, self.num_parameters)
        return -self.log_prob(y, y_pred)

    def call(self, y_true, y_pred):
        return _total(self.values(y_true, y_pred))


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


def output_names(model):
    """The names of a model's outputs as `compile(loss={...})` takes them, in order; None where they are not known."""
    if isinstance(model, keras.Sequential):
        return (model.layers[-1].name,)
    if not hasattr(model, "output_names"):
        return None
    return tuple(sorted(model.output)) if isinstance(model.output, dict) else tuple(model.output_names)


def last_layer(model, name=None):
    """The layer that gives the output of that name, or the only one there is; None where it can't be seen."""
    if isinstance(model, keras.Sequential):
        last = model.layers[-1]
    elif hasattr(model, "operations"):
        # Outputs have names of their own in a dict, and else those of their layers.
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
    """The activation of a layer by Keras's name for it; None for none, or one that Keras does not know."""
    for cls in (layers.Softmax, layers.ReLU, layers.LeakyReLU, layers.ELU):
        if isinstance(layer, cls):
            return cls.__name__.lower()
    activation = getattr(layer, "activation", None)
    name = keras.activations.serialize(activation) if callable(activation) else None
    return name if isinstance(name, str) and name != "linear" else None


def check_activation(model, name=None, stacklevel=2):
    """Say if the outputs that are a distribution's parameters end in an activation, and what that keeps them from.

    Args:
        model: A built model; what can be seen is the last layer of Sequential and Functional ones.
        name: Of the output, where there are several.
        stacklevel: As for `warnings.warn`.

    Warns:
        UserWarning: With the activation, and the scales of y that are left.
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


# Keras's metrics of a point, as `compile` takes them by name or class, in small letters.
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
    """Say what a compiled model does with outputs that are a distribution's parameters, as far as that can be seen.

    Args:
        model: A compiled, built model.
        stacklevel: As for `warnings.warn`.

    Warns:
        UserWarning: For an activation at the end of outputs whose loss is a `NegativeLogLikelihood`, and for a metric
            of Keras's that compares y with all parameters, the raw scale among them.
    """
    names = output_names(model) or ()
    try:
        config = compile_config(model)
    except Exception:  # of an object without a config: its metrics cannot be seen
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
    """What `compile` was given, as Keras saves it. It raises what an object raises that has no config."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a lambda cannot be serialized: nothing is to be
        return model.get_compile_config() or {}


def _of_output(given, name, place, count):
    """What `compile` was given for an output."""
    if isinstance(given, dict):
        return given.get(name)
    if isinstance(given, (list, tuple)) and count > 1:
        return given[place]
    return given


def _keras_names(metrics):
    """The names of Keras's own metrics in a config of `compile`."""
    if isinstance(metrics, str):
        return [metrics]
    if isinstance(metrics, dict) and "class_name" in metrics:
        return [] if metrics.get("registered_name") else [metrics["class_name"]]
    if isinstance(metrics, (list, tuple)):
        return [name for each in metrics for name in _keras_names(each)]
    return []
