"""`StochasticLayer`: a layer that draws noise and weights the KL of its posteriors in the loss."""

import contextlib
import contextvars
import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_vdrop.checks import check_non_negative, check_policy, check_seed
from keras_vdrop.layers.foreign_arguments import refuse_foreign_arguments
from keras_vdrop.layers.rematerialization import Rematerialized
from keras_vdrop.posterior import Posterior, VariationalWeight, note_kl, posteriors
from keras_vdrop.sampling import is_sampling, seed_generator, seeds, use_scope
from keras_vdrop.variables import Scaled
from keras_vdrop.warning import warn

# Built layers whose `kl_weight` was never set.
_unset = weakref.WeakSet()
# Those about which a warning has been given.
_told = weakref.WeakSet()

_UNSET_MESSAGE = (
    "The KL weight of these variational layers was never set, so each layer's KL is averaged over its weights. The "
    "model trains, but the loss is not the ELBO, and the strength of the regularization is arbitrary. Pass "
    "`callbacks=[keras_vdrop.ELBO(num_examples=len(x_train))]` to `fit`, or `kl_weight=1 / len(x_train)` to each layer."
)

# Built layers that were given a `kl_weight` of 1 or more, and about which no warning has been given yet.
_heavy = weakref.WeakSet()

_HEAVY_MESSAGE = (
    "A KL weight of 1 or more is correct only for one training example. Pass `kl_weight=1 / len(x_train)`, or omit it "
    "and pass `callbacks=[keras_vdrop.ELBO(num_examples=len(x_train))]` to `fit`. Received: kl_weight={:g}"
)

_SEED_STATE = "seed_generator_state"

# The key in files for what a stored log variance is to be multiplied by.
_RATE = "log_variance_rate"

# The results of `kl_cost` within the scope `kl_costs`, by posterior; None outside the scope.
_costs: contextvars.ContextVar[dict[Posterior, Any] | None] = contextvars.ContextVar("costs", default=None)

# The function to call with every layer that has a KL and is called in training; None outside `watched`.
_watcher: contextvars.ContextVar[Callable[[Any], None] | None] = contextvars.ContextVar("watcher", default=None)

# Whether a callback sets the KL weight of the layers being built.
_weighted_by_callback = contextvars.ContextVar("weighted_by_callback", default=False)


@contextlib.contextmanager
def kl_costs() -> Iterator[dict[Posterior, Any]]:
    """Open a scope that computes each posterior's KL once; yield a dict from posteriors to their `kl_cost`."""
    costs: dict[Posterior, Any] = {}
    token = _costs.set(costs)
    try:
        yield costs
    finally:
        _costs.reset(token)


