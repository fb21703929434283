"""What all variational layers share, as mixins to Keras's own layers.

A variational layer is `class VariationalX(AffineLayer, keras.layers.X)`. Keras's layer brings its arguments, their
checks, its shapes and its `build`; `VariationalLayer.add_weight` answers that `build` with a `VariationalWeight`
wherever a prior is given, and the layer's `call` applies it. Below that, `StochasticLayer` is whatever draws noise
and has a KL to weigh.
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

# Built layers whose `kl_weight` nobody has set, and of which nobody has been told.
_unset = weakref.WeakSet()

_UNSET_MESSAGE = (
    "The KL weight of these variational layers was never set, so each layer's KL is averaged over its weights. That "
    "trains, but the loss is not the ELBO and regularises by a strength of no meaning. Pass "
    "`callbacks=[keras_vdrop.ELBO(num_examples=len(x_train))]` to `fit`, or `kl_weight=1 / len(x_train)` to each layer."
)

# Between them the KL to every prior is finite in float32, summed over many weights.
_LEAST_LOG_VARIANCE, _LARGEST_LOG_VARIANCE = -80, 40

# What saved models may name, and what has taken its place.
_RETIRED_ESTIMATORS = {"fast_local_reparameterization": "local_reparameterization"}

_SEED_STATE = "seed_generator_state"

# What a config means that says nothing of it: such a one, and the state of an optimizer beside it, is from before it
# could be said.
_BEFORE_RATES = {"log_variance_rate": 1.0}

# Built layers that were given a `kl_weight` of 1 or more, and of which nobody has been told.
_heavy = weakref.WeakSet()

_HEAVY_MESSAGE = (
    "A KL weight of 1 or more is that of one training example. Pass `kl_weight=1 / len(x_train)`, or leave it out and "
    "pass `callbacks=[keras_vdrop.ELBO(num_examples=len(x_train))]` to `fit`. Received: kl_weight={:g}"
)

# What the KLs cost that were computed within `kl_costs`, by posterior; None outside of it.
_costs = contextvars.ContextVar("costs", default=None)

# What is told of every layer with a KL that is called in training; None where nobody asks.
_watcher = contextvars.ContextVar("watcher", default=None)

# Whether a callback weighs the KL of what is built now.
_weighed = contextvars.ContextVar("weighed", default=False)


@contextlib.contextmanager
def kl_costs():
    """A scope in which each posterior's KL is computed once: a dict from the posteriors to what `kl_cost` gave."""
    token = _costs.set({})
    try:
        yield _costs.get()
    finally:
        _costs.reset(token)


