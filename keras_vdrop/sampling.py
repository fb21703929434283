"""When and from what variational layers draw: the `sampling()` scope, and the generators of their noise."""

import contextlib
import contextvars

import keras
from keras import ops

from keras_vdrop.functional import noise

# None outside of `sampling()`, else its argument.
_consistent = contextvars.ContextVar("keras_vdrop_sampling", default=None)

_GENERATOR_NAME = "variational_noise"


@contextlib.contextmanager
def sampling(consistent=False):
    """Within the scope, variational layers draw their weights although `training` is False.

    Everything else (BatchNormalization, Keras's own Dropout) stays in inference mode. A function that was compiled
    outside the scope does not notice it: use `MonteCarlo` for `predict`.

    Args:
        consistent: Whether one draw of the weights and masks serves all examples of a call, whatever the layers'
            estimators: what is computed is then one function, drawn from the posterior. A layer that a model calls
            twice draws twice.

    Example:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalDense(1, initial_log_variance=0.0, seed=0)
        >>> x = keras.ops.ones((1, 4))
        >>> bool(layer(x) == layer(x))
        True
        >>> with kv.sampling():
        ...     bool(layer(x) == layer(x))
        False
    """
    token = _consistent.set(bool(consistent))
    try:
        yield
    finally:
        _consistent.reset(token)


def is_sampling():
    """True within a `sampling()` scope."""
    return _consistent.get() is not None


def is_consistent():
    """True within a `sampling(consistent=True)` scope."""
    return bool(_consistent.get())


def mask_shape(shape):
    """The shape of a mask for inputs of that shape: one for each example, or one for all of them."""
    return (1, *shape[1:]) if is_consistent() else tuple(shape)


class FixedSeeds(keras.random.SeedGenerator):
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


def seed_generator(seed, *salt):
    """A layer's source of noise. Equal arguments give equal noise, unless `seed` is None."""
    hashed = None if seed is None else noise.hash_seed(seed, *salt)
    return keras.random.SeedGenerator(hashed, name=_GENERATOR_NAME)


def generator_states(model):
    """The state variables of every such generator in a model: what changes when its layers draw."""
    return [variable for variable in model.non_trainable_variables if f"{_GENERATOR_NAME}/" in variable.path]
