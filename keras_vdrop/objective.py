"""The factor between the NLL of an example and its share in Keras's loss.

Keras's losses are means over all labels of an example: pixels, steps, the numbers of a vector. With L labels per
example, the loss of `fit` is NLL / L. The KL then needs the weight 1 / (L·examples), so that the sum is proportional to
the negative ELBO.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import losses as keras_losses
from keras import ops

from keras_vdrop.functional.tensors import product
from keras_vdrop.losses import NegativeLogLikelihood
from keras_vdrop.outputs import compile_config
from keras_vdrop.targets import mask_of

# The mean is over all numbers of an example.
_MEANS_OVER_NUMBERS = (
    keras_losses.MeanSquaredError,
    keras_losses.MeanAbsoluteError,
    keras_losses.MeanAbsolutePercentageError,
    keras_losses.MeanSquaredLogarithmicError,
    keras_losses.LogCosh,
    keras_losses.Huber,
    keras_losses.BinaryCrossentropy,
    keras_losses.BinaryFocalCrossentropy,
    keras_losses.Hinge,
    keras_losses.SquaredHinge,
    keras_losses.Poisson,
)
# One axis holds a label; the mean is over all other axes.
_MEANS_OVER_VECTORS = (
    keras_losses.CategoricalCrossentropy,
    keras_losses.SparseCategoricalCrossentropy,
    keras_losses.CategoricalFocalCrossentropy,
    keras_losses.CategoricalHinge,
    keras_losses.CosineSimilarity,
    keras_losses.KLDivergence,
)
# These are not negative log likelihoods, not even up to a constant.
_NO_LIKELIHOODS = (
    keras_losses.BinaryFocalCrossentropy,
    keras_losses.CategoricalFocalCrossentropy,
    keras_losses.Hinge,
    keras_losses.SquaredHinge,
    keras_losses.CategoricalHinge,
    keras_losses.CosineSimilarity,
    keras_losses.Dice,
    keras_losses.Tversky,
)
# The loss is a sum over an example, so an example is one term of the mean.
_SUMS = (keras_losses.CTC, NegativeLogLikelihood)

_CLASSES = {
    getattr(keras_losses, name): cls
    for name, cls in {
        "mean_squared_error": keras_losses.MeanSquaredError,
        "mean_absolute_error": keras_losses.MeanAbsoluteError,
        "mean_absolute_percentage_error": keras_losses.MeanAbsolutePercentageError,
        "mean_squared_logarithmic_error": keras_losses.MeanSquaredLogarithmicError,
        "log_cosh": keras_losses.LogCosh,
        "huber": keras_losses.Huber,
        "binary_crossentropy": keras_losses.BinaryCrossentropy,
        "binary_focal_crossentropy": keras_losses.BinaryFocalCrossentropy,
        "hinge": keras_losses.Hinge,
        "squared_hinge": keras_losses.SquaredHinge,
        "poisson": keras_losses.Poisson,
        "categorical_crossentropy": keras_losses.CategoricalCrossentropy,
        "sparse_categorical_crossentropy": keras_losses.SparseCategoricalCrossentropy,
        "categorical_focal_crossentropy": keras_losses.CategoricalFocalCrossentropy,
        "categorical_hinge": keras_losses.CategoricalHinge,
        "cosine_similarity": keras_losses.CosineSimilarity,
        "kl_divergence": keras_losses.KLDivergence,
        "ctc": keras_losses.CTC,
    }.items()
}

# The functions return one number for a batch, as the classes do.
_ON_BATCHES = ((keras_losses.dice, keras_losses.Dice), (keras_losses.tversky, keras_losses.Tversky))

_WAY_OUT = (
    "Pass `labels_per_example` to `ELBO`: the number of terms of an example over which the loss is a mean, or 1 if it "
    "sums over the example"
)


class Output(NamedTuple):
    """What a loss sees of one output of a model.

    Attributes:
        name: The name of the output.
        shape: Its shape with the batch; None for an unknown size.
        masked: Whether it has a mask.
    """

    name: str
    shape: tuple[int | None, ...]
    masked: bool


class Term(NamedTuple):
    """One output's share in the loss: `weight` times a mean over `labels` terms an example.

    Attributes:
        name: The name of the output.
        weight: Its `loss_weights`.
        labels: The number of terms of an example.
        is_mse: Whether its loss is the mean squared error.
    """

    name: str
    weight: float
    labels: int
    is_mse: bool


def outputs_of(y_pred: Any, names: Sequence[str] | None = None) -> list[Output]:
    """Return the `Output`s of a model, given its output tensors, symbolic or not.

    Args:
        y_pred: A tensor, or a list or dict of tensors.
        names: The names of the outputs if `y_pred` is not a dict.

    Raises:
        ValueError: For nested outputs.
    """
    if isinstance(y_pred, dict):
        named = list(y_pred.items())
    else:
        tensors = list(y_pred) if isinstance(y_pred, (list, tuple)) else [y_pred]
        names = names if names and len(names) == len(tensors) else [f"output_{i}" for i in range(len(tensors))]
        named = list(zip(names, tensors))
    if any(isinstance(tensor, (dict, list, tuple)) for _, tensor in named):
        raise ValueError(
            f"`ELBO` cannot determine the weight of the KL for nested outputs. {_WAY_OUT}. Received: outputs={y_pred}"
        )
    return [Output(name, tuple(tensor.shape), mask_of(tensor) is not None) for name, tensor in named]


def likelihood_factor(
    outputs: Sequence[Output], loss: Any, loss_weights: Any = None, likelihood_scale: float | None = None
) -> float:
    """Return c, the factor between the mean NLL of an example and the loss, Σ over outputs of (weight / labels)·NLL.

    Args:
        outputs: List of `Output`.
        loss: As given to `compile`: a loss, or a list or dict of losses.
        loss_weights: As given to `compile`: None, a number, or a list or dict of numbers.
        likelihood_scale: None, or σ for the mean squared errors among the losses: their NLL contains the squared error
            divided by 2σ².

    Returns:
        Float > 0.

    Raises:
        ValueError: If c cannot be derived, or if the losses of several outputs have different factors, so that their
            sum is not proportional to the NLL of an example.
    """
    terms = [
        Term(output.name, weight, labels_of(one, output), is_mse(one))
        for output, one, weight in _by_output(outputs, loss, loss_weights)
    ]
    if likelihood_scale is not None and not any(term.is_mse for term in terms):
        raise ValueError(
            "`likelihood_scale` requires a model whose loss is the mean squared error. Received: "
            f"likelihood_scale={likelihood_scale!r} for loss={loss!r}"
        )
    nats = [2.0 * likelihood_scale**2 if likelihood_scale and term.is_mse else 1.0 for term in terms]
    factors = [term.weight * unit / term.labels for term, unit in zip(terms, nats)]
    if not math.isclose(min(factors), max(factors), rel_tol=1e-4):
        right = {term.name: float(f"{term.labels / unit:.6g}") for term, unit in zip(terms, nats)}
        given = {term.name: term.weight for term in terms}
        raise ValueError(
            "The losses of the outputs are means over different numbers of labels, so their weighted sum is not "
            f"proportional to the NLL of an example. Pass `loss_weights={right}` to `compile`, or multiples of these. "
            "If you want to keep your weights, pass `labels_per_example` to `ELBO`. It divides the KL by that number. "
            f"Received: loss_weights={given}"
        )
    return factors[0]


def is_mse(loss: Any) -> bool:
    """Return whether a loss, as `compile` takes it, is the mean squared error."""
    cls, _ = _resolved(loss, ())
    return cls is not None and issubclass(cls, keras_losses.MeanSquaredError)


def labels_of(loss: Any, output: Output) -> int:
    """Return the number of terms of one example over which a loss takes its mean.

    Raises:
        ValueError: If the loss is not a mean over the batch, or if the number cannot be derived.
    """
    cls, instance = _resolved(loss, output.shape)
    reduction = getattr(instance, "reduction", "sum_over_batch_size")
    if reduction not in ("sum_over_batch_size", "mean"):
        raise ValueError(
            "`ELBO` cannot determine the weight of the KL for a loss that is not a mean over the batch. "
            f'{_WAY_OUT}. Or pass `reduction="sum_over_batch_size"` to the loss. '
            f"Received: reduction={reduction!r} in loss={loss!r}"
        )
    if cls is not None and issubclass(cls, _SUMS):
        return 1
    if cls is None:
        if product(output.shape[1:]) != 1:
            raise ValueError(
                f"`ELBO` cannot determine over how many terms of an example a custom loss is a mean. {_WAY_OUT}. "
                f"Received: loss={loss!r} for the output {output.name!r} of shape {output.shape}"
            )
        if _adds_up(loss, output.shape):
            raise ValueError(
                "`ELBO` requires a loss that is a mean over the batch, and this one adds up its examples, so the KL "
                "would weigh too little. Return one number for each example, or their mean. If the loss is meant to be "
                f"a sum, {_WAY_OUT[0].lower()}{_WAY_OUT[1:]}. Received: loss={loss!r}"
            )
        return 1
    config = {} if instance is None else instance.get_config()
    sizes = list(output.shape)
    if issubclass(cls, _MEANS_OVER_VECTORS):
        del sizes[config.get("axis", -1)]
    labels = product(sizes[1:])
    masked = output.masked or config.get("ignore_class") is not None
    if labels is None or (masked and labels > 1):
        what = "is masked" if masked else "has an unknown number of labels per example"
        raise ValueError(
            f"`ELBO` cannot determine the weight of the KL: the output {output.name!r} {what}, and the loss is a mean "
            f"over the labels of a batch. {_WAY_OUT}. Pass the average of this number over the examples, or use a loss "
            f"of `keras_vdrop.losses`. Received: loss={loss!r} for outputs of shape {output.shape}"
        )
    return labels


def compiled_loss_weights(model: keras.Model) -> Any:
    """Return the `loss_weights` that `compile` was given.

    Raises:
        ValueError: If Keras cannot tell.
    """
    try:
        return compile_config(model).get("loss_weights")
    except Exception as error:
        raise ValueError(
            f"The `loss_weights` of {model.name!r} cannot be read from its compile config ({error}). {_WAY_OUT}. "
            "Divide this number by the weight of the loss."
        ) from error


def require_loss(model: keras.Model) -> None:
    """Raise a `ValueError` if `compile` was given no loss, so that nothing is known about the data part."""
    if model.loss is None:
        raise ValueError(
            "`ELBO` cannot determine the weight of the KL for a model that is compiled without a `loss`. "
            f"{_WAY_OUT}. Received: loss=None in {model.name!r}"
        )


def without_likelihood(loss: Any) -> list[str]:
    """Return the names of those of Keras's losses, as `compile` takes them, that are no negative log likelihoods."""
    resolved = (_resolved(each, ()) for each in keras.tree.flatten(loss) if each is not None)
    classes = [cls or type(instance) for cls, instance in resolved]
    return [cls.__name__ for cls in classes if issubclass(cls, _NO_LIKELIHOODS)]