@contextlib.contextmanager
def watched(watcher):
    """A scope in which `watcher(layer)` is called for every layer with a KL that is called in training."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def weighed_by_callback(yes):
    """Say whether a callback sets the KL weight of the layers that are built from now on."""
    _weighed.set(yes)


def is_unset(layer):
    """Whether nobody has set the `kl_weight` of a built layer."""
    return layer in _unset


def _signature_of(method):
    """Its signature without `self`."""
    signature = inspect.signature(method)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _arguments(method, *kinds):
    """The arguments of a method that are of some kinds, by name."""
    parameters = _signature_of(method).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in kinds}


class DropIn:
    """Mixin for `class VariationalX(..., keras.layers.X)` that takes X's arguments, in X's order, and by keyword ours.

    A constructor `(*args, ..., **kwargs)` turns them into keywords by `_bind`. The signature that `help` and editors
    show is composed: Keras's arguments, then the keywords of our constructors.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # A constructor that takes whatever comes passes it on to ours.
        passes_on = inspect.getfullargspec(cls.__init__).varargs
        cls.__signature__ = cls._composed_signature() if passes_on else _signature_of(cls.__init__)

    @classmethod
    def _keras_arguments(cls):
        """The arguments of the Keras layer, by name, without its `**kwargs`."""
        keras_layer = next(base for base in cls.__mro__ if not issubclass(base, (DropIn, StochasticLayer)))
        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        return _arguments(keras_layer.__init__, *kinds)

    @classmethod
    def _own_arguments(cls):
        """The keywords of our constructors, by name."""
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
        """Positional arguments of the Keras layer by name, as Python would bind them, and the others."""
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
    """Mixin for a layer that draws noise in training and under `sampling()`, and weighs the KL of what it draws from.

    Args:
        kl_weight: Float ≥ 0, the factor of the KL in the loss: 1 / (number of training examples) where the data loss
            is a mean over examples. Leave None where the `ELBO` callback sets it.
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

    # Where noise comes from, once the layer is built; None where it draws nothing.
    seed_generator = None

    def __setattr__(self, name, value):
        if name == "seed_generator" and not hasattr(self, "_posterior_size"):
            return  # Keras's constructors make one by the unhashed seed; `build` makes ours
        super().__setattr__(name, value)

    def build(self, input_shape):
        super().build(input_shape)
        _plain_variable(self.variable_dtype)  # here, where variables may be made
        self._build_noise()

    def _build_noise(self):
        """Make the source of noise and, where there is a posterior, the weight of its KL."""
        if self.draws:
            # `Bidirectional` makes two layers of one config; their noise must differ nonetheless.
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
        """A variable that a callback may change while a compiled function runs."""
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
        """Whether there is anything to draw: a layer without priors and rates makes no noise in any scope."""
        return True

    def _noisy(self, training):
        """Whether this call draws."""
        if training and self in _unset:
            _unset.clear()  # one warning speaks for all layers there are
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
        """Where the next seed comes from, for what is called so."""
        return self._replay.get() or seeds(self.seed_generator, purpose)

    _replay = contextvars.ContextVar("replay", default=None)

    @property
    def _replayed(self):
        """The generator whose state all noise within a call follows from when it is computed again, or None."""
        return self.seed_generator

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """As in Keras (within `keras.RematScope`), but so that the second computation draws the noise of the first."""
        replay, scope = contextlib.nullcontext, (is_consistent(), repeated())
        if self._replayed is not None:
            # Keras tells the layers within this one of `training` at the first computation only.
            state = ops.convert_to_tensor(self._replayed.state)
            advance(self._replayed)
            replay = functools.partial(self._replaying, state, self._noisy(kwargs.get("training")), scope)

        @functools.wraps(layer_call)
        def call(*args):
            with replay():
                return layer_call(*args, **kwargs)

        # TensorFlow takes no keywords here, and Keras passes `training` as one.
        rematerialized = super().rematerialized_call(call, *args)
        return lambda *args, **_: rematerialized(*args)

    @contextlib.contextmanager
    def _replaying(self, state, noisy, scope):
        token = self._replay.set(_Replay(state, noisy))
        try:
            with drawing(*scope):  # whether there is noise, `noisy` says
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
        """The KL that costs nothing, in nats for each number of a posterior, on average over it."""
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
        """What one of the layer's posteriors costs before it is weighed: max(KL, free_bits·size), in nats."""
        costs = _costs.get()
        if costs is not None and posterior in costs:
            return costs[posterior]
        kl = posterior.kl()
        cost = ops.maximum(kl, ops.cast(self._free_bits, kl.dtype) * posterior.size)
        if costs is not None:
            costs[posterior] = cost
        return cost

    def weighted_kl(self, posterior):
        """The term that one of the layer's posteriors adds to the loss: kl_weight·max(KL, free_bits·size)."""
        cost = self.kl_cost(posterior)
        return ops.cast(self._kl_weight, cost.dtype) * cost

    # What `sparsity` asks

    def structure(self, kept):
        """What the layer's weights make up, of which `sparsity` is to tell how much is left.

        Args:
            kept: Dict from the names of the layer's weights to NumPy arrays, True where a weight is left.

        Returns:
            Dict from a name to (left, all).
        """
        return {}

    def places(self, input_shape):
        """At how many places of one example each weight is multiplied: 0 where that is no product.

        Args:
            input_shape: Of the inputs, with the batch.

        Returns:
            Int, or None where it depends on a size that is not known.
        """
        return 0

    def stock_variables(self):
        """The layer's own variables that the Keras layer has too, for which it stands; noise alone has none."""
        return []

    # Saving

    def get_config(self):
        return {**super().get_config(), "kl_weight": self._initial_kl_weight, "seed": self.seed}

    def save_own_variables(self, store):
        # Keras's Dense and Conv save only what they know of: a kernel and a bias.
        scaled = self._scaled()
        for key, variable in self._keys().items():
            store[key] = scaled[id(variable)].value if id(variable) in scaled else variable
        if self.seed_generator is not None:
            store[_SEED_STATE] = self.seed_generator.state

    def _keys(self):
        """The layer's own variables by their keys in files: Keras's, and the names of fixed scales of priors."""
        keras.layers.Layer.save_own_variables(self, own := {})
        parameters = [each for weight in self._variational_weights() for each in weight.prior_parameters.values()]
        fixed = {id(each) for each in parameters if not each.trainable}
        counted = [each for each in own.values() if id(each) not in fixed]
        named = [each for each in own.values() if id(each) in fixed]
        return {**{str(index): each for index, each in enumerate(counted)}, **{each.name: each for each in named}}

    def _variational_weights(self):
        return [each for each in posteriors(self) if isinstance(each, VariationalWeight)]

    def _scaled(self):
        """What is stored in units of its own, by the id of its variable: files hold it in nats, whatever the units."""
        return {id(weight.log_variance.variable): weight.log_variance for weight in self._variational_weights()}

    def _value_before(self, variable):
        """What a variable was before files had it, as an array; None where they always did."""
        if variable is self._kl_weight:
            return np.float32(self._default_kl_weight())
        if variable is self._free_bits or variable.name.endswith("_prior_log_scale"):
            return np.float32(0.0)  # no bits were free, and "normal" was N(0, 1)
        return np.ones(variable.shape, bool) if variable.dtype == "bool" else None

    def load_own_variables(self, store):
        found = {key: store[key] for key in set(store.keys())}  # a store is not quite a dict
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
            _unset.discard(self)  # `ELBO` had set it when the weights were saved


