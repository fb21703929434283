"""TensorFlow Probability's side of priors: distributions, which of them can be priors, their KL and their configs.

TFP takes seconds to import, so it is imported on first use.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_vdrop.functional.kl import LOG_UNIFORM_FORMS

# Exact for polynomials of degree ≤ 39.
_NODES = 20

# Points at which the density of a prior must not be 0.
_SOMEWHERE = (-100.0, 100.0)


def check(distribution: Any) -> None:
    """Raise a `ValueError` unless the value is a TFP distribution that can be a prior."""
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "A TFP distribution as a prior requires the TensorFlow backend. With other backends, use "
            "`priors.LogUniform`, `priors.ARD` or `priors.Normal`. "
            f"Received: {distribution} with the backend {keras.backend.backend()!r}"
        )
    if not is_distribution(distribution):
        raise ValueError(
            f"`distribution` must be a tfp.distributions.Distribution. Received: distribution={distribution!r}"
        )
    if distribution.event_shape.rank != 0:
        raise ValueError(
            "A prior must be a distribution over scalars, because it applies to each weight separately. Received: "
            f"{distribution} with event_shape={distribution.event_shape}"
        )
    if not is_positive_everywhere(distribution):
        raise ValueError(
            "The density of a prior must be above 0 at every real number, or the KL is infinite. Use a "
            f"distribution such as `tfd.Normal`, `tfd.Laplace` or `tfd.StudentT`. Received: {distribution}"
        )


def is_positive_everywhere(distribution: Any) -> bool:
    """Return whether the density appears to be above 0 on the whole real line.

    It checks the declared support, if any, and the density at two points. For a distribution over integers it returns
    False.
    """
    import tensorflow as tf

    if not distribution.dtype.is_floating:
        return False
    with tf.init_scope():
        somewhere = tf.constant(_SOMEWHERE, distribution.dtype)
        try:
            support = distribution.experimental_default_event_space_bijector()
        except NotImplementedError:
            support = None  # the distribution does not declare it
        if support is not None and not bool(tf.reduce_all(support.forward(somewhere) == somewhere)):
            return False
        try:
            densities = [distribution.log_prob(x) for x in tf.unstack(somewhere)]
        except (ValueError, tf.errors.InvalidArgumentError):  # if it validates its arguments
            return False
        return all(bool(tf.reduce_all(tf.math.is_finite(density))) for density in densities)


def kl_from_normal(loc: Any, log_variance: Any, distribution: Any) -> Any:
    """Compute KL(N(loc, exp(log_variance)) ‖ distribution) in the dtype of the distribution.

    TFP's closed form is used if it has one. Otherwise KL = −H(q) − E_q[log p], the expectation by quadrature.
    """
    from tensorflow_probability import distributions as tfd

    loc, log_variance = (ops.cast(value, distribution.dtype.name) for value in (loc, log_variance))
    posterior = tfd.Normal(loc, ops.exp(0.5 * log_variance))
    try:
        return tfd.kl_divergence(posterior, distribution)
    except NotImplementedError:
        return -posterior.entropy() - _expected_log_prob(distribution, loc, posterior.scale)


def _expected_log_prob(distribution: Any, loc: Any, scale: Any) -> Any:
    """Return E[log p(w)] over w ~ N(loc, scale²) by Gauss–Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    weights = weights / weights.sum()
    terms = (float(w) * distribution.log_prob(loc + float(x) * scale) for x, w in zip(nodes, weights))
    return sum(terms)


