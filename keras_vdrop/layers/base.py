"""Base classes of all variational layers, as mixins to Keras's own layers.

A variational layer is `class VariationalX(AffineLayer, keras.layers.X)`. The Keras layer provides the arguments, their
checks, the shapes and `build`. When `build` adds a weight that has a prior, `VariationalLayer.add_weight` returns a
`VariationalWeight`, and the layer's `call` applies it. The base of these classes is `StochasticLayer`: any layer that
draws noise and can have a KL in the loss.
"""

import contextlib
import contextvars
import functools
import inspect
import math
import numbers
import warnings
import weakref

import keras
import numpy as np
from keras import ops

from keras_vdrop import priors
from keras_vdrop.functional import estimators
from keras_vdrop.posterior import LowRankUpdate, VariationalWeight, posteriors
from keras_vdrop.sampling import (
    FixedSeeds,
    advance,
    drawing,
    is_consistent,
    is_repeated,
    is_sampling,
    repeated,
    seed_generator,
    seeds,
    use_scope,
)

# Built layers whose `kl_weight` was never set.
_unset = weakref.WeakSet()
# Those about which a warning has been given.
_told = weakref.WeakSet()

_UNSET_MESSAGE = (
    "The KL weight of these variational layers was never set, so each layer's KL is averaged over its weights. That "
    "trains, but the loss is not the ELBO and regularises by a strength of no meaning. Pass "
    "`callbacks=[keras_vdrop.ELBO(num_examples=len(x_train))]` to `fit`, or `kl_weight=1 / len(x_train)` to each layer."
)

# Within these bounds the KL to every prior is finite in float32, even summed over many weights.
_LEAST_LOG_VARIANCE, _LARGEST_LOG_VARIANCE = -80, 40

# Estimators that saved models may name but that no longer exist, and their replacements.
_RETIRED_ESTIMATORS = {"fast_local_reparameterization": "local_reparameterization"}

_SEED_STATE = "seed_generator_state"

# The values for arguments that a config lacks. Such a config, and the optimizer state saved with it, is older than the
# argument.
_BEFORE_RATES = {"log_variance_rate": 1.0}

# Built layers that were given a `kl_weight` of 1 or more, and about which no warning has been given yet.
_heavy = weakref.WeakSet()

_HEAVY_MESSAGE = (
    "A KL weight of 1 or more is that of one training example. Pass `kl_weight=1 / len(x_train)`, or leave it out and "
    "pass `callbacks=[keras_vdrop.ELBO(num_examples=len(x_train))]` to `fit`. Received: kl_weight={:g}"
)

# The results of `kl_cost` within the scope `kl_costs`, by posterior; None outside the scope.
_costs = contextvars.ContextVar("costs", default=None)

# The function to call with every layer that has a KL and is called in training; None outside `watched`.
_watcher = contextvars.ContextVar("watcher", default=None)

# Whether a callback sets the KL weight of the layers being built.
_weighed = contextvars.ContextVar("weighed", default=False)


@contextlib.contextmanager
def kl_costs():
    """Open a scope that computes each posterior's KL once; yield a dict from posteriors to their `kl_cost`."""
    token = _costs.set({})
    try:
        yield _costs.get()
    finally:
        _costs.reset(token)


