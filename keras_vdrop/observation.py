"""What a training step's loss is made of: the data's part, and the KL before it is weighed.

Keras reports the loss of an epoch alone. The penalties in it change with every step, so their part can only be told
apart within the step. `LossTerms` is a metric that does so from `compute_loss`.
"""

import contextlib
import warnings

import keras
from keras import ops

from keras_vdrop.functional import tracing
from keras_vdrop.layers.base import kl_costs, watched
from keras_vdrop.objective import outputs_of
from keras_vdrop.posterior import posteriors


class LossTerms(keras.metrics.Metric):
    """Means over the examples of an epoch: the loss without any penalties, without the KL, and the KL, in nats.

    It belongs to the model's first metric, the one that Keras has of the loss, whose result it adds its own to.
    """

    def __init__(self):
        super().__init__(name="loss_terms", dtype="float32")
        self.examples, self.nll, self.rest, self.kl = (
            self.add_variable((), "zeros", name=name) for name in ("examples", "nll", "rest", "kl")
        )
        self.full_weight = self.add_variable((), "zeros", name="full_weight")

    def update_state(self, nll, rest, kl, examples):
        examples = ops.cast(examples, "float32")
        self.examples.assign_add(examples)
        for total, value in ((self.nll, nll), (self.rest, rest), (self.kl, kl)):
            total.assign_add(ops.cast(value, "float32") * examples)

    def result(self):
        means = (ops.divide_no_nan(total, self.examples) for total in (self.nll, self.rest, self.kl))
        nll, rest, kl = means
        return {"nll": nll, "elbo_loss": rest + self.full_weight * kl}

    def reset_state(self):
        for total in (self.examples, self.nll, self.rest, self.kl):
            total.assign(0.0)


