"""What `MonteCarlo.evaluate` collects in its pass over the data and reports at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_vdrop.functional.tensors import to_numpy
from keras_vdrop.montecarlo.checks import ENDS, check_probabilities, range_of, report_not_finite
from keras_vdrop.montecarlo.readings import MomentsNLL, Reading, moments
from keras_vdrop.targets import mask_of, outside, weights_of
from keras_vdrop.warning import warn

# The fewest values of y for which `evaluate` may warn that predictions are worse than the mean and variance of y.
_ENOUGH = 30


def of(readings: Mapping[str | None, Reading]) -> list[Any]:
    """Return the reports for the readings of a model's outputs, given by name."""
    return [Finite(), *(report for name, reading in readings.items() for report in _of_output(name, reading))]


def _of_output(name: str | None, reading: Reading) -> Sequence[Report]:
    """Return the reports on an output."""
    if reading.likelihood is None:
        return []
    if not reading.is_classes:
        return [Fit(name, reading)]
    labels = [Labels(name, reading)] if reading.likelihood == "categorical" else []
    return labels if reading.from_logits else [*labels, Probabilities(name, reading.likelihood)]


class Report(keras.metrics.Metric):
    """Base of metrics that collect facts in `evaluate` and report them at its end; they do not appear in the logs."""

    def result(self) -> dict[str, Any]:
        return {}

    def report(self) -> None:
        raise NotImplementedError

    def _add(self, name: str, initial: float = 0.0) -> Any:
        return self.add_variable((), initializer=keras.initializers.Constant(initial), name=name)

    def _number(self, variable: Any) -> float:
        return float(to_numpy(variable))


class Finite(Report):
    """The number of rows, and the number of rows with NaN or infinity."""

    def __init__(self):
        super().__init__(name="finite", dtype="float32")
        self.rows, self.wrong = self._add("rows"), self._add("wrong")

    def update_state(self, found: Any, rows: Mapping[str | None, tuple[Any, Any, Any]]) -> None:
        arrays = [each for each in keras.tree.flatten(found) if keras.backend.standardize_dtype(each.dtype) != "bool"]
        wrong = False
        for values in arrays:
            flat = ops.reshape(values, (ops.shape(values)[0], -1))
            wrong = ops.logical_or(wrong, ops.logical_not(ops.all(ops.isfinite(flat), axis=1)))
        self.rows.assign_add(ops.cast(ops.shape(arrays[0])[0], "float32"))
        self.wrong.assign_add(ops.sum(ops.cast(wrong, "float32")))

    @property
    def count(self) -> int:
        """The number of rows."""
        return int(self._number(self.rows))

    def report(self) -> None:
        report_not_finite(int(self._number(self.wrong)), self.count)


class Labels(Report):
    """The number of labels that count and are not class numbers."""

    def __init__(self, name: str | None, reading: Reading):
        super().__init__(name="labels", dtype="float32")
        self.output, self.reading = name, reading
        self.wrong = self._add("wrong")

    def update_state(self, found: dict[str, Any], rows: Mapping[str | None, tuple[Any, Any, Any]]) -> None:
        if self.output not in rows:
            return
        y, found, weight = rows[self.output]
        y, weight = self.reading.laid_out(y, found, weight)
        point = found["probability"]
        if len(y.shape) == len(point.shape):
            return  # one-hot
        wrong = ops.cast(outside(y, point.shape[-1]), "float32")
        for each in (weight, mask_of(point)):
            if each is not None:
                wrong *= weights_of(ops.cast(ops.not_equal(ops.cast(each, "float32"), 0.0), "float32"), wrong)
        self.wrong.assign_add(ops.sum(wrong))

    def report(self) -> None:
        wrong = int(self._number(self.wrong))
        if wrong:
            raise ValueError(
                f"Labels{self.reading.where} must be ints from 0 to C − 1. Give those that are to be ignored the "
                f"`sample_weight` 0. Received: {wrong} labels out of this range"
            )


class Probabilities(Report):
    """The range of outputs that should be probabilities, and the range of their sums."""

    def __init__(self, name: str | None, likelihood: str):
        super().__init__(name="probabilities", dtype="float32")
        self.output, self.likelihood = name, likelihood
        self.ends = [self._add(end, math.inf if end in ("low", "sum_low") else -math.inf) for end in ENDS]

    def reset_state(self) -> None:
        for variable, end in zip(self.ends, ENDS):
            variable.assign(math.inf if end in ("low", "sum_low") else -math.inf)

    def update_state(self, found: dict[str, Any], rows: Mapping[str | None, tuple[Any, Any, Any]]) -> None:
        found = found if self.output is None else found[self.output]
        for variable, value, end in zip(self.ends, range_of(found["probability"], self.likelihood, ops), ENDS):
            variable.assign((ops.minimum if end in ("low", "sum_low") else ops.maximum)(variable, value))

    def report(self) -> None:
        check_probabilities(*map(self._number, self.ends))


class Fit(Report):
    """The NLL of predicted numbers, compared with that of a normal distribution with the mean and variance of y."""

    def __init__(self, name: str | None, reading: Reading):
        super().__init__(name="fit", dtype="float32")
        self.output, self.reading = name, reading
        self.count, self.mean, self.squares, self.nll = map(self._add, ("count", "mean", "squares", "nll"))

    def update_state(self, found: dict[str, Any], rows: Mapping[str | None, tuple[Any, Any, Any]]) -> None:
        if self.output not in rows:
            return
        y, found, weight = rows[self.output]
        y, weight = self.reading.laid_out(y, found, weight)
        y = ops.cast(y, "float32")
        counts = ops.ones_like(y)
        for each in (weight, mask_of(found["mean"])):
            if each is not None:
                counts *= weights_of(ops.cast(each, y.dtype), y)
        count = ops.sum(counts)
        mean = ops.divide_no_nan(ops.sum(counts * y), count)
        shift, total = mean - self.mean, self.count + count
        # Combine the squared deviations of both parts. Plain sums of squares would cancel where y is far from 0.
        squares = ops.sum(counts * ops.square(y - mean))
        self.squares.assign_add(squares + ops.square(shift) * ops.divide_no_nan(self.count * count, total))
        self.mean.assign_add(shift * ops.divide_no_nan(count, total))
        self.count.assign(total)
        self.nll.assign_add(ops.sum(counts * MomentsNLL().values(y, moments(found))))

    def report(self) -> None:
        count, mean, squares, nll = map(self._number, (self.count, self.mean, self.squares, self.nll))
        if count < _ENOUGH or not squares > 0:
            return
        scale = math.sqrt(squares / count)
        least = 0.5 * math.log(2.0 * math.pi * math.e) + math.log(scale)
        if not nll / count > least + 0.1:
            return
        standard = abs(mean) < 3.0 and 0.3 < scale < 3.0
        way_out = (
            "Train longer, or check the inputs."
            if standard
            else ("Standardise y as (y − mean) / standard deviation: an untrained network predicts numbers of about 1.")
        )
        warn(
            f"The prediction of y{self.reading.where} is worse than a constant prediction: its NLL is "
            f"{nll / count:.3g} nats per number, and that of a normal distribution with the mean "
            f"{mean:.3g} and the standard deviation {scale:.3g} of y is {least:.3g}. {way_out}",
        )