def _adds_up(loss: Any, shape: Sequence[int | None]) -> bool:
    """Return whether a custom loss returns a sum over the batch; False if that cannot be found out."""
    if not callable(loss) or isinstance(loss, keras_losses.Loss):
        return False  # a `Loss` says it by its `reduction`

    def of(rows):
        ones = np.ones((rows, *(size or 1 for size in shape[1:])), "float32")
        value = loss(ops.convert_to_tensor(ones), ops.convert_to_tensor(0.3 * ones))
        return np.asarray(ops.convert_to_numpy(value), "float64")

    try:
        few, many = of(2), of(8)
    except Exception:  # it takes other values, or runs in a graph, whose tensors have no value
        return False
    return few.shape == many.shape == () and few != 0 and math.isclose(many / few, 4.0, rel_tol=1e-3)


def _resolved(loss: Any, shape: Sequence[int | None]) -> tuple[Any, Any]:
    """Return the known class that a loss computes, or None for a custom loss; and its `Loss` object, or None."""
    if isinstance(loss, str) and loss.lower() in ("crossentropy", "ce"):
        binary = bool(shape) and shape[-1] == 1
        return (keras_losses.BinaryCrossentropy if binary else keras_losses.CategoricalCrossentropy), None
    if isinstance(loss, (str, dict)):
        loss = keras_losses.get(loss)
    loss = next((cls for function, cls in _ON_BATCHES if loss is function), loss)
    if isinstance(loss, type):
        loss = loss()
    if not isinstance(loss, keras_losses.Loss):
        return _CLASSES.get(loss), None
    known = (*_MEANS_OVER_NUMBERS, *_MEANS_OVER_VECTORS, *_SUMS)
    for cls in known:
        if isinstance(loss, cls):
            own = cls is not NegativeLogLikelihood and type(loss).call is not cls.call
            return (None if own else cls), loss
    return None, loss