class VariationalLayer(DropIn, StochasticLayer):
    """Mixin that makes a Keras layer's weights variational.

    A subclass without a constructor of its own takes the arguments of its Keras layer, in their order, and these.

    Args:
        *args: The arguments of the Keras layer.
        kernel_prior: Prior of every weight but the bias: "log_uniform", "ard", "normal", "scale_mixture", a
            `priors.Prior`, a TFP distribution, or None for a plain weight.
        bias_prior: The same for the bias.
        estimator: How noise enters the output: one of `functional.estimators.ESTIMATORS`; or "auto", local
            reparameterization where an example uses each number of the weight once, and flipout elsewhere.
        kl_weight: As for `StochasticLayer`.
        initial_log_variance: Float, where log_variance starts; None for a standard deviation that is 5 % of the root
            mean square of the initial weights, 22 % with a normal prior (and of 0.1 where these are 0).
        log_variance_rate: Float > 0, how many learning rates a step of an optimizer such as Adam moves log_variance;
            SGD moves it by the gradient times the learning rate times this squared.
        threshold: Float, the log alpha above which `sparsity` and `prune` give a weight up; None for the prior's, which
            is 3, and 5 where weights live and die in groups.
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
        """At how many places of one example each number of a weight is used, in one call on inputs of that shape.

        Args:
            input_shape: Of the inputs, with the batch.

        Returns:
            Int, or None where it depends on a size that is not known.
        """
        return self.places(input_shape)

    @property
    def learns_locally(self):
        """Whether the estimator may be local reparameterisation."""
        return self.estimator in ("auto", "local_reparameterization")

    def _estimator(self, input_shape):
        """The estimator of a call on inputs of that shape."""
        if self.estimator != "auto":
            return self.estimator
        once = self.uses(tuple(input_shape)) == 1 and not (self.draws and is_repeated(self.seed_generator))
        return "local_reparameterization" if once else "flipout"

    def _channel_axis(self):
        """The axis of the channels in inputs and outputs."""
        return 1 if getattr(self, "data_format", None) == "channels_first" else -1

    def _sign_axes(self):
        """Of inputs and of outputs, the axis of the batch and those that they share with the kernel."""
        return (0, self._channel_axis()), (0, self._channel_axis())

    def places(self, input_shape):
        """Every one on the axes that the inputs do not share with the kernel."""
        shared = {axis % len(input_shape) for axis in self._sign_axes()[0]}
        return product(size for axis, size in enumerate(input_shape) if axis not in shared)

    def stock_variables(self):
        """Of a posterior, its mean."""
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
        """As in Keras; but a trainable weight with a prior becomes a `VariationalWeight`."""
        if shape is not None and None in shape:
            raise ValueError(
                f"The weight {name!r} of {self.name!r} needs a size that is not known. Received: shape={tuple(shape)}; "
                "give all sizes in `keras.Input` or in `output_shape`."
            )
        is_bias = name is not None and "bias" in name
        prior = self.bias_prior if is_bias else self.kernel_prior
        arguments["initializer"] = initializer
        if not is_bias and getattr(self, "lora_rank", None):
            prior, trainable = None, False  # what is learned is its update
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
        """In what the Keras layer would compute with x: not its own policy's where `TimeDistributed` calls it."""
        weight = _plain_variable(self.variable_dtype).dtype
        given = keras.backend.standardize_dtype(x.dtype)
        if given == weight or not is_float(x):
            return weight
        # Keras has no result of float64.
        return "float64" if "float64" in (weight, given) else keras.backend.result_type(weight, given)

    def _apply(self, weight, linear, x, noisy, estimator=None, sign_axes=None):
        """`linear(x, weight)` for a plain or a variational weight."""
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

    # What Keras's layers do to a plain kernel

    _update = None

    def enable_lora(self, rank, a_initializer="he_uniform", b_initializer="zeros", lora_alpha=None):
        """Keras's `build` calls this where the layer was given a `lora_rank`; afterwards it is too late.

        The kernel W stays as it is, and the layer learns an update of it: W + lora_alpha / lora_rank·A·B with a
        posterior over A, N(loc, exp(log_variance)), in which what meets one input shares a variance. B is plain, and 0
        at first.

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
        """The weight of which `lora_rank` learns an update: its last axis is that of the outputs."""
        return self.kernel

    def _with_update(self, y, linear, x, noisy):
        """`y`, which is `linear(x, W)`, and what the update of W adds to it."""
        if self._update is None:
            return y
        inner = self._apply(self.lora_a, linear, x, noisy)
        axis = self._channel_axis()
        update = ops.matmul(ops.moveaxis(inner, axis, -1), ops.cast(self.lora_b, inner.dtype))
        return y + ops.cast(self._update.scale, y.dtype) * ops.moveaxis(update, -1, axis)

    def quantize(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} cannot be quantized.")


class AffineLayer(VariationalLayer):
    """Mixin for activation(linear(x, kernel) + bias): the layer says what `linear` is."""

    # What an output is called, and the axes of the kernel that have one for each index.
    _outputs = "units", (-1,)

    def linear(self, x, kernel):
        """The layer's operation, linear in the input and in the kernel."""
        raise NotImplementedError

    def transform(self, x, noisy):
        """All of the layer but bias and activation; by default one `linear` with one kernel."""
        return self._with_update(self._apply(self.kernel, self.linear, x, noisy), self.linear, x, noisy)

    def structure(self, kept):
        """The outputs into which a weight is left."""
        name, axes = self._outputs
        return {name: left_along(kept["kernel"], axes)}

    def call(self, inputs, training=False):
        noisy = self._noisy(training)
        x = self.transform(inputs, noisy)
        if self.bias is not None:
            x = x + self._broadcast_bias(x, noisy)
        return x if self.activation is None else self.activation(x)

    def _broadcast_bias(self, x, noisy):
        """The bias, shaped to be added to `x`: the weight of an input that is always one."""
        rank = len(x.shape)
        shape = [1] * (rank - len(self.bias.shape)) + list(self.bias.shape)
        if self._channel_axis() == 1:
            shape = [1, -1] + [1] * (rank - 2)
        if not isinstance(self.bias, VariationalWeight):
            return ops.reshape(ops.cast(self.bias, self._dtype_with(x)), shape)
        ones = ops.ones((ops.shape(x)[0], *[1] * (rank - 1)), x.dtype)
        every_axis = tuple(range(rank))
        add = lambda one, bias: one * ops.reshape(bias, shape)  # noqa: E731
        # Every example has one 1 for it.
        estimator = "local_reparameterization" if self.estimator == "auto" else self.estimator
        return self._apply(self.bias, add, ones, noisy, estimator, sign_axes=(every_axis, every_axis))


