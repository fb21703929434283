"""Convolution layers."""

import keras

from keras_vdrop.layers.base import AffineLayer, check_positive_int


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalConv2D(AffineLayer, keras.layers.Conv2D):
    """y = activation(x ∗ W + b), W ~ N(loc, exp(log_variance)): `keras.layers.Conv2D` with a distribution for a kernel.

    In training (and within `sampling()`) the convolution is drawn, by default by local reparameterisation:
    x ∗ loc + sqrt(x² ∗ exp(log_variance))·ε, with ε ~ N(0, 1) for every example, location and filter, which treats the
    kernel as drawn anew at every location; "flipout" and "reparameterization" do not. Otherwise W = loc, and 0
    where pruned. The KL of the kernel to its prior is in `layer.losses`.

    Args:
        filters: Positive int, U.
        kernel_size, strides, padding, data_format, dilation_rate, groups, activation, use_bias, kernel_initializer,
            bias_initializer, kernel_regularizer, bias_regularizer, activity_regularizer, kernel_constraint,
            bias_constraint: As in `keras.layers.Conv2D`; those of the kernel act on its mean.
        kernel_prior, bias_prior, estimator, kl_weight, initial_log_variance, threshold, seed: As in
            `VariationalDense`.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        (B, height, width, D), or (B, D, height, width) with `data_format="channels_first"`.

    Output shape:
        (B, new height, new width, U), or (B, U, new height, new width).

    Raises:
        ValueError: For a value that is out of range, groups that do not divide the channels, or inputs whose
            channels are unknown.

    Example:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalConv2D(8, 3, activation="relu", kl_weight=1 / 1000)
        >>> layer(keras.ops.ones((2, 5, 5, 1))).shape == (2, 3, 3, 8)
        True

    Reference:
        Variational Dropout Sparsifies Deep Neural Networks, Molchanov, Ashukha, Vetrov, 2017,
        https://arxiv.org/abs/1701.05369
    """

    def __init__(
        self,
        filters,
        kernel_size,
        strides=(1, 1),
        padding="valid",
        data_format=None,
        dilation_rate=(1, 1),
        groups=1,
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
        check_positive_int("filters", filters)
        super().__init__(
            filters=filters,
            kernel_size=kernel_size,
            strides=strides,
            padding=padding,
            data_format=data_format,
            dilation_rate=dilation_rate,
            groups=groups,
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
        return self.convolution_op(x, kernel)
