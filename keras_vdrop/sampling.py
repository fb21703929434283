"""The `sampling()` scope, in which variational layers draw, and the generators of their noise."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Literal

import keras
from keras import ops

from keras_vdrop.functional import noise, tracing

# The innermost scope of this thread, or None outside any scope.
_scope: contextvars.ContextVar[_Scope | None] = contextvars.ContextVar("keras_vdrop_sampling", default=None)

# The scopes that the main thread has open, outermost first. Threads that start within a scope belong to it.
_open: list[_Scope] = []

_GENERATOR_NAME = "variational_noise"

_COMPILED_MESSAGE = (
    "This function is being compiled within a `sampling()` scope that was opened outside of it. It would remain noisy "
    "after the scope ends. Open the scope inside the function, or predict with `keras_vdrop.MonteCarlo(model)`. "
    "Functions that Keras compiles (`predict`, `evaluate`, `fit`) can be called within a scope."
)

_UNUSED_MESSAGE = (
    "Nothing was drawn within this `sampling()` scope: no layer with a prior or a dropout rate was called in it. A "
    "function that was compiled earlier ignores the scope, and so does a thread that was started earlier. Open the "
    "scope inside the function or thread, or predict with `keras_vdrop.MonteCarlo(model)`."
)


class _Scope:
    """The state of an open scope, which tells layers how to draw.

    Attributes:
        consistent: Whether all calls share one draw.
        repeated: The ids of the generator states of layers that an example uses more than once: an example keeps its
            draw of these layers from call to call.
        held: The generator states to advance when the scope ends, by id.
        used: Whether anything was drawn.
        around: Whether the scope was opened outside of compiled functions, which then outlive it.
        threads: The threads that were running when the scope was opened.
    """

    def __init__(self, consistent: bool, repeated: Iterable[int] = ()):
        self.consistent = bool(consistent)
        self.repeated = frozenset(repeated)
        self.held: dict[int, Any] = {}
        self.used = False
        self.around = False
        self.threads: Collection[threading.Thread] = ()


@contextlib.contextmanager
def sampling(consistent: bool = False) -> Iterator[None]:
    """Make variational layers draw their weights within the scope, even if `training` is False.

    Everything else (BatchNormalization, Keras's own Dropout) stays in inference mode. `predict`, `evaluate` and `fit`
    of a model follow the scope, wherever they were called first: a separate function is compiled for each kind of
    scope. A function that you compile yourself (`tf.function`, `jax.jit`) must open the scope inside: compiling one
    within a scope raises an error, and one that was compiled before ignores the scope.

    Threads that start while the main thread is within the scope belong to it, and so do replicas
    (`tf.distribute.Strategy.run`). Open a scope in any other thread, even if it starts while a thread other than the
    main one is within a scope.

    An RNN draws once per sequence. A recurrent cell that you call step by step draws again at every step, unless
    `consistent`.

    Args:
        consistent: If True, all examples, calls, threads and replicas within the scope share one draw of the weights
            and masks, whatever the layers' estimators. The model is then one function, drawn from the posterior. The
            next scope draws another one.

    Raises:
        ValueError: If a function that is not Keras's is compiled within the scope; or, when the scope ends, if nothing
            was drawn in it.

    Examples:
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
def drawing(consistent: bool = False, repeated: Iterable[int] = ()) -> Iterator[_Scope]:
    """Open a scope for this thread alone, which does not advance generators when it ends.

    The caller must make sure that the next scope finds other generator states. A compiled function must open the scope
    inside.

    Args:
        consistent, repeated: As for `_Scope`.
    """
    take_part()
    scope = _Scope(consistent, repeated)
    token = _scope.set(scope)
    try:
        yield scope
    finally:
        _scope.reset(token)


@contextlib.contextmanager
def _open_to_threads(scope: _Scope) -> Iterator[None]:
    """Let threads that start from now on find the scope, if the main thread opens it.

    Python does not tell which thread started another one. If another thread could do this, threads that it did not
    start would find its scope too.
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


def _current() -> _Scope | None:
    """Return the scope in which the caller runs, or None."""
    scope = _scope.get()
    return _of_the_main_thread() if scope is None and _open else scope


def _of_the_main_thread() -> _Scope | None:
    """Return the main thread's innermost scope within which this thread was started, or None."""
    thread = threading.current_thread()
    return next((scope for scope in reversed(_open) if thread not in scope.threads), None)


def is_sampling() -> bool:
    """Return whether the caller runs within a scope."""
    return _current() is not None


def is_consistent() -> bool:
    """Return whether the caller runs within a scope of consistent draws."""
    scope = _current()
    return scope is not None and scope.consistent


def use_scope() -> bool:
    """Return whether a scope makes the caller draw. Layers with noise ask at every call.

    If a function of Keras's (`predict_function` and the like) is being compiled, it becomes a `CompiledByScope`.

    Raises:
        ValueError: If another function is being compiled, and the scope was opened outside of it.
    """
    scope = _current()
    if scope is None or scope.around:
        _compile_for(scope)
    take_part()
    return scope is not None


def take_part() -> None:
    """Mark the caller's scope, if any, as used."""
    scope = _current()
    if scope is not None and not scope.used:
        scope.used = True


def _compile_for(scope: _Scope | None, refuse: bool = True) -> None:
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


def _kind(scope: _Scope | None) -> bool | None:
    return None if scope is None else scope.consistent


class CompiledByScope:
    """A `model.predict_function` (or that of test or train) with one compiled function for each kind of scope.

    Args:
        model: The model.
        name: "predict", "test" or "train".
        kind: None outside any scope, otherwise whether the scope is consistent.
        function: The function that Keras is compiling for this kind.

    Attributes:
        reached: The kinds of scope that layers found while the functions were compiled.
    """

    def __init__(
        self,
        model: keras.Model,
        name: Literal["predict", "test", "train"],
        kind: bool | None,
        function: Callable[..., Any],
    ):
        self._model = model
        self._name = name
        self._functions = {kind: function}
        self._lock = threading.Lock()
        self.reached = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scope = _current()
        kind = _kind(scope)
        with self._lock:
            if kind not in self._functions:
                self._functions[kind] = tracing.new_function(self._model, self._name)
        if kind:
            scope.held.update((id(state), state) for state in generator_states(self._model))
        result = self._functions[kind](*args, **kwargs)
        if kind not in self.reached:
            raise ValueError(_UNUSED_MESSAGE)  # layers ran in replica threads that a non-main thread started
        take_part()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(next(iter(self._functions.values())), name)


def repeated() -> frozenset[int]:
    """Return the ids of the generator states of layers whose draw an example keeps from call to call."""
    scope = _current()
    return frozenset() if scope is None else scope.repeated


def is_repeated(generator: keras.random.SeedGenerator) -> bool:
    """Return whether an example keeps its draw from this generator from call to call."""
    return id(generator.state) in repeated()


def advance(generator: keras.random.SeedGenerator) -> None:
    """Advance a layer's generator: when the scope ends if draws are consistent, otherwise now unless it is repeated."""
    if is_consistent():
        _current().held[id(generator.state)] = generator.state
    elif not is_repeated(generator):
        generator.next()


def seeds(generator: keras.random.SeedGenerator, purpose: str) -> keras.random.SeedGenerator:
    """Return the source of a layer's next seed.

    Args:
        generator: The layer's generator of noise.
        purpose: A name for what is drawn. If draws are consistent or repeated, all draws for one purpose are the same,
            and draws for different purposes are independent.
    """
    if not (is_consistent() or is_repeated(generator)):
        return generator
    advance(generator)
    return FixedSeeds(generator.state, noise.hash_seed(purpose))


def mask_shape(shape: Sequence[Any]) -> tuple[Any, ...]:
    """Return the shape of a mask for inputs of a shape: a mask per example, or one for all if draws are consistent."""
    return (1, *shape[1:]) if is_consistent() else tuple(shape)


class FixedSeeds(keras.random.SeedGenerator):
    """A source of seeds that follow from one fixed state: every new instance gives the same seeds.

    Attributes:
        same_on_replicas: Whether all replicas of a strategy draw the same, as they do if draws are consistent.
    """

    def __init__(self, state: Any, salt: int = 0):
        # Keras's constructor would create a variable.
        self.same_on_replicas = is_consistent()
        self._state = state
        self._salt = salt
        self._draws = 0

    def next(self, ordered: bool = True) -> Any:
        # Stay far from the states of other calls, which increase by one, and within 31 bits.
        salt, draw = self._salt ^ (self._draws >> 7), self._draws & 127
        offset = ops.convert_to_tensor([salt, draw << 24], dtype=self._state.dtype)
        self._draws += 1
        return self._state + offset


def seed_generator(seed: int | None, *salt: str) -> keras.random.SeedGenerator:
    """Create a layer's generator of noise. Equal arguments give equal noise, unless `seed` is None."""
    hashed = None if seed is None else noise.hash_seed(seed, *salt)
    return keras.random.SeedGenerator(hashed, name=_GENERATOR_NAME)


def generator_states(model: keras.Model) -> list[Any]:
    """Return the state variables of all generators of noise in a model; they change when its layers draw."""
    return [variable for variable in model.non_trainable_variables if f"{_GENERATOR_NAME}/" in variable.path]


def is_generator_state(variable: Any) -> bool:
    """Return whether a variable is the state of a `keras.random.SeedGenerator`."""
    return variable.path.split("/")[-1] == "seed_generator_state"


class OneDraw(keras.StatelessScope):
    """A scope in which every generator of random numbers starts from the seed of one draw.

    That includes generators that do not belong to a model: Keras's own, which it uses where `seed` is None, and those
    that a function takes from elsewhere.

    Args:
        state_mapping: List of pairs (variable, value), which may contain states of generators.
        seed: Scalar tensor: the seed of all other generators.
    """

    def __init__(self, state_mapping: Sequence[tuple[Any, Any]], seed: Any):
        super().__init__(state_mapping=state_mapping)
        self._seed = seed
        self._others = 0

    def get_current_value(self, variable: Any) -> Any:
        value = super().get_current_value(variable)
        if value is None and is_generator_state(variable):
            # A state is a seed and a counter. Multiples of this number modulo 2³¹ are far apart, also from 0, where
            # the generators in `state_mapping` start.
            self._others += 1
            value = ops.cast(ops.stack([self._seed, self._others * 1_327_217_885 % 2**31]), variable.dtype)
            self.state_mapping[id(variable)] = value
        return value