class _Replay(FixedSeeds):
    """A computation that can be done again: its seeds, and whether it draws."""

    def __init__(self, state, noisy):
        super().__init__(state)
        self.noisy = noisy


@functools.cache
def _plain_variable(dtype):
    """A variable as Keras's layers have it: its `dtype` is that of its values where it is asked for."""
    return keras.Variable(keras.initializers.Zeros(), shape=(), dtype=dtype, trainable=False)


def is_float(x):
    """Whether a tensor is of a floating type."""
    return keras.backend.is_float_dtype(x.dtype)


def left_along(kept, axes):
    """Of the indices on some axes of a boolean array, (those with anything True, all)."""
    axes = {axis % kept.ndim for axis in axes}
    left = kept.any(axis=tuple(axis for axis in range(kept.ndim) if axis not in axes))
    return int(left.sum()), left.size


def product(sizes):
    """Of sizes that may be unknown: None where it is, 1 of none."""
    sizes = list(sizes)
    return 0 if 0 in sizes else None if None in sizes else math.prod(sizes)


def check_positive_int(name, value):
    """Raise a `ValueError` unless `value` is an int > 0."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"`{name}` must be a positive int. Received: {name}={value!r}")


def check_policy(policy):
    """Raise a `ValueError` if a dtype policy is one of quantized weights."""
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
    """Raise a `ValueError` unless `value` is a log variance with which the KL is finite in float32."""
    check_finite(name, value)
    if not _LEAST_LOG_VARIANCE <= value <= _LARGEST_LOG_VARIANCE:
        raise ValueError(
            f"`{name}` is the log of a variance, usually from −10 to 0, and from {_LEAST_LOG_VARIANCE} to "
            f"{_LARGEST_LOG_VARIANCE}. Received: {name}={value!r}"
        )
