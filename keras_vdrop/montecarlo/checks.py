"""What `MonteCarlo` checks: its model before the first draw, and what it has predicted."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_vdrop import costs
from keras_vdrop.checks import require_built
from keras_vdrop.functional.tensors import to_numpy
from keras_vdrop.layers.drop_in import DropIn
from keras_vdrop.layers.monte_carlo_dropout import KERAS_NOISE, is_taken_over
from keras_vdrop.layers.stochastic import StochasticLayer
from keras_vdrop.losses import NegativeLogLikelihood
from keras_vdrop.montecarlo.predictions import flat_rows
from keras_vdrop.outputs import check_activation, last_activation, last_layer, output_names
from keras_vdrop.posterior import learning_posteriors, owners
from keras_vdrop.warning import warn

if TYPE_CHECKING:
    from keras_vdrop.montecarlo.readings import Reading

# The lowest and highest of the values that should be probabilities, and the lowest and highest of their sums.
ENDS = ("low", "high", "sum_low", "sum_high")
# The number of rows whose outputs are looked at.
ROWS = 32
# The fewest different outputs from which a warning says that they look like probabilities.
_FEW = 20


def check_built(model: keras.Model) -> None:
    """Raise if the model or a layer that draws has not been built: only then are its generators of noise known."""
    require_built(model)
    layers = [layer.name for layer in model._flatten_layers() if isinstance(layer, StochasticLayer) and not layer.built]
    if layers:
        raise ValueError(
            f"The layers {layers} within {model.name!r} have not been built, because Keras computed the shapes of "
            "outputs without calling the layers around them: call the model on some data first."
        )


def check_num_samples(count: int, output: str) -> None:
    """Warn if statistics are to be taken from one draw."""
    if count == 1 and output == "statistics":
        warn(
            "One draw does not show how much draws differ: the variance over the draws and the mutual information are "
            "0. Pass a larger `num_samples`; 32 is the default. Received: num_samples=1",
        )


def check_draws(model: keras.Model) -> None:
    """Raise if nothing in the model is drawn, and warn of noise that is active in training only."""
    off = _keras_noise(model)
    if not any(isinstance(layer, StochasticLayer) and layer.draws for layer in model._flatten_layers()):
        way_out = "Replace a Keras layer, for example by `keras_vdrop.VariationalDense`."
        if off:
            way_out = (
                f"Keras's own dropout in {off} is active only in training. Use `keras_vdrop.MonteCarloDropout` in its "
                "place."
            )
        raise ValueError(
            f"Every draw from the model {model.name!r} would be the same: it has no variational layer with a prior "
            f"or a rate above 0. {way_out}"
        )
    if off:
        warn(
            f"Keras's own dropout in {off} is active only in training and stays off in `MonteCarlo`. To draw it as "
            "well, use `keras_vdrop.MonteCarloDropout` in its place or, around a layer that contains it, "
            '`keras_vdrop.Variational(layer, dropout="monte_carlo")`.',
        )


def _keras_noise(model: keras.Model) -> list[str]:
    """Return the names of the layers with Keras's own dropout or noise, at a rate or scale above 0."""
    found = []
    for layer in model._flatten_layers():
        if isinstance(layer, (StochasticLayer, DropIn)):
            continue
        names = ("rate", "stddev") if isinstance(layer, KERAS_NOISE) else ("dropout", "recurrent_dropout")
        rates = [getattr(layer, name, 0.0) for name in names]
        if not any(isinstance(rate, numbers.Real) and rate > 0 for rate in rates) or layer.name in found:
            continue
        if not any(map(is_taken_over, layer._flatten_layers())):
            found.append(layer.name)
    return found


def check_kl_weight(model: keras.Model) -> None:
    """Warn of a posterior that was learned or saved while the KL did not have its full weight in the loss."""
    names, least = [], 1.0
    for owner in owners(learning_posteriors(model)):
        weight, full = (float(to_numpy(each)) for each in (owner.kl_weight, owner.full_kl_weight or 0.0))
        if weight == 0.0 or weight < 0.99 * full:
            names.append(owner.name)
            least = min(least, weight / full if full else 0.0)
    if names:
        warn(
            f"In the layers {names} of {model.name!r}, the KL has {least:.2g} of its full weight, so the posterior is "
            "too certain. Either training ended within the warm-up, or a callback chose an epoch within it: "
            "`EarlyStopping(restore_best_weights=True)` and `ModelCheckpoint(save_best_only=True)` need "
            '`monitor="val_loss"`, which has the KL at its full weight.',
        )


def check_noise_is_a_draw(model: keras.Model) -> None:
    """Warn of layers that were trained with noise that no draw of their weights can produce."""
    names = [
        layer.name
        for layer, in_one_call in costs.used_repeatedly(model)
        if layer.learns_locally and (layer.estimator == "local_reparameterization" or not in_one_call)
    ]
    if names:
        warn(
            f"The layers {names} are used at several positions of an example, and each position has independent noise "
            "in training. No draw of their weights can produce such noise, so `MonteCarlo` does not show the "
            'uncertainty of their posterior. Train with `estimator="flipout"`, and pass all positions to a layer in '
            "one call, not one by one as in a shared layer or `TimeDistributed`.",
        )


