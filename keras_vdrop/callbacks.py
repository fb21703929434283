"""Callbacks: the weight of the KL in the loss, and sparsity in the logs."""

import math

import keras

from keras_vdrop.layers.base import check_finite
from keras_vdrop.posterior import kl_divergence, require_posteriors
from keras_vdrop.pruning import sparsity

# What fraction of its full weight the KL has when a fraction p of the warm-up is over.
SCHEDULES = {
    "linear": lambda p: p,
    "cubic": lambda p: p**3,
    "cosine": lambda p: 0.5 * (1.0 - math.cos(math.pi * p)),
}


class ELBO(keras.callbacks.Callback):
    """Make `fit` minimise the negative ELBO per example: mean NLL + temperature·β·KL / num_examples.

    β is 0 up to `start_epoch`, rises over `warmup_epochs` and stays 1. A network that starts with the full KL
    gives up weights before it has learned which ones it needs, so give it some epochs of each. β depends on nothing
    but the number of the epoch (and batch), so that a `fit` resumed with `initial_epoch` goes on where the schedule
    was.

    Adds to the logs of every epoch
        `kl`: Σ KL(posterior ‖ prior) at the end of the epoch, in nats, not weighted.
        `nll`: the loss without the penalties of the weights, whose mean over the epoch is taken as that of
            their values at its beginning and end.
        `val_nll`: the same of the validation loss, exactly.

    Args:
        num_examples: Positive int, the number of training examples (not batches).
        warmup_epochs: Over how many epochs β rises from 0 to 1; 0 for at once.
        start_epoch: The epoch, counted from 0, at which it starts to rise.
        schedule: How it rises: "linear", "cubic" (p³ of the way at p of the time: late), "cosine" (softly at both
            ends); or a callable from the step to β ≥ 0, in place of the two above. The step is an int that counts
            from 0: the epoch, or with `per="batch"` the batch since the beginning of training.
        per: "epoch" or "batch": how often β changes.
        temperature: Float ≥ 0, a constant factor of the KL; 1 for the ELBO. Below 1 (a "cold" posterior) data count
            for more than they are, and more weights stay.
        likelihood_scale: Float > 0, σ, where the loss is the mean squared error: the standard deviation of the data
            around the prediction, in the units of y. The loss is then the negative ELBO of N(prediction, σ²) in units
            of D / (2σ²), less a constant, for D numbers an example: the KL is weighed by 2σ²/D more. Without it, a mean
            squared error is that of σ = √(D/2). None for losses that are likelihoods, such as `losses.NormalNLL`.
        free_bits: Float ≥ 0, in nats for each weight: the KL of a weight tensor that costs nothing, on average over its
            weights: max(KL, free_bits·weights) takes its place. Its gradient is 0 below.

    Raises:
        ValueError: For a value that is out of range; in `fit`, for a model without variational weights, a
            `likelihood_scale` where the model has several outputs or one of unknown size, or a callable
            of the batch that resumes at an epoch of which Keras does not know how many batches came before.

    Example:
        >>> import keras, keras_vdrop as kv, numpy as np
        >>> x, y = np.ones((8, 3)), np.ones((8, 1))
        >>> model = keras.Sequential([keras.Input((3,)), kv.VariationalDense(1)])
        >>> model.compile("adam", "mse")
        >>> history = model.fit(x, y, callbacks=[kv.ELBO(num_examples=len(x))], verbose=0)
        >>> sorted(history.history)
        ['kl', 'loss', 'nll']

    Reference:
        Warm-up: Ladder Variational Autoencoders, Sønderby et al., 2016, https://arxiv.org/abs/1602.02282; free bits:
        Improved Variational Inference with Inverse Autoregressive Flow, Kingma et al., 2016,
        https://arxiv.org/abs/1606.04934; temperature: How Good is the Bayes Posterior in Deep Neural Networks Really?,
        Wenzel et al., 2020, https://arxiv.org/abs/2002.02405
    """

    def __init__(
        self,
        num_examples,
        warmup_epochs=0,
        start_epoch=0,
        schedule="linear",
        per="epoch",
        temperature=1.0,
        free_bits=0.0,
        likelihood_scale=None,
    ):
        super().__init__()
        for name, value, least in (
            ("num_examples", num_examples, 1),
            ("warmup_epochs", warmup_epochs, 0),
            ("start_epoch", start_epoch, 0),
            ("temperature", temperature, 0),
            ("free_bits", free_bits, 0),
        ):
            check_finite(name, value)
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}. Received: {name}={value!r}")
        if likelihood_scale is not None:
            check_finite("likelihood_scale", likelihood_scale)
            if likelihood_scale <= 0:
                raise ValueError(f"`likelihood_scale` must be above 0. Received: likelihood_scale={likelihood_scale!r}")
        if not callable(schedule) and schedule not in SCHEDULES:
            raise ValueError(
                f"`schedule` must be one of {sorted(SCHEDULES)} or a callable of the step. "
                f"Received: schedule={schedule!r}"
            )
        if per not in ("epoch", "batch"):
            raise ValueError(f'`per` must be "epoch" or "batch". Received: per={per!r}')
        self.num_examples = num_examples
        self.warmup_epochs = warmup_epochs
        self.start_epoch = start_epoch
        self.schedule = schedule
        self.per = per
        self.temperature = temperature
        self.free_bits = free_bits
        self.likelihood_scale = likelihood_scale

    def beta(self, epoch, batch=0):
        """The factor of the KL in that epoch (with `per="batch"`, at that batch of it), 1 for the ELBO itself."""
        batch = batch if self.per == "batch" else 0
        if callable(self.schedule):
            return self.schedule(epoch if self.per == "epoch" else self._batches_before(epoch) + batch)
        elapsed = epoch + (batch / self._steps if self._steps else 0.0) - self.start_epoch
        if self.warmup_epochs == 0:
            return float(elapsed >= 0)
        return SCHEDULES[self.schedule](min(1.0, max(0.0, elapsed / self.warmup_epochs)))

    # How many batches an epoch has: None as long as neither Keras nor an epoch that is over has told.
    _steps = None

    def _batches_before(self, epoch):
        if epoch and not self._steps:
            raise ValueError(
                "How many batches came before this epoch is not known, so a schedule of batches cannot go on. "
                f"Received: initial_epoch={epoch}; pass `steps_per_epoch` to `fit`."
            )
        return epoch * self._steps if epoch else 0

    def set_model(self, model):
        require_posteriors(model)
        super().set_model(model)
        self._units = self._loss_units()

    def _loss_units(self):
        """In what nats the loss is: 2σ²/D of them for the mean of D squared errors."""
        if self.likelihood_scale is None:
            return 1.0
        shape = self.model.output_shape
        if isinstance(shape, (list, dict)) or None in shape[1:]:
            raise ValueError(
                "`likelihood_scale` takes a model with one output of known size. Received: "
                f"likelihood_scale={self.likelihood_scale!r} for outputs of shape {shape}; give the KL's weight by "
                "`temperature`."
            )
        return 2.0 * self.likelihood_scale**2 / math.prod(shape[1:])

    def on_train_begin(self, logs=None):
        self._steps = (self.params or {}).get("steps")

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._set(epoch)
        self._penalty_at_begin = self._penalty()

    def on_train_batch_begin(self, batch, logs=None):
        if self.per == "batch":
            self._set(self._epoch, batch)

    def on_train_batch_end(self, batch, logs=None):
        self._last_batch = batch

    def _set(self, epoch, batch=0):
        """Give every layer its KL weight.

        By way of `self.model`, always: that is what makes the JAX trainer take note of what is assigned.
        """
        kl_weight = self._units * self.temperature * self.beta(epoch, batch) / self.num_examples
        for owner in {id(posterior.owner): posterior.owner for posterior in require_posteriors(self.model)}.values():
            owner.kl_weight = kl_weight
            owner.free_bits = self.free_bits

    def on_epoch_end(self, epoch, logs=None):
        self._steps = self._steps or self._last_batch + 1
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
