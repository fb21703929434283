"""Callbacks: the weight of the KL in the loss, and sparsity in the logs."""

import math

import keras

from keras_vdrop.layers.base import check_finite
from keras_vdrop.posterior import kl_divergence, require_variational_weights
from keras_vdrop.pruning import sparsity


class ELBO(keras.callbacks.Callback):
    """Make `fit` minimise the negative ELBO per example: mean NLL + β·KL / num_examples.

    β is 0 up to `start_epoch`, rises linearly over `warmup_epochs` and stays 1. A network that starts with the full KL
    gives up weights before it has learned which ones it needs, so give it some epochs of each.

    Adds to the logs of every epoch
        `kl`: Σ KL(posterior ‖ prior) at the end of the epoch, in nats, not weighted.
        `nll`: the loss without the penalties of the weights, whose mean over the epoch is taken as that of
            their values at its beginning and end.
        `val_nll`: the same of the validation loss, exactly.

    Args:
        num_examples: Positive int, the number of training examples (not batches).
        warmup_epochs: Over how many epochs β rises from 0 to 1; 0 for at once.
        start_epoch: The epoch, counted from 0, at which it starts to rise.
        schedule: "linear", or a callable from the epoch (int, from 0) to β ≥ 0, in place of the two above.

    Raises:
        ValueError: For a value that is out of range, or, in `fit`, a model without variational weights.

    Example:
        >>> import keras, keras_vdrop as kv, numpy as np
        >>> x, y = np.ones((8, 3)), np.ones((8, 1))
        >>> model = keras.Sequential([keras.Input((3,)), kv.VariationalDense(1)])
        >>> model.compile("adam", "mse")
        >>> history = model.fit(x, y, callbacks=[kv.ELBO(num_examples=len(x))], verbose=0)
        >>> sorted(history.history)
        ['kl', 'loss', 'nll']
    """

    def __init__(self, num_examples, warmup_epochs=0, start_epoch=0, schedule="linear"):
        super().__init__()
        for name, value, least in (
            ("num_examples", num_examples, 1),
            ("warmup_epochs", warmup_epochs, 0),
            ("start_epoch", start_epoch, 0),
        ):
            check_finite(name, value)
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}. Received: {name}={value!r}")
        if schedule != "linear" and not callable(schedule):
            raise ValueError(f'`schedule` must be "linear" or a callable of the epoch. Received: schedule={schedule!r}')
        self.num_examples = num_examples
        self.warmup_epochs = warmup_epochs
        self.start_epoch = start_epoch
        self.schedule = schedule

    def beta(self, epoch):
        """The factor of the KL in that epoch, 1 for the ELBO itself."""
        if callable(self.schedule):
            return self.schedule(epoch)
        if self.warmup_epochs == 0:
            return float(epoch >= self.start_epoch)
        return min(1.0, max(0.0, (epoch - self.start_epoch) / self.warmup_epochs))

    def set_model(self, model):
        require_variational_weights(model)
        super().set_model(model)

    def on_epoch_begin(self, epoch, logs=None):
        for weight in require_variational_weights(self.model):
            weight.owner.kl_weight = self.beta(epoch) / self.num_examples
        self._penalty_at_begin = self._penalty()

    def on_epoch_end(self, epoch, logs=None):
        if logs is None:
            return
        logs["kl"] = _number(kl_divergence(self.model))
        penalty = self._penalty()
        logs["nll"] = logs["loss"] - 0.5 * (self._penalty_at_begin + penalty)
        if "val_loss" in logs:
            logs["val_nll"] = logs["val_loss"] - penalty

    def _penalty(self):
        """What the weights' regularizers, the KL among them, add to the loss."""
        regularized = (v for v in self.model.trainable_variables if getattr(v, "regularizer", None) is not None)
        return math.fsum(_number(variable.regularizer(variable)) for variable in regularized)


def _number(scalar):
    return float(keras.ops.convert_to_numpy(scalar))


class SparsityLogger(keras.callbacks.Callback):
    """Add `weights_left`, the fraction of the weights that a model still needs, to the logs of every epoch.

    Args:
        threshold: As for `sparsity`.
    """

    def __init__(self, threshold=None):
        super().__init__()
        self.threshold = threshold

    def set_model(self, model):
        sparsity(model, self.threshold)  # raises now what it would raise after an epoch
        super().set_model(model)

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            report = sparsity(self.model, self.threshold)
            logs["weights_left"] = report.left / report.weights
