"""What the course of a training says of its posterior: whether it has arrived, and whether anything is left of it."""

import numpy as np
from keras import ops

from keras_vdrop.posterior import VariationalWeight, learning_posteriors
from keras_vdrop.pruning import sparsity

# Fewer epochs of one KL weight say nothing.
_EPOCHS = 5
# Of one weight tensor, so many log variances are followed.
_FOLLOWED = 4096


class Record:
    """The course of one `fit`, epoch by epoch.

    Args:
        model: A built model, before its first step.
    """

    def __init__(self, model):
        self.betas, self.nlls, self.kls = [], [], []
        self._start = self._last = _log_variances(model)
        self._since, self._path = self._start, 0.0

    def add(self, model, beta, nll, kl):
        """Note the end of an epoch.

        Args:
            model: The model.
            beta: The KL's factor in the epoch.
            nll: The data's part of the loss in the epoch; None where it is not known.
            kl: The KL at its end, in nats.
        """
        now = _log_variances(model)
        if now.size != self._start.size:  # the model was built in its first step
            self._start = self._last = self._since = now
        if not self.betas or beta != self.betas[-1]:
            self._since, self._path = self._last, 0.0
        self._path += np.abs(now - self._last).mean() if now.size else 0.0
        self._last = now
        self.betas.append(beta)
        self.nlls.append(nll)
        self.kls.append(kl)

    @property
    def without_kl(self):
        """Whether the KL was in the loss of no epoch."""
        return not any(self.betas)

    def complaints(self, model, num_examples, factor):
        """Warnings by name.

        Args:
            model: The model as it is now.
            num_examples: By which the KL is divided.
            factor: What the loss makes of the NLL of an example.

        Returns:
            Dict from a name to a sentence.
        """
        said = {}
        settled = sum(1 for beta in self.betas if beta == self.betas[-1]) if self.betas and self.betas[-1] else 0
        if settled < _EPOCHS or self.nlls[-1] is None:
            return said
        nll, kl = self.nlls[-1] / factor, self.kls[-1] / num_examples
        figures = f"KL/num_examples is {kl:.3g} nats an example beside an NLL of {nll:.3g}"
        if self._has_hardly_moved() and kl > _SHARE * abs(nll):
            said["stays"] = (
                "The posterior has hardly moved and is still on its way: in this `fit` the log variances have changed "
                f"by {self._moved():.2g} on average, to {self._last.mean():.3g}, and {figures}. What the model says of "
                "its certainty is that of its initial values. Train longer, or with a higher learning rate: 3 to 10 "
                "times as high, falling towards the end."
            )
        elif kl > 10 * max(abs(nll), 0.1):
            said["dwarfs"] = (
                f"The KL dwarfs the data: {figures}. Train longer or with a higher learning rate, choose a prior "
                "closer to the weights' scale or a smaller model, or weigh the KL less by `temperature`."
            )
        if complaint := self._collapse(model, factor):
            said["collapsed"] = complaint
        return said

    def _moved(self):
        return float(np.abs(self._last - self._start).mean())

    def _has_hardly_moved(self):
        """Whether log variances moved little, and by one way: a posterior at its place moves to and fro."""
        if not self._last.size or not self._path:
            return False
        straight = np.abs(self._last - self._since).mean() / self._path
        return self._moved() < _LITTLE and straight > _STRAIGHT

    def _collapse(self, model, factor):
        """A sentence where layers have lost all weights and the data's part of the loss has grown with β."""
        known = [nll for nll in self.nlls if nll is not None]
        best, last = min(known) / factor, known[-1] / factor
        gone = [row.name for row in sparsity(model).layers if row.weights and not row.left]
        if not gone or last - best < 0.1 * abs(best) + 0.1:
            return None
        return (
            f"Pruning has collapsed: no weight is left in {', '.join(map(repr, gone))}, and the NLL of an example has "
            f"risen from {best:.3g} to {last:.3g} with β. Let the KL rise later and more slowly (`start_epoch`, "
            "`warmup_epochs`), weigh it less (`temperature`), or train at a lower learning rate."
        )


# The posterior has hardly moved: a KL of more than the NLL, log variances within 1 nat of their start, a straight way.
_SHARE, _LITTLE, _STRAIGHT = 1.0, 1.0, 0.8


def _log_variances(model):
    """Of the weights that learn, those of some numbers of each, one array."""
    found = [np.zeros(0)]
    for posterior in learning_posteriors(model):
        if isinstance(posterior, VariationalWeight):
            values = np.ravel(ops.convert_to_numpy(ops.convert_to_tensor(posterior.log_variance)))
            found.append(values[:: max(1, values.size // _FOLLOWED)])
    return np.concatenate(found)
