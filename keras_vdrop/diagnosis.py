"""Diagnosis of a training: whether the posterior has converged, and whether layers have lost all their weights."""

import itertools
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_vdrop.functional.tensors import to_numpy
from keras_vdrop.normalization import normalizations_of_noise
from keras_vdrop.posterior import VariationalWeight, learning_posteriors
from keras_vdrop.pruning import sparsity

# The fewest optimizer steps under one KL weight for a judgement. In 50 steps of Adam at Keras's default learning rate
# and the default `log_variance_rate`, a log variance moves by a quarter of a nat. A shorter training is only a trial.
_STEPS = 50
# In 200 such steps a log variance can move by a nat. The check waits this long if training may continue: after a `fit`
# of one epoch, as in a loop, or while the KL is falling.
_STEPS_TO_GO = 200
# The fewest epochs under one KL weight that show a trend of the NLL.
_EPOCHS = 5
# The posterior has hardly moved if three conditions hold. The KL is more than `_SHARE` times the NLL, and more than
# `_HALF` of its initial value. The log variances are within `_LITTLE` nats of their start. Their path is straight
# (distance / length above `_STRAIGHT`) or, for a new posterior, shorter than `_LITTLE` nats.
_SHARE, _HALF, _LITTLE, _STRAIGHT = 1.0, 0.5, 1.0, 0.8
# A smaller |NLL| counts as this much: where y has a density, an NLL of 0 has no special meaning.
_LEAST_NLL = 0.1
# New log variances are equal all over a weight tensor. A few steps give them a standard deviation below this.
_ALIKE = 0.25
# A shorter path, in nats, is only rounding.
_ROUNDING = 1e-4
# About how many log variances of one weight tensor are followed.
_FOLLOWED = 4096
# The initial number of steps between two looks, how many looks are kept, and how many stretches make a path.
_APART, _LOOKS, _STRETCHES = 10, 16, 4


class Record:
    """The course of a training: of one `fit`, or of several that continue one schedule.

    Args:
        model: A built model, before its first step.
    """

    def __init__(self, model: keras.Model):
        self.betas, self._nlls = [], []
        self._start_kl = self._kl = learning_kl(model)
        self._followed = _followed(model)
        self._start = self._last = self._end = self._log_variances()
        self._is_new = all(_are_alike(_values(*each)) for each in self._followed)
        self._path_length = 0.0
        self._beta, self._count = None, 0
        self._begin_period()

    def _begin_period(self) -> None:
        """Start a new period: under another weight of the KL, the posterior converges to another point."""
        self._period, self._steps, self._epochs = self._beta, self._count, 0
        self._looks, self._every, self._unseen = [self._last], _APART, 0

    def _is_same_period(self, beta: float) -> bool:
        """Return whether the weight of the KL is that of the current period, within a factor of 2."""
        return self._period is None or self._period / 2 <= beta <= 2 * self._period

    def step(self, beta: float, count: float) -> bool:
        """Record steps of the optimizer.

        Args:
            beta: β in these steps.
            count: The number of steps.

        Returns:
            Whether it is time to `look`.
        """
        self._beta, self._count = beta, count
        if self._period is None:
            self._period = beta
        self._steps += count
        self._unseen += count
        return self._unseen >= self._every or not self._is_same_period(beta)

    def look(self) -> None:
        """Record the current log variances, after the steps that were recorded last."""
        now = self._log_variances()
        self._path_length += _distance(self._last, now)
        self._last = now
        self._unseen = 0
        if not self._is_same_period(self._beta):
            self._begin_period()
            return
        self._looks.append(now)
        if len(self._looks) > _LOOKS:
            self._looks, self._every = self._looks[::2], 2 * self._every

    def add(self, nll: float | None, kl: float) -> None:
        """Record the end of an epoch.

        Args:
            nll: The mean NLL of an example over the epoch; None if it is not known.
            kl: The KL at the end of the epoch, in nats.
        """
        self.betas.append(self._beta)
        self._nlls.append(nll)
        self._kl = kl
        self._epochs += 1

    def end(self) -> None:
        """Record the end of a `fit`."""
        self._end = self._log_variances()

    def is_continued_by(self, model: keras.Model) -> bool:
        """Return whether the model is as the last `fit` left it, so that the next one continues its course."""
        return self._follows(model) and np.array_equal(self._log_variances(), self._end)

    def is_repeated_by(self, model: keras.Model) -> bool:
        """Return whether the model is again as it was at the start of the record, although it has moved since."""
        now = self._log_variances()
        has_moved = not (np.array_equal(now, self._last) and np.array_equal(now, self._end))
        return has_moved and self._follows(model) and np.array_equal(now, self._start)

    def _follows(self, model: keras.Model) -> bool:
        """Return whether the model learns the variables of the record."""
        variables = [id(variable) for variable, _ in _learning(model)]
        return variables == [id(variable) for variable, _, _ in self._followed]

    @property
    def without_kl(self) -> bool:
        """Whether β was 0 in every epoch."""
        return not any(self.betas)

    def warnings(
        self, model: keras.Model, num_examples: float, temperature: float, is_one_of_many: bool = False
    ) -> dict[str, str]:
        """Return the warnings that apply.

        Args:
            model: The model in its current state.
            num_examples: The number by which the KL is divided.
            temperature: A further factor of the KL.
            is_one_of_many: Whether more `fit`s may follow.

        Returns:
            Dict from the names of warnings to their messages.
        """
        if not self._beta or not self._nlls or self._nlls[-1] is None:
            return {}
        said = {}
        enough = _STEPS_TO_GO if is_one_of_many or self._kl_has_fallen else _STEPS
        if self._steps >= enough:
            said.update(self._size_of_kl(num_examples, temperature * self._beta))
            said.update(_statistics_of_noise(model))
        if self._epochs >= _EPOCHS:
            said.update(self._collapse(model))
        return said

    def _size_of_kl(self, num_examples: float, weight: float) -> dict[str, str]:
        """Return the warning, if any, about a KL that is large compared with the NLL."""
        nll, kl = self._nlls[-1], weight * self._kl / num_examples
        size = max(abs(nll), _LEAST_NLL)
        factor = "" if weight == 1.0 else f"{weight:.2g}·"
        figures = f"{factor}KL/num_examples is {kl:.3g} nats per example, compared with an NLL of {nll:.3g}"
        if kl > _SHARE * size and self._has_hardly_moved():
            return {
                "stays": "The posterior has hardly moved and has not converged. So far the log variances have changed "
                f"by {_distance(self._start, self._end):.2g} on average, to a mean of {self._end.mean():.3g}, and "
                f"{figures}. The uncertainty of predictions is still that of the initial values. Train longer, or at a "
                "learning rate 3 to 10 times as high that falls towards the end."
            }
        if kl > 10 * size:
            return {
                "dwarfs": f"The KL dwarfs the NLL: {figures}. Train longer or at a higher learning rate. Or use a "
                "prior closer to the scale of the weights, a smaller model, or a lower `temperature`."
            }
        return {}

    def _has_hardly_moved(self) -> bool:
        """Return whether the log variances are still near their start.

        A posterior that has converged moves back and forth; one that has not moves straight on. But a new posterior
        whose path is shorter than a nat in all, back and forth included, has not converged either: gradients that are
        small compared with their noise, or very small steps, look the same. If the KL has fallen, the posterior has
        moved: where log variances are slow, the means go to 0 first.
        """
        if not self._end.size or self._kl_has_fallen or _distance(self._start, self._end) >= _LITTLE:
            return False
        gone = self._path_length + _distance(self._last, self._end)
        return (self._is_new and gone < _LITTLE) or self._straightness() > _STRAIGHT

    @property
    def _kl_has_fallen(self) -> bool:
        return self._kl < _HALF * self._start_kl

    def _straightness(self) -> float:
        """Return distance / length of the path in this period; 0 if the path is too short to tell."""
        stretches = [_distance(*pair) for pair in itertools.pairwise([*self._looks, self._end])]
        if len(stretches) < _STRETCHES or sum(stretches) < _ROUNDING:
            return 0.0
        return _distance(self._looks[0], self._end) / sum(stretches)

    def _collapse(self, model: keras.Model) -> dict[str, str]:
        """Return the warning, if any, about layers that have lost all weights while the NLL has risen."""
        best, last = min(nll for nll in self._nlls if nll is not None), self._nlls[-1]
        gone = [row.name for row in sparsity(model).layers if row.weights and not row.left]
        if not gone or last - best < 0.1 * abs(best) + 0.1:
            return {}
        return {
            "collapsed": f"Pruning has collapsed: no weights are kept in {', '.join(map(repr, gone))}, and the mean "
            f"NLL of an example has risen from {best:.3g} to {last:.3g}. Let the KL rise later and more slowly "
            "(`start_epoch`, `warmup_epochs`), or lower the `temperature` or the learning rate."
        }

    def _log_variances(self) -> np.ndarray:
        return np.concatenate([np.zeros(0), *(_values(*each) for each in self._followed)])


