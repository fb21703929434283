"""Callbacks: the weight of the KL in the loss, and sparsity in the logs."""

import contextlib
import importlib.util
import math
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras
import numpy as np

from keras_vdrop.checks import check_finite, check_non_negative, check_positive
from keras_vdrop.diagnosis import Record, learning_kl
from keras_vdrop.functional.tensors import to_numpy
from keras_vdrop.layers.stochastic import set_weighted_by_callback
from keras_vdrop.objective import (
    Output,
    compiled_loss_weights,
    likelihood_factor,
    outputs_of,
    require_loss,
    without_likelihood,
)
from keras_vdrop.observation import Observer
from keras_vdrop.outputs import check_outputs
from keras_vdrop.posterior import (
    owners,
    posteriors,
    prunable_weights,
    require_posteriors,
    require_prunable_weights,
)
from keras_vdrop.pruning import Sparsity, row_name, sparsity
from keras_vdrop.warning import warn

# The KL's share of its full weight after a fraction p of the warm-up.
SCHEDULES = {
    "linear": lambda p: p,
    "cubic": lambda p: p**3,
    "cosine": lambda p: 0.5 * (1.0 - math.cos(math.pi * p)),
}


class ELBO(keras.callbacks.Callback):
    """Make `fit` minimise the negative ELBO: c·(mean NLL of an example + temperature·β·KL / num_examples).

    c is the factor between the NLL of an example and Keras's loss: 1 / L for a loss that is a mean over the L labels of
    an example (pixels, steps, the numbers of a vector) and 1 for the losses of `keras_vdrop.losses`, times the
    `loss_weights`. `ELBO` derives c from the model's outputs and loss.

    β is 0 up to `start_epoch`, rises to 1 over `warmup_epochs` and stays there. A network that starts with the full KL
    gives up weights before it has learned which ones it needs. By default β is 0 for a tenth of the epochs of `fit` and
    rises over the next three tenths, both rounded down, so that a single epoch has the full KL. β depends only on the
    number of the epoch (and batch): a `fit` resumed with `initial_epoch` continues the schedule, and so does the next
    `fit` of the same model with the same callback, unless its weights have been set back to the initial ones.

    Validation within `fit` uses the full weight of the KL, β = 1. So `val_loss`, which Keras's callbacks monitor, does
    not depend on β, and its lowest value is that of the best model. The callback adds to the logs of every epoch:
        `kl`: Σ KL(posterior ‖ prior) at the end of the epoch, in nats, unweighted; frozen posteriors do not count.
        `beta`: β at the end of the epoch.
        `nll`, `val_nll`: the data part of the loss, averaged over the steps of the epoch: the value of `compile`'s
            loss, with sample and class weights. It contains neither the KL, nor Keras's weight and activity
            regularizers, nor what layers add by `add_loss` (except in a model compiled without a loss).
        `elbo_loss`, `val_elbo_loss`: the loss with the KL at its full weight. Everything in the loss is in it: without
            regularizers it is c times the negative ELBO, and a Keras regularizer counts as a further prior.
    A user's metric of the same name takes precedence. `nll` and `elbo_loss` are computed in `compute_loss`: they are
    missing if a custom `train_step` does not call it, or does not return the results of `self.metrics`.

    The log variances, and the parameters that a prior learns, are excluded from the optimizer's `weight_decay`, which
    would pull the log variances to 0. The means still decay, which acts as a second prior beside the KL's.

    Args:
        num_examples: Positive int, the number of training examples (not of batches or labels).
        warmup_epochs: Number of epochs over which β rises from 0 to 1; 0 for at once. None for three tenths of the
            epochs of `fit`, or for 0 if `start_epoch` is given.
        start_epoch: The epoch, counted from 0, at which β starts to rise. None for a tenth of the epochs of `fit`, or
            for 0 if `warmup_epochs` is given.
        schedule: How β rises: "linear", "cubic" (β = p³ after a fraction p of the time: late), "cosine" (smoothly at
            both ends); or a callable from the step to β ≥ 0, which replaces the two arguments above. The step is an int
            counted from 0: the epoch, or with `per="batch"` the batch since the beginning of training.
        per: "epoch" or "batch": how often β changes.
        temperature: Float ≥ 0, a constant factor of the KL, included in its full weight; 1 for the ELBO. Below 1 (a
            "cold" posterior) the data get more weight than they should, and more weights are kept.
        likelihood_scale: Float > 0, σ, if the loss is the mean squared error: the standard deviation of the data
            around the prediction, in the units of y. The loss is then 2σ² / L times the negative ELBO of
            N(prediction, σ²), up to a constant. Without it, the mean squared error corresponds to σ = √½. None for
            losses that are likelihoods, such as `losses.NormalNLL`.
        free_bits: Float ≥ 0, in nats per weight. For each weight tensor, the loss contains max(KL, free_bits·kept
            weights) instead of the KL, so a KL below free_bits·kept weights has no gradient.
        labels_per_example: Float > 0, L, the number of terms of an example over which the loss takes its mean. Needed
            if it cannot be derived: for masked outputs, sequences of unknown length (give their average), a custom loss
            or a custom `train_step`. None to derive it.

    Raises:
        ValueError: For a value out of range. In `fit`: for a model without variational weights; for an impossible
            `num_examples`; if c cannot be derived, or differs between the losses of several outputs; for a callable of
            the batch if `fit` resumes at a later epoch and the number of batches before it is unknown.

    Warns:
        RuntimeWarning: Each once: if it replaces a `kl_weight` that a layer was given; if a variational layer is called
            that does not belong to the model; if the loss is not a negative log likelihood; if the training step does
            not compute the KL; if `num_examples` does not fit the first epoch. At the end of `fit`, with figures: if
            the posterior has hardly moved, the KL dwarfs the NLL, a layer has lost all weights, BatchNormalization has
            seen the noise, β was never above 0, or training was stopped before β = 1. The first, second and fourth
            need 50 optimizer steps under one KL weight, or 200 if the `fit` has one epoch or the KL has halved; the
            third 5 epochs. Several `fit`s that continue one schedule count as one.
        UserWarning: At the beginning of `fit`, for mistakes with outputs whose loss is one of `losses`.

    Examples:
        >>> import keras, keras_vdrop as kv, numpy as np
        >>> x, y = np.ones((8, 3)), np.ones((8, 1))
        >>> model = keras.Sequential([keras.Input((3,)), kv.VariationalDense(1)])
        >>> model.compile("adam", "mse")
        >>> history = model.fit(x, y, callbacks=[kv.ELBO(num_examples=len(x))], verbose=0)
        >>> sorted(history.history)
        ['beta', 'elbo_loss', 'kl', 'loss', 'nll']

    Reference:
        Warm-up: Ladder Variational Autoencoders, Sønderby et al., 2016, https://arxiv.org/abs/1602.02282; free bits:
        Improved Variational Inference with Inverse Autoregressive Flow, Kingma et al., 2016,
        https://arxiv.org/abs/1606.04934; temperature: How Good is the Bayes Posterior in Deep Neural Networks Really?,
        Wenzel et al., 2020, https://arxiv.org/abs/2002.02405
    """

    def __init__(
        self,
        num_examples: int,
        warmup_epochs: int | None = None,
        start_epoch: int | None = None,
        schedule: Literal["linear", "cubic", "cosine"] | Callable[[int], float] = "linear",
        per: Literal["epoch", "batch"] = "epoch",
        temperature: float = 1.0,
        free_bits: float = 0.0,
        likelihood_scale: float | None = None,
        labels_per_example: float | None = None,
    ):
        super().__init__()
        check_finite("num_examples", num_examples)
        if num_examples < 1:
            raise ValueError(f"`num_examples` must be at least 1. Received: num_examples={num_examples!r}")
        for name, value in (("warmup_epochs", warmup_epochs), ("start_epoch", start_epoch)):
            if value is not None:
                check_non_negative(name, value)
        check_non_negative("temperature", temperature)
        check_non_negative("free_bits", free_bits)
        for name, value in (("likelihood_scale", likelihood_scale), ("labels_per_example", labels_per_example)):
            if value is not None:
                check_positive(name, value)
        if not callable(schedule) and schedule not in SCHEDULES:
            raise ValueError(
                f"`schedule` must be one of {sorted(SCHEDULES)} or a callable that takes the step. "
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
        self.labels_per_example = labels_per_example
        self._warned = set()

    # The schedule

    # Batches per epoch; None until Keras knows them, or the first epoch is over.
    _steps: int | None = None
    # Number of epochs from which the default warm-up is computed.
    _epochs: int | None = None
    # Number of epochs of the schedule before epoch 0 of this `fit`.
    _before = 0
    # Number of epochs of the schedule that are over.
    _next = 0
    # Weak reference to the model that was trained last.
    _fitted: Callable[[], keras.Model | None] = staticmethod(lambda: None)

    def beta(self, epoch: int, batch: int = 0) -> float:
        """Return β in an epoch (with `per="batch"`, at a batch of the epoch); 1 for the ELBO itself."""
        batch = batch if self.per == "batch" else 0
        if callable(self.schedule):
            return self.schedule(epoch if self.per == "epoch" else self._batches_before(epoch) + batch)
        start, warmup = self._warmup()
        elapsed = epoch + (batch / self._steps if self._steps else 0.0) - start
        if warmup == 0:
            return float(elapsed >= 0)
        return SCHEDULES[self.schedule](min(1.0, max(0.0, elapsed / warmup)))

    def _warmup(self) -> tuple[float, float]:
        """Return (start_epoch, warmup_epochs)."""
        if self.start_epoch is None and self.warmup_epochs is None:
            if self._epochs is None:
                raise ValueError(
                    "By default the warm-up is a share of the epochs of `fit`, which are known only within `fit`. Pass "
                    "`start_epoch` or `warmup_epochs`. Received: start_epoch=None, warmup_epochs=None"
                )
            return self._epochs // 10, 3 * self._epochs // 10
        return self.start_epoch or 0, self.warmup_epochs or 0

    def _batches_before(self, epoch: int) -> int:
        if epoch and not self._steps:
            raise ValueError(
                "The schedule counts batches, but the number of batches before this epoch is unknown. "
                f"Pass `steps_per_epoch` to `fit`. Received: initial_epoch={epoch}"
            )
        return epoch * self._steps if epoch else 0

    def _continue_schedule(self, epoch: int) -> None:
        """At the first epoch of a `fit`, continue the schedule if this callback has trained the model before.

        It starts again if the model has been set back to where it started, as between the folds of a cross-validation.
        """
        is_repeated = self._first_record is not None and self._first_record.is_repeated_by(self.model)
        if self._fitted() is not self.model or is_repeated:
            self._fitted, self._next, self._epochs = weakref.ref(self.model), 0, None
            self._record = self._first_record = None
        self._before = max(0, self._next - epoch)
        if self._epochs is None or not self._before:
            self._epochs = (self.params or {}).get("epochs")

    # The weight of the KL

    # c, the factor between the NLL of an example and the loss; None until it is known.
    _factor: float | None = None
    # The shapes of the outputs, without the batch, in the first batch of this `fit` that was seen.
    _shapes: list[tuple[int | None, ...]] | None = None
    # Whether that batch has changed c, which was known from another call or another `fit`.
    _corrected = False

    @property
    def _full_weight(self) -> float:
        return self._factor * self.temperature / self.num_examples

    def _set(self, beta: float) -> None:
        """Set the KL weight of every layer; 0 while c is unknown.

        Always get the model from `self.model`: on JAX, that property makes the trainer notice assignments.
        """
        self._beta = beta
        kl_weight = 0.0 if self._factor is None else self._full_weight * beta
        for owner in owners(posteriors(self.model)):
            owner.kl_weight = kl_weight
            owner.full_kl_weight = None if self._factor is None else self._full_weight
            owner.free_bits = self.free_bits

    def _find_factor(self, outputs: Sequence[Output] | None) -> float | None:
        """Return c for the outputs of the model, as `outputs_of` gives them; None if they are not known yet."""
        if self.labels_per_example is not None:
            scale = self.likelihood_scale
            return (1.0 if scale is None else 2.0 * scale**2) / self.labels_per_example
        if outputs is None:
            return None
        return likelihood_factor(outputs, self.model.loss, self._loss_weights, self.likelihood_scale)

    def _finish_setup(self) -> None:
        """Finish the setup of a model that its first step builds. That step calls this method while it is traced.

        Raises:
            ValueError: If a later batch has another c.
        """
        if not self._pending:
            self._check_factor()
            return
        self._factor = self._find_factor(self._observer.outputs)
        self._check_factor()
        if keras.backend.backend() != "jax":  # on JAX, the step already holds its weights; they are set after the batch
            with _eagerly():
                self._start()

    def _check_factor(self) -> None:
        """Correct c by the first batch of this `fit`, and raise if a later one has another c.

        Before the first batch, c comes from the call that built the model or from the `fit` before, which may have had
        longer or shorter sequences.
        """
        outputs = self._observer.outputs
        if outputs is None:
            return
        shapes = [output.shape[1:] for output in outputs]
        if shapes == self._shapes:
            return
        is_first, self._shapes = self._shapes is None, self._shapes or shapes
        try:
            factor = self._find_factor(outputs)
        except ValueError:
            self._observer.traces_each_fit = True  # one function for several lengths does not know the length
            raise
        if self._factor is None or math.isclose(factor, self._factor, rel_tol=1e-6):
            return
        self._observer.traces_each_fit = True
        if is_first:
            self._factor, self._corrected = factor, True
            if keras.backend.backend() != "jax":  # there, the weights are set after the batch
                with _eagerly():
                    self._apply()
        else:
            raise ValueError(
                "`ELBO` cannot determine the weight of the KL: the batches differ in the number of labels per example. "
                "Pass the average of this number over the examples as `labels_per_example`, or use a loss of "
                f"`keras_vdrop.losses`. Received: outputs of shapes {shapes} after {self._shapes}, without the batch"
            )

    def _start(self) -> None:
        """Do everything that needs the model's weights before the first step."""
        _exclude_from_weight_decay(self.model)
        self._warn_of_own_weights()
        self._apply()
        self._pending = self._factor is None

    def _apply(self) -> None:
        """Set the KL weights, and the full one for the logs."""
        self._set(self._beta)
        if self._observer.terms is not None and self._factor is not None:
            self._observer.terms.full_weight.assign(self._full_weight)

    def _warn_of_own_weights(self) -> None:
        if self._factor is None:
            return
        for layer in owners(posteriors(self.model)):
            own = layer._initial_kl_weight
            if own is not None and not math.isclose(own, self._full_weight, rel_tol=1e-6):
                self._warn_once(
                    "own weight",
                    f"`ELBO` sets the KL weight {self._full_weight:.3g} in place of the {own:.3g} that was passed to "
                    f"the layer {layer.name!r}. Do not pass `kl_weight` to layers if you use `ELBO`. To scale the KL, "
                    "pass `temperature` to `ELBO`.",
                )

    def _warn_of_the_loss(self) -> None:
        names = without_likelihood(self.model.loss)
        if names:
            self._warn_once(
                "loss",
                f"{names[0]} is not the negative log likelihood of a distribution, so the loss with the KL is not an "
                "ELBO, and how certain the posterior becomes is arbitrary. Use a cross-entropy, the mean squared error "
                "or a loss of `keras_vdrop.losses`.",
            )

    def _warn_once(self, what: str, message: str) -> None:
        """Warn once for each kind of message."""
        if what not in self._warned:
            self._warned.add(what)
            warn(message, RuntimeWarning)

    # The hooks that Keras calls

    _training = False
    # The record at the start of the schedule.
    _first_record = None
    # The course of the training, over all `fit`s of one model that continue one schedule.
    _record: Record | None = None

    def set_model(self, model: keras.Model) -> None:
        if _is_built(model):
            require_posteriors(model)
        super().set_model(model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._steps = (self.params or {}).get("steps")
        if self._steps and self.num_examples < self._steps:
            raise ValueError(
                "`num_examples` must be at least the number of steps of an epoch. Pass the number of training "
                "examples, not of batches: `num_examples=len(x)`. If an epoch repeats examples, pass "
                "`steps_per_epoch=num_examples // batch_size` to `fit`. "
                f"Received: num_examples={self.num_examples} for {self._steps} steps"
            )
        self._training, self._first_epoch, self._first_batch = True, True, True
        self._seen = None
        self._fitted_epochs = 0
        self._batches_a_step = _batches_a_step(self.model.optimizer)
        if self.labels_per_example is None:
            require_loss(self.model)
            self._loss_weights = compiled_loss_weights(self.model)
        self._warn_of_the_loss()
        self._observer = Observer.of(self.model)
        is_given = self.labels_per_example is not None
        self._observer.reads_outputs = not is_given
        if self._observer.traces_each_fit and not is_given:
            self._observer.retrace()
        self._factor = self._find_factor(None if is_given else _symbolic_outputs(self.model) or self._observer.outputs)
        self._shapes, self._corrected = None, False
        self._observer.attach()
        self._observer.on_outputs = self._finish_setup
        self._observer.observe("train_function")
        self._pending = True
        self._beta = 0.0
        self._checked = _is_built(self.model)
        if self._checked:
            check_outputs(self.model)
        set_weighted_by_callback(not self._checked)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._first_epoch:
            self._continue_schedule(epoch)
        self._epoch = self._before + epoch
        self._beta = self.beta(self._epoch)
        if self._pending and _is_built(self.model):
            self._start()
            _build_optimizer(self.model)
        self._set(self._beta)
        self._last_batch = -1
        if self._first_epoch:
            self._first_epoch = False
            self._begin_record()

    def _begin_record(self) -> None:
        """Start a record, unless this `fit` continues another; if the first batch builds the model, start it later."""
        if self._record is not None and self._record.is_continued_by(self.model):
            return
        if _is_built(self.model):
            self._new_record()
        else:
            self._record = None

    def _new_record(self) -> None:
        self._record = Record(self.model)
        self._first_record = self._first_record or self._record

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self.per == "batch":
            self._set(self.beta(self._epoch, batch))

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self._steps:  # with `steps_per_execution`, Keras counts the last call as a full one
            batch = min(batch, self._steps - 1)
        batches, self._last_batch = batch - self._last_batch, batch
        if self._first_batch:
            self._first_batch = False
            self._after_first_batch(batch + 1)
        if self._record.step(self._beta, batches / self._batches_a_step):
            _ = self.model  # on JAX, this brings the variables up to date
            self._record.look()

    def _after_first_batch(self, steps: int) -> None:
        require_posteriors(self.model)
        if not self._checked:
            check_outputs(self.model)
        if self._factor is None:
            raise ValueError(
                "`ELBO` cannot determine the weight of the KL for a model whose outputs are unknown and whose "
                "`train_step` does not call `compute_loss`. Pass `labels_per_example` to `ELBO`: the number of terms "
                "of an example over which the loss is a mean. Received: labels_per_example=None"
            )
        if self._pending:
            self._start()
        elif self._corrected:
            self._apply()
        if self._record is None:
            self._new_record()
        examples = self._observer.examples_seen(steps)
        batch_size = self._batch_size = 0 if examples is None else examples / steps
        if batch_size > self.num_examples or (self.num_examples == self._steps and batch_size > 1):
            raise ValueError(
                "`num_examples` must be the number of training examples, not of batches. Pass `num_examples=len(x)`. "
                f"Received: num_examples={self.num_examples} for {self._steps or 'an unknown number of'} batches of "
                f"{batch_size:g} examples"
            )

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self._training:
            self._note_examples()
            self._scheduled = self._beta
            self._set(1.0)
            self._observer.observe("test_function")

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._training:
            self._observer.restore("test_function")
            self._set(self._scheduled)

    def _note_examples(self) -> None:
        """Warn if `num_examples` does not fit the number of examples in the first epoch."""
        if self._seen is not None:
            return
        self._seen = self._observer.examples_seen() or 0
        # With a likelihood scale, c does not depend on the labels alone.
        labels = 1.0 if self.likelihood_scale else 1.0 / self._factor
        if self._seen > self.num_examples:
            self._warn_once(
                "examples",
                f"An epoch has seen {self._seen:.0f} examples, more than num_examples={self.num_examples}. "
                "Pass the number of training examples: `num_examples=len(x)`. Ignore this warning if an epoch repeats "
                "examples.",
            )
        elif labels > 1.5 and self._seen and math.isclose(self.num_examples, self._seen * labels, rel_tol=1e-6):
            self._warn_once(
                "labels",
                f"num_examples={self.num_examples} is the number of labels: there are {self._seen:.0f} examples of "
                f"{labels:.0f} labels each. Pass the number of examples: `num_examples=len(x)`. `ELBO` accounts for "
                "the labels itself.",
            )
        elif self._seen and self._seen + self._batch_size <= self.num_examples:
            self._warn_once(
                "examples",
                f"An epoch has seen {self._seen:.0f} examples, fewer than num_examples={self.num_examples}. "
                "Pass the number of training examples, without those that `validation_split` holds back. Ignore this "
                "warning if `steps_per_epoch` ends an epoch early.",
            )

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._steps = self._steps or self._last_batch + 1
        self._next = self._before + epoch + 1
        self._fitted_epochs += 1
        self._note_examples()
        if logs is None:
            return
        kl = learning_kl(self.model)
        logs.setdefault("kl", kl)
        logs.setdefault("beta", self._beta)
        nll = logs.get("nll")
        self._record.add(None if nll is None else nll / (self._factor or 1.0), kl)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._training = False
        self._observer.restore("train_function")
        self._observer.on_outputs = None
        if self._record is None or not self._record.betas or self.temperature == 0:
            return
        model = self.model
        self._record.end()
        said = self._record.warnings(model, self.num_examples, self.temperature, self._fitted_epochs == 1)
        for what, message in said.items():
            self._warn_once(what, message)
        self._warn_of_the_end()

    def _warn_of_the_end(self) -> None:
        """Warn if the KL was never in the loss, or if training was stopped before β = 1."""
        beta = self._record.betas[-1]
        stopped = self.model.stop_training and beta < 1 and not callable(self.schedule)
        if not (stopped or self._record.without_kl):
            return
        if callable(self.schedule):
            way_out = "Use a `schedule` that reaches 1."
        else:
            end = sum(self._warmup())
            way_out = (
                f"The warm-up ends at epoch {end}. Train for more epochs than that in one `fit`, and pass "
                f"`start_from_epoch={end}` to `EarlyStopping`. Or continue with `initial_epoch={self._next}` or the "
                "same `ELBO`. Or pass `start_epoch=0, warmup_epochs=0` to `ELBO`."
            )
        self._warn_once("beta", f"Training has ended with β = {beta:.2g}: the KL was not fully in the loss. {way_out}")


def _exclude_from_weight_decay(model: keras.Model) -> None:
    """Exclude the variables of posteriors, except for the means, from the optimizer's weight decay.

    Raises:
        ValueError: If the optimizer does not allow it, as Keras's do not once they are built.
    """
    for optimizer in _optimizers(model.optimizer):
        if any(getattr(optimizer, name, None) for name in ("weight_decay", "adam_weight_decay")):
            _exclude_from(optimizer, model)


def _exclude_from(optimizer: Any, model: keras.Model) -> None:
    own = [
        v for posterior in posteriors(model) for v in posterior.variables if v is not getattr(posterior, "loc", None)
    ]
    # Keras has no public way to ask what the user has excluded, and a second call replaces the first.
    decays = optimizer._use_weight_decay
    decayed = [variable for variable in own if variable.trainable and decays(variable)]
    if not decayed:
        return
    try:
        excluded = [variable for variable in model.trainable_variables if not decays(variable)]
        optimizer.exclude_from_weight_decay(var_list=[*excluded, *decayed])
    except ValueError as error:
        names = sorted({variable.name for variable in decayed})
        raise ValueError(
            "Weight decay must not pull log variances to 0, which is a standard deviation of 1. Before the first "
            f"step, call `optimizer.exclude_from_weight_decay(var_names={names})`. Received: "
            f"weight_decay={optimizer.weight_decay!r}"
        ) from error


def _batches_a_step(optimizer: Any) -> int:
    """Return the number of batches over which an optimizer accumulates gradients before a step."""
    return max(getattr(each, "gradient_accumulation_steps", None) or 1 for each in _optimizers(optimizer))


def _optimizers(optimizer: Any) -> list[Any]:
    """Return the optimizers that change the weights: those within a `LossScaleOptimizer` or `MultiOptimizer`."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return getattr(optimizer, "optimizers", [optimizer])


def _build_optimizer(model: keras.Model) -> None:
    """Create the variables of the optimizer, so that TensorFlow does not trace the training step a second time."""
    if keras.backend.backend() == "tensorflow" and model.optimizer is not None and not model.optimizer.built:
        with model.distribute_strategy.scope():
            model.optimizer.build(model.trainable_variables)


def _is_built(model: keras.Model) -> bool:
    return model.built and bool(model.weights)


def _symbolic_outputs(model: Any) -> list[Output] | None:
    """Return the `Output`s of a model that has not been called yet; None if they are not known."""
    try:
        # A `Sequential` that was built by a call has no `output`, but it has `outputs`.
        tensors = model.outputs[0] if isinstance(model, keras.Sequential) else model.output
    except (AttributeError, ValueError):
        return None
    return outputs_of(tensors, getattr(model, "output_names", None))


def _eagerly() -> contextlib.AbstractContextManager[Any]:
    """Return a scope in which assignments run at once, even while TensorFlow traces a graph."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


class SparsityLogger(keras.callbacks.Callback):
    """Add `weights_left`, the fraction of the weights that pruning would keep, to the logs of every epoch.

    With `log_dir`, it also writes for TensorBoard, with the epoch as the step: the scalar `weights_left`, the scalar
    `weights_left/<layer>` for each layer, and the histogram `log_alpha/<layer>/<weight>` of each prunable weight,
    without the weights that are pruned already.

    Args:
        threshold: As for `sparsity`.
        log_dir: Folder for TensorBoard's event files, or None. It requires the package `tensorboard`.

    Raises:
        ImportError: If `log_dir` is given and `tensorboard` is not installed.

    Examples:
        >>> import keras, keras_vdrop as kv, numpy as np
        >>> layer = kv.VariationalDense(1, kernel_initializer="ones", kl_weight=1 / 8)
        >>> model = keras.Sequential([keras.Input((3,)), layer])
        >>> model.compile("adam", "mse")
        >>> history = model.fit(np.ones((8, 3)), np.ones((8, 1)), callbacks=[kv.SparsityLogger()], verbose=0)
        >>> history.history["weights_left"]
        [1.0]
    """

    def __init__(self, threshold: float | None = None, log_dir: str | os.PathLike | None = None):
        super().__init__()
        if log_dir is not None and importlib.util.find_spec("tensorboard") is None:
            raise ImportError("`log_dir` requires TensorBoard: pip install tensorboard")
        self.threshold = threshold
        self.log_dir = log_dir
        self._writer = None

    def set_model(self, model: keras.Model) -> None:
        if _is_built(model):  # raise the errors now, not after an epoch
            require_prunable_weights(model)
            sparsity(model, self.threshold)
        super().set_model(model)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if logs is not None:
            require_prunable_weights(self.model)
            report = sparsity(self.model, self.threshold)
            logs["weights_left"] = report.left / report.weights
            if self.log_dir is not None:
                self._write(os.fspath(self.log_dir), epoch, report)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, log_dir: str, epoch: int, report: Sparsity) -> None:
        """Write the state after an epoch for TensorBoard."""
        import tensorflow as tf

        if self._writer is None:
            self._writer = tf.summary.create_file_writer(log_dir)
        with self._writer.as_default(step=epoch):
            tf.summary.scalar("weights_left", report.left / report.weights)
            for row in report.layers:
                tf.summary.scalar(f"weights_left/{row.name}", row.left / row.weights)
            for weight in prunable_weights(self.model):
                log_alpha, mask = (to_numpy(each) for each in (weight.log_alpha(), weight.mask))
                log_alpha = np.broadcast_to(log_alpha, weight.shape)[mask]
                tf.summary.histogram(f"log_alpha/{row_name(self.model, weight)}/{weight.name}", log_alpha)
        self._writer.flush()