@contextlib.contextmanager
def watched(watcher):
    """Open a scope that calls `watcher(layer)` for every layer that has a KL and is called in training."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def weighed_by_callback(yes):
    """Set whether a callback sets the KL weight of the layers that are built from now on."""
    _weighed.set(yes)


def is_unset(layer):
    """Return whether the `kl_weight` of a built layer was never set."""
    return layer in _unset


def _signature_of(method):
    """Return the signature of a method without `self`."""
    signature = inspect.signature(method)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _arguments(method, *kinds):
    """Return the parameters of a method that are of the given kinds, by name."""
    parameters = _signature_of(method).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in kinds}


class DropIn:
    """Mixin for `class VariationalX(..., keras.layers.X)` that takes X's arguments, in X's order, and our keywords.

    A constructor `(*args, ..., **kwargs)` turns its arguments into keywords by `_bind`. `help` and editors show a
    composed signature: Keras's arguments, then the keywords of our constructors.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # A constructor with `*args` passes its arguments on, so its own signature says little.
        passes_on = inspect.getfullargspec(cls.__init__).varargs
        cls.__signature__ = cls._composed_signature() if passes_on else _signature_of(cls.__init__)

    @classmethod
    def _keras_arguments(cls):
        """Return the parameters of the Keras layer's constructor, by name, without its `**kwargs`."""
        keras_layer = next(base for base in cls.__mro__ if not issubclass(base, (DropIn, StochasticLayer)))
        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        return _arguments(keras_layer.__init__, *kinds)

    @classmethod
    def _own_arguments(cls):
        """Return the keyword-only parameters of our constructors, by name."""
        own = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, DropIn) and "__init__" in vars(base):
                own.update(_arguments(base.__init__, inspect.Parameter.KEYWORD_ONLY))
        return own

    @classmethod
    def _composed_signature(cls):
        theirs = cls._keras_arguments()
        own = [parameter for name, parameter in cls._own_arguments().items() if name not in theirs]
        return inspect.Signature([*theirs.values(), *own, inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)])

    @classmethod
    def _bind(cls, args, kwargs):
        """Name the positional arguments, as Python would for the Keras layer, and merge them with the keywords."""
        names = list(cls._keras_arguments())
        if len(args) > len(names):
            raise TypeError(f"{cls.__name__} takes {len(names)} positional arguments. Received: {len(args)}")
        named = dict(zip(names, args))
        if twice := set(named) & set(kwargs):
            raise TypeError(f"{cls.__name__} got multiple values for {sorted(twice)}.")
        return {**named, **kwargs}

    @classmethod
    def from_config(cls, config):
        return super().from_config({**_BEFORE_RATES, **config})


