"""How a likelihood reads an output: its samples, its statistics, and their comparison with y."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_vdrop.functional import likelihoods, uncertainty
from keras_vdrop.losses import NegativeLogLikelihood
from keras_vdrop.montecarlo.checks import check_probabilities, known_names, range_of
from keras_vdrop.montecarlo.predictions import Predictions
from keras_vdrop.targets import aligned, mask_of, weights_of, with_mask

_LIKELIHOODS = (None, "categorical", "bernoulli", "normal")


def readings_of(likelihood: Any, from_logits: bool | dict[str, bool]) -> dict[str | None, Reading]:
    """Return a `Reading` for each output, by name.

    Without a dict there is one `Reading`, named None: for the only output, or with `likelihood=None` for outputs of
    any structure.
    """
    if not isinstance(likelihood, dict):
        if isinstance(from_logits, dict):
            raise ValueError(
                "If `from_logits` is a dict, `likelihood` must be a dict by output name as well. "
                f"Received: from_logits={from_logits!r} and likelihood={likelihood!r}"
            )
        return {None: Reading(likelihood, from_logits)}
    if not likelihood or not all(isinstance(name, str) for name in likelihood):
        raise ValueError(f"A dict `likelihood` must have output names as keys. Received: likelihood={likelihood!r}")
    by_name = from_logits if isinstance(from_logits, dict) else dict.fromkeys(likelihood, from_logits)
    if unknown := sorted(set(by_name) - set(likelihood)):
        raise ValueError(f"`from_logits` has names that are not in `likelihood`: {unknown}. {known_names(likelihood)}")
    return {name: Reading(each, by_name.get(name, True), name) for name, each in likelihood.items()}


def serialized(likelihood: Any) -> Any:
    if isinstance(likelihood, dict):
        return {name: serialized(each) for name, each in likelihood.items()}
    if likelihood is None or isinstance(likelihood, str):
        return likelihood
    return keras.saving.serialize_keras_object(likelihood)


class Reading:
    """How a likelihood reads one output: what its samples are, which statistics it has, and how it is scored against y.

    Args:
        likelihood, from_logits: As for `MonteCarlo`.
        name: The name of the output if there are several.
    """

    def __init__(self, likelihood: Any, from_logits: bool, name: str | None = None):
        is_loss = hasattr(likelihood, "moments") and not isinstance(likelihood, type)
        if not (likelihood in _LIKELIHOODS or is_loss):
            raise ValueError(
                f"`likelihood` must be one of {_LIKELIHOODS}, a loss of `keras_vdrop.losses`, or a dict of these by "
                f"output name. Received: likelihood={likelihood!r}"
            )
        self.likelihood: Any = likelihood
        self.from_logits = from_logits
        self.where = "" if name is None else f" for {name!r}"

    @property
    def is_classes(self) -> bool:
        return self.likelihood in ("categorical", "bernoulli")

    @property
    def summary(self) -> uncertainty.Summary:
        known = {
            None: uncertainty.MOMENTS,
            "categorical": uncertainty.CATEGORICAL,
            "bernoulli": uncertainty.BERNOULLI,
        }
        return next((each for key, each in known.items() if key == self.likelihood), uncertainty.TOTAL_VARIANCE)

    def samples(self, outputs: Any) -> Any:
        """Convert outputs, of float32 or wider, to the samples that the summary takes."""
        if self.likelihood is None:
            return outputs
        if not ops.is_tensor(outputs):
            raise ValueError(
                "A `likelihood` applies to one output. For several outputs, pass a dict by output name, or None. "
                f"Received: likelihood={self.likelihood!r}{self.where} for {len(outputs)} outputs"
            )
        self._check_size(outputs.shape)
        if self.likelihood == "categorical":
            return ops.softmax(outputs) if self.from_logits else outputs
        if self.likelihood == "bernoulli":
            return ops.sigmoid(outputs) if self.from_logits else outputs
        if self.likelihood == "normal":
            return outputs[..., 0], ops.square(likelihoods.scale_of(outputs[..., 1]))
        return self.likelihood.moments(outputs)

    def _check_size(self, shape: Sequence[int | None]) -> None:
        """Raise if the last axis of the outputs does not have the size that the likelihood takes."""
        if self.likelihood == "categorical" and shape[-1] == 1:
            raise ValueError(
                '`likelihood="categorical"` requires outputs (B, ..., C) with C ≥ 2. For a single logit or '
                f'probability, pass `likelihood="bernoulli"`. Received: outputs{self.where} of shape {tuple(shape)}'
            )
        size = 2 if self.likelihood == "normal" else getattr(self.likelihood, "num_parameters", None)
        if size is not None and shape[-1] != size:
            raise ValueError(
                f"The likelihood requires outputs (B, ..., {size}). Received: likelihood={self.likelihood!r} and "
                f"outputs{self.where} of shape {tuple(shape)}"
            )

    def predictions(self, arrays: dict[str, Any]) -> Predictions:
        """Return the arrays as `Predictions`; raise if they should be probabilities and are not."""
        if self.is_classes and not self.from_logits and len(arrays["probability"]):
            check_probabilities(*range_of(arrays["probability"], self.likelihood, np))
        return Predictions(arrays)

    # Scores

    def check_metric(self, metric: Any) -> None:
        """Raise for a metric that takes the outputs of the model, and not a prediction."""
        if self.likelihood is None:
            return
        point = "probability" if self.is_classes else "mean"
        remedy = None
        if (of_prediction := getattr(metric, "of_prediction", None)) is not None:
            remedy = f"takes the parameters of a distribution. {of_prediction}"
        elif self.is_classes and getattr(metric, "from_logits", False) is True:
            remedy = "takes logits. Pass `from_logits=False` to it."
        if remedy is not None:
            raise ValueError(
                f"`MonteCarlo` compares y{self.where} with the `{point}` that it predicts, but the metric "
                f"{metric.name!r} {remedy} Received: a metric of type {type(metric).__name__}"
            )

    def laid_out(self, y: Any, found: dict[str, Any], weight: Any) -> tuple[Any, Any]:
        """Return y in the layout of its prediction, and weights that broadcast to one for each number or label."""
        point = found[point_name(found)]
        shape, sizes = point.shape, ops.shape(point)
        if self.likelihood == "categorical":
            shape, sizes = shape[:-1], sizes[:-1]
        one_hot = self.likelihood == "categorical" and tuple(y.shape) == tuple(point.shape)
        fitting = y if one_hot else aligned(y, shape, sizes)
        if fitting is None:
            raise ValueError(
                f"`y` must have the shape of the prediction{self.where}, {tuple(shape)}. "
                f"Received: y of shape {tuple(y.shape)}"
            )
        if weight is not None:
            weighed = point[..., 0] if self.likelihood == "categorical" else point
            weight = weights_of(weight, weighed)
            if mask_of(point) is not None:  # on PyTorch, Keras multiplies the weights by the mask in place
                weight = weight * ops.ones_like(weighed, dtype=weight.dtype)
        return fitting, weight

    def compared(self, y: Any, found: dict[str, Any], weight: Any) -> tuple[Any, Any, Any]:
        """Return y, the prediction to compare it with, and weights, as Keras's losses and metrics take them.

        Keras takes the mean over the last axis and applies weights to the others, so numbers get an axis of size 1.
        """
        point = found[point_name(found)]
        if self.likelihood is None:
            _check_same_layout(y, point)
            return y, keras.tree.map_structure(_at_least_a_column, point), weight
        y, weight = self.laid_out(y, found, weight)
        if self.likelihood == "categorical":
            return y, point, weight
        rank = len(point.shape)
        of_numbers = weight is not None and any(size != 1 for size in weight.shape[1:])
        if rank == 1 or of_numbers or mask_of(point) is not None:
            return ops.expand_dims(y, -1), _a_number_each(point), weight
        return y, point, None if weight is None else weight[..., 0]

    def loss(self, y: Any, found: dict[str, Any], weight: Any) -> Any:
        """Return −log p(y) of the prediction: Keras's mean over labels, or the sum over the numbers of an example."""
        if self.likelihood is None:
            raise ValueError(
                f"The prediction{self.where} has no likelihood. Pass a `likelihood`, or pass a `loss` to `compile`."
            )
        y, weight = self.laid_out(y, found, weight)
        if not self.is_classes:
            return MomentsNLL(name="nll")(y, moments(found), weight)
        point = found["probability"]
        if self.likelihood == "bernoulli":
            return keras.losses.BinaryCrossentropy()(ops.expand_dims(y, -1), _a_number_each(point), weight)
        one_hot = len(y.shape) == len(point.shape)
        if not one_hot:  # the report `Labels` counts the labels that are no classes
            y = ops.clip(y, 0, point.shape[-1] - 1)
        loss = keras.losses.CategoricalCrossentropy if one_hot else keras.losses.SparseCategoricalCrossentropy
        return loss()(y, point, weight)


