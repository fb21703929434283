"""What the course of a training says of its posterior: whether it has arrived, and whether anything is left of it."""

import itertools

import numpy as np
from keras import ops

from keras_vdrop.normalization import normalizations_of_noise
from keras_vdrop.posterior import VariationalWeight, learning_posteriors
from keras_vdrop.pruning import sparsity

# Fewer optimizer steps under one KL weight say nothing: in 50 of Adam at Keras's default rate, and at the default
# `log_variance_rate`, a log variance moves by a quarter of a nat. Whoever trains for less tries out whether it runs.
_STEPS = 50
# By 200 such steps a log variance can have moved by a nat. It takes as many where more may be to come: where a `fit`
# had one epoch, as in a loop, and where the KL is falling.
_STEPS_TO_GO = 200
# What an NLL does as β rises is a trend; it takes so many epochs under one KL weight.
_EPOCHS = 5
# The posterior has hardly moved: a KL of more than the NLL, and more than half of what it was at first; log variances
# within 1 nat of their start; a straight way.
_SHARE, _HALF, _LITTLE, _STRAIGHT = 1.0, 0.5, 1.0, 0.8
# An NLL of less is taken for this much: 0 is a number like others where y has a density.
_LEAST_NLL = 0.1
# Log variances as they are made are the same all over a weight tensor; a few steps set them apart by less than this.
_ALIKE = 0.25
# A way of less is nothing but rounding, in nats.
_ROUNDING = 1e-4
# Of one weight tensor, so many log variances are followed.
_FOLLOWED = 4096
# How many steps lie between two looks at first, how many looks are kept, and how many stretches make a way.
_APART, _LOOKS, _STRETCHES = 10, 16, 4


class Record:
    """The course of a training: of one `fit`, or of several that go on with one schedule.

    Args:
        model: A built model, before its first step.
    """

    def __init__(self, model):
        self.betas, self._nlls = [], []
        self._start_kl = self._kl = learning_kl(model)
        self._followed = _followed(model)
        self._start = self._last = self._end = self._log_variances()
        self._as_made = all(_are_alike(_values(*each)) for each in self._followed)
        self._way = 0.0
        self._beta, self._count = None, 0
        self._begin_period()

    def _begin_period(self):
        """Under a KL of another weight, the posterior has another place to go to."""
        self._period, self._steps, self._epochs = self._beta, self._count, 0
        self._looks, self._every, self._unseen = [self._last], _APART, 0

    def _is_same_period(self, beta):
        """Whether that is about the weight that the KL has had: within a factor of 2."""
        return self._period is None or self._period / 2 <= beta <= 2 * self._period

    def step(self, beta, count):
        """Note steps of the optimizer.

        Args:
            beta: The KL's factor in them.
            count: How many there were.

        Returns:
            Whether it is time to `look`.
        """
        self._beta, self._count = beta, count
        if self._period is None:
            self._period = beta
        self._steps += count
        self._unseen += count
        return self._unseen >= self._every or not self._is_same_period(beta)

    def look(self):
        """Note where the posterior is, after the steps that were noted last."""
        now = self._log_variances()
        self._way += _distance(self._last, now)
        self._last = now
        self._unseen = 0
        if not self._is_same_period(self._beta):
            self._begin_period()
            return
        self._looks.append(now)
        if len(self._looks) > _LOOKS:
            self._looks, self._every = self._looks[::2], 2 * self._every

    def add(self, nll, kl):
        """Note the end of an epoch.

        Args:
            nll: Of an example, the mean over the epoch; None where it is not known.
            kl: The KL at its end, in nats.
        """
        self.betas.append(self._beta)
        self._nlls.append(nll)
        self._kl = kl
        self._epochs += 1

    def end(self):
        """Note the end of a `fit`."""
        self._end = self._log_variances()

    def goes_on(self, model):
        """Whether the model is as the last `fit` has left it: then the next one goes on with its course."""
        variables = [id(variable) for variable, _ in _learning(model)]
        same = variables == [id(variable) for variable, _, _ in self._followed]
        return same and np.array_equal(self._log_variances(), self._end)

    @property
    def without_kl(self):
        """Whether the KL was in the loss of no epoch."""
        return not any(self.betas)

    def complaints(self, model, num_examples, temperature, is_one_of_many=False):
        """Warnings by name.

        Args:
            model: The model as it is now.
            num_examples: By which the KL is divided.
            temperature: What the KL is weighed by besides.
            is_one_of_many: Whether more `fit`s may be to come.

        Returns:
            Dict from a name to a sentence.
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

    def _size_of_kl(self, num_examples, weight):
        """What there is to say of a KL that is large beside the data's part."""
        nll, kl = self._nlls[-1], weight * self._kl / num_examples
        size = max(abs(nll), _LEAST_NLL)
        factor = "" if weight == 1.0 else f"{weight:.2g}·"
        figures = f"{factor}KL/num_examples is {kl:.3g} nats an example beside an NLL of {nll:.3g}"
        if kl > _SHARE * size and self._has_hardly_moved():
            return {
                "stays": "The posterior has hardly moved and is still on its way: in training so far the log variances "
                f"have changed by {_distance(self._start, self._end):.2g} on average, to {self._end.mean():.3g}, and "
                f"{figures}. What the model says of its certainty is that of its initial values. Train longer, or with "
                "a higher learning rate: 3 to 10 times as high, falling towards the end."
            }
        if kl > 10 * size:
            return {
                "dwarfs": f"The KL dwarfs the data: {figures}. Train longer or with a higher learning rate, choose a "
                "prior closer to the weights' scale or a smaller model, or weigh the KL less by `temperature`."
            }
        return {}

    def _has_hardly_moved(self):
        """Whether log variances are about where they were.

        A posterior at its place moves to and fro, and one that is on its way moves straight on. But where it has gone
        less than a nat in all from the values that it was made with, to and fro included, that is no place which it
        has found: gradients too small for their noise, or no steps to speak of, look the same. And where the KL has
        fallen, the means have moved: slow log variances let them go to 0 first.
        """
        if not self._end.size or self._kl_has_fallen or _distance(self._start, self._end) >= _LITTLE:
            return False
        gone = self._way + _distance(self._last, self._end)
        return (self._as_made and gone < _LITTLE) or self._straightness() > _STRAIGHT

    @property
    def _kl_has_fallen(self):
        return self._kl < _HALF * self._start_kl

    def _straightness(self):
        """The distance over the length of the way, under this weight of the KL; 0 where it is too short to tell."""
        stretches = [_distance(*pair) for pair in itertools.pairwise([*self._looks, self._end])]
        if len(stretches) < _STRETCHES or sum(stretches) < _ROUNDING:
            return 0.0
        return _distance(self._looks[0], self._end) / sum(stretches)

    def _collapse(self, model):
        """What there is to say where layers have lost all weights and the data's part of the loss has grown with β."""
        best, last = min(nll for nll in self._nlls if nll is not None), self._nlls[-1]
        gone = [row.name for row in sparsity(model).layers if row.weights and not row.left]
        if not gone or last - best < 0.1 * abs(best) + 0.1:
            return {}
        return {
            "collapsed": f"Pruning has collapsed: no weight is left in {', '.join(map(repr, gone))}, and the NLL of an "
            f"example has risen from {best:.3g} to {last:.3g} with β. Let the KL rise later and more slowly "
            "(`start_epoch`, `warmup_epochs`), weigh it less (`temperature`), or train at a lower learning rate."
        }

    def _log_variances(self):
        return np.concatenate([np.zeros(0), *(_values(*each) for each in self._followed)])