class StochasticLayer(keras.layers.Layer):
    """Mixin for a layer that draws noise in training and under `sampling()`, and weights the KL of its posteriors.

    Args:
        kl_weight: Float ≥ 0, the factor of the KL in the loss: 1 / (number of training examples) if the data loss is
            a mean over examples. Leave it None if the `ELBO` callback sets it.
        seed: Int for the same noise in every run, or None.
        **kwargs: The arguments of the Keras layer.
    """

    def __init__(self, *, kl_weight=None, seed=None, **kwargs):
        if kl_weight is not None:
            check_non_negative("kl_weight", kl_weight)
        if seed is not None and (not isinstance(seed, numbers.Integral) or isinstance(seed, bool)):
            raise ValueError(f"`seed` must be an int or None. Received: seed={seed!r}")
        super().__init__(**kwargs)
        check_policy(self.dtype_policy)
        self.seed = None if seed is None else int(seed)
        self._initial_kl_weight = None if kl_weight is None else float(kl_weight)
        self._kl_weight = None
        self._free_bits = None
        self._posterior_size = 0

    # The generator of the noise, once the layer is built; None if the layer draws nothing.
    seed_generator = None

    def __setattr__(self, name, value):
        if name == "seed_generator" and not hasattr(self, "_posterior_size"):
            return  # Keras's constructors make a generator from the unhashed seed; `build` makes ours
        super().__setattr__(name, value)

    def build(self, input_shape):
        super().build(input_shape)
        _plain_variable(self.variable_dtype)  # cached for `call`, which must not create variables
        self._build_noise()

    def _build_noise(self):
        """Create the generator of noise and, if there is a posterior, the variables that weight its KL."""
        if self.draws:
            # `Bidirectional` makes two layers from one config, and their noise must differ.
            backward = any(part.startswith("backward_") for part in (self.path or self.name).split("/"))
            self.seed_generator = seed_generator(self.seed, "backward" if backward else "forward")
        if self._posterior_size:
            self._kl_weight = self._add_scalar("kl_weight", self._default_kl_weight())
            self._free_bits = self._add_scalar("free_bits", 0.0)
            if self._initial_kl_weight is None and not _weighed.get():
                _unset.add(self)
            elif (self._initial_kl_weight or 0.0) >= 1.0:
                _heavy.add(self)

    def _add_scalar(self, name, value):
        """Create a scalar variable, so that a callback can change the value that a compiled function uses."""
        return keras.layers.Layer.add_weight(
            self,
            name=name,
            shape=(),
            initializer=keras.initializers.Constant(value),
            dtype="float32",
            trainable=False,
            autocast=False,
        )

    # Noise

    @property
    def draws(self):
        """Whether there is anything to draw: a layer without priors and dropout rates never makes noise."""
        return True

    def _noisy(self, training):
        """Return whether this call draws; in training, also give pending warnings and call the watcher."""
        if training and self in _unset and self not in _told:
            _told.update(_unset)  # one warning covers all layers built so far
            warnings.warn(_UNSET_MESSAGE, stacklevel=2)
        if training and self in _heavy:
            _heavy.clear()
            warnings.warn(_HEAVY_MESSAGE.format(self._initial_kl_weight), RuntimeWarning, stacklevel=2)
        if training and self._posterior_size and _watcher.get() is not None:
            _watcher.get()(self)
        replay = self._replay.get()
        if replay is not None:
            return replay.noisy
        sampled = use_scope() if self.draws else is_sampling()
        return bool(training) or sampled

    def _seeds(self, purpose="noise"):
        """Return the generator of the next seed; `purpose` names what is drawn with it."""
        return self._replay.get() or seeds(self.seed_generator, purpose)

    _replay = contextvars.ContextVar("replay", default=None)

    @property
    def _replayed(self):
        """The generator whose state determines all noise of a call that can be recomputed, or None."""
        return self.seed_generator

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """As in Keras (within `keras.RematScope`), but the recomputation draws the same noise as the first pass."""
        replay, scope = contextlib.nullcontext, (is_consistent(), repeated())
        if self._replayed is not None:
            # Keras passes `training` to the layers within this one in the first pass only, so decide here and now
            # whether the call draws.
            state = ops.convert_to_tensor(self._replayed.state)
            advance(self._replayed)
            replay = functools.partial(self._replaying, state, self._noisy(kwargs.get("training")), scope)

        @functools.wraps(layer_call)
        def call(*args):
            with replay():
                return layer_call(*args, **kwargs)

        # TensorFlow takes no keywords here, but Keras passes `training` as one.
        rematerialized = super().rematerialized_call(call, *args)
        return lambda *args, **_: rematerialized(*args)

    @contextlib.contextmanager
    def _replaying(self, state, noisy, scope):
        token = self._replay.set(_Replay(state, noisy))
        try:
            with drawing(*scope):  # as in the first pass; `noisy` decides whether to draw
                yield
        finally:
            self._replay.reset(token)

    # The KL and its weight

    @property
    def kl_weight(self):
        """The factor of this layer's KL in the loss: a float32 variable once the layer is built; assignable."""
        return self._initial_kl_weight if self._kl_weight is None else self._kl_weight

    @kl_weight.setter
    def kl_weight(self, value):
        check_non_negative("kl_weight", value)
        if self._kl_weight is None:
            self._initial_kl_weight = float(value)
        else:
            self._kl_weight.assign(value)
            _unset.discard(self)
            _heavy.discard(self)

    def _default_kl_weight(self):
        return 1.0 / self._posterior_size if self._initial_kl_weight is None else self._initial_kl_weight

    @property
    def free_bits(self):
        """The KL that costs nothing, in nats per element of a posterior, averaged over its elements; assignable."""
        return self._free_bits

    @free_bits.setter
    def free_bits(self, value):
        check_non_negative("free_bits", value)
        if self._free_bits is None:
            raise ValueError(
                f"The layer {self.name!r} has not been built: it has no KL yet. Received: free_bits={value!r}"
            )
        self._free_bits.assign(value)

    def kl_cost(self, posterior):
        """Return the cost of one of the layer's posteriors before weighting: max(KL, free_bits·size), in nats."""
        costs = _costs.get()
        if costs is not None and posterior in costs:
            return costs[posterior]
        kl = posterior.kl()
        cost = ops.maximum(kl, ops.cast(self._free_bits, kl.dtype) * posterior.size)
        if costs is not None:
            costs[posterior] = cost
        return cost

    def weighted_kl(self, posterior):
        """Return what one of the layer's posteriors adds to the loss: kl_weight·max(KL, free_bits·size)."""
        cost = self.kl_cost(posterior)
        return ops.cast(self._kl_weight, cost.dtype) * cost

    # For `sparsity`

    def structure(self, kept):
        """Count the structures that the layer's weights make up, such as units, and those that are kept.

        Args:
            kept: Dict from the names of the layer's weights to NumPy arrays, True where a weight is kept.

        Returns:
            Dict from the name of a structure to (number kept, number of all).
        """
        return {}

    def places(self, input_shape):
        """Return at how many positions of one example each weight is multiplied; 0 if the layer multiplies nothing.

        Args:
            input_shape: The shape of the inputs, with the batch.

        Returns:
            Int, or None if it depends on an unknown size.
        """
        return 0

    def stock_variables(self):
        """Return the layer's own variables that its Keras counterpart has too; a layer of noise alone has none."""
        return []

    # Saving

    def get_config(self):
        return {**super().get_config(), "kl_weight": self._initial_kl_weight, "seed": self.seed}

    def save_own_variables(self, store):
        # Keras's Dense and Conv would save only the kernel and the bias.
        scaled = self._scaled()
        for key, variable in self._keys().items():
            store[key] = scaled[id(variable)].value if id(variable) in scaled else variable
        if self.seed_generator is not None:
            store[_SEED_STATE] = self.seed_generator.state

    def _keys(self):
        """Return the layer's own variables by their keys in files: Keras's numbers; names for fixed prior scales."""
        keras.layers.Layer.save_own_variables(self, own := {})
        parameters = [each for weight in self._variational_weights() for each in weight.prior_parameters.values()]
        fixed = {id(each) for each in parameters if not each.trainable}
        counted = [each for each in own.values() if id(each) not in fixed]
        named = [each for each in own.values() if id(each) in fixed]
        return {**{str(index): each for index, each in enumerate(counted)}, **{each.name: each for each in named}}

    def _variational_weights(self):
        return [each for each in posteriors(self) if isinstance(each, VariationalWeight)]

    def _scaled(self):
        """Return each scaled log variance by the id of its variable; files hold the log variance, not the variable."""
        return {id(weight.log_variance.variable): weight.log_variance for weight in self._variational_weights()}

    def _value_before(self, variable):
        """Return, as an array, the value that a variable had before files stored it; None if they always did."""
        if variable is self._kl_weight:
            return np.float32(self._default_kl_weight())
        if variable is self._free_bits or variable.name.endswith("_prior_log_scale"):
            return np.float32(0.0)  # there were no free bits, and "normal" was N(0, 1)
        return np.ones(variable.shape, bool) if variable.dtype == "bool" else None

    def load_own_variables(self, store):
        found = {key: store[key] for key in set(store.keys())}  # a store lacks some methods of a dict
        state = found.pop(_SEED_STATE, None)
        scaled = self._scaled()
        for key, variable in self._keys().items() if found else ():
            if key not in found and self._value_before(variable) is not None:
                found[key] = self._value_before(variable)
            elif key in found and id(variable) in scaled:
                found[key] = np.asarray(found[key]) / scaled[id(variable)].factor
        keras.layers.Layer.save_own_variables(self, own := {})
        keys = {id(variable): key for key, variable in self._keys().items()}
        values = {index: found.pop(keys[id(each)]) for index, each in own.items() if keys[id(each)] in found}
        keras.layers.Layer.load_own_variables(self, {**values, **found})
        if state is not None and self.seed_generator is not None:
            self.seed_generator.state.assign(state)
        if self in _unset and not math.isclose(float(self._kl_weight), self._default_kl_weight(), rel_tol=1e-6):
            _unset.discard(self)  # `ELBO` had set it before the weights were saved


