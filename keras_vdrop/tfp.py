"""Posteriors and priors as TensorFlow Probability distributions.

TFP takes seconds to import, so it is imported on first use.
"""

import functools


def posterior(weight):
    """Return the posterior of a `VariationalWeight`: independent N(loc, exp(log_variance)), one event of its shape.

    The pruning mask is ignored: pruned weights have a distribution too.

    Returns:
        A `tfp.distributions.Independent`. If nothing is pruned, `tfd.kl_divergence(posterior(w), prior(w))` equals
        `w.kl()`.
    """
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    scale = tf.exp(0.5 * weight.log_variance.value)
    return tfd.Independent(tfd.Normal(tf.cast(weight.loc, scale.dtype), scale), len(weight.shape))


def prior(weight):
    """Return the prior of a `VariationalWeight`, one event of the weight's shape.

    An ARD prior is fitted to the current posterior.

    Returns:
        A `tfp.distributions.Independent`.
    """
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    log_variance = weight.log_variance.value
    parameters = {name: tf.convert_to_tensor(value) for name, value in weight.prior_parameters.items()}
    distribution = weight.prior.distribution(tf.cast(weight.loc, log_variance.dtype), log_variance, **parameters)
    return tfd.Independent(_broadcast(distribution, weight.shape), len(weight.shape))


def _broadcast(distribution, shape):
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


def __getattr__(name):
    if name == "LogUniform":
        return _log_uniform()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _log_uniform():
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    from keras_vdrop import priors

    class LogUniform(tfd.Distribution):
        """The prior p(|w|) ∝ 1/|w| over all real w. It is improper: a log density up to a constant, and no samples.

        The KL of a `tfd.Normal` to it is registered, normalised to 0 for variance / loc² → ∞.

        Args:
            batch_shape: Tuple of ints, the shape of independent copies.
            form: Approximation of the KL, as in `priors.LogUniform`.
            dtype: Dtype of the values.
        """

        def __init__(self, batch_shape=(), form="sigmoid", dtype="float32", name="LogUniform"):
            parameters = dict(locals())
            self._prior = priors.LogUniform(form)
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
        def _parameter_properties(cls, dtype, num_classes=None):
            return {}

        def _batch_shape(self):
            return tf.TensorShape(self._batch)

        def _batch_shape_tensor(self):
            return tf.constant(self._batch, "int32")

        def _event_shape(self):
            return tf.TensorShape([])

        def _event_shape_tensor(self):
            return tf.constant([], "int32")

        def _log_prob(self, value):
            return -tf.math.log(tf.abs(value))

    @tfd.RegisterKL(tfd.Normal, LogUniform)
    def _kl_normal_log_uniform(posterior, prior, name=None):
        with tf.name_scope(name or "kl_normal_log_uniform"):
            loc, scale = tf.convert_to_tensor(posterior.loc), tf.convert_to_tensor(posterior.scale)
            return prior._prior.kl(loc, 2.0 * tf.math.log(scale))

    return LogUniform