def check_outputs(model: keras.Model, readings: Mapping[str | None, Reading]) -> None:
    """Raise if a likelihood does not fit the outputs, as far as the model shows that before it is called."""
    names = output_names(model)
    if None in readings:
        if names is not None and len(names) > 1 and readings[None].likelihood is not None:
            raise ValueError(
                "A `likelihood` applies to one output. For several outputs, pass a dict by output name, or None. "
                f"Received: likelihood={readings[None].likelihood!r} for the outputs {sorted(names)}"
            )
    elif names is not None and set(names) != set(readings):
        raise ValueError(wrong_names(readings, names))
    for name, reading in readings.items():
        activation = last_activation(last_layer(model, name))
        if reading.is_classes and reading.from_logits and activation in ("softmax", "sigmoid"):
            raise ValueError(
                f"The model {model.name!r} ends with an activation that returns probabilities{reading.where}. "
                "Pass `from_logits=False`."
            )
        if reading.likelihood == "normal" or isinstance(reading.likelihood, NegativeLogLikelihood):
            check_activation(model, name)


def need_outputs(model: keras.Model, readings: Mapping[str | None, Reading]) -> dict[str | None, Reading]:
    """Return the readings of logits, by name, for which only outputs can show whether they are probabilities."""
    if any(getattr(layer, "stateful", False) for layer in model._flatten_layers()):
        return {}  # such layers take whole batches only
    return {
        name: reading
        for name, reading in readings.items()
        if reading.is_classes and reading.from_logits and not hasattr(last_layer(model, name), "activation")
    }


def check_logits(outputs: np.ndarray, likelihood: str, where: str) -> None:
    """Raise if outputs that should be logits are certainly probabilities; warn if they probably are.

    Args:
        outputs: Array (n, ..., C), or (n, ...) for "bernoulli", of a few rows.
        likelihood: "categorical" or "bernoulli".
        where: Str for the message, the output's name.
    """
    way_out = f"If the model returns probabilities{where}, pass `from_logits=False`."
    if outputs.size == 0 or not ((outputs >= 0) & (outputs <= 1)).all():
        return
    if likelihood == "categorical" and np.allclose(outputs.sum(axis=-1), 1.0, rtol=0, atol=1e-3):
        raise ValueError(
            f"With `from_logits=True` the outputs must be logits, but those of a row{where} lie between 0 and 1 and "
            f"sum to 1. {way_out}"
        )
    if likelihood == "bernoulli" and len(np.unique(outputs)) >= _FEW:
        warn(
            f"With `from_logits=True` the outputs should be logits, but {outputs.size} of them{where} lie between 0 "
            f"and 1. {way_out}"
        )


def check_metrics(metrics: Any, readings: Mapping[str | None, Reading]) -> None:
    """Raise for metrics that would take a prediction for the parameters of a distribution, or for logits."""
    for name, reading in readings.items():
        own = metrics.get(name) if isinstance(metrics, dict) else metrics
        if len(readings) > 1 and not isinstance(metrics, dict):
            continue  # only Keras knows which outputs they belong to
        for metric in keras.tree.flatten(own):
            reading.check_metric(metric)


def wrong_names(likelihood: Iterable[Any], outputs: Iterable[Any]) -> str:
    missing, unknown = sorted(set(outputs) - set(likelihood)), sorted(set(likelihood) - set(outputs))
    wrong = [f"no entry for {missing}"] * bool(missing) + [f"entries for unknown outputs {unknown}"] * bool(unknown)
    return (
        f"`likelihood` must have an entry, which may be None, for each of the outputs {sorted(outputs)}. "
        f"Received: {' and '.join(wrong)}"
    )


def known_names(names: Iterable[Any]) -> str:
    return f"Known names: {sorted(names)}"


def rows_not_finite(result: Any) -> int:
    """Count the rows that contain NaN or infinity."""
    arrays = keras.tree.flatten(result)
    rows = np.zeros(len(arrays[0]), bool)
    for values in arrays:
        rows |= ~flat_rows(np.isfinite(values)).all(axis=1)
    return int(rows.sum())


def report_not_finite(wrong: int, rows: int) -> None:
    """Warn if any rows contain NaN or infinity."""
    if wrong:
        warn(
            f"The predictions of {wrong} of {rows} rows contain NaN or infinity. Check the inputs of these rows and "
            "the weights of the model.",
        )


def range_of(probability: Any, likelihood: str, of: Any) -> tuple[Any, Any, Any, Any]:
    """Return the values that `ENDS` names, over finite values only. `of` is `numpy`, or `keras.ops` for tensors."""
    sums = of.ones_like(probability) if likelihood == "bernoulli" else of.sum(probability, axis=-1)

    def extremes(values):
        known = of.isfinite(values)
        return of.min(of.where(known, values, math.inf)), of.max(of.where(known, values, -math.inf))

    return *extremes(probability), *extremes(sums)


def check_probabilities(low: float, high: float, sum_low: float, sum_high: float) -> None:
    """Raise if means are not probabilities: means of probabilities always are, and those of logits hardly ever."""
    wrong_sums = math.isfinite(sum_low) and max(1.0 - sum_low, sum_high - 1.0) > 1e-2
    if low < -1e-3 or high > 1 + 1e-3 or wrong_sums:
        raise ValueError(
            "With `from_logits=False` the outputs must be probabilities. Pass `from_logits=True`, or end the model "
            f"with a softmax or a sigmoid. Received: means from {low:g} to {high:g}, with sums from {sum_low:g} to "
            f"{sum_high:g}"
        )