class VariationalLayer(DropIn, StochasticLayer):
    """Mixin that makes a Keras layer's weights variational.

    A subclass without its own constructor takes the arguments of its Keras layer, in their order, and the following.

    Args:
        *args: The arguments of the Keras layer.
        kernel_prior: Prior of every weight except the bias: "log_uniform", "ard", "normal", "scale_mixture", a
            `priors.Prior`, a TFP distribution, or None for a plain weight.
        bias_prior: The same for the bias.
        estimator: How noise enters the output: one of `functional.estimators.ESTIMATORS`; or "auto": local
            reparameterization if an example uses each element of the weight once, else flipout.
        kl_weight: As for `StochasticLayer`.
        initial_log_variance: Float, the initial log_variance. None sets the standard deviation to 5 % (22 % with a
            normal prior) of the root mean square of the initial weights, which counts as 0.1 if they are all 0.
        log_variance_rate: Float > 0. A step of an optimizer such as Adam moves log_variance by about this many learning
            rates; SGD moves it by the gradient times the learning rate times log_variance_rate².
        threshold: Float, the log alpha above which `sparsity` and `prune` drop a weight; None for that of the prior:
            3, or 5 if the prior keeps or drops weights in groups.
        seed: As for `StochasticLayer`.
        **kwargs: The arguments of the Keras layer.
    """

    def __init__(
        self,
        *args,
        kernel_prior="log_uniform",
        bias_prior=None,
        estimator="auto",
        kl_weight=None,
        initial_log_variance=None,
        log_variance_rate=5.0,
        threshold=None,
        seed=None,
        **kwargs,
    ):
        kwargs = self._bind(args, kwargs)
        seed = kwargs.pop("seed", seed)
        estimator = _RETIRED_ESTIMATORS.get(estimator, estimator)
        if estimator not in self._estimators():
            raise ValueError(f"`estimator` must be one of {self._estimators()}. Received: estimator={estimator!r}")
        if initial_log_variance is not None:
            check_log_variance("initial_log_variance", initial_log_variance)
        check_positive("log_variance_rate", log_variance_rate)
        if threshold is not None:
            check_finite("threshold", threshold)
        kernel_prior, bias_prior = priors.get(kernel_prior), priors.get(bias_prior)
        super().__init__(kl_weight=kl_weight, seed=seed, **kwargs)
        self.kernel_prior = kernel_prior
        self.bias_prior = bias_prior
        self.estimator = estimator
        self.initial_log_variance = None if initial_log_variance is None else float(initial_log_variance)
        self.log_variance_rate = float(log_variance_rate)
        self.threshold = None if threshold is None else float(threshold)

    @classmethod
    def _estimators(cls):
        return "auto", *estimators.ESTIMATORS

    def uses(self, input_shape):
        """Return at how many positions of one example each element of a weight is used in one call.

        Args:
            input_shape: The shape of the inputs, with the batch.

        Returns:
            Int, or None if it depends on an unknown size.
        """
        return self.places(input_shape)

    @property
    def learns_locally(self):
        """Whether the layer may use local reparameterization."""
        return self.estimator in ("auto", "local_reparameterization")

    def _estimator(self, input_shape):
        """Return the name of the estimator for a call on inputs of this shape."""
        if self.estimator != "auto":
            return self.estimator
        once = self.uses(tuple(input_shape)) == 1 and not (self.draws and is_repeated(self.seed_generator))
        return "local_reparameterization" if once else "flipout"

    def _channel_axis(self):
        """Return the axis of the channels in inputs and outputs."""
        return 1 if getattr(self, "data_format", None) == "channels_first" else -1

    def _sign_axes(self):
        """Return, for inputs and for outputs, the batch axis and the axes that they share with the kernel."""
        return (0, self._channel_axis()), (0, self._channel_axis())

    def places(self, input_shape):
        """Count the positions along the input axes other than the batch and those shared with the kernel."""
        shared = {axis % len(input_shape) for axis in self._sign_axes()[0]}
        return product(size for axis, size in enumerate(input_shape) if axis not in shared)

    def stock_variables(self):
        """Exclude the KL's scalars, the low-rank update and, of each posterior, everything but its mean."""
        own = {id(self._kl_weight), id(self._free_bits)}
        for posterior in posteriors(self):
            stands = posterior.loc if posterior is not self.lora_a else None
            own.update(id(variable) for variable in posterior.variables if variable is not stands)
        if self._update is not None:
            own.add(id(self._update.b))
        return [variable for variable in self.weights if id(variable) not in own]

    # Weights

    @property
    def draws(self):
        return self._posterior_size > 0

    def build(self, input_shape):
        for axis in self._sign_axes()[0][1:]:
            if not -len(input_shape) <= axis < len(input_shape):
                raise ValueError(
                    f"The inputs to {self.name!r} must have more axes. Received: input_shape={tuple(input_shape)}"
                )
            if input_shape[axis] is None:
                raise ValueError(
                    f"Dimension {axis} of the inputs to {self.name!r} must be known to build its weights. "
                    f"Received: input_shape={tuple(input_shape)}; give it in `keras.Input`."
                )
        super().build(input_shape)

    def add_weight(self, shape=None, initializer=None, dtype=None, trainable=True, name=None, **arguments):
        """As in Keras, but a trainable weight with a prior becomes a `VariationalWeight`."""
        if shape is not None and None in shape:
            raise ValueError(
                f"The weight {name!r} of {self.name!r} needs a size that is not known. Received: shape={tuple(shape)}; "
                "give all sizes in `keras.Input` or in `output_shape`."
            )
        is_bias = name is not None and "bias" in name
        prior = self.bias_prior if is_bias else self.kernel_prior
        arguments["initializer"] = initializer
        if not is_bias and getattr(self, "lora_rank", None):
            prior, trainable = None, False  # the layer learns only the low-rank update
        if prior is None or not trainable:
            return super().add_weight(shape=shape, dtype=dtype, trainable=trainable, name=name, **arguments)
        weight = VariationalWeight(
            self,
            super().add_weight,
            name,
            shape,
            prior=prior,
            initial_log_variance=self.initial_log_variance,
            log_variance_rate=self.log_variance_rate,
            prunable=not is_bias,
            **arguments,
        )
        self._posterior_size += weight.size
        return weight

    def _dtype_with(self, x):
        """Return the dtype in which Keras's layer would compute with x: not its policy's if `TimeDistributed` calls."""
        weight = _plain_variable(self.variable_dtype).dtype
        given = keras.backend.standardize_dtype(x.dtype)
        if given == weight or not is_float(x):
            return weight
        # Except with TensorFlow, Keras's `result_type` turns float64 into float32.
        return "float64" if "float64" in (weight, given) else keras.backend.result_type(weight, given)

    def _apply(self, weight, linear, x, noisy, estimator=None, sign_axes=None):
        """Return `linear(x, weight)` for a plain or a variational weight."""
        dtype = self._dtype_with(x)
        if is_float(x):
            x = ops.cast(x, dtype)
        if not isinstance(weight, VariationalWeight):
            return linear(x, ops.cast(weight, dtype))
        return weight.apply(
            linear,
            x,
            noisy=noisy,
            estimator=estimator or self._estimator(x.shape),
            seed=self._seeds(weight.name),
            sign_axes=sign_axes or self._sign_axes(),
            dtype=dtype,
        )

    # Saving

    def get_config(self):
        return {
            **super().get_config(),
            "kernel_prior": priors.serialize(self.kernel_prior),
            "bias_prior": priors.serialize(self.bias_prior),
            "estimator": self.estimator,
            "initial_log_variance": self.initial_log_variance,
            "log_variance_rate": self.log_variance_rate,
            "threshold": self.threshold,
        }

    # LoRA and quantization, which Keras's layers apply to a plain kernel

    _update = None

    def enable_lora(self, rank, a_initializer="he_uniform", b_initializer="zeros", lora_alpha=None):
        """Add a low-rank update to the kernel. Keras's `build` calls this if `lora_rank` is set; a later call fails.

        The kernel W stays fixed, and the layer learns an update of it: W + lora_alpha / lora_rank·A·B. A has a
        posterior N(loc, exp(log_variance)), in which the weights of one input share a variance. B is plain and starts
        at 0.

        Reference:
            BLoB: Bayesian Low-Rank Adaptation by Backpropagation for Large Language Models, Wang et al., 2024,
            https://arxiv.org/abs/2406.11675
        """
        kernel = self._adapted()
        if self._update is not None or isinstance(kernel, VariationalWeight) or kernel.trainable:
            raise ValueError(
                f"{self.name!r} has been built without a low-rank update. Give it `lora_rank` when it is made, or make "
                f"it from a trained layer by `keras_vdrop.to_variational(model, rank={rank})`."
            )
        if getattr(self, "groups", 1) != 1:
            raise ValueError(
                f"A convolution in groups has no low-rank update. Received: groups={self.groups}, lora_rank={rank}"
            )
        if self.kernel_prior is None:
            raise ValueError(f"The update of {self.name!r} needs a `kernel_prior`. Received: kernel_prior=None")
        self._update = LowRankUpdate(
            self,
            super().add_weight,
            "lora",
            kernel,
            rank,
            lora_alpha or self.lora_alpha,
            a_initializer,
            b_initializer,
            prior=self.kernel_prior,
            initial_log_variance=self.initial_log_variance,
            log_variance_rate=self.log_variance_rate,
        )
        self._posterior_size += self._update.a.size

    @property
    def lora_a(self):
        """A of the low-rank update, a `VariationalWeight`; None without one."""
        return None if self._update is None else self._update.a

    @property
    def lora_b(self):
        """B of the low-rank update, a variable; None without one."""
        return None if self._update is None else self._update.b

    def _adapted(self):
        """Return the weight that the low-rank update applies to; its last axis is that of the outputs."""
        return self.kernel

    def _with_update(self, y, linear, x, noisy):
        """Return `y`, which is `linear(x, W)`, plus what the update of W, if there is one, adds to it."""
        if self._update is None:
            return y
        inner = self._apply(self.lora_a, linear, x, noisy)
        axis = self._channel_axis()
        update = ops.matmul(ops.moveaxis(inner, axis, -1), ops.cast(self.lora_b, inner.dtype))
        return y + ops.cast(self._update.scale, y.dtype) * ops.moveaxis(update, -1, axis)

    def quantize(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} cannot be quantized.")


