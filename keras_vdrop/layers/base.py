"""What all variational layers share, as mixins to Keras's own layers.

A variational layer is `class VariationalX(VariationalLayer, keras.layers.X)`. Keras's layer brings its arguments, their
checks, its shapes and its `build`; `VariationalLayer.add_weight` answers that `build` with a `VariationalWeight`
wherever a prior is given, and the layer's `call` applies it.
"""

import contextvars
import functools
import math
import numbers
import warnings
import weakref

import keras
from keras import ops

from keras_vdrop import priors
from keras_vdrop.functional import estimators
from keras_vdrop.posterior import VariationalWeight
from keras_vdrop.sampling import is_sampling, seed_generator

# Built layers whose `kl_weight` nobody has set, and of which nobody has been told.
_unset = weakref.WeakSet()

_UNSET_MESSAGE = (
    "The KL weight of these variational layers was never set, so each layer's KL is averaged over its weights. That "
    "trains, but the loss is not the ELBO and regularises by a strength of no meaning. Pass "
    "`callbacks=[keras_vdrop.ELBO(num_examples=len(x_train))]` to `fit`, or `kl_weight=1 / len(x_train)` to each layer."
)

_LARGEST_LOG_VARIANCE = 80

_SEED_STATE = "seed_generator_state"


class VariationalLayer(keras.layers.Layer):
    """Mixin that makes a Keras layer's weights variational.

    Args:
        kernel_prior: Prior of every weight but the bias: "log_uniform", "ard", "normal", a `priors.Prior`,
            a TFP distribution, or None for a plain weight.
        bias_prior: The same for the bias.
        estimator: One of `functional.estimators.ESTIMATORS`: how noise enters the output.
        kl_weight: Float ≥ 0, the factor of the KL in the loss: 1 / (number of training examples) where the data loss
            is a mean over examples. Leave None where the `ELBO` callback sets it.
        initial_log_variance: Float, where log_variance starts.
        threshold: Float, the log alpha above which `sparsity` and `prune` give a weight up.
        seed: Int for the same noise in every run, or None.
        **kwargs: The arguments of the Keras layer.
    """

    def __init__(
        self,
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
        if estimator not in self._estimators():
            raise ValueError(f"`estimator` must be one of {self._estimators()}. Received: estimator={estimator!r}")
        if kl_weight is not None:
            _check_kl_weight(kl_weight)
        check_finite("initial_log_variance", initial_log_variance)
        if abs(initial_log_variance) > _LARGEST_LOG_VARIANCE:
            raise ValueError(
                f"`initial_log_variance` is the log of a variance, usually from −10 to 0, and within "
                f"±{_LARGEST_LOG_VARIANCE}. Received: initial_log_variance={initial_log_variance!r}"
            )
        check_finite("threshold", threshold)
        if seed is not None and not isinstance(seed, int):
            raise ValueError(f"`seed` must be an int or None. Received: seed={seed!r}")
        kernel_prior, bias_prior = priors.get(kernel_prior), priors.get(bias_prior)
        super().__init__(**kwargs)
        self.kernel_prior = kernel_prior
        self.bias_prior = bias_prior
        self.estimator = estimator
        self.initial_log_variance = float(initial_log_variance)
        self.threshold = float(threshold)
        self.seed = seed
        self._initial_kl_weight = None if kl_weight is None else float(kl_weight)
        self._kl_weight = None
        self._variational_size = 0

    @classmethod
    def _estimators(cls):
        return tuple(estimators.ESTIMATORS)

    def _channel_axis(self):
        """The axis of the channels in inputs and outputs."""
        return 1 if getattr(self, "data_format", None) == "channels_first" else -1

    # Weights

    def build(self, input_shape):
        if input_shape[self._channel_axis()] is None:
            raise ValueError(
                f"The last dimension of the inputs to {self.name!r} must be known to build its weights (with "
                f"channels_first, the second). Received: input_shape={tuple(input_shape)}; give it in `keras.Input`."
            )
        super().build(input_shape)
        # `Bidirectional` makes two layers of one config; their noise must differ nonetheless.
        backward = any(part.startswith("backward_") for part in (self.path or self.name).split("/"))
        self.seed_generator = seed_generator(self.seed, "backward" if backward else "forward")
        if self._variational_size:
            self._kl_weight = super().add_weight(
                name="kl_weight",
                shape=(),
                initializer=keras.initializers.Constant(self._default_kl_weight()),
                dtype="float32",
                trainable=False,
                autocast=False,
            )
            if self._initial_kl_weight is None:
                _unset.add(self)

    def add_weight(self, shape=None, initializer=None, dtype=None, trainable=True, name=None, **arguments):
        """As in Keras; but a trainable weight with a prior becomes a `VariationalWeight`."""
        prior = self.bias_prior if name is not None and "bias" in name else self.kernel_prior
        arguments["initializer"] = initializer
        if prior is None or not trainable:
            return super().add_weight(shape=shape, dtype=dtype, trainable=trainable, name=name, **arguments)
        self._variational_size += math.prod(shape)
        return VariationalWeight(
            self,
            super().add_weight,
            name,
            shape,
            prior=prior,
            estimator=self.estimator,
            initial_log_variance=self.initial_log_variance,
            **arguments,
        )

    # Noise

    def _noisy(self, training):
        """Whether this call draws its weights."""
        if training and self in _unset:
            _unset.clear()  # one warning speaks for all layers there are
            warnings.warn(_UNSET_MESSAGE, stacklevel=2)
        return bool(training) or is_sampling()

    def _apply(self, weight, linear, x, noisy):
        """`linear(x, weight)` for a plain or a variational weight."""
        if not isinstance(weight, VariationalWeight):
            return linear(x, ops.cast(weight, x.dtype))
        seed = self._replayed_seeds.get() or self.seed_generator
        return weight.apply(linear, x, noisy=noisy, seed=seed, channel_axis=self._channel_axis())

    _replayed_seeds = contextvars.ContextVar("replayed_seeds", default=None)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """As in Keras (within `keras.RematScope`), but so that the second computation draws the noise of the first."""
        state = self.seed_generator.next()

        @functools.wraps(layer_call)
        def call(*args):
            token = self._replayed_seeds.set(_ReplayedSeeds(state))
            try:
                return layer_call(*args, **kwargs)
            finally:
                self._replayed_seeds.reset(token)

        # TensorFlow takes no keywords here, and Keras passes `training` as one.
        rematerialized = super().rematerialized_call(call, *args)
        return lambda *args, **_: rematerialized(*args)

    # The KL and its weight

    @property
    def kl_weight(self):
        """The factor of this layer's KL in the loss: a float32 variable once the layer is built; assignable."""
        return self._initial_kl_weight if self._kl_weight is None else self._kl_weight

    @kl_weight.setter
    def kl_weight(self, value):
        _check_kl_weight(value)
        if self._kl_weight is None:
            self._initial_kl_weight = float(value)
        else:
            self._kl_weight.assign(value)
            _unset.discard(self)

    def _default_kl_weight(self):
        return 1.0 / self._variational_size if self._initial_kl_weight is None else self._initial_kl_weight

    def weighted_kl(self, weight):
        """The term that one of the layer's variational weights adds to the loss."""
        kl = weight.kl()
        return ops.cast(self._kl_weight, kl.dtype) * kl

    # Saving

    def get_config(self):
        return {
            **super().get_config(),
            "kernel_prior": priors.serialize(self.kernel_prior),
            "bias_prior": priors.serialize(self.bias_prior),
            "estimator": self.estimator,
            "kl_weight": self._initial_kl_weight,
            "initial_log_variance": self.initial_log_variance,
            "threshold": self.threshold,
            "seed": self.seed,
        }

    def save_own_variables(self, store):
        # Keras's Dense and Conv save only what they know of: a kernel and a bias.
        keras.layers.Layer.save_own_variables(self, store)
        if self.built:
            store[_SEED_STATE] = self.seed_generator.state

    def load_own_variables(self, store):
        keys = set(store.keys())  # a store is not quite a dict
        keras.layers.Layer.load_own_variables(self, {key: store[key] for key in keys - {_SEED_STATE}})
        if _SEED_STATE in keys:
            self.seed_generator.state.assign(store[_SEED_STATE])
        if self in _unset and not math.isclose(float(self._kl_weight), self._default_kl_weight(), rel_tol=1e-6):
            _unset.discard(self)  # `ELBO` had set it when the weights were saved

    # What Keras's layers do to a plain kernel

    def enable_lora(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} has no low-rank adaptation.")

    def quantize(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} cannot be quantized.")


class AffineLayer(VariationalLayer):
    """Mixin for activation(linear(x, kernel) + bias): the layer says what `linear` is."""

    def linear(self, x, kernel):
        """The layer's operation, linear in the input and in the kernel."""
        raise NotImplementedError

    def call(self, inputs, training=False):
        noisy = self._noisy(training)
        x = self._apply(self.kernel, self.linear, inputs, noisy)
        if self.bias is not None:
            x = x + self._broadcast_bias(x, noisy)
        return x if self.activation is None else self.activation(x)

    def _broadcast_bias(self, x, noisy):
        """The bias, shaped to be added to `x`: the weight of an input that is always one."""
        shape = [1] * len(x.shape)
        shape[self._channel_axis()] = -1
        if not isinstance(self.bias, VariationalWeight):
            return ops.reshape(ops.cast(self.bias, x.dtype), shape)
        ones = ops.ones((ops.shape(x)[0], *[1] * (len(shape) - 1)), x.dtype)
        return self._apply(self.bias, lambda one, bias: one * ops.reshape(bias, shape), ones, noisy)


class _ReplayedSeeds(keras.random.SeedGenerator):
    """The seeds that follow from one state: the same ones however often they are asked for anew."""

    def __init__(self, state):
        # No variable, so not Keras's own constructor.
        self._state = state
        self._draws = 0

    def next(self, ordered=True):
        # Far from the states of other calls, which count up by one.
        offset = ops.convert_to_tensor([0, self._draws << 24], dtype=self._state.dtype)
        self._draws += 1
        return self._state + offset


def check_positive_int(name, value):
    """Raise a `ValueError` unless `value` is an int > 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"`{name}` must be a positive int. Received: {name}={value!r}")


def check_finite(name, value):
    """Raise a `ValueError` unless `value` is a finite number."""
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number. Received: {name}={value!r}")


def _check_kl_weight(value):
    check_finite("kl_weight", value)
    if value < 0:
        raise ValueError(
            f"`kl_weight` must be ≥ 0, usually 1 / (number of training examples). Received: kl_weight={value!r}"
        )
