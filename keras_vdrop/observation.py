"""The terms of the loss of a training step: the data part, and the KL before it is weighted.

Keras reports only the loss of an epoch. The penalties in it change with every step, so only the step itself can
separate the terms. `Observer` does so in `compute_loss`, and `LossTerms` is the metric that averages them.
"""

import contextlib
from collections.abc import Callable
from typing import Any, Literal

import keras
from keras import ops

from keras_vdrop.functional import tracing
from keras_vdrop.functional.tensors import to_numpy
from keras_vdrop.layers.stochastic import kl_costs, set_weighted_by_callback, watched
from keras_vdrop.objective import Output, outputs_of
from keras_vdrop.posterior import learning_posteriors, owners, posteriors, recorded_kls
from keras_vdrop.warning import warn


class LossTerms(keras.metrics.Metric):
    """Means over the examples of an epoch: the loss without any penalties, the loss without the KL, and the KL in nats.

    It is attached to the model's first metric, which Keras has for the loss, and adds its results to those.
    """

    def __init__(self):
        super().__init__(name="loss_terms", dtype="float32")
        self.examples, self.nll, self.rest, self.kl = (
            self.add_variable((), "zeros", name=name) for name in ("examples", "nll", "rest", "kl")
        )
        self.full_weight = self.add_variable((), "zeros", name="full_weight")

    def update_state(self, nll: Any, rest: Any, kl: Any, examples: Any) -> None:
        examples = ops.cast(examples, "float32")
        self.examples.assign_add(examples)
        for total, value in ((self.nll, nll), (self.rest, rest), (self.kl, kl)):
            total.assign_add(ops.cast(value, "float32") * examples)

    def result(self) -> dict[str, Any]:
        means = (ops.divide_no_nan(total, self.examples) for total in (self.nll, self.rest, self.kl))
        nll, rest, kl = means
        return {"nll": nll, "elbo_loss": rest + self.full_weight * kl}

    def reset_state(self) -> None:
        for total in (self.examples, self.nll, self.rest, self.kl):
            total.assign(0.0)