def _statistics_of_noise(model):
    """What there is to say of BatchNormalization that has seen noise, where `predict` adds none."""
    names = normalizations_of_noise(model)
    if not names:
        return {}
    what = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return {
        "normalization": f"BatchNormalization has seen the noise of the weights, and its moving variances include it "
        f"({what}). `predict` adds no noise: call `keras_vdrop.update_batch_normalization(model, x)` before it, and "
        "before `select_threshold` and `compact`. `MonteCarlo` needs no such call."
    }


def learning_kl(model):
    """Σ KL of the posteriors that learn, in nats: a float."""
    return float(sum(ops.convert_to_numpy(each.kl()) for each in learning_posteriors(model)))


def _learning(model):
    """The log variances that learn, as pairs of the variable and the `VariationalWeight` that it belongs to."""
    trainable = {id(variable) for variable in model.trainable_variables}
    weights = [each for each in learning_posteriors(model) if isinstance(each, VariationalWeight)]
    pairs = [(weight.log_variance.variable, weight) for weight in weights]
    return [pair for pair in pairs if id(pair[0]) in trainable]


def _followed(model):
    """(variable, factor, places) of every log variance that learns, as `_values` takes them."""
    return [(variable, weight.log_variance.factor, _places(weight)) for variable, weight in _learning(model)]


def _places(weight):
    """Which log variances to follow, as flat indices: some of those whose weights are left.

    A weight that has been given up costs next to nothing, and its log variance drifts on and on.
    """
    shape = tuple(weight.log_variance.shape)
    left = ops.convert_to_numpy(weight.keep_mask()) if shape == tuple(weight.shape) else np.ones(shape, bool)
    places = np.flatnonzero(left)
    return places[:: max(1, places.size // _FOLLOWED)]


def _values(variable, factor, places):
    """Log variances at some places, in nats."""
    return factor * ops.convert_to_numpy(ops.take(ops.ravel(ops.convert_to_tensor(variable)), places))


def _are_alike(values):
    return not values.size or values.std() < _ALIKE


def _distance(one, other):
    """How far log variances are apart, on average, in nats."""
    return float(np.abs(other - one).mean()) if one.size else 0.0
