"""What a model's outputs are: their names, the layers that compute them, and mistakes in how they are used."""

import warnings
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from keras_vdrop.functional import likelihoods
from keras_vdrop.functional.tensors import to_numpy
from keras_vdrop.losses import NegativeLogLikelihood
from keras_vdrop.warning import warn

# Layers that are activations, except for `PReLU`: it learns the slope that would tell its range.
_ACTIVATION_LAYERS = (layers.Softmax, layers.ReLU, layers.LeakyReLU, layers.ELU)


def output_names(model: Any) -> tuple[str, ...] | None:
    """Return the names of a model's outputs, in order, as in `compile(loss={...})`; None if they are not known."""
    if isinstance(model, keras.Sequential):
        return (model.layers[-1].name,)
    if not hasattr(model, "output_names"):
        return None
    return tuple(sorted(model.output)) if isinstance(model.output, dict) else tuple(model.output_names)


def last_layer(model: Any, name: str | None = None) -> Any:
    """Return the layer that computes the named output, or the only output; None if it cannot be determined."""
    if isinstance(model, keras.Sequential):
        last = model.layers[-1]
    elif hasattr(model, "operations"):
        # The names of outputs are the keys of a dict, and otherwise the names of their layers.
        index = 0 if name is None else output_names(model).index(name)
        names = model.output_names
        found = [each for each in model.operations if each.name == names[index]]
        if (name is None and len(names) > 1) or names.count(names[index]) > 1 or not found:
            return None
        (last,) = found
    else:
        return None
    while isinstance(last, keras.layers.Wrapper):
        last = last.layer
    return last_layer(last) if isinstance(last, keras.Model) else last


def last_activation(layer: Any) -> str | None:
    """Return Keras's name of the activation of a layer or operation; None if it has none, or one unknown to Keras."""
    if layer is not None and not isinstance(layer, layers.Layer):  # `keras.ops.softmax` of an output, for example
        name = type(layer).__name__.lower()
        return name if callable(getattr(keras.activations, name, None)) else None
    for cls in _ACTIVATION_LAYERS:
        if isinstance(layer, cls):
            return cls.__name__.lower()
    activation = getattr(layer, "activation", None)
    name = keras.activations.serialize(activation) if callable(activation) else None
    return name if isinstance(name, str) and name != "linear" else None


def check_activation(model: keras.Model, name: str | None = None) -> None:
    """Warn if outputs that are the parameters of a distribution end in an activation.

    Args:
        model: A built model. The check can inspect the last layer of Sequential and Functional models only.
        name: Name of the output, if there are several.

    Warns:
        UserWarning: Names the activation and the range of scales that it allows.
    """
    layer = last_layer(model, name)
    activation = last_activation(layer)
    if activation is None:
        return
    grid = np.linspace(-100.0, 100.0, 2001, dtype="float32")
    function = layer if isinstance(layer, _ACTIVATION_LAYERS) else keras.activations.get(activation)
    raw = to_numpy(function(ops.convert_to_tensor(np.stack([-grid, grid], axis=-1))))[:, 1]
    scale = np.logaddexp(0.0, raw.astype("float64")) + likelihoods.LEAST_SCALE
    least, most = (f"{end:.3g}" for end in (scale.min(), scale.max()))
    reach = f"at least {least}" if raw.max() > 50 else f"between {least} and {most}"
    warn(
        f"The outputs of {model.name!r}{f' for {name!r}' if name else ''} are the parameters of a distribution, but "
        f"the model ends with the activation {activation!r}. It restricts the mean, and the scale is always {reach}. "
        "Remove the activation: the loss makes the scale positive.",
    )


# Names of Keras's metrics of point predictions, in lower case and without underscores.
_OF_A_POINT = {
    "mse",
    "mae",
    "mape",
    "meansquarederror",
    "meanabsoluteerror",
    "meanabsolutepercentageerror",
    "rootmeansquarederror",
    "r2score",
}


def check_outputs(model: keras.Model) -> None:
    """Warn about mistakes with outputs that are the parameters of a distribution, as far as they can be detected.

    Args:
        model: A compiled, built model.

    Warns:
        UserWarning: If an output whose loss is a `NegativeLogLikelihood` ends in an activation, or has a Keras metric
            that compares y with all parameters, including the raw scale.
    """
    names = output_names(model) or ()
    try:
        config = compile_config(model)
    except Exception:  # an object has no config, so the metrics are unknown
        config = {}
    for index, name in enumerate(names):
        loss = _of_output(model.loss, name, index, len(names))
        if not isinstance(loss, NegativeLogLikelihood):
            continue
        check_activation(model, name if len(names) > 1 else None)
        given = [_of_output(config.get(kind), name, index, len(names)) for kind in ("metrics", "weighted_metrics")]
        wrong = [metric for metric in _keras_names(given) if metric.lower().replace("_", "") in _OF_A_POINT]
        if wrong:
            warn(
                f"The metric {wrong[0]!r} compares y with all the parameters that {model.name!r} returns, including "
                "the raw scale. Use `keras_vdrop.metrics.RootMeanSquaredError` or `MeanAbsoluteError`, which compare y "
                "with the mean.",
            )


def compile_config(model: keras.Model) -> Any:
    """Return the arguments of `compile` as Keras saves them. Raises what the `get_config` of an argument raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about lambdas, which need not be serialized here
        return model.get_compile_config() or {}


def _of_output(given: Any, name: str, index: int, count: int) -> Any:
    """Return the entry for one output of an argument of `compile`."""
    if isinstance(given, dict):
        return given.get(name)
    if isinstance(given, (list, tuple)) and count > 1:
        return given[index]
    return given


def _keras_names(metrics: Any) -> list[str]:
    """Return the names of Keras's own metrics in a config of `compile`."""
    if isinstance(metrics, str):
        return [metrics]
    if isinstance(metrics, dict) and "class_name" in metrics:
        return [] if metrics.get("registered_name") else [metrics["class_name"]]
    if isinstance(metrics, (list, tuple)):
        return [name for each in metrics for name in _keras_names(each)]
    return []
