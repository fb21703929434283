"""When and from what variational layers draw: the `sampling()` scope, and the generators of their noise."""

import contextlib
import contextvars

import keras

from keras_vdrop.functional import noise

_active = contextvars.ContextVar("keras_vdrop_sampling", default=False)

_GENERATOR_NAME = "variational_noise"


@contextlib.contextmanager
def sampling():
    """Within the scope, variational layers draw their weights although `training` is False.

    Everything else (BatchNormalization, Keras's own Dropout) stays in inference mode. A function that was compiled
    outside the scope does not notice it: use `MonteCarlo` for `predict`.

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
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


def is_sampling():
    """True within a `sampling()` scope."""
    return _active.get()


def seed_generator(seed, *salt):
    """A layer's source of noise. Equal arguments give equal noise, unless `seed` is None."""
    hashed = None if seed is None else noise.hash_seed(seed, *salt)
    return keras.random.SeedGenerator(hashed, name=_GENERATOR_NAME)


def generator_states(model):
    """The state variables of every such generator in a model: what changes when its layers draw."""
    return [variable for variable in model.non_trainable_variables if f"{_GENERATOR_NAME}/" in variable.path]
