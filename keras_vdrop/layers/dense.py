"""Dense layers."""

import keras
from keras import ops

from keras_vdrop.layers.base import AffineLayer


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalDense(AffineLayer, keras.layers.Dense):
    """y = activation(x·W + b), W ~ N(loc, exp(log_variance)): `keras.layers.Dense` with a distribution for a kernel.

    In training (and within `sampling()`) the product is drawn, by default by local reparameterisation:
    x·loc + sqrt(x²·exp(log_variance))·ε, with ε ~ N(0, 1) for every example and unit. Otherwise W = loc, and 0 where
    pruned. The KL of the kernel to its prior is in `layer.losses`.

    Args:
        units: Positive int, U.
        activation, use_bias, kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer,
            activity_regularizer, kernel_constraint, bias_constraint: As in `keras.layers.Dense`; those of the kernel
            act on its mean.
        kernel_prior: "log_uniform" (prunes hardest), "ard" (prunes, and is a proper prior), "normal",
            a `priors.Prior`, a TFP distribution, or None for a plain kernel.
        bias_prior: The same for the bias; None, a plain bias.
        estimator: "local_reparameterization", "flipout" or "reparameterization": see `functional.estimators`.
        kl_weight: Float ≥ 0, 1 / (number of training examples); None where the `ELBO` callback sets it.
        initial_log_variance: Float, where log_variance starts.
        threshold: Float, the log alpha above which `sparsity` and `prune` give a weight up.
        seed: Int for the same noise in every run, or None.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        (B, ..., D).

    Output shape:
        (B, ..., U).

    Raises:
        ValueError: For a value that is out of range, or inputs whose last dimension is unknown.

    Example:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalDense(3, kl_weight=1 / 1000)
        >>> layer(keras.ops.ones((2, 4))).shape == (2, 3)
        True
        >>> layer.kernel.loc.shape == (4, 3)
        True

    Reference:
        Variational Dropout Sparsifies Deep Neural Networks, Molchanov, Ashukha, Vetrov, 2017,
        https://arxiv.org/abs/1701.05369
    """

    def __init__(
        self,
        units,
        activation=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        *,
        kernel_prior="log_uniform",
        bias_prior=None,
        estimator="local_reparameterization",
        kl_weight=None,
        initial_log_variance=-10.0,
        threshold=3.0,
        seed=None,
        **kwargs,
    ):
        super().__init__(
            units=units,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            kernel_prior=kernel_prior,
            bias_prior=bias_prior,
            estimator=estimator,
            kl_weight=kl_weight,
            initial_log_variance=initial_log_variance,
            threshold=threshold,
            seed=seed,
            **kwargs,
        )

    def linear(self, x, kernel):
        return ops.matmul(x, kernel)