class Observer:
    """Observer of every loss that a model computes in a step of `fit` or of its validation.

    It replaces `model.compute_loss` by a function that calls the original. Steps that are compiled outside
    a `fit` with the callback do not contain the observer, so `evaluate` returns what it always did.

    Args:
        model: A compiled `keras.Model`.

    Attributes:
        reads_outputs: Whether `outputs` is wanted.
        outputs: The `Output`s of the training step that was traced last; None before.
        on_outputs: None, or a callable that runs at every trace, before the loss is computed.
        terms: The `LossTerms`; None for a model without metrics.
        batch_size: The number of examples in that step; None if it varies.
        traces_each_fit: Whether every `fit` must trace its own training step, to see its own outputs.
    """

    def __init__(self, model: keras.Model):
        self.model = model
        self.terms: LossTerms | None = None
        self.on_outputs: Callable[[], None] | None = None
        self._trains = False
        self.reads_outputs = True
        self.outputs: list[Output] | None = None
        self.batch_size: int | None = None
        self.traces_each_fit = False
        self._running = False
        self._shown = False
        self._recorded = self._kl_in_loss = None
        self._owners: set[int] = set()
        self._steps: dict[str, Callable[..., Any]] = {}
        self._made_for: dict[str, tuple[Any, Any]] = {}
        self._own: dict[str, Any] = {}
        self._compute_loss = model.compute_loss
        # Not a bound method of the observer: Keras saves what the attributes of a model hold.
        model.compute_loss = lambda *args, **kwargs: self._observe(*args, **kwargs)
        vars(model.compute_loss)["observer"] = self

    @classmethod
    def of(cls, model: keras.Model) -> "Observer":
        """Return the observer of a model; the first call makes it."""
        return getattr(model.compute_loss, "observer", None) or cls(model)

    def attach(self) -> None:
        """Attach terms to the metrics that `compile` has made. A model without metrics has no terms."""
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

    def observe(self, name: Literal["train_function", "test_function"]) -> None:
        """Replace a compiled step of the model by an observed one.

        Args:
            name: "train_function" or "test_function".
        """
        own = getattr(self.model, name)
        if own is self._steps.get(name):
            return  # still there from a `fit` that was interrupted
        # `compile` and `make_train_function(force=True)` ask for a new step.
        made_for = (getattr(self.model, "_compile_config", None), own)
        if name not in self._steps or any(a is not b for a, b in zip(self._made_for[name], made_for)):
            self._made_for[name] = made_for
            function = tracing.new_function(self.model, name.removesuffix("_function"))
            self._steps[name] = self._observed(function, trains=name == "train_function")
        self._own[name] = own
        setattr(self.model, name, self._steps[name])

    def retrace(self) -> None:
        """Forget the training step and its outputs, so that the next one is traced anew."""
        self._steps.pop("train_function", None)
        self.outputs = None

    def restore(self, name: Literal["train_function", "test_function"]) -> None:
        """Put the model's own step back."""
        setattr(self.model, name, self._own.pop(name, None))

    def examples_seen(self, steps: int | None = None) -> float | None:
        """Return the number of examples that the terms cover, or None if it is not known.

        Args:
            steps: Within an epoch, the number of steps since its start; None at its end.
        """
        if steps is not None and self.batch_size is not None:
            return steps * self.batch_size
        if self.terms is None or (steps is not None and keras.backend.backend() == "jax"):
            return None  # on JAX, variables are up to date only at the end of an epoch
        return float(to_numpy(self.terms.examples))

    def _observed(self, function: Callable[..., Any], trains: bool) -> Callable[..., Any]:
        is_traced = False  # only the first call runs the Python code

        def run(*args, **kwargs):
            nonlocal is_traced
            self._running = self._shown = True
            self._trains = trains
            self._kl_in_loss = None
            judged, is_traced = trains and not is_traced, True
            try:
                with watched(self._watch), recorded_kls() as self._recorded:
                    results = function(*args, **kwargs)
            finally:
                self._running = False
                # Layers that a step builds have their weight from the callback; later ones have not.
                set_weighted_by_callback(False)
            if judged:
                self._check_kl(self._recorded if self._kl_in_loss is None else self._kl_in_loss)
            return results

        return run

    def _check_kl(self, is_in_loss: object) -> None:
        """Warn if a training step of the user's own leaves out the KL."""
        if not is_in_loss and learning_posteriors(self.model):
            warn(
                f"The training step of {self.model.name!r} does not compute the KL, so the loss lacks it, and the "
                "posterior becomes too certain. Add `sum(self.losses)` to the loss in your `train_step` or "
                "`compute_loss`; `ELBO` sets its weight.",
                RuntimeWarning,
            )

    def _watch(self, layer: keras.layers.Layer) -> None:
        """Warn if the model calls a layer that is not one of its own: Keras trains only layers that it finds."""
        if id(layer) in self._owners:
            return
        self._owners.update(map(id, owners(posteriors(self.model))))
        if id(layer) in self._owners:
            return
        self._owners.add(id(layer))  # warn only once
        warn(
            f"The layer {layer.name!r} is called within {self.model.name!r}, but is not one of its layers. This "
            "happens if a `Lambda` or another function calls it. The layer does not learn, and its KL is not in the "
            "loss. Call it in the model's graph, or make it an attribute of the model or of a custom layer.",
            RuntimeWarning,
        )

    def _observe(self, *args: Any, **kwargs: Any) -> Any:
        if not self._running:
            return self._compute_loss(*args, **kwargs)
        named = dict(zip(("x", "y", "y_pred"), args)) | kwargs
        if self.reads_outputs and self._trains and named.get("y_pred") is not None:
            self.outputs = outputs_of(named["y_pred"], getattr(self.model, "output_names", None))
        if self.on_outputs is not None:
            self.on_outputs()
        with kl_costs() as costs:
            loss = self._compute_loss(*args, **kwargs)
            self._kl_in_loss = bool(self._recorded)
            penalties = _penalties(self.model)
        if self.terms is None or loss is None:
            return loss
        total = loss * _replicas(self.model)
        penalty: Any = 0
        for each in penalties:
            penalty = penalty + ops.cast(ops.sum(each), total.dtype)
        weighed = sum(ops.cast(p.owner.kl_weight, cost.dtype) * cost for p, cost in costs.items())
        kl = sum(costs.values())
        examples = next((ops.shape(one)[0] for one in keras.tree.flatten(list(named.values())) if _has_rows(one)), 1)
        self.batch_size = examples if isinstance(examples, int) else None
        values = (total - penalty, total - weighed, kl)
        nll, rest, kl = (ops.stop_gradient(ops.convert_to_tensor(value)) for value in values)
        self.terms.update_state(nll, rest, kl, examples)
        return loss


def _penalties(model: keras.Model) -> list[Any]:
    """Return all terms of the loss of a step except for the data part.

    If `compile` was given a loss, these are all that layers add to it: penalties of weights (the KL among them) and of
    activities, and `add_loss`. If it was given none, `add_loss` contains the data part, and these are only the
    penalties of weights.
    """
    # Always compute them: on JAX, `model.losses` comes from the call before, so its KLs are not within `kl_costs`.
    of_weights = [v.regularizer(v) for v in model.trainable_variables if getattr(v, "regularizer", None) is not None]
    return of_weights if model.loss is None else model.losses


def _has_rows(one: Any) -> bool:
    return ops.is_tensor(one) and len(one.shape) > 0


def _replicas(model: keras.Model) -> int:
    """Return the number of replicas by which Keras divides a loss on TensorFlow; 1 on other backends."""
    strategy = getattr(model, "distribute_strategy", None)
    return 1 if strategy is None else strategy.num_replicas_in_sync


def _strategy_scope(model: keras.Model) -> contextlib.AbstractContextManager[Any]:
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()