def _by_output(outputs: Sequence[Output], loss: Any, loss_weights: Any) -> list[tuple[Output, Any, float]]:
    """Return (output, loss, weight) for each output that contributes to the loss."""
    names = [output.name for output in outputs]

    def spread(value, what):
        if isinstance(value, dict):
            if not set(value) <= set(names):
                raise ValueError(
                    f"`{what}` names unknown outputs. {_WAY_OUT}. Received: {what}={value} for outputs {names}"
                )
            return [value.get(name) for name in names]
        if isinstance(value, (list, tuple)):
            if len(value) != len(names):
                raise ValueError(
                    f"`{what}` must have one entry for each output. {_WAY_OUT}. Received: {what}={value} for outputs "
                    f"{names}"
                )
            return list(value)
        return [value] * len(names)

    weights = [1.0] * len(names) if loss_weights is None else spread(loss_weights, "loss_weights")
    shares = [
        (output, one, float(1.0 if weight is None else weight))
        for output, one, weight in zip(outputs, spread(loss, "loss"), weights)
    ]
    shares = [share for share in shares if share[1] is not None and share[2] != 0]
    if not shares or any(weight < 0 for _, _, weight in shares):
        raise ValueError(
            f"Expected at least one loss with a positive weight, and no negative weights. {_WAY_OUT}. "
            f"Received: loss={loss!r}, loss_weights={loss_weights!r}"
        )
    return shares
