"""Compiled functions: which one is being traced when a layer is called, and how to trace one only once.

TensorFlow and JAX run the Python code of a function only when they trace it. Whatever a layer reads there, such as
whether it is within a scope, is fixed for all later calls. PyTorch recompiles if what was read has changed.
"""

import sys
import types
from collections.abc import Callable
from typing import Any, Literal

import keras
from keras import ops

from keras_vdrop.functional.tensors import Tensor

_STEPS = {"train_step": "train", "test_step": "test", "predict_step": "predict"}


def compiled_function() -> tuple[keras.Model, str] | tuple[None, None] | None:
    """Return the compiled function that the caller is being traced for.

    Returns:
        None if the caller runs eagerly or only infers shapes. Otherwise a pair: the model and "predict" for
        `model.predict_function`, and likewise with "test" and "train"; None and None for any other function.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        return _owner(_is_jax_call, otherwise=None)
    if backend == "tensorflow":
        import tensorflow as tf

        if tf.inside_function():
            # The thread of a replica has only the step on its stack, not the compiled function.
            return _owner(_is_tensorflow_call, otherwise=(None, None))
    return None


def new_function(model: keras.Model, name: Literal["predict", "test", "train"]) -> Callable[..., Any]:
    """Have Keras make another `model.predict_function`, which traces the step anew. The model keeps its own.

    Args:
        model: A compiled `keras.Model`.
        name: "predict", "test" or "train".
    """
    step_name, function_name = f"{name}_step", f"{name}_function"
    own, step, is_set = getattr(model, function_name), getattr(model, step_name), step_name in vars(model)
    # JAX caches by the identity of a function, and would not trace the same method again.
    setattr(model, step_name, lambda *args, **kwargs: step(*args, **kwargs))
    setattr(model, function_name, None)
    try:
        getattr(model, f"make_{function_name}")()
        return getattr(model, function_name)
    finally:
        setattr(model, function_name, own)
        if is_set:
            setattr(model, step_name, step)
        else:
            delattr(model, step_name)


def _owner(is_boundary: Callable[[types.FrameType], bool], otherwise: tuple[None, None] | None) -> Any:
    """Identify the innermost compiled function on the stack, as `compiled_function` returns it.

    Keras has no public way from a layer to the model that is being traced. The stack is the same for functional,
    subclassed and nested models.

    Args:
        is_boundary: Callable, whether a frame is the call of a compiled function.
        otherwise: The result if no such frame and no step of a model is on the stack. If it is None, a step alone does
            not count.
    """
    found = None
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_name
        if name in _STEPS:
            model = frame.f_locals.get("self")
            found = (model, _STEPS[name]) if isinstance(model, keras.Model) else found
        elif name == "compute_output_spec":
            return None
        elif is_boundary(frame):
            return found or (None, None)
        frame = frame.f_back
    if otherwise is None:
        return None
    return found or otherwise


def _is_tensorflow_call(frame: types.FrameType) -> bool:
    return frame.f_globals.get("__name__", "").startswith("tensorflow.python.eager.polymorphic_function")


def _is_jax_call(frame: types.FrameType) -> bool:
    """Return whether a frame traces a function under `jit`, and not the body of a loop, which runs at once."""
    return frame.f_code.co_name == "cache_miss" and frame.f_globals.get("__name__") == "jax._src.pjit"


def in_tensorflow() -> bool:
    """Return whether the backend is TensorFlow."""
    return keras.backend.backend() == "tensorflow"


def side_by_side(function: Callable[[Tensor], Any], elements: Tensor) -> Any:
    """Apply `function` to each element and stack the results; vectorised where the backend can vectorise draws."""
    if elements.shape[0] == 1:
        return keras.tree.map_structure(lambda each: each[None], function(elements[0]))
    if in_tensorflow():
        import tensorflow as tf

        # `ops.vectorized_map` would warn that random numbers are drawn one element after the other.
        return tf.vectorized_map(function, elements, warn=False)
    if keras.backend.backend() == "jax":
        return ops.vectorized_map(function, elements)
    results = list(map(function, ops.unstack(elements)))
    return keras.tree.map_structure(lambda *each: ops.stack(each), *results)


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that a TensorFlow graph holds one copy of it for all calls with the same shapes."""
    if not in_tensorflow():
        return function
    import tensorflow as tf

    return function if tf.executing_eagerly() else tf.function(function)
