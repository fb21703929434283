"""Callbacks: the weight of the KL in the loss, and sparsity in the logs."""

import contextlib
import math
import warnings
import weakref

import keras

from keras_vdrop.diagnosis import Record
from keras_vdrop.layers.base import check_finite, weighed_by_callback
from keras_vdrop.losses import check_outputs
from keras_vdrop.objective import compiled_loss_weights, likelihood_factor, outputs_of, require_loss
from keras_vdrop.observation import Observer
from keras_vdrop.posterior import learning_posteriors, posteriors, require_posteriors
from keras_vdrop.pruning import sparsity

# What fraction of its full weight the KL has when a fraction p of the warm-up is over.
SCHEDULES = {
    "linear": lambda p: p,
    "cubic": lambda p: p**3,
    "cosine": lambda p: 0.5 * (1.0 - math.cos(math.pi * p)),
}


class ELBO(keras.callbacks.Callback):
    """Make `fit` minimise the negative ELBO: c·(mean NLL of an example + temperature·β·KL / num_examples).

    c is what Keras's loss makes of the NLL of an example: 1 / L, where it is a mean over the L labels that an example
    has (pixels, steps, the numbers of a vector) and 1 for the losses of `keras_vdrop.losses`, times the `loss_weights`.
    It is found from the model's outputs and its loss.

    β is 0 up to `start_epoch`, rises over `warmup_epochs` and stays 1. A network that starts with the full KL gives up
    weights before it has learned which ones it needs. By default β is 0 for a tenth of the epochs of `fit` and rises
    for another three tenths, both rounded down, so that a single epoch has the full KL. β depends on nothing but the
    number of the epoch (and batch): a `fit` resumed with `initial_epoch` goes on where the schedule was, and so does
    the next `fit` of the same model with the same callback.

    Validation within `fit` takes the KL at its full weight, β = 1: `val_loss`, which Keras's callbacks monitor, does
    not depend on β, and the lowest one is that of the best model. Adds to the logs of every epoch
        `kl`: Σ KL(posterior ‖ prior) at the end of the epoch, in nats, not weighted.
        `nll`, `val_nll`: the data's part of the loss, as it was at every step: what `compile`'s loss makes of it, with
            the weights of examples and classes. The KL is not in it, nor Keras's regularizers of weights and
            activities, nor what layers add by `add_loss` (unless there is no other loss).
        `elbo_loss`, `val_elbo_loss`: the loss with the KL at its full weight. All that is in the loss is in it too:
            without regularizers it is c times the negative ELBO, and one of Keras's counts as a further prior.
    A metric of the user's that has one of these names keeps it. `nll` and `elbo_loss` need `compute_loss`: a
    `train_step` that does not call it, or does not return the results of `self.metrics`, does without.

    The log variances, and what a prior learns, are excluded from the optimizer's `weight_decay`: it would pull the
    log variances to 0. It still decays the means, as a second prior beside the KL's.

    Args:
        num_examples: Positive int, the number of training examples (not batches, nor labels).
        warmup_epochs: Over how many epochs β rises from 0 to 1; 0 for at once; None for three tenths of those of `fit`,
            or 0 where `start_epoch` is given.
        start_epoch: The epoch, counted from 0, at which it starts to rise; None for a tenth of those of `fit`, or 0
            where `warmup_epochs` is given.
        schedule: How it rises: "linear", "cubic" (p³ of the way at p of the time: late), "cosine" (softly at both
            ends); or a callable from the step to β ≥ 0, in place of the two above. The step is an int that counts
            from 0: the epoch, or with `per="batch"` the batch since the beginning of training.
        per: "epoch" or "batch": how often β changes.
        temperature: Float ≥ 0, a constant factor of the KL; 1 for the ELBO. Below 1 (a "cold" posterior) data count
            for more than they are, and more weights stay. The full weight of the KL has it.
        likelihood_scale: Float > 0, σ, where the loss is the mean squared error: the standard deviation of the data
            around the prediction, in the units of y. The loss is then 2σ² / L times the negative ELBO of
            N(prediction, σ²), less a constant. Without it, a mean squared error is that of σ = √½. None for losses that
            are likelihoods, such as `losses.NormalNLL`.
        free_bits: Float ≥ 0, in nats for each weight: the KL of a weight tensor that costs nothing, on average over its
            weights: max(KL, free_bits·weights) takes its place. Its gradient is 0 below.
        labels_per_example: Float > 0, L, over how many terms of an example the loss takes its mean, where it cannot be
            known: masked outputs, sequences of unknown length (their average), a loss or `train_step` of one's own.
            None to find it.

    Raises:
        ValueError: For a value that is out of range. In `fit`: for a model without variational weights; for
            `num_examples` that cannot be right; where c cannot be known, or the losses of several outputs have
            different ones; for a callable of the batch that resumes at an epoch of which Keras does not know how many
            batches came before.

    Warns:
        Each once. Where it sets a `kl_weight` other than the one a layer was given, and at the end of `fit`, with
        figures, where the posterior has hardly moved, the KL dwarfs the NLL, a layer has lost all weights, or β was
        never above 0. What it says of the posterior takes 50 steps of the optimizer under one weight of the KL, 200
        where a `fit` has one epoch; several `fit`s that go on with one schedule are one training. Where a variational
        layer is called that is none of the model's. At the beginning of `fit`, what `losses.check_outputs` says of the
        outputs of a loss of `losses`.

    Example:
        >>> import keras, keras_vdrop as kv, numpy as np
        >>> x, y = np.ones((8, 3)), np.ones((8, 1))
        >>> model = keras.Sequential([keras.Input((3,)), kv.VariationalDense(1)])
        >>> model.compile("adam", "mse")
        >>> history = model.fit(x, y, callbacks=[kv.ELBO(num_examples=len(x))], verbose=0)
        >>> sorted(history.history)
        ['elbo_loss', 'kl', 'loss', 'nll']

    Reference:
        Warm-up: Ladder Variational Autoencoders, Sønderby et al., 2016, https://arxiv.org/abs/1602.02282; free bits:
        Improved Variational Inference with Inverse Autoregressive Flow, Kingma et al., 2016,
        https://arxiv.org/abs/1606.04934; temperature: How Good is the Bayes Posterior in Deep Neural Networks Really?,
        Wenzel et al., 2020, https://arxiv.org/abs/2002.02405
    """

    def __init__(
        self,
        num_examples,
        warmup_epochs=None,
        start_epoch=None,
        schedule="linear",
        per="epoch",
        temperature=1.0,
        free_bits=0.0,
        likelihood_scale=None,
        labels_per_example=None,
    ):
        super().__init__()
        for name, value, least in (
            ("num_examples", num_examples, 1),
            ("warmup_epochs", warmup_epochs, 0),
            ("start_epoch", start_epoch, 0),
            ("temperature", temperature, 0),
            ("free_bits", free_bits, 0),
        ):
            if value is None and name in ("warmup_epochs", "start_epoch"):
                continue
            check_finite(name, value)
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}. Received: {name}={value!r}")
        for name, value in (("likelihood_scale", likelihood_scale), ("labels_per_example", labels_per_example)):
            if value is not None:
                check_finite(name, value)
                if value <= 0:
                    raise ValueError(f"`{name}` must be above 0. Received: {name}={value!r}")
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
        self.labels_per_example = labels_per_example
        self._told = set()

    # The schedule

    # How many batches an epoch has: None as long as neither Keras nor an epoch that is over has told.
    _steps = None
    # Of how many epochs the warm-up takes its part, how many came before epoch 0 of this `fit`, and which is the next.
    _epochs = None
    _before = 0
    _next = 0
    _fitted = staticmethod(lambda: None)

    def beta(self, epoch, batch=0):
        """The factor of the KL in that epoch (with `per="batch"`, at that batch of it), 1 for the ELBO itself."""
        batch = batch if self.per == "batch" else 0
        if callable(self.schedule):
            return self.schedule(epoch if self.per == "epoch" else self._batches_before(epoch) + batch)
        start, warmup = self._warmup()
        elapsed = epoch + (batch / self._steps if self._steps else 0.0) - start
        if warmup == 0:
            return float(elapsed >= 0)
        return SCHEDULES[self.schedule](min(1.0, max(0.0, elapsed / warmup)))

    def _warmup(self):
        """(start_epoch, warmup_epochs)."""
        if self.start_epoch is None and self.warmup_epochs is None:
            if self._epochs is None:
                raise ValueError(
                    "The warm-up is a part of the epochs of `fit`, which are known there only. Received: "
                    "start_epoch=None, warmup_epochs=None; give one of them."
                )
            return self._epochs // 10, 3 * self._epochs // 10
        return self.start_epoch or 0, self.warmup_epochs or 0

    def _batches_before(self, epoch):
        if epoch and not self._steps:
            raise ValueError(
                "How many batches came before this epoch is not known, so a schedule of batches cannot go on. "
                f"Received: initial_epoch={epoch}; pass `steps_per_epoch` to `fit`."
            )
        return epoch * self._steps if epoch else 0

    def _go_on_from(self, epoch):
        """At the first epoch of a `fit`: go on with the schedule, where this callback has trained the model before."""
        if self._fitted() is not self.model:
            self._fitted, self._next, self._epochs, self._record = weakref.ref(self.model), 0, None, None
        self._before = max(0, self._next - epoch)
        if self._epochs is None or not self._before:
            self._epochs = (self.params or {}).get("epochs")

    # The weight of the KL

    # What the loss makes of the NLL of an example, as soon as it is known.
    _factor = None

    @property
    def _full_weight(self):
        return self._factor * self.temperature / self.num_examples

    def _set(self, beta):
        """Give every layer its KL weight, and none as long as its scale is not known.

        By way of `self.model`, always: that is what makes the JAX trainer take note of what is assigned.
        """
        self._beta = beta
        kl_weight = 0.0 if self._factor is None else self._full_weight * beta
        for owner in _owners(self.model):
            owner.kl_weight = kl_weight
            owner.free_bits = self.free_bits

    def _find_factor(self, outputs):
        """From the outputs of the model, as `outputs_of` gives them; None where they are not known yet."""
        if self.labels_per_example is not None:
            scale = self.likelihood_scale
            return (1.0 if scale is None else 2.0 * scale**2) / self.labels_per_example
        if outputs is None:
            return None
        return likelihood_factor(outputs, self.model.loss, self._loss_weights, self.likelihood_scale)

    def _see(self):
        """What a step does as it is traced: all that is still to be done for a model that was not built before."""
        if not self._pending:
            return
        self._factor = self._find_factor(self._observer.outputs)
        if keras.backend.backend() != "jax":  # whose step has its weights by now: `on_train_batch_end` sets them
            with _eagerly():
                self._start()

    def _start(self):
        """All that needs the model's weights, before the first step."""
        _exclude_from_weight_decay(self.model)
        self._warn_of_own_weights()
        self._set(self._beta)
        if self._observer.terms is not None and self._factor is not None:
            self._observer.terms.full_weight.assign(self._full_weight)
        self._pending = self._factor is None

    def _warn_of_own_weights(self):
        if self._factor is None:
            return
        for layer in _owners(self.model):
            own = layer.get_config().get("kl_weight")
            if own is not None and not math.isclose(own, self._full_weight, rel_tol=1e-6):
                self._tell(
                    "own weight",
                    f"`ELBO` sets the KL weight {self._full_weight:.3g} in place of the {own:.3g} that the layer "
                    f"{layer.name!r} was given. Leave `kl_weight` out where `ELBO` sets it; a factor of the KL is its "
                    "`temperature`.",
                )

    def _tell(self, what, message):
        """Warn, once for each kind of message."""
        if what not in self._told:
            self._told.add(what)
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    # What Keras calls

    _training = False
    # The course of the training, over all `fit`s of one model whose schedule goes on.
    _record = None

    def set_model(self, model):
        if _is_built(model):
            require_posteriors(model)
        super().set_model(model)

    def on_train_begin(self, logs=None):
        self._steps = (self.params or {}).get("steps")
        if self._steps and self.num_examples < self._steps:
            raise ValueError(
                f"There cannot be fewer training examples than steps of an epoch. Received: "
                f"num_examples={self.num_examples} for {self._steps} steps; pass the number of examples, not of "
                "batches: `num_examples=len(x)`. Where an epoch sees the same examples again, give `fit` "
                "`steps_per_epoch=num_examples // batch_size`."
            )
        self._training, self._first_epoch, self._first_batch = True, True, True
        self._seen = None
        self._fitted_epochs = 0
        self._batches_a_step = _batches_a_step(self.model.optimizer)
        if self.labels_per_example is None:
            require_loss(self.model)
            self._loss_weights = compiled_loss_weights(self.model)
        self._observer = Observer.of(self.model)
        self._factor = self._find_factor(_symbolic_outputs(self.model) or self._observer.outputs)
        self._observer.attach()
        self._observer.on_outputs = self._see
        self._observer.observe("train_function")
        self._pending = True
        self._beta = 0.0
        self._checked = _is_built(self.model)
        if self._checked:
            check_outputs(self.model)
        weighed_by_callback(not self._checked)

    def on_epoch_begin(self, epoch, logs=None):
        if self._first_epoch:
            self._go_on_from(epoch)
        self._epoch = self._before + epoch
        self._beta = self.beta(self._epoch)
        if self._pending and _is_built(self.model):
            self._start()
        self._set(self._beta)
        self._last_batch = -1
        if self._first_epoch:
            self._first_epoch = False
            self._begin_record()

    def _begin_record(self):
        """Unless this goes on with another `fit`; a model that its first batch builds has nothing to look at yet."""
        if self._record is not None and self._record.goes_on(self.model):
            return
        self._record = Record(self.model) if _is_built(self.model) else None

    def on_train_batch_begin(self, batch, logs=None):
        if self.per == "batch":
            self._set(self.beta(self._epoch, batch))

    def on_train_batch_end(self, batch, logs=None):
        if self._steps:  # with `steps_per_execution`, Keras counts those that the last call could have had
            batch = min(batch, self._steps - 1)
        batches, self._last_batch = batch - self._last_batch, batch
        if self._first_batch:
            self._first_batch = False
            self._after_first_batch(batch + 1)
        if self._record.step(self._beta, batches / self._batches_a_step):
            _ = self.model  # has JAX bring its variables up to date
            self._record.look()

    def _after_first_batch(self, steps):
        weighed_by_callback(False)
        require_posteriors(self.model)
        if not self._checked:
            check_outputs(self.model)
        if self._factor is None:
            raise ValueError(
                "The KL cannot be weighed by itself for a model whose outputs are not known and whose `train_step` "
                "does not call `compute_loss`. Pass `labels_per_example` to `ELBO`: the number of terms over which "
                "the loss takes its mean in an example. Received: labels_per_example=None"
            )
        if self._pending:
            self._start()
        if self._record is None:
            self._record = Record(self.model)
        examples = self._observer.examples_seen(steps)
        batch_size = self._batch_size = 0 if examples is None else examples / steps
        if batch_size > self.num_examples or (self.num_examples == self._steps and batch_size > 1):
            raise ValueError(
                f"`num_examples` must be the number of training examples. Received: num_examples={self.num_examples} "
                f"for {self._steps or 'an unknown number of'} batches of {batch_size:g}; pass the number of examples, "
                "not of batches: `num_examples=len(x)`."
            )

    def on_test_begin(self, logs=None):
        if self._training:
            self._note_examples()
            self._scheduled = self._beta
            self._set(1.0)
            self._observer.observe("test_function")

    def on_test_end(self, logs=None):
        if self._training:
            self._observer.restore("test_function")
            self._set(self._scheduled)

    def _note_examples(self):
        """Compare `num_examples` with what the first epoch has seen."""
        if self._seen is not None:
            return
        self._seen = self._observer.examples_seen() or 0
        # With a likelihood scale the factor is not one of labels alone.
        labels = 1.0 if self.likelihood_scale else 1.0 / self._factor
        if self._seen > self.num_examples:
            self._tell(
                "examples",
                f"An epoch has seen {self._seen:.0f} examples, more than there are: num_examples={self.num_examples}. "
                "Pass the number of training examples: `num_examples=len(x)`. Where an epoch sees the same examples "
                "again, all is well.",
            )
        elif labels > 1.5 and self._seen and math.isclose(self.num_examples, self._seen * labels, rel_tol=1e-6):
            self._tell(
                "labels",
                f"num_examples={self.num_examples} is the number of labels: {self._seen:.0f} examples of "
                f"{labels:.0f}. `ELBO` weighs the KL for the labels of an example by itself: pass "
                "`num_examples=len(x)`.",
            )
        elif self._seen and self._seen + self._batch_size <= self.num_examples:
            self._tell(
                "examples",
                f"An epoch has seen {self._seen:.0f} examples, fewer than there are: num_examples={self.num_examples}. "
                "Pass the number of examples to learn from, without those that `validation_split` holds back. Where "
                "`steps_per_epoch` ends an epoch early, all is well.",
            )

    def on_epoch_end(self, epoch, logs=None):
        self._steps = self._steps or self._last_batch + 1
        self._next = self._before + epoch + 1
        self._fitted_epochs += 1
        self._note_examples()
        if logs is None:
            return
        kl = float(sum(keras.ops.convert_to_numpy(each.kl()) for each in learning_posteriors(self.model)))
        logs.setdefault("kl", kl)
        nll = logs.get("nll")
        self._record.add(None if nll is None else nll / (self._factor or 1.0), kl)

    def on_train_end(self, logs=None):
        self._training = False
        self._observer.restore("train_function")
        self._observer.on_outputs = None
        if self._record is None or not self._record.betas or self.temperature == 0:
            return
        model = self.model
        self._record.end()
        said = self._record.complaints(model, self.num_examples, self.temperature, self._fitted_epochs == 1)
        for what, message in said.items():
            self._tell(what, message)
        self._warn_of_the_end()

    def _warn_of_the_end(self):
        """Where the KL was never in the loss, or something has stopped training before it was in full."""
        beta = self._record.betas[-1]
        stopped = self.model.stop_training and beta < 1 and not callable(self.schedule)
        if not (stopped or self._record.without_kl):
            return
        if callable(self.schedule):
            way_out = "See to a `schedule` that reaches 1."
        else:
            end = sum(self._warmup())
            way_out = (
                f"The warm-up ends at epoch {end}: let one `fit` have more epochs than that, with "
                f"`start_from_epoch={end}` in `EarlyStopping`; or go on by `initial_epoch={self._next}` or with the "
                "same `ELBO`; or pass `start_epoch=0, warmup_epochs=0`."
            )
        self._tell("beta", f"Training has ended with β = {beta:.2g}: the KL was not fully in the loss. {way_out}")