def _statistics_of_noise(model: keras.Model) -> dict[str, str]:
    """Return the warning, if any, about BatchNormalization that has seen noise, which `predict` does not add."""
    names = normalizations_of_noise(model)
    if not names:
        return {}
    what = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return {
        "normalization": "The moving variances of BatchNormalization include the noise of the weights "
        f"({what}), but `predict` adds no noise. Call `keras_vdrop.update_batch_normalization(model, x)` before "
        "`predict`, `select_threshold` and `compact`. `MonteCarlo` does not need this call."
    }


def learning_kl(model: keras.Model) -> float:
    """Return Σ KL of the posteriors that are not frozen, in nats: a float."""
    return float(sum(to_numpy(each.kl()) for each in learning_posteriors(model)))


def _learning(model: keras.Model) -> list[tuple[Any, VariationalWeight]]:
    """Return the trainable log variances, as pairs of the variable and its `VariationalWeight`."""
    trainable = {id(variable) for variable in model.trainable_variables}
    weights = [each for each in learning_posteriors(model) if isinstance(each, VariationalWeight)]
    pairs = [(weight.log_variance.variable, weight) for weight in weights]
    return [pair for pair in pairs if id(pair[0]) in trainable]


def _followed(model: keras.Model) -> list[tuple[Any, float, np.ndarray]]:
    """Return the arguments of `_values`, (variable, factor, indices), for every trainable log variance."""
    return [(variable, weight.log_variance.factor, _indices(weight)) for variable, weight in _learning(model)]


def _indices(weight: VariationalWeight) -> np.ndarray:
    """Return the flat indices of the log variances to follow: a subset of those whose weights are kept.

    Any other weight costs next to nothing, so its log variance drifts without end.
    """
    shape = tuple(weight.log_variance.shape)
    left = to_numpy(weight.keep_mask()) if shape == tuple(weight.shape) else np.ones(shape, bool)
    indices = np.flatnonzero(left)
    return indices[:: max(1, indices.size // _FOLLOWED)]


def _values(variable: Any, factor: float, indices: np.ndarray) -> np.ndarray:
    """Return the log variances at some flat indices, in nats."""
    return factor * to_numpy(ops.take(ops.ravel(ops.convert_to_tensor(variable)), indices))


def _are_alike(values: np.ndarray) -> bool:
    return not values.size or values.std() < _ALIKE


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean absolute difference between log variances, in nats."""
    return float(np.abs(other - one).mean()) if one.size else 0.0
