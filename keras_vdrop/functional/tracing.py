"""Whose compiled function a layer's call becomes part of: what runs in Python once, and is kept.

TensorFlow and JAX run the Python of a function when they trace it, and never again. So what a layer reads there, such
as whether it is within a scope, is settled for good. PyTorch compiles anew where what was read has changed.
"""

import sys

import keras

_STEPS = {"train_step": "train", "test_step": "test", "predict_step": "predict"}


def compiled_function():
    """The function for which the caller is being traced.

    Returns:
        None where the caller runs at once, or only to find shapes. Else a pair: of `model.predict_function`, the model
        and "predict", and so for "test" and "train"; of any other function, None and None.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        return _owner(_is_jax_call, otherwise=None)
    if backend == "tensorflow":
        import tensorflow as tf

        if tf.inside_function():
            # The stack of a replica's thread ends at its step.
            return _owner(_is_tensorflow_call, otherwise=(None, None))
    return None


def new_function(model, name):
    """Another `model.predict_function` by Keras, which traces the step anew. The model keeps the one that it has.

    Args:
        model: A compiled `keras.Model`.
        name: "predict", "test" or "train".
    """
    step_name, function_name = f"{name}_step", f"{name}_function"
    own, step, is_set = getattr(model, function_name), getattr(model, step_name), step_name in vars(model)
    # JAX knows a function by its identity, and would not trace the same method again.
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


def _owner(is_boundary, otherwise):
    """What the innermost compiled function on the stack is; without one, the step that was met or `otherwise`.

    Keras has no public way from a layer to the model that is being traced, and the stack is the same for functional,
    subclassed and nested models.
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
    return otherwise and (found or otherwise)


def _is_tensorflow_call(frame):
    return frame.f_globals.get("__name__", "").startswith("tensorflow.python.eager.polymorphic_function")


def _is_jax_call(frame):
    """Of a function under `jit`; the body of a loop is traced as well, but run at once."""
    return frame.f_code.co_name == "cache_miss" and frame.f_globals.get("__name__") == "jax._src.pjit"