@contextlib.contextmanager
def watched(watcher: Callable[[Any], None]) -> Iterator[None]:
    """Open a scope that calls `watcher(layer)` for every layer that has a KL and is called in training."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def set_weighted_by_callback(yes: bool) -> None:
    """Set whether a callback sets the KL weight of the layers that are built from now on."""
    _weighted_by_callback.set(yes)


def is_unset(layer: keras.layers.Layer) -> bool:
    """Return whether the `kl_weight` of a built layer was never set."""
    return layer in _unset


class StochasticLayer(Rematerialized):
    """Mixin for a layer that draws noise in training and under `sampling()`, and weights the KL of its posteriors.

    Args:
        kl_weight: Float ≥ 0, the factor of the KL in the loss: 1 / (number of training examples) if the data loss is
            a mean over examples. Leave it None if the `ELBO` callback sets it.
        seed: Int for the same noise in every run, or None.
        **kwargs: The arguments of the Keras layer.
    """

    def __init__(self, *, kl_weight: float | None = None, seed: int | None = None, **kwargs: Any):
        if kl_weight is not None:
            check_non_negative("kl_weight", kl_weight)
        check_seed(seed)
        refuse_foreign_arguments(type(self), kwargs)
        super().__init__(**kwargs)
        check_policy(self.dtype_policy)
        self.seed = None if seed is None else int(seed)
        self._initial_kl_weight = None if kl_weight is None else float(kl_weight)
        self._kl_weight = None
        self._free_bits = None
        self._posterior_size = 0

    # The weight that `ELBO` gives the KL in the end; None without `ELBO`.
    full_kl_weight: float | None = None
    # The generator of the noise, once the layer is built; None if the layer draws nothing.
    seed_generator: keras.random.SeedGenerator | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "seed_generator" and not hasattr(self, "_posterior_size"):
            return  # Keras's constructors make a generator from the unhashed seed; `build` makes ours
        super().__setattr__(name, value)

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        plain_variable(self.variable_dtype)  # cached for `call`, which must not create variables
        self._build_noise()

    def _build_noise(self) -> None:
        """Create the generator of noise and, if there is a posterior, the variables that weight its KL."""
        if self.draws:
            # `Bidirectional` makes two layers from one config, and their noise must differ.
            backward = any(part.startswith("backward_") for part in (self.path or self.name).split("/"))
            self.seed_generator = seed_generator(self.seed, "backward" if backward else "forward")
        if self._posterior_size:
            self._kl_weight = self._add_scalar("kl_weight", self._default_kl_weight())
            self._free_bits = self._add_scalar("free_bits", 0.0)
            if self._initial_kl_weight is None and not _weighted_by_callback.get():
                _unset.add(self)
            elif (self._initial_kl_weight or 0.0) >= 1.0:
                _heavy.add(self)

    def _add_scalar(self, name: str, value: float) -> Any:
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
    def draws(self) -> bool:
        """Whether there is anything to draw: a layer without priors and dropout rates never makes noise."""
        return True

    def _noisy(self, training: bool | None) -> bool:
        """Return whether this call draws; in training, also give pending warnings and call the watcher."""
        if training and self in _unset and self not in _told:
            _told.update(_unset)  # one warning covers all layers built so far
            warn(_UNSET_MESSAGE)
        if training and self in _heavy:
            _heavy.clear()
            warn(_HEAVY_MESSAGE.format(self._initial_kl_weight), RuntimeWarning)
        watcher = _watcher.get()
        if training and self._posterior_size and watcher is not None:
            watcher(self)
        replay = self._replay.get()
        if replay is not None:
            return replay.noisy
        sampled = use_scope() if self.draws else is_sampling()
        return bool(training) or sampled

    def _seeds(self, purpose: str = "noise") -> keras.random.SeedGenerator:
        """Return the generator of the next seed; `purpose` names what is drawn with it."""
        return self._replay.get() or seeds(self.seed_generator, purpose)

    # The KL and its weight

    @property
    def kl_weight(self) -> Any:
        """The factor of this layer's KL in the loss: a float32 variable once the layer is built; assignable."""
        return self._initial_kl_weight if self._kl_weight is None else self._kl_weight

    @kl_weight.setter
    def kl_weight(self, value: float) -> None:
        check_non_negative("kl_weight", value)
        if self._kl_weight is None:
            self._initial_kl_weight = float(value)
        else:
            self._kl_weight.assign(value)
            _unset.discard(self)
            _heavy.discard(self)

    def _default_kl_weight(self) -> float:
        return 1.0 / self._posterior_size if self._initial_kl_weight is None else self._initial_kl_weight

    @property
    def free_bits(self) -> Any:
        """The KL per kept element of a posterior that costs nothing, in nats; assignable; None before `build`."""
        return self._free_bits

    @free_bits.setter
    def free_bits(self, value: float) -> None:
        check_non_negative("free_bits", value)
        if self._free_bits is None:
            raise ValueError(
                f"The layer {self.name!r} has not been built or has no prior, so it has no KL. "
                f"Received: free_bits={value!r}"
            )
        self._free_bits.assign(value)

    def kl_cost(self, posterior: Posterior) -> Any:
        """Return the cost of one of the layer's posteriors before weighting: max(KL, free_bits·kept), in nats."""
        note_kl()
        costs = _costs.get()
        if costs is not None and posterior in costs:
            return costs[posterior]
        kl = posterior.kl()
        cost = ops.maximum(kl, ops.cast(self._free_bits, kl.dtype) * posterior.kept())
        if costs is not None:
            costs[posterior] = cost
        return cost

    def weighted_kl(self, posterior: Posterior) -> Any:
        """Return what one of the layer's posteriors adds to the loss: kl_weight·max(KL, free_bits·kept)."""
        cost = self.kl_cost(posterior)
        return ops.cast(self._kl_weight, cost.dtype) * cost

    # For `sparsity`

    def structure(self, kept: dict[str, np.ndarray]) -> dict[str, tuple[int, int]]:
        """Count the structures that the layer's weights make up, such as units, and those that are kept.

        Args:
            kept: Dict from the names of the layer's weights to NumPy arrays, True where a weight is kept.

        Returns:
            Dict from the name of a structure to (number kept, number of all).
        """
        return {}

    def places(self, input_shape: Sequence[int | None]) -> int | None:
        """Return at how many positions of one example each weight is multiplied; 0 if the layer multiplies nothing.

        Args:
            input_shape: The shape of the inputs, with the batch.

        Returns:
            Int, or None if it depends on an unknown size.
        """
        return 0

    def stock_variables(self) -> list[Any]:
        """Return the layer's own variables that its Keras counterpart has too; a layer of noise alone has none."""
        return []

    # Saving

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "kl_weight": self._initial_kl_weight, "seed": self.seed}

    def save_own_variables(self, store: Any) -> None:
        # Keras's Dense and Conv would save only the kernel and the bias.
        keys, scaled = self._keys(), self._scaled()
        for key, variable in keys.items():
            store[key] = variable
        rates = {scaled[id(variable)].factor for variable in keys.values() if id(variable) in scaled}
        if rates:
            (store[_RATE],) = map(np.float32, rates)  # all of the layer's own weights have one rate
        if self.seed_generator is not None:
            store[_SEED_STATE] = self.seed_generator.state

    def _keys(self) -> dict[str, Any]:
        """Return the layer's own variables by their keys in files: Keras's numbers; names for fixed prior scales."""
        keras.layers.Layer.save_own_variables(self, own := {})
        parameters = [each for weight in self._variational_weights() for each in weight.prior_parameters.values()]
        fixed = {id(each) for each in parameters if not each.trainable}
        counted = [each for each in own.values() if id(each) not in fixed]
        named = [each for each in own.values() if id(each) in fixed]
        return {**{str(index): each for index, each in enumerate(counted)}, **{each.name: each for each in named}}

    def _variational_weights(self) -> list[VariationalWeight]:
        return [each for each in posteriors(self) if isinstance(each, VariationalWeight)]

    def _scaled(self) -> dict[int, Scaled]:
        """Return each scaled log variance by the id of its variable."""
        return {id(weight.log_variance.variable): weight.log_variance for weight in self._variational_weights()}

    def _value_before(self, variable: Any) -> Any:
        """Return, as an array, the value for a variable that an older file lacks; None if every file has it."""
        if variable is self._kl_weight:
            return np.float32(self._default_kl_weight())
        if variable is self._free_bits or variable.name.endswith("_prior_log_scale"):
            return np.float32(0.0)  # there were no free bits, and "normal" was N(0, 1)
        return np.ones(variable.shape, bool) if variable.dtype == "bool" else None

    def load_own_variables(self, store: Any) -> None:
        found = {key: store[key] for key in set(store.keys())}  # a store lacks some methods of a dict
        state, rate = found.pop(_SEED_STATE, None), found.pop(_RATE, None)
        scaled = self._scaled()
        for key, variable in self._keys().items() if found else ():
            if key not in found and self._value_before(variable) is not None:
                found[key] = self._value_before(variable)
            elif key in found and id(variable) in scaled:
                # Values of the same rate stay as they are, bit for bit. Older files hold the log variance itself.
                factor = (1.0 if rate is None else np.asarray(rate)) / np.float32(scaled[id(variable)].factor)
                found[key] = np.asarray(found[key]) * factor
        keras.layers.Layer.save_own_variables(self, own := {})
        keys = {id(variable): key for key, variable in self._keys().items()}
        values = {index: found.pop(keys[id(each)]) for index, each in own.items() if keys[id(each)] in found}
        keras.layers.Layer.load_own_variables(self, {**values, **found})
        if state is not None and self.seed_generator is not None:
            self.seed_generator.state.assign(state)
        if self in _unset and not math.isclose(float(self._kl_weight), self._default_kl_weight(), rel_tol=1e-6):
            _unset.discard(self)  # `ELBO` had set it before the weights were saved


@functools.cache
def plain_variable(dtype: str) -> Any:
    """Return a variable like those of Keras's layers: its `dtype` is the one to which the current scope casts it."""
    return keras.Variable(keras.initializers.Zeros(), shape=(), dtype=dtype, trainable=False)
