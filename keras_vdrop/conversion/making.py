"""Make the layers that replace others: variational layers, noise that can be sampled, and copies."""

import dataclasses
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, Literal

import keras
from keras import layers

from keras_vdrop import priors
from keras_vdrop.conversion.graphs import check_built, check_lookup, children, config_of, model_copy, serialized
from keras_vdrop.conversion.survey import COUNTERPARTS, exchange
from keras_vdrop.layers import MonteCarloDropout, Variational, VariationalDense, VariationalGaussianDropout
from keras_vdrop.layers.monte_carlo_dropout import noise_shape_of

# Keras's layers whose counterparts can have a low-rank update.
_ADAPTABLE = (
    *(layers.Dense, layers.EinsumDense, layers.Embedding, layers.MultiHeadAttention),
    *(layers.Conv1D, layers.Conv2D, layers.Conv3D),
)

NOISE_KINDS = (None, "monte_carlo", "variational")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments that all new variational layers share.

    Raises:
        ValueError: For a value that is out of range.
    """

    kernel_prior: priors.Prior
    bias_prior: priors.Prior | None
    estimator: str
    kl_weight: float | None
    initial_log_variance: float | None
    log_variance_rate: float
    threshold: float | None
    lora_rank: int | None = None
    lora_alpha: float | None = None

    def __post_init__(self) -> None:
        VariationalDense(1, name="arguments", **vars(self))

    def of(self, cls: Any) -> dict[str, Any]:
        """Return the arguments for a class: "auto" if it lacks the estimator, `lora_*` only if there is a rank."""
        known = getattr(cls, "_cell_class", cls)._estimators()
        given = {**vars(self), "estimator": self.estimator if self.estimator in known else "auto"}
        if self.lora_rank is None:
            del given["lora_rank"], given["lora_alpha"]
        return given


def counterpart(layer: Any, arguments: Arguments) -> Any:
    """Return the counterpart of a layer of Keras, with the same arguments, not built.

    Raises:
        ValueError: If the counterpart does not support the arguments, or a low-rank update that is asked for.
    """
    cls, rank = COUNTERPARTS[type(layer)], arguments.lora_rank
    if rank is not None and (type(layer) not in _ADAPTABLE or getattr(layer, "groups", 1) != 1):
        raise ValueError("its counterpart cannot learn a low-rank update")
    made = cls.from_config({**config_of(layer), **arguments.of(cls)})
    if isinstance(layer, layers.EinsumDense):
        _, kernel, outputs = made._operands()
        if rank is not None and kernel[-1] != outputs[-1]:
            raise ValueError("a low-rank update needs the last axis of its kernel to be the last axis of its outputs")
    return made


def wrapped(layer: Any, arguments: Arguments, dropout: Literal["monte_carlo", "variational"] | None) -> Variational:
    """Return a copy of a layer in a `Variational`, not built."""
    return _variational(copied(layer), arguments, dropout)


def wrapped_model(
    model: keras.Model, arguments: Arguments, dropout: Literal["monte_carlo", "variational"] | None
) -> Variational:
    """Return a copy of a model in a `Variational`, built.

    Raises:
        ValueError: For a model that cannot be made again from its config.
    """
    try:
        copy = model_copy(model)
    except Exception as error:
        raise _not_copied(model, error) from error
    check_built(copy, model)
    return _variational(copy, arguments, dropout)


def _variational(
    layer: Any, arguments: Arguments, dropout: Literal["monte_carlo", "variational"] | None
) -> Variational:
    names = "kl_weight", "initial_log_variance", "log_variance_rate", "threshold", "lora_rank", "lora_alpha"
    given = {name: getattr(arguments, name) for name in names}
    # Dropout inside a wrapped layer cannot learn its rate, so both kinds draw it at its fixed rate.
    drawn = "monte_carlo" if dropout else None
    return Variational(layer, prior=arguments.kernel_prior, trainable=layer.trainable, dropout=drawn, **given)


def copied(layer: Any) -> Any:
    """Return a layer of the same class and arguments, not built.

    Raises:
        ValueError: For a layer that cannot be made again from its config.
    """
    check_lookup(layer)
    try:
        own_code = {"safe_mode": False} if isinstance(layer, layers.Lambda) else {}
        return type(layer).from_config(config_of(layer), **own_code)
    except Exception as error:  # the config of a user's class may fail with any exception
        raise _not_copied(layer, error) from error


def _not_copied(layer: Any, error: Exception) -> ValueError:
    return ValueError(
        f"{layer.name!r}, a {type(layer).__name__}, cannot be recreated from its config ({_shortened(error)}). "
        "Define `get_config` in its class, and decorate the class and its custom functions with "
        "@keras.saving.register_keras_serializable()."
    )


def _shortened(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")


def remade(layer: Any, new_layers: Mapping[int, Callable[[], Any]]) -> Any:
    """Return the layer that replaces another in a copy of its model, not built.

    Args:
        layer: A layer of the model, or another operation of its graph.
        new_layers: Dict from the ids of layers to functions that make their replacements. If neither this layer nor
            one of its sublayers is among them, the layer is copied.
    """
    if id(layer) in new_layers:
        return new_layers[id(layer)]()
    if not isinstance(layer, layers.Layer) or not any(id(each) in new_layers for each in layer._flatten_layers()):
        return copied(layer)
    config = _remade_config(layer, serialized(layer), new_layers)
    try:
        return keras.saving.deserialize_keras_object(config, safe_mode=False)
    except Exception as error:
        raise _not_copied(layer, error) from error


def _remade_config(layer: Any, config: dict[str, Any], new_layers: Mapping[int, Callable[[], Any]]) -> dict[str, Any]:
    """Return the serialized layer with the replacements of itself or its sublayers in it."""
    if id(layer) in new_layers:
        new = serialized(new_layers[id(layer)]())
    else:
        within = exchange(config["config"], children(layer), lambda inner, its: _remade_config(inner, its, new_layers))
        new = {"config": within}
    return {name: value for name, value in {**config, **new}.items() if name != "build_config"}


# Noise


def noise(
    layer: Any, kind: Literal["monte_carlo", "variational"], kl_weight: float | None
) -> MonteCarloDropout | VariationalGaussianDropout:
    """Return the layer that replaces one of Keras's noise layers.

    Args:
        layer: A layer of one of the classes in `KERAS_NOISE`.
        kind: "monte_carlo" for the same noise, which can be sampled; "variational" for noise that learns its strength.
        kl_weight: As in `VariationalGaussianDropout`.

    Raises:
        ValueError: If no layer can replace it; the message is the reason.
    """
    if isinstance(layer, (layers.AlphaDropout, layers.GaussianNoise)):
        raise ValueError("keras_vdrop has no layer for this noise")
    if kind == "monte_carlo" and isinstance(layer, layers.Dropout):
        return MonteCarloDropout.like(layer)
    if layer.rate == 0.0:
        raise ValueError("its rate is 0, so it adds no noise")
    arguments = {"alpha": "fixed"}
    if kind == "variational":
        arguments = {"alpha": "unit", "axis": _axis_of_units(layer), "kl_weight": kl_weight}
    return VariationalGaussianDropout(
        layer.rate, seed=layer.seed, **arguments, name=layer.name, dtype=layer.dtype_policy
    )


def _axis_of_units(layer: Any) -> int:
    """Return the axis of the units that a dropout layer drops as a whole; the last axis if it drops single numbers."""
    noise_shape = noise_shape_of(layer) if isinstance(layer, layers.Dropout) else None
    axis = -1
    if noise_shape is not None:
        dropped = [axis for axis, size in enumerate(noise_shape) if axis and size != 1]
        if len(dropped) != 1:
            raise ValueError(f"with noise_shape={noise_shape}, its units are not on a single axis")
        (axis,) = dropped
    shapes = {tuple(node.input_tensors[0].shape) for node in layer._inbound_nodes}
    if not shapes:
        raise ValueError("its units are unknown, because it is within another layer")
    units = {shape[axis] for shape in shapes}
    if None in units or len({(len(shape), shape[axis]) for shape in shapes}) > 1:
        raise ValueError(f"its units are unknown, because its inputs have the shapes {sorted(shapes, key=str)}")
    return axis
