"""When and from what variational layers draw: the `sampling()` scope, and the generators of their noise."""

import contextlib
import contextvars
import threading

import keras
from keras import ops

from keras_vdrop.functional import noise, tracing

# The innermost scope of this thread, or None outside of all.
_scope = contextvars.ContextVar("keras_vdrop_sampling", default=None)

# The scopes that the main thread has open, which the threads that it starts belong to; outermost first.
_open = []

_GENERATOR_NAME = "variational_noise"

_COMPILED_MESSAGE = (
    "This function is being compiled within a `sampling()` scope that was opened outside of it: it would keep the "
    "noise for good. Open the scope inside the function, or predict by `keras_vdrop.MonteCarlo(model)`. Models that "
    "Keras compiles itself (`predict`, `evaluate`, `fit`) may be called within a scope."
)

_UNUSED_MESSAGE = (
    "Nothing was drawn within this `sampling()` scope: no layer with a prior or a rate was called in it. A function "
    "that was compiled before does not notice the scope, nor does a thread that was started before: open the scope "
    "inside them, or predict by `keras_vdrop.MonteCarlo(model)`."
)


class _Scope:
    """What layers draw by, from when it is opened until it is closed.

    Attributes:
        consistent: Whether all calls draw the same.
        repeated: The ids of the states of generators whose layers an example uses more than once: an example keeps its
            draw of them from call to call.
        held: Of the generators that are to advance when the scope ends, the states, by their id.
        used: Whether anything was drawn.
        around: Whether functions can be compiled within it that outlive it.
        threads: Those that ran when it was opened.
    """

    def __init__(self, consistent, repeated=()):
        self.consistent = bool(consistent)
        self.repeated = frozenset(repeated)
        self.held = {}
        self.used = False
        self.around = False
        self.threads = ()


@contextlib.contextmanager
def sampling(consistent=False):
    """Within the scope, variational layers draw their weights although `training` is False.

    Everything else (BatchNormalization, Keras's own Dropout) stays in inference mode. `predict`, `evaluate` and `fit`
    of a model draw within the scope and not outside of it, wherever they were called first: Keras compiles a function
    for each. A function that you compile (`tf.function`, `jax.jit`) must open the scope itself: one that is compiled
    within a scope is refused, and one that was compiled before does not notice it.

    Threads that start while the main thread is within the scope belong to it, and so do replicas
    (`tf.distribute.Strategy.run`). Other threads do not, nor do those that start while another than the main thread is
    within it: open the scope in them.

    An RNN draws once a sequence. A recurrent cell that you call step by step draws anew at every step, unless
    `consistent`.

    Args:
        consistent: Whether one draw of the weights and masks serves all examples, all calls, all threads and all
            replicas within the scope, whatever the layers' estimators: what is computed is then one function, drawn
            from the posterior. The next scope draws another.

    Raises:
        ValueError: If a function that is not Keras's is compiled within the scope; and at its end, if nothing was drawn
            within it.

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
    outer = _current()
    if outer is None or outer.around:
        _compile_for(outer, refuse=False)
    with drawing(consistent) as scope:
        scope.around = tracing.compiled_function() is None
        with _open_to_threads(scope):
            yield
    if not scope.used:
        raise ValueError(_UNUSED_MESSAGE)
    for state in scope.held.values():
        state.assign(state + ops.convert_to_tensor([0, 1], dtype=state.dtype))


@contextlib.contextmanager
def drawing(consistent=False, repeated=()):
    """The same for this thread alone, and for who sees to it that the next scope finds other states of generators.

    A function that is compiled must have it inside. `repeated`: see `_Scope`.
    """
    take_part()
    scope = _Scope(consistent, repeated)
    token = _scope.set(scope)
    try:
        yield scope
    finally:
        _scope.reset(token)


@contextlib.contextmanager
def _open_to_threads(scope):
    """Have the threads that start from now on find the scope, if the main thread opens it.

    Python does not tell who has started a thread. A scope of another thread could be taken for that of its siblings.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    scope.threads = frozenset(threading.enumerate())
    _open.append(scope)
    try:
        yield
    finally:
        _open.remove(scope)