def point_name(found: Iterable[str]) -> str:
    """Return the name of the statistic that y is compared with."""
    return "probability" if "probability" in found else "mean"


def _at_least_a_column(point: Any) -> Any:
    """Return the tensor with rank 2 at least: Keras takes the mean over the last axis."""
    return point[:, None] if len(point.shape) == 1 else point


def _a_number_each(point: Any) -> Any:
    """Add a last axis of size 1, (B, ..., 1), and keep the mask."""
    return with_mask(ops.expand_dims(point, -1), mask_of(point))


def moments(found: dict[str, Any]) -> Any:
    """Return the mean and the variance of y, (B, ..., 2), with the mask of the mean."""
    variance = found["aleatoric_variance"] + found["epistemic_variance"]
    return with_mask(ops.stack([found["mean"], variance], axis=-1), mask_of(found["mean"]))


def _check_same_layout(y: Any, point: Any) -> None:
    """Raise if y has neither the shape of the prediction nor that of its class numbers."""
    ys, points = keras.tree.flatten(y), keras.tree.flatten(point)
    if len(ys) != len(points) or any(each is None for each in ys):
        return  # Keras raises an error, or compares some of them
    for label, each in zip(ys, points):
        if aligned(label, each.shape) is None and aligned(label, each.shape[:-1]) is None:
            raise ValueError(
                f"`y` must have the shape of the prediction, {tuple(each.shape)}, or, for class numbers, "
                f"{tuple(each.shape[:-1])}. Received: y of shape {tuple(label.shape)}"
            )


class MomentsNLL(NegativeLogLikelihood):
    """−log N(y; mean, variance), where the outputs (B, ..., 2) are that mean and variance."""

    def log_prob(self, y: Any, parameters: Any) -> Any:
        return likelihoods.normal(y, parameters[..., 0], ops.sqrt(parameters[..., 1]))

    def moments(self, parameters: Any) -> tuple[Any, Any]:
        return parameters[..., 0], parameters[..., 1]
