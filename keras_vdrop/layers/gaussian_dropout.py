"""`VariationalGaussianDropout`: multiplicative Gaussian noise on activations, of learned variance."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_vdrop import priors
from keras_vdrop.checks import check_finite, check_rate, is_int
from keras_vdrop.functional import noise
from keras_vdrop.functional.tensors import is_float, left_along
from keras_vdrop.layers.stochastic import StochasticLayer
from keras_vdrop.posterior import VariationalWeight
from keras_vdrop.sampling import mask_shape


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalGaussianDropout(StochasticLayer):
    """y = x·s, s ~ N(1, alpha) for every example and unit: multiplicative noise of learned variance alpha.

    The posterior is over a scale s for each unit; a draw of it is the same at all positions of an example. Its KL to
    the prior, log-uniform by default, is in `layer.losses`: the noise grows as far as the data allow. A unit whose log
    alpha exceeds the threshold carries no information: `prune` sets it to 0, and `sparsity` counts it. Without noise
    (in prediction, outside `sampling()`) y = x.

    Args:
        rate: Float in (0, 1), which sets the initial alpha to rate / (1 − rate).
        alpha: "unit" to learn one alpha for each unit; "layer" to learn one for all units (the KL still counts every
            unit, and nothing is pruned); "fixed" for noise as in `keras.layers.GaussianDropout`, with noise for every
            entry and no KL, but active under `sampling()` too.
        prior: "log_uniform", "ard", or a `priors.Prior`. `priors.LogUniform("cubic")` is that of the paper: alpha is
            kept at or below 1 (also initially), where its cubic KL is valid, so nothing is pruned.
        axis: Int, the axis of the units in the input.
        kl_weight: Float ≥ 0, 1 / (number of training examples); None if the `ELBO` callback sets it.
        threshold: Float, the log alpha above which a unit is pruned; None for that of the prior.
        seed: Int for the same noise in every run, or None.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        (B, ...), of known size along `axis`.

    Output shape:
        That of the input.

    Raises:
        ValueError: For a value that is out of range, or an unknown number of units.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalGaussianDropout(0.2, kl_weight=1 / 1000)
        >>> layer(keras.ops.ones((2, 5))).shape == (2, 5)
        True
        >>> round(float(keras.ops.exp(layer.scale.log_alpha()[0])), 3)
        0.25

    Reference:
        Variational Dropout and the Local Reparameterization Trick, Kingma, Salimans, Welling, 2015,
        https://arxiv.org/abs/1506.02557
    """

    def __init__(
        self,
        rate: float = 0.5,
        alpha: Literal["unit", "layer", "fixed"] = "unit",
        prior: Any = "log_uniform",
        axis: int = -1,
        kl_weight: float | None = None,
        threshold: float | None = 3.0,
        seed: int | None = None,
        **kwargs: Any,
    ):
        check_rate("rate", rate)
        if rate == 0.0:
            raise ValueError("`rate` must be > 0, or the initial log alpha is infinite. Received: rate=0.0")
        if alpha not in ("unit", "layer", "fixed"):
            raise ValueError(f'`alpha` must be "unit", "layer" or "fixed". Received: alpha={alpha!r}')
        if not is_int(axis) or axis == 0:
            raise ValueError(f"`axis` must be an int other than 0, the batch axis. Received: axis={axis!r}")
        if threshold is not None:
            check_finite("threshold", threshold)
        prior = priors.get(prior)
        if prior is None:
            raise ValueError(
                '`prior` must not be None. For noise of fixed variance, pass `alpha="fixed"` and omit `prior`. '
                "Received: prior=None"
            )
        super().__init__(kl_weight=kl_weight, seed=seed, **kwargs)
        self.rate = float(rate)
        self.alpha = alpha
        self.prior = prior
        self.axis = int(axis)
        self.threshold = None if threshold is None else float(threshold)
        self.supports_masking = True

    def build(self, input_shape: Sequence[int | None]) -> None:
        rank = len(input_shape)
        if not -rank < self.axis < rank:
            raise ValueError(
                f"`axis` must be an axis of the inputs other than the batch axis. Received: axis={self.axis} and "
                f"input_shape={tuple(input_shape)}"
            )
        units = input_shape[self.axis]
        if units is None:
            raise ValueError(
                f"Dimension {self.axis} of the inputs to {self.name!r}, the number of units, must be known. Specify it "
                f"in `keras.Input`. Received: input_shape={tuple(input_shape)}"
            )
        if self.alpha != "fixed":
            capped = isinstance(self.prior, priors.LogUniform) and self.prior.form == "cubic"
            self._posterior_size = units
            self.scale = VariationalWeight(
                self,
                self.add_weight,
                "scale",
                (units,),
                prior=self.prior,
                initial_log_variance=min(self._initial_log_alpha, 0.0) if capped else self._initial_log_alpha,
                log_variance_rate=1.0,
                initializer="ones",
                learn_loc=False,
                prunable=self.alpha == "unit",
                log_variance_shape=None if self.alpha == "unit" else (1,),
                log_variance_constraint=AtMostZero() if capped else None,
            )
        super().build(input_shape)

    @property
    def _initial_log_alpha(self) -> float:
        return math.log(self.rate / (1.0 - self.rate))

    def call(self, inputs: Any, training: bool | None = False) -> Any:
        noisy = self._noisy(training)
        if noisy and not is_float(inputs):
            inputs = ops.cast(inputs, self.compute_dtype)
        if self.alpha == "fixed":
            return self._fixed(inputs) if noisy else inputs
        shape = [1] * len(inputs.shape)
        shape[self.axis] = -1
        # Apply the scales to an input of ones with one position per example, so that all positions share a draw.
        dtype = inputs.dtype if is_float(inputs) else self.compute_dtype
        ones = ops.ones((ops.shape(inputs)[0], *[1] * (len(inputs.shape) - 1)), dtype)
        scale = self.scale.apply(
            lambda one, scale: one * ops.reshape(scale, shape),
            ones,
            noisy=noisy,
            estimator="local_reparameterization",
            seed=self._seeds(),
            sign_axes=None,
            dtype=dtype,
        )
        return inputs * scale

    def _fixed(self, x: Any) -> Any:
        epsilon = noise.normal(mask_shape(ops.shape(x)), self._seeds())
        return x * ops.cast(1.0 + math.exp(0.5 * self._initial_log_alpha) * epsilon, x.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def structure(self, kept: dict[str, np.ndarray]) -> dict[str, tuple[int, int]]:
        return {"units": left_along(kept["scale"], (0,))}

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "rate": self.rate,
            "alpha": self.alpha,
            "prior": priors.serialize(self.prior),
            "axis": self.axis,
            "threshold": self.threshold,
        }


class AtMostZero(keras.constraints.Constraint):
    """Projects a log alpha onto values ≤ 0, that is, alpha ≤ 1."""

    def __call__(self, w: Any) -> Any:
        return ops.minimum(w, 0.0)
