"""When and from what variational layers draw: the `sampling()` scope, and the generators of their noise."""

import contextlib
import contextvars

import keras
from keras import ops

from keras_vdrop.functional import noise

# The innermost scope, or None outside of all.
_scope = contextvars.ContextVar("keras_vdrop_sampling", default=None)

_GENERATOR_NAME = "variational_noise"


class _Scope:
    def __init__(self, consistent):
        self.consistent = bool(consistent)
        # Generators to advance when the scope ends, by their id.
        self.held = {}


@contextlib.contextmanager
def sampling(consistent=False):
    """Within the scope, variational layers draw their weights although `training` is False.

    Everything else (BatchNormalization, Keras's own Dropout) stays in inference mode. A function that was compiled
    outside the scope does not notice it: use `MonteCarlo` for `predict`.

    Args:
        consistent: Whether one draw of the weights and masks serves all examples and all calls within the scope,
            whatever the layers' estimators: what is computed is then one function, drawn from the posterior. The next
            scope draws another.

    Example:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalDense(1, initial_log_variance=0.0, seed=0)
        >>> x = keras.ops.ones((1, 4))
        >>> bool(layer(x) == layer(x))
        True
        >>> with kv.sampling():
        ...     bool(layer(x) == layer(x))
        False
        >>> with kv.sampling(consistent=True):
        ...     bool(layer(x) == layer(x))
        True
    """
    with drawing(consistent) as scope:
        yield
    for generator in scope.held.values():
        generator.next()


@contextlib.contextmanager
def drawing(consistent=False):
    """The same, for who sees to it that the next scope finds the generators of noise elsewhere."""
    scope = _Scope(consistent)
    token = _scope.set(scope)
    try:
        yield scope
    finally:
        _scope.reset(token)


def is_sampling():
    """True within a scope."""
    return _scope.get() is not None


def is_consistent():
    """True within a scope of consistent draws."""
    return is_sampling() and _scope.get().consistent


def advance(generator):
    """Have a layer's generator of noise move on: now, or where draws are consistent, when the scope ends."""
    if is_consistent():
        _scope.get().held[id(generator)] = generator
    else:
        generator.next()


def seeds(generator, purpose):
    """Where a layer's next seed comes from.

    Args:
        generator: The layer's.
        purpose: What it is drawn for, by a name: where draws are consistent, all that is drawn for one thing is the
            same, and what is drawn for two is independent.
    """
    if not is_consistent():
        return generator
    advance(generator)
    return FixedSeeds(generator.state, noise.hash_seed(purpose))


def mask_shape(shape):
    """The shape of a mask for inputs of that shape: one for each example, or one for all of them."""
    return (1, *shape[1:]) if is_consistent() else tuple(shape)


class FixedSeeds(keras.random.SeedGenerator):
    """The seeds that follow from one state: the same ones however often they are asked for anew."""

    def __init__(self, state, salt=0):
        # No variable, so not Keras's own constructor.
        self._state = state
        self._salt = salt
        self._draws = 0

    def next(self, ordered=True):
        # Far from the states of other calls, which count up by one.
        offset = ops.convert_to_tensor([self._salt, self._draws << 24], dtype=self._state.dtype)
        self._draws += 1
        return self._state + offset


def seed_generator(seed, *salt):
    """A layer's source of noise. Equal arguments give equal noise, unless `seed` is None."""
    hashed = None if seed is None else noise.hash_seed(seed, *salt)
    return keras.random.SeedGenerator(hashed, name=_GENERATOR_NAME)


def generator_states(model):
    """The state variables of every such generator in a model: what changes when its layers draw."""
    return [variable for variable in model.non_trainable_variables if f"{_GENERATOR_NAME}/" in variable.path]
