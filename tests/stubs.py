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

from typing import Any, Literal, TypeAlias

import keras

from keras_vdrop.posterior import VariationalWeight
from keras_vdrop.priors import Prior
'''

PRIOR = """
# Also a distribution of TensorFlow Probability, or a config.
_Prior: TypeAlias = Literal["log_uniform", "ard", "normal", "scale_mixture"] | Prior | Any | None
"""

# The types of arguments that mean the same in every layer. All others are those of Keras, which names no types.
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
    "units": "int",
    "filters": "int",
    "rate": "float",
    "use_bias": "bool",
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
    return head + PRIOR + f"\n__all__ = [{names}]\n" + "".join(map(_of_class, classes))


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
    if name == "dropout" and cls is kv.Variational:
        return 'Literal["monte_carlo"] | None'
    return TYPES.get(name, "Any")


def _default(value):
    if isinstance(value, str):
        return f'"{value}"'
    return repr(value) if value is None or isinstance(value, (bool, int, float, tuple)) else "..."


if __name__ == "__main__":
    PATH.write_text(text())