class Observer:
    """Sees every loss that a model computes while it runs a step of `fit` or of its validation.

    It replaces `model.compute_loss` by a function that calls it. Steps that are compiled outside of `fit` with the
    callback do not have it in them, so that `evaluate` answers as ever.

    Args:
        model: A compiled `keras.Model`.

    Attributes:
        outputs: The `Output`s of the step that was traced last; None before.
        on_outputs: Called at every trace, before the loss is computed.
        terms: The `LossTerms`; None for a model without metrics.
        batch_size: How many examples that step has; None where it varies.
    """

    def __init__(self, model):
        self.model = model
        self.terms = None
        self.on_outputs = None
        self.outputs = None
        self.batch_size = None
        self._running = False
        self._shown = False
        self._owners = set()
        self._steps = {}
        self._own = {}
        self._compute_loss = model.compute_loss
        # A bound method of this would not do: Keras saves what a model's attributes hold.
        model.compute_loss = lambda *args, **kwargs: self._observe(*args, **kwargs)
        model.compute_loss.observer = self

    @classmethod
    def of(cls, model):
        """The observer of a model, made at the first call."""
        return getattr(model.compute_loss, "observer", None) or cls(model)

    def attach(self):
        """Make ready for what `compile` has made anew; without any metric of the model's, there are no terms."""
        metrics = self.model.metrics
        host = metrics[0] if metrics else None
        if host is None:
            self.terms = None
        if host is None or getattr(host, "loss_terms", None) is not None:
            return
        with _strategy_scope(self.model):
            self.terms = host.loss_terms = LossTerms()
        self._steps.clear()
        result, reset = host.result, host.reset_state

        def result_with_terms():
            own = result()
            if not self._shown:
                return own
            own = own if isinstance(own, dict) else {host.name: own}
            return {**self.terms.result(), **own}

        def reset_with_terms():
            reset()
            self.terms.reset_state()
            self._shown = False

        host.result, host.reset_state = result_with_terms, reset_with_terms

    def observe(self, name):
        """Put an observed step in the place of the model's.

        Args:
            name: "train_function" or "test_function".
        """
        own = getattr(self.model, name)
        if own is self._steps.get(name):
            return  # a `fit` was broken off
        if name not in self._steps:
            self._steps[name] = self._observed(tracing.new_function(self.model, name.removesuffix("_function")))
        self._own[name] = own
        setattr(self.model, name, self._steps[name])

    def restore(self, name):
        """Put the model's step back in its place."""
        setattr(self.model, name, self._own.pop(name, None))

    def examples_seen(self, steps=None):
        """How many examples the terms are of, or None where it is not known.

        Args:
            steps: Given within an epoch: how many steps it is old.
        """
        if steps is not None and self.batch_size is not None:
            return steps * self.batch_size
        if self.terms is None or (steps is not None and keras.backend.backend() == "jax"):
            return None  # JAX brings its variables up to date at the end of an epoch
        return float(ops.convert_to_numpy(self.terms.examples))

    def _observed(self, function):
        def run(*args, **kwargs):
            self._running = self._shown = True
            try:
                with watched(self._watch):
                    return function(*args, **kwargs)
            finally:
                self._running = False

        return run

    def _watch(self, layer):
        """Say so where the model calls a layer that is none of its own: Keras trains only what it finds."""
        if id(layer) in self._owners:
            return
        self._owners.update(id(posterior.owner) for posterior in posteriors(self.model))
        if id(layer) in self._owners:
            return
        self._owners.add(id(layer))  # once
        warnings.warn(
            f"The layer {layer.name!r} is called within {self.model.name!r}, but is none of its layers, such as one "
            "that a `Lambda` or another function calls: it does not learn, and its KL is not in the loss. Call it in "
            "the model's graph, or make it an attribute of the model or of a layer of your own.",
            RuntimeWarning,
            stacklevel=2,
        )

    def _observe(self, *args, **kwargs):
        if not self._running:
            return self._compute_loss(*args, **kwargs)
        named = dict(zip(("x", "y", "y_pred"), args)) | kwargs
        if named.get("y_pred") is not None:
            self.outputs = outputs_of(named["y_pred"], getattr(self.model, "output_names", None))
        if self.on_outputs is not None:
            self.on_outputs()
        with kl_costs() as costs:
            loss = self._compute_loss(*args, **kwargs)
            penalties = _penalties(self.model)
        if self.terms is None or loss is None:
            return loss
        total = loss * _replicas(self.model)
        penalty = sum(ops.cast(ops.sum(each), total.dtype) for each in penalties)
        weighed = sum(ops.cast(p.owner.kl_weight, cost.dtype) * cost for p, cost in costs.items())
        kl = sum(costs.values())
        examples = next((ops.shape(one)[0] for one in keras.tree.flatten(list(named.values())) if _has_rows(one)), 1)
        self.batch_size = examples if isinstance(examples, int) else None
        terms = (ops.stop_gradient(ops.convert_to_tensor(value)) for value in (total - penalty, total - weighed, kl))
        self.terms.update_state(*terms, examples)
        return loss


def _penalties(model):
    """What the loss of a step has besides the data's part.

    That is all that layers add to the loss that `compile` was given: penalties of weights, the KL among them, those of
    activities, `add_loss`. Where it was given none, it is what layers add that says how well the data are met; then
    these are the penalties of weights alone.
    """
    # In any case: on JAX the losses of layers are those of the call before, and their KLs are not within `kl_costs`.
    of_weights = [v.regularizer(v) for v in model.trainable_variables if getattr(v, "regularizer", None) is not None]
    return of_weights if model.loss is None else model.losses


def _has_rows(one):
    return ops.is_tensor(one) and len(one.shape) > 0


def _replicas(model):
    """By how many replicas Keras divides a loss on TensorFlow; 1 elsewhere."""
    strategy = getattr(model, "distribute_strategy", None)
    return 1 if strategy is None else strategy.num_replicas_in_sync


def _strategy_scope(model):
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()