class AffineLayer(VariationalLayer):
    """Mixin for activation(linear(x, kernel) + bias); the subclass defines `linear`."""

    # The name of the outputs, and the axes of the kernel that index them.
    _outputs = "units", (-1,)

    def linear(self, x, kernel):
        """Apply the layer's operation, which is linear in the input and in the kernel."""
        raise NotImplementedError

    def transform(self, x, noisy):
        """Compute the layer without bias and activation; by default `linear` with one kernel."""
        return self._with_update(self._apply(self.kernel, self.linear, x, noisy), self.linear, x, noisy)

    def structure(self, kept):
        """Count the outputs that have at least one kept weight."""
        name, axes = self._outputs
        return {name: left_along(kept["kernel"], axes)}

    def call(self, inputs, training=False):
        noisy = self._noisy(training)
        x = self.transform(inputs, noisy)
        if self.bias is not None:
            x = x + self._broadcast_bias(x, noisy)
        return x if self.activation is None else self.activation(x)

    def _broadcast_bias(self, x, noisy):
        """Return the bias, shaped to be added to `x`; a variational bias is the weight of an input that is always 1."""
        rank = len(x.shape)
        shape = [1] * (rank - len(self.bias.shape)) + list(self.bias.shape)
        if self._channel_axis() == 1:
            shape = [1, -1] + [1] * (rank - 2)
        if not isinstance(self.bias, VariationalWeight):
            return ops.reshape(ops.cast(self.bias, self._dtype_with(x)), shape)
        ones = ops.ones((ops.shape(x)[0], *[1] * (rank - 1)), x.dtype)
        every_axis = tuple(range(rank))
        add = lambda one, bias: one * ops.reshape(bias, shape)  # noqa: E731
        # Each example has a single 1 as input, so it uses the bias once.
        estimator = "local_reparameterization" if self.estimator == "auto" else self.estimator
        return self._apply(self.bias, add, ones, noisy, estimator, sign_axes=(every_axis, every_axis))


