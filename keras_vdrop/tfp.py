"""Posteriors and priors as TensorFlow Probability distributions.

TFP takes seconds to import, so it is imported on first use.
"""

from typing import Any

from keras_vdrop.distributions import log_uniform
from keras_vdrop.posterior import VariationalWeight


def posterior(weight: VariationalWeight) -> Any:
    """Return the posterior of a `VariationalWeight`: independent N(loc, exp(log_variance)), one event of its shape.

    The pruning mask is ignored: pruned weights have a distribution too.

    Args:
        weight: A `VariationalWeight`, such as `layer.kernel` of a built `VariationalDense`, on TensorFlow.

    Returns:
        A `tfp.distributions.Independent`. If nothing is pruned, `tfd.kl_divergence(posterior(w), prior(w))` equals
        `w.kl()`.

    Raises:
        ImportError: If TensorFlow Probability is not installed.

    Examples:
        >>> import keras_vdrop as kv  # doctest: +SKIP
        >>> layer = kv.VariationalDense(1, kernel_prior="ard")  # doctest: +SKIP
        >>> layer.build((None, 4))  # doctest: +SKIP
        >>> kv.tfp.posterior(layer.kernel).event_shape.as_list()  # doctest: +SKIP
        [4, 1]
    """
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    scale = tf.exp(0.5 * weight.log_variance.value)
    return tfd.Independent(tfd.Normal(tf.cast(weight.loc, scale.dtype), scale), len(weight.shape))


def prior(weight: VariationalWeight) -> Any:
    """Return the prior of a `VariationalWeight`, one event of the weight's shape.

    An ARD prior is fitted to the current posterior.

    Args:
        weight: As for `posterior`.

    Returns:
        A `tfp.distributions.Independent`.

    Raises:
        ImportError: If TensorFlow Probability is not installed.
        NotImplementedError: For a prior that defines no distribution of TFP.

    Examples:
        >>> import keras_vdrop as kv, tensorflow_probability as tfp  # doctest: +SKIP
        >>> layer = kv.VariationalDense(1, kernel_prior="ard")  # doctest: +SKIP
        >>> layer.build((None, 4))  # doctest: +SKIP
        >>> q, p = kv.tfp.posterior(layer.kernel), kv.tfp.prior(layer.kernel)  # doctest: +SKIP
        >>> bool(abs(tfp.distributions.kl_divergence(q, p) - layer.kernel.kl()) < 1e-3)  # doctest: +SKIP
        True
    """
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    log_variance = weight.log_variance.value
    parameters = {name: tf.convert_to_tensor(value) for name, value in weight.prior_parameters.items()}
    distribution = weight.prior.distribution(tf.cast(weight.loc, log_variance.dtype), log_variance, **parameters)
    return tfd.Independent(_broadcast(distribution, weight.shape), len(weight.shape))


def _broadcast(distribution: Any, shape: Any) -> Any:
    """Return the same distribution with the given batch shape.

    It broadcasts a parameter if that suffices, since TFP registers KLs for the distribution itself but not for
    `BatchBroadcast`.
    """
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    if distribution.batch_shape == shape:
        return distribution
    for name, value in distribution.parameters.items():
        if isinstance(value, (float, tf.Tensor)):
            wide = distribution.copy(**{name: tf.broadcast_to(value, shape)})
            if wide.batch_shape == shape:
                return wide
    return tfd.BatchBroadcast(distribution, shape)


def __getattr__(name: str) -> Any:
    if name == "LogUniform":
        return log_uniform()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
