"""`ConcreteDropout`: dropout before a layer, of learned rate."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_vdrop.checks import check_positive, check_rate
from keras_vdrop.functional import noise
from keras_vdrop.functional.tensors import channel_axis, is_float
from keras_vdrop.layers.stochastic import StochasticLayer
from keras_vdrop.posterior import KLPenalty, Posterior
from keras_vdrop.sampling import mask_shape


@keras.saving.register_keras_serializable(package="keras_vdrop")
class ConcreteDropout(StochasticLayer, keras.layers.Wrapper):
    """y = layer(x·z / (1 − p)), z ~ Bernoulli(1 − p) relaxed, with a learned rate p: Dropout that learns its rate.

    z = 1 − σ((logit p + logit u) / temperature), u ~ U(0, 1);
    KL = ‖W‖² / (2·prior_scale²·(1 − p)) + D·(log 2 − H(p)), with the wrapped layer's kernel W, the number D of input
    channels, and the entropy H of a Bernoulli variable

    The first term is weight decay of the wrapped kernel, which costs more at a greater rate. The second term pulls the
    rate towards ½. Both are in nats, in `layer.losses`, and weighted by `kl_weight`, 1 / (number of training examples),
    like every KL here. With fewer data the learned rate is therefore greater. Without noise (in prediction, outside
    `sampling()`) y = layer(x).

    Args:
        layer: A Keras layer with a plain `kernel`, such as Dense, Conv2D or EinsumDense.
        initial_rate: Float in (0, 1), the initial p.
        temperature: Float > 0, the temperature of the relaxation; as it approaches 0, z becomes 0 or 1.
        prior_scale: Float > 0, the standard deviation of the prior of a weight (the paper's 1 / l).
        spatial: Whether whole channels are dropped, the same at every position, as suits a convolution.
        kl_weight: Float ≥ 0, 1 / (number of training examples); None if the `ELBO` callback sets it.
        seed: Int for the same noise in every run, or None.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        That of the wrapped layer.

    Output shape:
        That of the wrapped layer.

    Raises:
        ValueError: For a value that is out of range, a layer without a kernel, or a kernel that already has a prior.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.ConcreteDropout(keras.layers.Dense(3), kl_weight=1 / 1000)
        >>> layer(keras.ops.ones((2, 5))).shape == (2, 3)
        True
        >>> round(float(layer.rate), 3)
        0.1

    Reference:
        Concrete Dropout, Gal, Hron, Kendall, 2017, https://arxiv.org/abs/1705.07832
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        initial_rate: float = 0.1,
        temperature: float = 0.1,
        prior_scale: float = 1.0,
        spatial: bool = False,
        kl_weight: float | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        check_rate("initial_rate", initial_rate)
        if initial_rate == 0.0:
            raise ValueError("`initial_rate` must be > 0, or its logit is infinite. Received: initial_rate=0.0")
        for name, value in (("temperature", temperature), ("prior_scale", prior_scale)):
            check_positive(name, value)
        super().__init__(layer=layer, kl_weight=kl_weight, seed=seed, **kwargs)
        self.initial_rate = float(initial_rate)
        self.temperature = float(temperature)
        self.prior_scale = float(prior_scale)
        self.spatial = bool(spatial)
        self.supports_masking = True

    def build(self, input_shape: Sequence[int | None]) -> None:
        channels = input_shape[channel_axis(self.layer)]
        if channels is None:
            raise ValueError(
                f"The number of channels of the inputs to {self.name!r} must be known. Specify it in `keras.Input`. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        keras.layers.Wrapper.build(self, input_shape)
        kernel = getattr(self.layer, "kernel", None)
        if not isinstance(kernel, keras.Variable):
            raise ValueError(
                "ConcreteDropout requires a layer with a plain `kernel`, because its KL includes the weight decay of "
                f"the kernel. Received: layer={self.layer.name!r} of type {type(self.layer).__name__}, "
                f"with kernel={kernel!r}"
            )
        posterior = BernoulliRate(self, kernel, channels)
        self.rate_logit = self.add_weight(
            name="rate_logit",
            shape=(),
            initializer=keras.initializers.Constant(math.log(self.initial_rate / (1.0 - self.initial_rate))),
            regularizer=KLPenalty(posterior),
            dtype="float32",
            autocast=False,
        )
        self._posterior_size = posterior.size
        self._build_noise()

    @property
    def rate(self) -> Any:
        """p, the probability that an input is dropped, as learned so far; `initial_rate` before `build`."""
        if not hasattr(self, "rate_logit"):
            return self.initial_rate
        return ops.sigmoid(ops.convert_to_tensor(self.rate_logit))

    def call(self, inputs: Any, training: bool | None = False) -> Any:
        return self.layer(self._drop(inputs) if self._noisy(training) else inputs)

    def _drop(self, x: Any) -> Any:
        if not is_float(x):
            x = ops.cast(x, self.compute_dtype)
        shape = ops.shape(x)
        if self.spatial:
            kept = (0, channel_axis(self.layer) % len(shape))
            shape = tuple(size if axis in kept else 1 for axis, size in enumerate(shape))
        logit = ops.convert_to_tensor(self.rate_logit)
        dropped = noise.concrete(mask_shape(shape), logit, self.temperature, self._seeds())
        return x * ops.cast((1.0 - dropped) / (1.0 - self.rate), x.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.layer.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "initial_rate": self.initial_rate,
            "temperature": self.temperature,
            "prior_scale": self.prior_scale,
            "spatial": self.spatial,
        }


class BernoulliRate(Posterior):
    """The posterior of a kernel whose input channels are dropped: W times a Bernoulli variable for each channel."""

    def __init__(self, owner: ConcreteDropout, kernel: Any, channels: int):
        super().__init__(owner, channels)
        self.kernel = kernel

    @property
    def variables(self) -> list[Any]:
        return [self.owner.rate_logit]

    def kl(self) -> Any:
        rate = self.owner.rate
        logit = ops.convert_to_tensor(self.owner.rate_logit)
        # Compute both logarithms from the logit, so that they are finite at every rate.
        entropy = rate * ops.softplus(-logit) + (1.0 - rate) * ops.softplus(logit)
        squares = ops.sum(ops.square(ops.cast(ops.convert_to_tensor(self.kernel), "float32")))
        decay = squares * (1.0 + ops.exp(logit)) / (2.0 * self.owner.prior_scale**2)
        return decay + self.size * (math.log(2.0) - entropy)