def config_of(value: Any) -> Any:
    """Convert a TFP distribution and its parameters to nested dicts, lists, numbers and strings.

    Raises:
        ValueError: For a distribution of another package, or a parameter that is none of these.
    """
    if is_distribution(value):
        tfd = sys.modules["tensorflow_probability"].distributions
        if getattr(tfd, type(value).__name__, None) is not type(value):
            raise ValueError(
                f"A prior created from {value!r} cannot be saved: {type(value).__name__} is not one of "
                "`tfp.distributions`. Write a subclass of `keras_vdrop.priors.Prior`, and register it with Keras."
            )
        parameters = {key: config_of(item) for key, item in value.parameters.items()}
        return {"distribution": type(value).__name__, "parameters": parameters}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, sys.modules["tensorflow"].DType):
        return value.name
    if isinstance(value, (list, tuple)) and any(is_distribution(item) for item in value):
        return [config_of(item) for item in value]
    try:
        return np.asarray(value, "float64").tolist()
    except (TypeError, ValueError):
        raise ValueError(f"A prior created from {value!r} cannot be saved. Create it from numbers.") from None


def from_config(config: Any) -> Any:
    """Return the distribution that `config_of` converted to this config."""
    from tensorflow_probability import distributions as tfd

    if isinstance(config, list) and any(isinstance(item, dict) for item in config):
        return [from_config(item) for item in config]
    if isinstance(config, list):
        return np.asarray(config, "float32")
    if not isinstance(config, dict):
        return config
    parameters = {key: from_config(item) for key, item in config["parameters"].items()}
    return getattr(tfd, config["distribution"])(**parameters)


def is_distribution(value: Any) -> bool:
    """Return whether a value is a TFP distribution, without importing TFP."""
    tfp = sys.modules.get("tensorflow_probability")
    return tfp is not None and isinstance(value, tfp.distributions.Distribution)


def normal(loc: Any, scale: Any) -> Any:
    """Return N(loc, scale²)."""
    from tensorflow_probability import distributions as tfd

    return tfd.Normal(loc, scale)


def normal_mixture(shares: Any, loc: Any, scale: Any) -> Any:
    """Return Σ_k shares_k·N(loc_k, scale_k²); the last axis of all arguments is k."""
    from tensorflow_probability import distributions as tfd

    return tfd.MixtureSameFamily(tfd.Categorical(probs=shares), tfd.Normal(loc, scale))


@functools.cache
def log_uniform() -> type[Any]:
    """Return the class of the log-uniform distribution, which TFP lacks."""
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    class LogUniform(tfd.Distribution):
        """The prior p(|w|) ∝ 1/|w| over all real w. It is improper: a log density up to a constant, and no samples.

        The KL of a `tfd.Normal` to it is registered, normalised to 0 for variance / loc² → ∞.

        Args:
            batch_shape: Tuple of ints, the shape of independent copies.
            form: Approximation of the KL, as in `priors.LogUniform`.
            dtype: Dtype of the values.
        """

        def __init__(
            self,
            batch_shape: Sequence[int] = (),
            form: str = "sigmoid",
            dtype: Any = "float32",
            name: str = "LogUniform",
        ):
            parameters = dict(locals())
            self._kl = LOG_UNIFORM_FORMS[form]
            self._batch = tuple(batch_shape)
            super().__init__(
                dtype=tf.as_dtype(dtype),
                reparameterization_type=tfd.NOT_REPARAMETERIZED,
                validate_args=False,
                allow_nan_stats=True,
                parameters=parameters,
                name=name,
            )

        @classmethod
        def _parameter_properties(cls, dtype: Any, num_classes: int | None = None) -> dict[str, Any]:
            return {}

        def _batch_shape(self) -> Any:
            return tf.TensorShape(self._batch)

        def _batch_shape_tensor(self) -> Any:
            return tf.constant(self._batch, "int32")

        def _event_shape(self) -> Any:
            return tf.TensorShape([])

        def _event_shape_tensor(self) -> Any:
            return tf.constant([], "int32")

        def _log_prob(self, value: Any) -> Any:
            return -tf.math.log(tf.abs(value))

    @tfd.RegisterKL(tfd.Normal, LogUniform)
    def _kl_normal_log_uniform(posterior, prior, name=None):
        with tf.name_scope(name or "kl_normal_log_uniform"):
            loc, scale = tf.convert_to_tensor(posterior.loc), tf.convert_to_tensor(posterior.scale)
            return prior._kl(loc, 2.0 * tf.math.log(scale))

    return LogUniform