def _owners(model):
    """The layers that weigh a KL, once."""
    return list({id(posterior.owner): posterior.owner for posterior in posteriors(model)}.values())


def _exclude_from_weight_decay(model):
    """Take what a posterior is made of, but its mean, out of what the optimizer decays.

    Raises:
        ValueError: Where the optimizer does not let it.
    """
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if not getattr(optimizer, "weight_decay", None):
        return
    own = [
        v for posterior in posteriors(model) for v in posterior.variables if v is not getattr(posterior, "loc", None)
    ]
    # Keras has no public way to ask what a user has excluded, and forgets it when more is.
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
            "Weight decay must not pull log variances to 0, which is a standard deviation of 1. Write, before the "
            f"first step: `optimizer.exclude_from_weight_decay(var_names={names})`. Received: "
            f"weight_decay={optimizer.weight_decay!r}"
        ) from error


def _batches_a_step(optimizer):
    """Over how many batches an optimizer gathers gradients before it makes a step."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return getattr(optimizer, "gradient_accumulation_steps", None) or 1


def _is_built(model):
    return model.built and bool(model.weights)


def _symbolic_outputs(model):
    """What is known of a model's outputs before it is called; None where nothing is."""
    try:
        # A `Sequential` that was called has no `output`, but has one of these.
        tensors = model.outputs[0] if isinstance(model, keras.Sequential) else model.output
    except (AttributeError, ValueError):
        return None
    return outputs_of(tensors, getattr(model, "output_names", None))


def _eagerly():
    """A scope in which variables are assigned now, while TensorFlow traces a graph."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


class SparsityLogger(keras.callbacks.Callback):
    """Add `weights_left`, the fraction of the weights that a model still needs, to the logs of every epoch.

    Args:
        threshold: As for `sparsity`.
    """

    def __init__(self, threshold=None):
        super().__init__()
        self.threshold = threshold

    def set_model(self, model):
        if _is_built(model):
            sparsity(model, self.threshold)  # raises now what it would raise after an epoch
        super().set_model(model)

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            report = sparsity(self.model, self.threshold)
            logs["weights_left"] = report.left / report.weights
