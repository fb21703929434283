"""Convolution layers: linear maps of patches, by a kernel that all positions share."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_vdrop.checks import check_positive_int
from keras_vdrop.functional.tensors import left_along
from keras_vdrop.layers.weights import AffineLayer


class ConvolutionLayer(AffineLayer):
    """Mixin for a Keras layer whose operation is `convolution_op`."""

    _outputs = "filters", (-1,)

    def __init__(self, *args: Any, **kwargs: Any):
        arguments = self._bind(args, kwargs)
        if "filters" in arguments:
            check_positive_int("filters", arguments["filters"])
        super().__init__(**arguments)

    def linear(self, x: Any, kernel: Any) -> Any:
        return self.convolution_op(x, kernel)

    def places(self, input_shape: Sequence[int | None]) -> int | None:
        """Count the positions of the outputs; multiplications by padding count too."""
        return super().places(self.compute_output_shape(input_shape))


class TransposedConvolutionLayer(ConvolutionLayer):
    """Mixin for a Keras layer whose operation is the gradient of a convolution."""

    _outputs = "filters", (-2,)

    def places(self, input_shape: Sequence[int | None]) -> int | None:
        """Count the positions of the inputs; multiplications for cropped outputs count too."""
        return AffineLayer.places(self, input_shape)

    def linear(self, x: Any, kernel: Any) -> Any:
        return ops.conv_transpose(
            x,
            kernel,
            strides=list(self.strides),
            padding=self.padding,
            output_padding=self.output_padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalConv1D(ConvolutionLayer, keras.layers.Conv1D):
    """y = activation(x ∗ W + b), W ~ N(loc, exp(log_variance)): `keras.layers.Conv1D` with a distribution for a kernel.

    In training (and within `sampling()`) W is drawn as in `VariationalConv2D`; otherwise W = loc, and 0 where pruned.

    Args:
        filters: Positive int, U.
        kernel_size, strides, padding, data_format, dilation_rate, groups, activation: As in `keras.layers.Conv1D`.
        use_bias, kernel_initializer, bias_initializer, kernel_regularizer: As in `keras.layers.Conv1D`.
        bias_regularizer, activity_regularizer, kernel_constraint, bias_constraint: As in `keras.layers.Conv1D`; those
            of the kernel apply to its mean.
        kernel_prior, bias_prior, estimator, kl_weight, initial_log_variance, log_variance_rate, threshold, seed: As in
            `VariationalDense`.
        lora_rank, lora_alpha: As in `Variational`.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        (B, T, D), or (B, D, T) with `data_format="channels_first"`.

    Output shape:
        (B, new T, U), or (B, U, new T).

    Raises:
        ValueError: For a value that is out of range, groups that do not divide the channels, or inputs whose channels
            are unknown.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalConv1D(8, 3, padding="causal", kl_weight=1 / 1000)
        >>> layer(keras.ops.ones((2, 5, 4))).shape == (2, 5, 8)
        True

    Reference:
        Variational Dropout Sparsifies Deep Neural Networks, Molchanov, Ashukha, Vetrov, 2017,
        https://arxiv.org/abs/1701.05369
    """

    def linear(self, x: Any, kernel: Any) -> Any:
        if self.padding != "causal":
            return super().linear(x, kernel)
        time = (self.dilation_rate[0] * (self.kernel_size[0] - 1), 0)
        x = ops.pad(x, ((0, 0), (0, 0), time) if self.data_format == "channels_first" else ((0, 0), time, (0, 0)))
        return ops.conv(x, kernel, list(self.strides), "valid", self.data_format, self.dilation_rate)


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalConv2D(ConvolutionLayer, keras.layers.Conv2D):
    """y = activation(x ∗ W + b), W ~ N(loc, exp(log_variance)): `keras.layers.Conv2D` with a distribution for a kernel.

    In training (and within `sampling()`) each example has its own draw of W, the same at all of its positions. It comes
    from flipout: x ∗ loc + ((x·r) ∗ Δ)·s, with Δ ~ N(0, exp(log_variance)) and signs r and s for every example and
    channel. "local_reparameterization" draws noise for every position instead, which is not a draw of W: `MonteCarlo`
    then does not show the uncertainty of the posterior. Otherwise W = loc, and 0 where pruned. `layer.losses` holds the
    KL between the kernel and its prior.

    Args:
        filters: Positive int, U.
        kernel_size, strides, padding, data_format, dilation_rate, groups, activation: As in `keras.layers.Conv2D`.
        use_bias, kernel_initializer, bias_initializer, kernel_regularizer: As in `keras.layers.Conv2D`.
        bias_regularizer, activity_regularizer, kernel_constraint, bias_constraint: As in `keras.layers.Conv2D`; those
            of the kernel apply to its mean.
        kernel_prior, bias_prior, estimator, kl_weight, initial_log_variance, log_variance_rate, threshold, seed: As in
            `VariationalDense`.
        lora_rank, lora_alpha: As in `Variational`.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        (B, height, width, D), or (B, D, height, width) with `data_format="channels_first"`.

    Output shape:
        (B, new height, new width, U), or (B, U, new height, new width).

    Raises:
        ValueError: For a value that is out of range, groups that do not divide the channels, or inputs whose channels
            are unknown.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalConv2D(8, 3, activation="relu", kl_weight=1 / 1000)
        >>> layer(keras.ops.ones((2, 5, 5, 1))).shape == (2, 3, 3, 8)
        True

    Reference:
        Variational Dropout Sparsifies Deep Neural Networks, Molchanov, Ashukha, Vetrov, 2017,
        https://arxiv.org/abs/1701.05369
    """


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalConv3D(ConvolutionLayer, keras.layers.Conv3D):
    """y = activation(x ∗ W + b), W ~ N(loc, exp(log_variance)): `keras.layers.Conv3D` with a distribution for a kernel.

    In training (and within `sampling()`) W is drawn as in `VariationalConv2D`; otherwise W = loc, and 0 where pruned.

    Args:
        filters: Positive int, U.
        kernel_size, strides, padding, data_format, dilation_rate, groups, activation: As in `keras.layers.Conv3D`.
        use_bias, kernel_initializer, bias_initializer, kernel_regularizer: As in `keras.layers.Conv3D`.
        bias_regularizer, activity_regularizer, kernel_constraint, bias_constraint: As in `keras.layers.Conv3D`; those
            of the kernel apply to its mean.
        kernel_prior, bias_prior, estimator, kl_weight, initial_log_variance, log_variance_rate, threshold, seed: As in
            `VariationalDense`.
        lora_rank, lora_alpha: As in `Variational`.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        (B, depth, height, width, D), or (B, D, depth, height, width) with `data_format="channels_first"`.

    Output shape:
        (B, new depth, new height, new width, U), or (B, U, new depth, new height, new width).

    Raises:
        ValueError: For a value that is out of range, groups that do not divide the channels, or inputs whose channels
            are unknown.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalConv3D(8, 3, kl_weight=1 / 1000)
        >>> layer(keras.ops.ones((2, 5, 5, 5, 1))).shape == (2, 3, 3, 3, 8)
        True

    Reference:
        Variational Dropout Sparsifies Deep Neural Networks, Molchanov, Ashukha, Vetrov, 2017,
        https://arxiv.org/abs/1701.05369
    """


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalConv1DTranspose(TransposedConvolutionLayer, keras.layers.Conv1DTranspose):
    """y = activation(Wᵀx + b), W ~ N(loc, exp(log_variance)): `keras.layers.Conv1DTranspose` with a random kernel.

    In training (and within `sampling()`) W is drawn as in `VariationalConv2D`; otherwise W = loc, and 0 where pruned.

    Args:
        filters: Positive int, U.
        kernel_size, strides, padding, output_padding, data_format, dilation_rate: As in `keras.layers.Conv1DTranspose`.
        activation, use_bias, kernel_initializer, bias_initializer: As in `keras.layers.Conv1DTranspose`.
        kernel_regularizer, bias_regularizer, activity_regularizer: As in `keras.layers.Conv1DTranspose`.
        kernel_constraint, bias_constraint: As in `keras.layers.Conv1DTranspose`; those of the kernel apply to its mean.
        kernel_prior, bias_prior, estimator, kl_weight, initial_log_variance, log_variance_rate, threshold, seed: As in
            `VariationalDense`.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        (B, T, D), or (B, D, T) with `data_format="channels_first"`.

    Output shape:
        (B, new T, U), or (B, U, new T).

    Raises:
        ValueError: For a value that is out of range, or inputs whose channels are unknown.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalConv1DTranspose(8, 2, strides=2, kl_weight=1 / 1000)
        >>> layer(keras.ops.ones((2, 5, 4))).shape == (2, 10, 8)
        True

    Reference:
        Variational Dropout Sparsifies Deep Neural Networks, Molchanov, Ashukha, Vetrov, 2017,
        https://arxiv.org/abs/1701.05369
    """


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalConv2DTranspose(TransposedConvolutionLayer, keras.layers.Conv2DTranspose):
    """y = activation(Wᵀx + b), W ~ N(loc, exp(log_variance)): `keras.layers.Conv2DTranspose` with a random kernel.

    In training (and within `sampling()`) W is drawn as in `VariationalConv2D`; otherwise W = loc, and 0 where pruned.

    Args:
        filters: Positive int, U.
        kernel_size, strides, padding, output_padding, data_format, dilation_rate: As in `keras.layers.Conv2DTranspose`.
        activation, use_bias, kernel_initializer, bias_initializer: As in `keras.layers.Conv2DTranspose`.
        kernel_regularizer, bias_regularizer, activity_regularizer: As in `keras.layers.Conv2DTranspose`.
        kernel_constraint, bias_constraint: As in `keras.layers.Conv2DTranspose`; those of the kernel apply to its mean.
        kernel_prior, bias_prior, estimator, kl_weight, initial_log_variance, log_variance_rate, threshold, seed: As in
            `VariationalDense`.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        (B, height, width, D), or (B, D, height, width) with `data_format="channels_first"`.

    Output shape:
        (B, new height, new width, U), or (B, U, new height, new width).

    Raises:
        ValueError: For a value that is out of range, or inputs whose channels are unknown.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalConv2DTranspose(8, 2, strides=2, kl_weight=1 / 1000)
        >>> layer(keras.ops.ones((2, 5, 5, 4))).shape == (2, 10, 10, 8)
        True

    Reference:
        Variational Dropout Sparsifies Deep Neural Networks, Molchanov, Ashukha, Vetrov, 2017,
        https://arxiv.org/abs/1701.05369
    """


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalDepthwiseConv2D(ConvolutionLayer, keras.layers.DepthwiseConv2D):
    """y_c = activation(x_c ∗ W_c + b_c), W ~ N(loc, exp(log_variance)): a `DepthwiseConv2D` with a random kernel.

    In training (and within `sampling()`) W is drawn as in `VariationalConv2D`; otherwise W = loc, and 0 where pruned.

    Args:
        kernel_size, strides, padding, depth_multiplier, data_format: As in `keras.layers.DepthwiseConv2D`.
        dilation_rate, activation, use_bias, depthwise_initializer: As in `keras.layers.DepthwiseConv2D`.
        bias_initializer, depthwise_regularizer, bias_regularizer: As in `keras.layers.DepthwiseConv2D`.
        activity_regularizer, depthwise_constraint, bias_constraint: As in `keras.layers.DepthwiseConv2D`; those of the
            kernel apply to its mean.
        kernel_prior, bias_prior, estimator, kl_weight, initial_log_variance, log_variance_rate, threshold, seed: As in
            `VariationalDense`.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        (B, height, width, D), or (B, D, height, width) with `data_format="channels_first"`.

    Output shape:
        (B, new height, new width, D·depth_multiplier), or with the channels second.

    Raises:
        ValueError: For a value that is out of range, or inputs whose channels are unknown.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalDepthwiseConv2D(3, depth_multiplier=2, kl_weight=1 / 1000)
        >>> layer(keras.ops.ones((2, 5, 5, 4))).shape == (2, 3, 3, 8)
        True

    Reference:
        Variational Dropout Sparsifies Deep Neural Networks, Molchanov, Ashukha, Vetrov, 2017,
        https://arxiv.org/abs/1701.05369
    """

    _outputs = "channels", (-2, -1)

    def linear(self, x: Any, kernel: Any) -> Any:
        return ops.depthwise_conv(x, kernel, self.strides, self.padding, self.data_format, self.dilation_rate)


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalSeparableConv2D(ConvolutionLayer, keras.layers.SeparableConv2D):
    """y = activation((x ∗ W)·V + b), W and V ~ N(loc, exp(log_variance)): a `SeparableConv2D` with random kernels.

    The layer applies a depthwise convolution and then a product at every position. In training (and within
    `sampling()`) it draws both kernels, `layer.depthwise_kernel` and `layer.pointwise_kernel`, as in
    `VariationalConv2D`.

    Args:
        filters: Positive int, U.
        kernel_size, strides, padding, data_format, dilation_rate: As in `keras.layers.SeparableConv2D`.
        depth_multiplier, activation, use_bias, depthwise_initializer: As in `keras.layers.SeparableConv2D`.
        pointwise_initializer, bias_initializer, depthwise_regularizer: As in `keras.layers.SeparableConv2D`.
        pointwise_regularizer, bias_regularizer, activity_regularizer: As in `keras.layers.SeparableConv2D`.
        depthwise_constraint, pointwise_constraint, bias_constraint: As in `keras.layers.SeparableConv2D`; those of a
            kernel apply to its mean.
        kernel_prior, bias_prior, estimator, kl_weight, initial_log_variance, log_variance_rate, threshold, seed: As in
            `VariationalDense`.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        (B, height, width, D), or (B, D, height, width) with `data_format="channels_first"`.

    Output shape:
        (B, new height, new width, U), or (B, U, new height, new width).

    Raises:
        ValueError: For a value that is out of range, or inputs whose channels are unknown.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalSeparableConv2D(8, 3, kl_weight=1 / 1000)
        >>> layer(keras.ops.ones((2, 5, 5, 4))).shape == (2, 3, 3, 8)
        True

    Reference:
        Variational Dropout Sparsifies Deep Neural Networks, Molchanov, Ashukha, Vetrov, 2017,
        https://arxiv.org/abs/1701.05369
    """

    _depthwise = VariationalDepthwiseConv2D.linear

    def transform(self, x: Any, noisy: bool) -> Any:
        estimator = self._estimator(x.shape)
        x = self._apply(self.depthwise_kernel, self._depthwise, x, noisy, estimator)
        return self._apply(self.pointwise_kernel, self._pointwise, x, noisy, estimator)

    def structure(self, kept: dict[str, np.ndarray]) -> dict[str, tuple[int, int]]:
        return {
            "channels": left_along(kept["depthwise_kernel"], (-2, -1)),
            "filters": left_along(kept["pointwise_kernel"], (-1,)),
        }

    def _pointwise(self, x: Any, kernel: Any) -> Any:
        if self.data_format == "channels_first":  # TensorFlow convolves this format on few devices only
            product = ops.matmul(ops.moveaxis(x, 1, -1), kernel[0, 0])
            return ops.cast(ops.moveaxis(product, -1, 1), kernel.dtype)  # PyTorch's product of float64 is float32
        return ops.conv(x, kernel, 1, "valid", self.data_format)
