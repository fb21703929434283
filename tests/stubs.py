"""Write `keras_vdrop/layers/__init__.pyi`: the composed signatures of the layers, for type checkers and editors.

    python -m tests.stubs

The constructors of the layers take `*args` and `**kwargs`, and compose their signatures when the package is imported.
Tools that read the source do not see them, so this file spells them out. A test compares it with what this module
returns.
"""

import inspect
import pathlib

import keras

import keras_vdrop as kv
from keras_vdrop.layers.cells import RecurrentCell
from keras_vdrop.posterior import VariationalWeight
from tests.cases import CASES

PATH = pathlib.Path(kv.layers.__file__).with_suffix(".pyi")

HEAD = '''"""Signatures of the layers with Keras {version}, written by `python -m tests.stubs`."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import keras
import numpy as np

from keras_vdrop.posterior import VariationalWeight
from keras_vdrop.priors import Prior
'''

ALIASES = """
# Also a distribution of TensorFlow Probability, or a config.
_Prior: TypeAlias = Literal["log_uniform", "ard", "normal", "scale_mixture"] | Prior | Any | None

# A function of Keras: its name, its config, itself, or an object that is called.
_Function: TypeAlias = str | dict[str, Any] | Callable[..., Any] | None

# Also an array of the shape of the weight.
_Initializer: TypeAlias = _Function | np.ndarray

# One int for all axes, or one for each.
_Ints: TypeAlias = int | Sequence[int]
"""

# The types of arguments that mean the same in every layer. Keras names no types for its own.
TYPES = {
    "kernel_prior": "_Prior",
    "bias_prior": "_Prior",
    "prior": "_Prior",
    "kl_weight": "float | None",
    "initial_log_variance": "float | None",
    "log_variance_rate": "float",
    "threshold": "float | None",
    "seed": "int | None",
    "dropout": "float",
    "recurrent_dropout": "float",
    "output_dropout": "float",
    "weight_dropout": "float",
    "tied_masks": "bool",
    "layer": "keras.layers.Layer",
    "initial_rate": "float",
    "temperature": "float",
    "prior_scale": "float",
    "spatial": "bool",
    "noise_shape": "Sequence[int | None] | None",
    "per_example": "bool",
    "include": "str | Sequence[str] | None",
    "exclude": "str | Sequence[str] | None",
    "alpha": 'Literal["unit", "layer", "fixed"]',
    "axis": "int",
    "units": "int",
    "filters": "int",
    "rate": "float",
    "use_bias": "bool",
    "activation": "_Function",
    "recurrent_activation": "_Function",
    "kernel_size": "_Ints",
    "strides": "_Ints",
    "dilation_rate": "_Ints",
    "output_padding": "_Ints | None",
    "padding": 'Literal["valid", "same"]',
    "data_format": 'Literal["channels_first", "channels_last"] | None',
    "groups": "int",
    "depth_multiplier": "int",
    "equation": "str",
    "bias_axes": "str | None",
    "input_dim": "int",
    "output_dim": "int",
    "mask_zero": "bool",
    "unit_forget_bias": "bool",
    "return_sequences": "bool",
    "return_state": "bool",
    "go_backwards": "bool",
    "stateful": "bool",
    "unroll": "bool",
    "reset_after": "bool",
    "use_cudnn": 'Literal["auto"] | bool',
    "num_heads": "int",
    "key_dim": "int",
    "value_dim": "int | None",
    "attention_axes": "_Ints | None",
    "sliding_window": "int | None",
    "flash_attention": "bool | None",
    "use_gate": "bool",
    "lora_rank": "int | None",
    "lora_alpha": "float | None",
    "gptq_unpacked_column_size": "int | None",
}

# The types of all arguments whose names end so.
SUFFIXES = {"_initializer": "_Initializer", "_regularizer": "_Function", "_constraint": "_Function"}

# The types of arguments that mean something else in one layer.
OF_LAYER = {
    (kv.Variational, "dropout"): 'Literal["monte_carlo"] | None',
    (kv.VariationalConv1D, "padding"): 'Literal["valid", "same", "causal"]',
    (kv.VariationalEinsumDense, "output_shape"): "int | Sequence[int | None]",
    (kv.VariationalMultiHeadAttention, "output_shape"): "_Ints | None",
}


# The names of weights that can be variational by default.
WEIGHTS = ("kernel", "recurrent_kernel", "depthwise_kernel", "pointwise_kernel", "embeddings", "scale")


def keras_version():
    """Return the version of Keras without its last part; the signatures depend on it."""
    return ".".join(keras.__version__.split(".")[:2])


def text():
    """Return the text of the stub file."""
    classes = [getattr(kv, name) for name in sorted(kv.layers.__all__)]
    bases = {base for cls in classes for base in cls.__bases__ if base.__module__.startswith("keras_vdrop")}
    modules = {base.__module__: [] for base in sorted(bases, key=lambda base: (base.__module__, base.__name__))}
    for base in sorted(bases, key=lambda base: base.__name__):
        modules[base.__module__].append(base.__name__)
    imports = [f"from {module} import {', '.join(found)}" for module, found in modules.items()]
    names = ", ".join(f'"{name}"' for name in sorted(kv.layers.__all__))
    head = HEAD.format(version=keras_version())
    head = head.replace("from keras_vdrop.posterior", "\n".join(imports) + "\nfrom keras_vdrop.posterior")
    return head + ALIASES + f"\n__all__ = [{names}]\n" + "".join(map(_of_class, classes))


def _of_class(cls):
    weights = "".join(f"    {name}: VariationalWeight\n" for name in _weights(cls))
    arguments = ",\n        ".join(["self", *_arguments(cls)])
    bases = ", ".join(map(_base, cls.__bases__))
    return f"\nclass {cls.__name__}({bases}):\n{weights}    def __init__(\n        {arguments},\n    ) -> None: ...\n"


def _base(base):
    if base.__module__.startswith("keras_vdrop"):
        return base.__name__
    return "keras.Model" if base is keras.Model else f"keras.layers.{base.__name__}"


def _weights(cls):
    """Return the names of the layer's attributes that are variational weights."""
    layer = next(case for case in CASES if case.cls is cls).built()
    layer = getattr(layer, "cell", layer) if issubclass(cls, RecurrentCell) else layer
    return [name for name in WEIGHTS if isinstance(getattr(layer, name, None), VariationalWeight)]


def _arguments(cls):
    star = False
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            yield f"**{name}: Any"
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            star = True
            yield "*"
        default = "" if parameter.default is parameter.empty else f" = {_default(parameter.default)}"
        yield f"{name}: {_type(cls, name)}{default}"


def _type(cls, name):
    if name == "estimator":
        known = getattr(cls, "_cell_class", cls)._estimators()
        return f"Literal[{', '.join(map(_default, known))}]"
    of_suffix = (found for suffix, found in SUFFIXES.items() if name.endswith(suffix))
    return OF_LAYER.get((cls, name)) or TYPES.get(name) or next(of_suffix, "Any")


def _default(value):
    if isinstance(value, str):
        return f'"{value}"'
    return repr(value) if value is None or isinstance(value, (bool, int, float, tuple)) else "..."


if __name__ == "__main__":
    PATH.write_text(text())