class _Replay(FixedSeeds):
    """The seeds of a computation that can be repeated, and whether it draws."""

    def __init__(self, state, noisy):
        super().__init__(state)
        self.noisy = noisy


@functools.cache
def _plain_variable(dtype):
    """Return a variable like those of Keras's layers: its `dtype` is the one to which the current scope casts it."""
    return keras.Variable(keras.initializers.Zeros(), shape=(), dtype=dtype, trainable=False)


def is_float(x):
    """Return whether a tensor has a floating dtype."""
    return keras.backend.is_float_dtype(x.dtype)


def left_along(kept, axes):
    """Return, for the indices along some axes of a boolean array, (number with any True, number of all)."""
    axes = {axis % kept.ndim for axis in axes}
    left = kept.any(axis=tuple(axis for axis in range(kept.ndim) if axis not in axes))
    return int(left.sum()), left.size


def product(sizes):
    """Multiply sizes, of which some may be None: 0 if any is 0, else None if any is None; 1 if there are none."""
    sizes = list(sizes)
    return 0 if 0 in sizes else None if None in sizes else math.prod(sizes)


def check_positive_int(name, value):
    """Raise a `ValueError` unless `value` is an int > 0."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"`{name}` must be a positive int. Received: {name}={value!r}")


def check_policy(policy):
    """Raise a `ValueError` if a dtype policy quantizes weights."""
    if getattr(policy, "quantization_mode", None) is not None:
        raise ValueError(
            "A distribution over weights cannot be quantized. Received: "
            f"dtype={policy.name!r}; train with a policy of floats, such as "
            f'"float32" or "mixed_float16", and quantize what `keras_vdrop.to_deterministic` gives.'
        )


def check_finite(name, value):
    """Raise a `ValueError` unless `value` is a finite number."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number. Received: {name}={value!r}")


def check_non_negative(name, value):
    """Raise a `ValueError` unless `value` is a finite number ≥ 0."""
    check_finite(name, value)
    if value < 0:
        raise ValueError(f"`{name}` must be ≥ 0. Received: {name}={value!r}")


def check_positive(name, value):
    """Raise a `ValueError` unless `value` is a finite number > 0."""
    check_finite(name, value)
    if value <= 0:
        raise ValueError(f"`{name}` must be > 0. Received: {name}={value!r}")


def check_rate(name, value):
    """Raise a `ValueError` unless `value` is a probability in [0, 1)."""
    check_finite(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"`{name}` must be a rate in [0, 1). Received: {name}={value!r}")


def check_log_variance(name, value):
    """Raise a `ValueError` unless `value` is a log variance for which the KL is finite in float32."""
    check_finite(name, value)
    if not _LEAST_LOG_VARIANCE <= value <= _LARGEST_LOG_VARIANCE:
        raise ValueError(
            f"`{name}` is the log of a variance, usually from −10 to 0, and from {_LEAST_LOG_VARIANCE} to "
            f"{_LARGEST_LOG_VARIANCE}. Received: {name}={value!r}"
        )