def _current():
    """The scope in which the caller is, or None."""
    scope = _scope.get()
    return _of_the_main_thread() if scope is None and _open else scope


def _of_the_main_thread():
    """The innermost of its scopes within which this thread was started, or None."""
    thread = threading.current_thread()
    return next((scope for scope in reversed(_open) if thread not in scope.threads), None)


def is_sampling():
    """True within a scope."""
    return _current() is not None


def is_consistent():
    """True within a scope of consistent draws."""
    scope = _current()
    return scope is not None and scope.consistent


def use_scope():
    """Whether the caller draws by a scope; what has noise to draw asks at every call.

    The function that is being compiled, if any, becomes one for each kind of scope if it is Keras's.

    Raises:
        ValueError: If it is another, and the scope was opened outside of it.
    """
    scope = _current()
    if scope is None or scope.around:
        _compile_for(scope)
    take_part()
    return scope is not None


def take_part():
    """Tell the scope in which the caller is, if any, that it serves a purpose."""
    scope = _current()
    if scope is not None and not scope.used:
        scope.used = True


def _compile_for(scope, refuse=True):
    found = tracing.compiled_function()
    if found is None:
        return
    model, name = found
    function = None if model is None else getattr(model, f"{name}_function")
    if function is None and scope is not None and refuse:
        raise ValueError(_COMPILED_MESSAGE)
    if function is None:
        return
    if not isinstance(function, CompiledByScope):
        function = CompiledByScope(model, name, _kind(scope), function)
        setattr(model, f"{name}_function", function)
    function.reached.add(_kind(scope))


def _kind(scope):
    return None if scope is None else scope.consistent


class CompiledByScope:
    """`model.predict_function` (or that of test or train) that calls one compiled function for each kind of scope.

    Args:
        model: The model.
        name: "predict", "test" or "train".
        kind: None outside of a scope, else whether it is consistent.
        function: What Keras is compiling there.

    Attributes:
        reached: The kinds of scopes that the layers found when their functions were compiled.
    """

    def __init__(self, model, name, kind, function):
        self._model = model
        self._name = name
        self._functions = {kind: function}
        self._lock = threading.Lock()
        self.reached = set()

    def __call__(self, *args, **kwargs):
        scope = _current()
        kind = _kind(scope)
        with self._lock:
            if kind not in self._functions:
                self._functions[kind] = tracing.new_function(self._model, self._name)
        if kind:
            scope.held.update((id(state), state) for state in generator_states(self._model))
        result = self._functions[kind](*args, **kwargs)
        if kind not in self.reached:
            raise ValueError(_UNUSED_MESSAGE)  # its replicas are threads, and not the main thread's
        take_part()
        return result

    def __getattr__(self, name):
        return getattr(next(iter(self._functions.values())), name)


def repeated():
    """The ids of the states of generators of which an example keeps its draw from one call to the next."""
    scope = _current()
    return frozenset() if scope is None else scope.repeated


def is_repeated(generator):
    """Whether the generator is one of those."""
    return id(generator.state) in repeated()


def advance(generator):
    """Have a layer's generator of noise move on: now, or where draws are consistent, when the scope ends."""
    if is_consistent():
        _current().held[id(generator.state)] = generator.state
    elif not is_repeated(generator):
        generator.next()


def seeds(generator, purpose):
    """Where a layer's next seed comes from.

    Args:
        generator: The layer's.
        purpose: What it is drawn for, by a name: where draws are consistent or repeated, all that is drawn for one
            thing is the same, and what is drawn for two is independent.
    """
    if not (is_consistent() or is_repeated(generator)):
        return generator
    advance(generator)
    return FixedSeeds(generator.state, noise.hash_seed(purpose))


def mask_shape(shape):
    """The shape of a mask for inputs of that shape: one for each example, or one for all of them."""
    return (1, *shape[1:]) if is_consistent() else tuple(shape)


class FixedSeeds(keras.random.SeedGenerator):
    """The seeds that follow from one state: the same ones however often they are asked for anew.

    Attributes:
        same_on_replicas: Whether the replicas of a strategy draw the same by them, as they do where draws are
            consistent.
    """

    def __init__(self, state, salt=0):
        # No variable, so not Keras's own constructor.
        self.same_on_replicas = is_consistent()
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
