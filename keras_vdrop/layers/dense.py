"""Dense layers."""

import re
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_vdrop.layers.weights import AffineLayer


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalDense(AffineLayer, keras.layers.Dense):
    """y = activation(x·W + b), W ~ N(loc, exp(log_variance)): `keras.layers.Dense` with a distribution for a kernel.

    In training (and within `sampling()`) each example has its own draw of W. For inputs (B, D) it comes from local
    reparameterization, x·loc + sqrt(x²·exp(log_variance))·ε, with ε ~ N(0, 1) for every example and unit. For inputs
    (B, ..., D), whose positions share W, it comes from flipout. Otherwise W = loc, and 0 where pruned. `layer.losses`
    holds the KL between the kernel and its prior.

    Args:
        units: Positive int, U.
        activation, use_bias, kernel_initializer, bias_initializer, kernel_regularizer: As in `keras.layers.Dense`.
        bias_regularizer, activity_regularizer, kernel_constraint, bias_constraint: As in `keras.layers.Dense`; those of
            the kernel apply to its mean.
        kernel_prior: "log_uniform" (prunes hardest), "ard" (prunes, and is a proper prior), "normal", "scale_mixture",
            a `priors.Prior`, a TFP distribution, or None for a plain kernel.
        bias_prior: The same for the bias; None for a plain bias.
        estimator: "local_reparameterization", "flipout" or "reparameterization" (see `functional.estimators`); or
            "auto": the first for inputs (B, D), else flipout.
        lora_rank, lora_alpha: As in `Variational`.
        kl_weight: Float ≥ 0, 1 / (number of training examples); None if the `ELBO` callback sets it.
        initial_log_variance: Float, the initial log_variance. None sets the standard deviation to 5 % (22 % with a
            normal prior) of the root mean square of the initial weights, which counts as 0.1 if they are all 0.
        log_variance_rate: Float > 0. A step of an optimizer such as Adam moves log_variance by about this many learning
            rates; SGD moves it by the gradient times the learning rate times log_variance_rate².
        threshold: Float, the log alpha above which a weight is pruned; None for that of the prior: 3, or 5 if the prior
            keeps or prunes weights in groups.
        seed: Int for the same noise in every run, or None.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        (B, ..., D).

    Output shape:
        (B, ..., U).

    Raises:
        ValueError: For a value that is out of range, or inputs whose last dimension is unknown.

    Examples:
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

    def linear(self, x: Any, kernel: Any) -> Any:
        return ops.matmul(x, kernel)


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalEinsumDense(AffineLayer, keras.layers.EinsumDense):
    """y = activation(einsum(equation, x, W) + b), W ~ N(loc, exp(log_variance)): `keras.layers.EinsumDense`.

    In training (and within `sampling()`) each example has its own draw of W. It comes from local reparameterization,
    einsum(x, loc) + sqrt(einsum(x², exp(log_variance)))·ε, if the example uses each weight once, and from flipout
    otherwise. Without noise W = loc, and 0 where pruned.

    Args:
        equation, output_shape, activation, bias_axes, kernel_initializer: As in `keras.layers.EinsumDense`.
        bias_initializer, kernel_regularizer, bias_regularizer, kernel_constraint: As in `keras.layers.EinsumDense`.
        bias_constraint: As in `keras.layers.EinsumDense`; those of the kernel apply to its mean.
        kernel_prior, bias_prior, estimator, kl_weight, initial_log_variance, log_variance_rate, threshold, seed: As in
            `VariationalDense`.
        lora_rank, lora_alpha: As in `Variational`.
        **kwargs: `name`, `dtype`, `trainable`, `activity_regularizer`.

    Input shape:
        (B, ...), the first operand of the equation.

    Output shape:
        (B, ...), the result of the equation.

    Raises:
        ValueError: For a value that is out of range, an equation that does not fit the inputs, or an axis of unknown
            size that the kernel shares with the inputs.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalEinsumDense("btd,dhk->bthk", (None, 2, 3), bias_axes="hk", kl_weight=1e-3)
        >>> layer(keras.ops.ones((2, 5, 4))).shape == (2, 5, 2, 3)
        True

    Reference:
        Variational Dropout Sparsifies Deep Neural Networks, Molchanov, Ashukha, Vetrov, 2017,
        https://arxiv.org/abs/1701.05369
    """

    def linear(self, x: Any, kernel: Any) -> Any:
        return ops.einsum(self.equation, x, kernel)

    def enable_lora(self, rank: int, *args: Any, **kwargs: Any) -> None:
        _, kernel, outputs = self._operands()
        if kernel[-1] != outputs[-1]:
            raise ValueError(
                "A low-rank update requires a kernel whose last axis is the last axis of the outputs. Received: "
                f"equation={self.equation!r}, lora_rank={rank}"
            )
        super().enable_lora(rank, *args, **kwargs)

    @property
    def _outputs(self) -> tuple[str, Sequence[int]]:
        _, kernel, outputs = self._operands()
        return "units", _positions(kernel, outputs)

    def _sign_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inputs, kernel, outputs = self._operands()
        batch = max(outputs.find(inputs[0]), 0)
        return (0, *_positions(inputs, kernel)), (batch, *_positions(outputs, kernel))

    def _operands(self) -> tuple[str, ...]:
        """Return the letters of the inputs, the kernel and the outputs, with a dot for an ellipsis."""
        operands = re.fullmatch(r"([a-zA-Z.]+),([a-zA-Z]+)->([a-zA-Z.]+)", self.equation.replace("...", "."))
        if operands is None:
            raise ValueError(
                '`equation` must be an einsum of two operands, such as "ab,bc->ac". Received: '
                f"equation={self.equation!r}"
            )
        return operands.groups()


def _positions(operand: str, letters: str) -> list[int]:
    """Return the axes of an einsum operand that `letters` names; those after an ellipsis (a dot here) are negative."""
    ellipsis = operand.find(".")
    past = [index - len(operand) if -1 < ellipsis < index else index for index in range(len(operand))]
    return [past[index] for index, letter in enumerate(operand) if letter != "." and letter in letters]
