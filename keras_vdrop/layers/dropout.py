"""Noise on activations: Gaussian of learned variance, Bernoulli of learned rate, Bernoulli that prediction can draw."""

import math
import numbers

import keras
from keras import ops

from keras_vdrop import priors
from keras_vdrop.checks import check_finite, check_positive, check_rate
from keras_vdrop.functional import noise
from keras_vdrop.functional.tensors import is_float, left_along
from keras_vdrop.layers.stochastic import StochasticLayer
from keras_vdrop.posterior import KLPenalty, Posterior, VariationalWeight
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
        threshold: Float, the log alpha above which `sparsity` and `prune` drop a unit.
        seed: Int for the same noise in every run, or None.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        (B, ...), of known size along `axis`.

    Output shape:
        That of the input.

    Raises:
        ValueError: For a value that is out of range, or an unknown number of units.

    Example:
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
        rate=0.5,
        alpha="unit",
        prior="log_uniform",
        axis=-1,
        kl_weight=None,
        threshold=3.0,
        seed=None,
        **kwargs,
    ):
        check_rate("rate", rate)
        if rate == 0.0:
            raise ValueError("`rate` must be > 0: noise that is not there cannot grow. Received: rate=0.0")
        if alpha not in ("unit", "layer", "fixed"):
            raise ValueError(f'`alpha` must be "unit", "layer" or "fixed". Received: alpha={alpha!r}')
        if not isinstance(axis, numbers.Integral) or isinstance(axis, bool) or axis == 0:
            raise ValueError(f"`axis` must be an int other than 0, the batch. Received: axis={axis!r}")
        check_finite("threshold", threshold)
        prior = priors.get(prior)
        if prior is None:
            raise ValueError(
                '`prior` must not be None. For noise that stays as it is, pass alpha="fixed" and no prior.'
            )
        super().__init__(kl_weight=kl_weight, seed=seed, **kwargs)
        self.rate = float(rate)
        self.alpha = alpha
        self.prior = prior
        self.axis = int(axis)
        self.threshold = float(threshold)
        self.supports_masking = True

    def build(self, input_shape):
        rank = len(input_shape)
        if not -rank < self.axis < rank:
            raise ValueError(
                f"`axis` must be one of the inputs' other than the batch. Received: axis={self.axis}, and "
                f"input_shape={tuple(input_shape)}"
            )
        units = input_shape[self.axis]
        if units is None:
            raise ValueError(
                f"Dimension {self.axis} of the inputs to {self.name!r}, the units, must be known. Received: "
                f"input_shape={tuple(input_shape)}; give it in `keras.Input`."
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
    def _initial_log_alpha(self):
        return math.log(self.rate / (1.0 - self.rate))

    def call(self, inputs, training=False):
        noisy = self._noisy(training)
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

    def _fixed(self, x):
        epsilon = noise.normal(mask_shape(ops.shape(x)), self._seeds())
        return x * ops.cast(1.0 + math.exp(0.5 * self._initial_log_alpha) * epsilon, x.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def structure(self, kept):
        return {"units": left_along(kept["scale"], (0,))}

    def get_config(self):
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

    def __call__(self, w):
        return ops.minimum(w, 0.0)


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

    Example:
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
        layer,
        initial_rate=0.1,
        temperature=0.1,
        prior_scale=1.0,
        spatial=False,
        kl_weight=None,
        seed=None,
        **kwargs,
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

    def build(self, input_shape):
        channels = input_shape[self._channel_axis()]
        if channels is None:
            raise ValueError(
                f"The channels of the inputs to {self.name!r} must be known. Received: "
                f"input_shape={tuple(input_shape)}; give them in `keras.Input`."
            )
        keras.layers.Wrapper.build(self, input_shape)
        kernel = getattr(self.layer, "kernel", None)
        if not isinstance(kernel, keras.Variable):
            raise ValueError(
                "ConcreteDropout wraps a layer with a plain `kernel`, whose weight decay is part of its KL. Received: "
                f"layer={self.layer.name!r} of type {type(self.layer).__name__}, with kernel={kernel!r}"
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

    def _channel_axis(self):
        return 1 if getattr(self.layer, "data_format", None) == "channels_first" else -1

    @property
    def rate(self):
        """p, the probability that an input is dropped, as learned so far."""
        return ops.sigmoid(ops.convert_to_tensor(self.rate_logit))

    def call(self, inputs, training=False):
        return self.layer(self._drop(inputs) if self._noisy(training) else inputs)

    def _drop(self, x):
        shape = ops.shape(x)
        if self.spatial:
            kept = (0, self._channel_axis() % len(shape))
            shape = tuple(size if axis in kept else 1 for axis, size in enumerate(shape))
        logit = ops.convert_to_tensor(self.rate_logit)
        dropped = noise.concrete(mask_shape(shape), logit, self.temperature, self._seeds())
        return x * ops.cast((1.0 - dropped) / (1.0 - self.rate), x.dtype)

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "initial_rate": self.initial_rate,
            "temperature": self.temperature,
            "prior_scale": self.prior_scale,
            "spatial": self.spatial,
        }


class BernoulliRate(Posterior):
    """The posterior of a kernel whose input channels are dropped: W times a Bernoulli variable for each channel."""

    def __init__(self, owner, kernel, channels):
        super().__init__(owner, channels)
        self.kernel = kernel

    @property
    def variables(self):
        return [self.owner.rate_logit]

    def kl(self):
        rate = self.owner.rate
        logit = ops.convert_to_tensor(self.owner.rate_logit)
        # Compute both logarithms from the logit, so that they are finite at every rate.
        entropy = rate * ops.softplus(-logit) + (1.0 - rate) * ops.softplus(logit)
        squares = ops.sum(ops.square(ops.cast(ops.convert_to_tensor(self.kernel), "float32")))
        decay = squares * (1.0 + ops.exp(logit)) / (2.0 * self.owner.prior_scale**2)
        return decay + self.size * (math.log(2.0) - entropy)


@keras.saving.register_keras_serializable(package="keras_vdrop")
class MonteCarloDropout(StochasticLayer, keras.layers.Dropout):
    """y = x·z / (1 − rate), z ~ Bernoulli(1 − rate): `keras.layers.Dropout` that is also active under `sampling()`.

    In a model that `MonteCarlo` wraps, it drops inputs at prediction, as in MC dropout, while BatchNormalization and
    Keras's own Dropout stay in inference mode. Without noise y = x.

    Args:
        rate: Float in [0, 1], the probability that an input is dropped.
        noise_shape: As in `keras.layers.Dropout`: the shape of the mask, broadcast to the input; None along an axis
            stands for the input's size.
        seed: Int for the same noise in every run, or None.
        per_example: Whether every example has its own mask. If not, all examples of a call share one mask, so that a
            draw is one network. For one mask in a whole prediction use `MonteCarlo(consistent=True)`.
        **kwargs: `name`, `dtype`.

    Input shape:
        (B, ...).

    Output shape:
        That of the input.

    Raises:
        ValueError: For a value that is out of range.

    Example:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.MonteCarloDropout(0.5, seed=0)
        >>> x = keras.ops.ones((2, 8))
        >>> bool(keras.ops.all(layer(x) == x))
        True
        >>> with kv.sampling():
        ...     bool(keras.ops.all(layer(x) == x))
        False

    Reference:
        Dropout as a Bayesian Approximation, Gal, Ghahramani, 2016, https://arxiv.org/abs/1506.02142
    """

    def __init__(self, rate, noise_shape=None, seed=None, per_example=True, **kwargs):
        super().__init__(rate=rate, noise_shape=noise_shape, seed=seed, **kwargs)
        self.per_example = bool(per_example)

    @property
    def draws(self):
        return self.rate > 0.0

    def call(self, inputs, training=False):
        if not self.draws or not self._noisy(training):
            return inputs
        shape = list(ops.shape(inputs))
        for axis, size in enumerate(self.noise_shape or ()):
            shape[axis] = shape[axis] if size is None else size
        if not self.per_example:
            shape[0] = 1
        keep = noise.bernoulli(mask_shape(shape), 1.0 - self.rate, self._seeds(), inputs.dtype)
        return inputs * (keep / (1.0 - self.rate)) if self.rate < 1.0 else ops.zeros_like(inputs)

    def get_config(self):
        config = {**super().get_config(), "per_example": self.per_example}
        del config["kl_weight"]  # the layer has no KL
        return config
