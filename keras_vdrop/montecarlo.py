"""`MonteCarlo`: predictions from many draws of the weights, and decisions that follow from them."""

import contextlib
import itertools
import math
import numbers
import statistics
import warnings

import keras
import numpy as np
from keras import layers, ops

from keras_vdrop import costs
from keras_vdrop.functional import likelihoods, uncertainty
from keras_vdrop.functional.checks import fraction
from keras_vdrop.layers.base import DropIn, StochasticLayer, check_positive_int
from keras_vdrop.losses import (
    NegativeLogLikelihood,
    aligned,
    check_activation,
    last_activation,
    last_layer,
    mask_of,
    output_names,
    weights_of,
    with_mask,
)
from keras_vdrop.sampling import FixedSeeds, drawing, generator_states, seed_generator, take_part

_LIKELIHOODS = (None, "categorical", "bernoulli", "normal")
_OUTPUTS = ("statistics", "samples")
_SEED_STATE = "seed_state"

# Keras layers whose noise is active in training only.
_KERAS_NOISE = (
    layers.Dropout,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.AlphaDropout,
)

# The fewest values of y for which `evaluate` may warn that predictions are worse than the mean and variance of y.
_ENOUGH = 30


@keras.saving.register_keras_serializable(package="keras_vdrop")
class MonteCarlo(keras.Model):
    """A model that predicts with S draws of another model's weights, E_q[p(y | x, w)] ≈ mean over w_1 ... w_S ~ q.

    All draws run inside one compiled graph: `sample_batch_size` of them side by side, and these groups one after the
    other. The memory for activations therefore does not depend on S. The wrapped model does not change and stays
    deterministic, and everything in it that is not variational stays in inference mode. A stateful RNN starts every
    draw from its current state, and keeps that state. Masked time steps get statistics like all others, but `evaluate`
    ignores them. Saving a `MonteCarlo` saves the wrapped model, without that model's compile configuration.

    Keras's own dropout (`Dropout` and similar layers, and arguments such as `dropout=` of attention) is not drawn, and
    a warning says so. Use `MonteCarloDropout` for dropout that is to be drawn.

    On TensorFlow it runs without XLA unless `compile(jit_compile=True)` asks for it. XLA takes some seconds to compile,
    and then predicts faster.

    `evaluate`, after `compile(metrics=[...])`, compares y with the `probability` or the `mean`. Unless `compile` is
    given a loss, the loss is −log p(y), where p is the mean probability, or the normal distribution with that mean and
    the sum of both variances. Like the training losses, it is the mean over the class labels of an example (Keras's
    cross-entropies), or the sum over the numbers of an example (`losses`); several outputs are summed. Weights of
    examples or of time steps, and the masks of the outputs, are taken into account.

    Args:
        model: A built `keras.Model` with at least one variational layer.
        num_samples: Positive int, S.
        likelihood: What the outputs mean. It decides which statistics `predict` returns:
            None: `mean` and `variance` over the draws, of each output.
            "categorical": outputs (B, ..., C): `probability`, `predictive_entropy` (total), `expected_entropy`
                (aleatoric, of the data), `mutual_information` (epistemic, of the model), in nats.
            "bernoulli": outputs (B, ...), the probability of 1 or its logit: the same statistics.
            "normal": outputs (B, ..., 2), the loc and the raw scale, as `losses.NormalNLL` takes them: `mean`,
                `aleatoric_variance` and `epistemic_variance`.
            A loss of `losses`, or any object with `moments(outputs)` -> (mean, variance) of y: the same three.
            For a model with several outputs, a dict of these by the names of the outputs: the keys of a model's dict of
                outputs, or `model.output_names` if the model returns a list.
        from_logits: Whether the outputs of a categorical or bernoulli model are logits; or a dict of bools by name.
        output: "statistics", or "samples" for the outputs themselves, (B, S, ...).
        seed: Int for the same draws in every run, or None.
        consistent: If True, all rows of all batches and calls share the same S draws of weights and masks: S functions
            drawn from the posterior. If False, each row has its own draws, as far as the layers' estimators allow.
        sample_batch_size: Positive int, how many draws are computed side by side. All that precedes the first noise is
            then computed once for all of them (not on PyTorch), and accelerators are better used; memory grows with it.
            It does not change the result. (XLA on TensorFlow gains nothing from it, and takes one draw at a time.)
        **kwargs: `name`, `dtype`.

    Returns:
        `predict` and `predict_on_batch` return `Predictions`, a dict of arrays; with a dict of likelihoods, a dict of
        `Predictions` by name; or an array of samples.

    Raises:
        ValueError: For a value out of range; for a model in which nothing is drawn; for probabilities where logits are
            expected, as far as the last layer's activation shows, or the reverse; for a dict whose names are not those
            of the outputs. In a call, for outputs whose size does not fit the likelihood. In `compile`, for metrics
            that take a distribution's parameters or logits. In `evaluate`, for y or weights whose layout does not match
            the outputs, or for data without rows.

    Warns:
        UserWarning: If a layer was trained with noise that no draw of its weights can produce; if Keras's own dropout
            stays off; if there is an activation before a raw scale. In `predict` and `evaluate`, if rows contain NaN or
            infinity, with their number. In `evaluate`, if numbers are predicted worse than by the mean and variance of
            y, as happens if y was not standardised.

    Example:
        >>> import keras, keras_vdrop as kv
        >>> model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(3)])
        >>> statistics = kv.MonteCarlo(model, num_samples=8)(keras.ops.ones((2, 4)))
        >>> statistics["mean"].shape == statistics["variance"].shape == (2, 3)
        True

    Reference:
        Dropout as a Bayesian Approximation, Gal, Ghahramani, 2016, https://arxiv.org/abs/1506.02142
    """

    def __init__(
        self,
        model,
        num_samples=32,
        likelihood=None,
        from_logits=True,
        output="statistics",
        seed=None,
        consistent=False,
        sample_batch_size=8,
        **kwargs,
    ):
        check_positive_int("num_samples", num_samples)
        check_positive_int("sample_batch_size", sample_batch_size)
        if output not in _OUTPUTS:
            raise ValueError(f"`output` must be one of {_OUTPUTS}. Received: output={output!r}")
        if isinstance(model, MonteCarlo):
            raise ValueError(f"{model.name!r} is a MonteCarlo already: give the model that it draws, its `model`.")
        readings = _readings(likelihood, from_logits)
        if not model.built:
            raise ValueError(f"The model {model.name!r} has not been built: call it on some data first.")
        _check_draws(model)
        _check_noise_is_a_draw(model)
        _check_outputs(model, readings)
        # The dtype of the statistics and of the inputs that are passed on. The wrapped model has its own policy.
        kwargs.setdefault("dtype", "float64" if model.compute_dtype == "float64" else "float32")
        super().__init__(**kwargs)
        self.model = model
        self.seed = seed
        self.seed_generator = seed_generator(seed)
        self.num_samples = num_samples
        self.sample_batch_size = sample_batch_size
        self.likelihood = likelihood
        self.from_logits = from_logits
        self.output_kind = output
        self._readings = readings
        self._seen = [_Finite(), *filter(None, (_seen(name, reading) for name, reading in readings.items()))]
        self.consistent = bool(consistent)
        if _in_tensorflow():
            self.jit_compile = False
        self.built = True

    def build(self, input_shape):
        self.built = True

    # Draws

    def samples(self, inputs):
        """Return the outputs of the wrapped model under S draws, (S, B, ...)."""
        if _has_no_rows(inputs):
            return keras.tree.map_structure(lambda each: each[:, :0], self.samples(_one_row_of(inputs)))
        first, rest = self._seeds()
        draws = self._draws_of(inputs)
        samples, _ = draws(first)
        if rest is None:
            return samples
        more = ops.map(lambda seeds: draws(seeds)[0], rest)
        count = rest.shape[0] * rest.shape[1]
        return keras.tree.map_structure(
            lambda one, others: ops.concatenate([one, ops.reshape(others, (count, *ops.shape(one)[1:]))]), samples, more
        )

    def _seeds(self):
        """Draw one seed for each draw and each of the G generators of noise.

        Returns:
            The seeds of the first group of draws, (s, G), and those of n more groups of k draws each, (n, k, G), or
            None if n = 0. k is the number of draws side by side, and s is the remainder of S / k, or k where that is 0.
        """
        shape = self.num_samples, len(generator_states(self.model))
        generator = FixedSeeds(self.seed_generator.state) if self.consistent else self.seed_generator
        seeds = keras.random.randint(shape, 0, 2**31 - 1, seed=generator)
        # XLA cannot tell where a loop ends, such as an RNN's, once TensorFlow has vectorised it.
        together = 1 if _in_tensorflow() and self.jit_compile else self.sample_batch_size
        first = self.num_samples % together or min(together, self.num_samples)
        if first == self.num_samples:
            return seeds, None
        return seeds[:first], ops.reshape(seeds[first:], (-1, together, shape[1]))

    def _draws_of(self, inputs):
        """Return a function from seeds (s, G) to the outputs (s, B, ...) under s draws, computed side by side.

        The function also returns the masks (B, ...) of the outputs that have one, by the index of the output.
        """
        states = generator_states(self.model)
        ids = {id(state) for state in states}
        # An example keeps its draw of a layer that it uses more than once. Only the code of a user's layer tells how
        # often it calls its sublayers, so these count as well. Layers with local reparameterization do not: they
        # learned with independent noise at each position, and draw like that here.
        repeated = [
            id(layer.seed_generator.state)
            for layer, _ in costs.used_repeatedly(self.model, calls_within=None)
            if layer.estimator != "local_reparameterization"
        ]
        held = [(v, ops.convert_to_tensor(v)) for v in self.model.variables if id(v) not in ids]

        def draw(seeds):
            """Return outputs and masks of a draw: each generator starts from its seed, and no other state changes."""
            started = [
                (state, ops.cast(ops.stack([seed, 0]), state.dtype)) for state, seed in zip(states, ops.unstack(seeds))
            ]
            with keras.StatelessScope(state_mapping=started + held), drawing(self.consistent, repeated) as scope:
                outputs = self.model(inputs, training=False)
                masks = {place: mask_of(each) for place, each in enumerate(self._in_order(outputs))}
            if not scope.used:
                raise ValueError(
                    f"Nothing was drawn from {self.model.name!r}: its layers are called by a function that was "
                    "compiled before, such as a `call` under `tf.function`. Leave the compiling to `MonteCarlo`."
                )
            return outputs, {place: mask for place, mask in masks.items() if mask is not None}

        def draws(seeds):
            outputs, masks = _side_by_side(draw, seeds)
            return outputs, {place: mask[0] for place, mask in masks.items()}

        return _traced_once(draws)

    # Statistics

    def call(self, inputs):
        if _has_no_rows(inputs):  # TensorFlow can neither vectorise draws of 0 rows nor sum them
            return _without_rows(self.call(_one_row_of(inputs)))
        if self.output_kind == "samples":
            return keras.tree.map_structure(lambda each: ops.swapaxes(each, 0, 1), self.samples(inputs))
        summary = self._summary()
        first, rest = self._seeds()
        draws = self._draws_of(inputs)
        outputs, masks = draws(first)
        samples = self._interpreted(outputs)
        origin = keras.tree.map_structure(lambda each: each[0], samples)

        def total(samples):
            return keras.tree.map_structure(lambda each: ops.sum(each, axis=0), summary.terms(samples, origin))

        totals = total(samples)
        if rest is not None:

            def add(step, totals):
                samples = self._interpreted(draws(ops.take(rest, step, axis=0))[0])
                return keras.tree.map_structure(ops.add, totals, total(samples))

            totals = ops.fori_loop(0, rest.shape[0], add, totals)
        means = keras.tree.map_structure(lambda each: each / self.num_samples, totals)
        return self._masked(summary.statistics(means, origin), masks)

    @property
    def _is_named(self):
        """Whether there are statistics for several outputs, by name."""
        return None not in self._readings

    def _summary(self):
        if self._is_named:
            return uncertainty.by_name({name: reading.summary for name, reading in self._readings.items()})
        return self._readings[None].summary

    def _interpreted(self, outputs):
        """Convert outputs to the samples that the summary takes, in float32 at least."""
        outputs = keras.tree.map_structure(_at_least_float32, outputs)
        if not self._is_named:
            return self._readings[None].samples(outputs)
        outputs = self._by_name(outputs, "outputs")
        if set(outputs) != set(self._readings):
            raise ValueError(_wrong_names(self._readings, outputs))
        return {name: reading.samples(outputs[name]) for name, reading in self._readings.items()}

    def _by_name(self, values, what):
        """Return values that belong to outputs (a dict, a list in the order of the outputs, or one value) by name."""
        if isinstance(values, dict):
            unknown = sorted(set(values) - set(self._readings))
            if unknown:
                raise ValueError(f"The {what} have names that no output has: {unknown}. {_known(self._readings)}")
            return dict(values)
        values = list(values) if isinstance(values, (list, tuple)) else [values]
        names = output_names(self.model) or (tuple(self._readings) if len(self._readings) == 1 else None)
        if names is None:
            raise ValueError(
                f"The outputs of {self.model.name!r} have no names: have it give a dict. {_known(self._readings)}"
            )
        if len(values) != len(names):
            raise ValueError(f"Expected {what} for {names}. Received: {len(values)} of them")
        return dict(zip(names, values))

    def _in_order(self, outputs):
        """Return the outputs as a flat list, in the order in which `_masked` assigns their masks."""
        return keras.tree.flatten(self._by_name(outputs, "outputs") if self._is_named else outputs)

    def _masked(self, found, masks):
        """Attach the masks of the outputs to the statistics that y is compared with, for `evaluate`."""
        if not masks:
            return found
        places = itertools.count()

        def keep(found):
            key = _point_name(found)
            point = keras.tree.map_structure(lambda each: with_mask(each, masks.get(next(places))), found[key])
            return {**found, key: point}

        return {name: keep(found[name]) for name in sorted(found)} if self._is_named else keep(found)

    # The interface of a Keras model

    def compile(
        self,
        optimizer=None,
        loss=None,
        loss_weights=None,
        metrics=None,
        weighted_metrics=None,
        *args,
        jit_compile="auto",
        **kwargs,
    ):
        """Configure `evaluate`, as in Keras. No optimizer is needed; on TensorFlow, `jit_compile="auto"` means False.

        Raises:
            ValueError: For a metric that takes a model's outputs (the parameters of a distribution, or logits) and not
                a prediction made from them.
        """
        if jit_compile == "auto" and _in_tensorflow():
            jit_compile = False
        for each in (metrics, weighted_metrics):
            _check_metrics(each, self._readings)
        super().compile(
            optimizer, loss, loss_weights, metrics, weighted_metrics, *args, jit_compile=jit_compile, **kwargs
        )

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))

    def make_predict_function(self, force=False):
        take_part()  # a MonteCarlo draws in any scope, but once compiled it no longer tells the scope
        return super().make_predict_function(force)

    def make_test_function(self, force=False):
        take_part()
        return super().make_test_function(force)

    def predict(self, x, *args, **kwargs):
        """Predict as in Keras; return `Predictions`, a dict of them by output name, or an array of samples.

        Inputs without rows give arrays without rows. A data set without a batch does not tell their shapes.

        Raises:
            ValueError: For a data set or generator without a batch.
        """
        if _has_no_rows(x):
            return self.predict_on_batch(x)
        try:
            with self._restored():
                result = super().predict(x, *args, **kwargs)
        except UnboundLocalError as error:  # Keras reads the last batch, which was never set
            raise ValueError(
                f"There is nothing to predict: the data have no batch. Received: x={x!r}; give arrays of 0 rows for "
                "predictions of 0 rows."
            ) from error
        return self._told(result)

    def predict_on_batch(self, x):
        """Predict one batch; otherwise as `predict`."""
        if not _has_no_rows(x):
            return self._told(super().predict_on_batch(x))
        return self._told(_without_rows(super().predict_on_batch(_one_row_of(x))))

    def _told(self, result):
        """Check the arrays, and return them in the form that `predict` documents."""
        _report_not_finite(_rows_not_finite(result), len(keras.tree.flatten(result)[0]))
        if self.output_kind == "samples":
            return result
        if not self._is_named:
            return self._readings[None].told(result)
        return {name: reading.told(result[name]) for name, reading in self._readings.items()}

    def evaluate(self, x=None, *args, **kwargs):
        """Evaluate as in Keras; the loss is the NLL of the prediction, unless `compile` was given one.

        Raises:
            ValueError: If there are no rows.
        """
        if _has_no_rows(x) or _has_no_batch(x):
            raise ValueError(_nothing_to_evaluate(x))
        try:
            with self._restored():
                result = super().evaluate(x, *args, **kwargs)
        except Exception as error:  # the type differs between backends
            if _gives_no_rows(x):
                raise ValueError(_nothing_to_evaluate(x)) from error
            raise
        if not self._seen[0].count:
            raise ValueError(_nothing_to_evaluate(x))
        for seen in self._seen:
            seen.report()
        return result

    def test_on_batch(self, x, *args, **kwargs):
        """Evaluate one batch, which must have rows; otherwise as in Keras."""
        if _has_no_rows(x):
            raise ValueError(_nothing_to_evaluate(x))
        return super().test_on_batch(x, *args, **kwargs)

    @contextlib.contextmanager
    def _restored(self):
        """Restore all variables if the body fails before its first batch is done.

        On JAX, Keras takes the values out of the variables for its steps, and does not put them back in that case.
        """
        held = []
        if keras.backend.backend() == "jax":
            held = [(variable, variable.value) for variable in (*self.variables, *self.metrics_variables)]
        try:
            yield
        except Exception:
            for variable, value in held:
                if not value.is_deleted():  # a step that has run deletes it
                    variable.assign(value)
            raise

    def fit(self, *args, **kwargs):
        """Not supported: a `MonteCarlo` only predicts."""
        raise NotImplementedError("A MonteCarlo only predicts: fit the model that it wraps.")

    train_on_batch = fit

    def export(self, filepath, format="tf_saved_model", *, input_signature=None, **kwargs):
        """Export to a SavedModel, as in Keras. The exported model takes the inputs of the wrapped model.

        Raises:
            ValueError: For another format. The runtimes of ONNX and LiteRT have no operations for the draws, and would
                reject the file.
        """
        if format != "tf_saved_model":
            raise ValueError(
                "A MonteCarlo draws random numbers by operations that only TensorFlow runs, so it is exported to a "
                f'SavedModel alone. Received: format={format!r}; give "tf_saved_model", or export the model without '
                "noise, keras_vdrop.compact(model) or keras_vdrop.to_deterministic(model)."
            )
        if input_signature is None and hasattr(self.model, "inputs"):
            input_signature = self.model.inputs if isinstance(self.model, keras.Sequential) else [self.model.input]
        super().export(filepath, format, input_signature=input_signature, **kwargs)

    @property
    def losses(self):
        """An empty list: the penalties of the wrapped model are for its training."""
        return []

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=False):
        if self.loss is not None or (not self._is_named and self.likelihood is None):
            y, point, weight = self._compared(y, y_pred, sample_weight)
            return super().compute_loss(x, y, point, weight, training)
        rows = self._rows(y, y_pred, sample_weight)
        if self._is_named and set(rows) != set(self._readings):
            raise ValueError(f"The loss takes y for every output. Received: y for {sorted(rows)}")
        return sum(self._readings[name].loss(*row) for name, row in rows.items())

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        rows = self._rows(y, y_pred, sample_weight)
        for seen in self._seen:
            seen.update_state(y_pred, rows)
        y, point, weight = self._compared(y, y_pred, sample_weight)
        return super().compute_metrics(x, y, point, weight)

    def _rows(self, y, found, weight):
        """Return (y, statistics, weight) of every output that has a y, by name; None is the name of a single output."""
        if self.output_kind == "samples":
            raise ValueError('`evaluate` compares y with a statistic. Received: output="samples"')
        if not self._is_named:
            return {None: (y, found, weight)}
        y = self._by_name(y, "y")
        if weight is None or ops.is_tensor(weight):
            weight = dict.fromkeys(y, weight)
        weight = self._by_name(weight, "sample_weight")
        return {name: (y[name], found[name], weight.get(name)) for name in y}

    def _compared(self, y, found, weight):
        """Return y, the predictions to compare it with, and weights, as Keras's losses and metrics take them."""
        rows = self._rows(y, found, weight)
        compared = {name: self._readings[name].compared(*row) for name, row in rows.items()}
        if not self._is_named:
            return compared[None]
        y, point, weight = ({name: each[part] for name, each in compared.items()} for part in range(3))
        if all(each is None for each in weight.values()):
            return y, point, None
        ones = {name: ops.ones(ops.shape(each)[:1]) for name, each in point.items() if weight[name] is None}
        return y, point, {**weight, **ones}

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store[_SEED_STATE] = self.seed_generator.state

    def load_own_variables(self, store):
        keys = set(store.keys())  # a store lacks some methods of a dict
        super().load_own_variables({key: store[key] for key in keys - {_SEED_STATE}})
        if _SEED_STATE in keys:
            self.seed_generator.state.assign(store[_SEED_STATE])

    def get_config(self):
        model = keras.saving.serialize_keras_object(self.model)
        model.pop("compile_config", None)  # not used here, but loading would need its custom objects
        return {
            **super().get_config(),
            "model": model,
            "num_samples": self.num_samples,
            "likelihood": _serialized(self.likelihood),
            "from_logits": dict(self.from_logits) if isinstance(self.from_logits, dict) else self.from_logits,
            "output": self.output_kind,
            "seed": self.seed,
            "consistent": self.consistent,
            "sample_batch_size": self.sample_batch_size,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        def loaded(value):
            if not isinstance(value, dict):
                return value
            if "class_name" in value:
                return keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
            return {name: loaded(each) for name, each in value.items()}

        return cls(**{**config, "model": loaded(config["model"]), "likelihood": loaded(config["likelihood"])})


def _serialized(likelihood):
    if isinstance(likelihood, dict):
        return {name: _serialized(each) for name, each in likelihood.items()}
    if likelihood is None or isinstance(likelihood, str):
        return likelihood
    return keras.saving.serialize_keras_object(likelihood)


def _readings(likelihood, from_logits):
    """Return a `_Reading` for each output, by name.

    Without a dict there is one `_Reading`, named None: for the only output, or with `likelihood=None` for outputs of
    any structure.
    """
    if not isinstance(likelihood, dict):
        if isinstance(from_logits, dict):
            raise ValueError(
                "`from_logits` by the names of outputs takes a `likelihood` by name. "
                f"Received: from_logits={from_logits!r} and likelihood={likelihood!r}"
            )
        return {None: _Reading(likelihood, from_logits)}
    if not likelihood or not all(isinstance(name, str) for name in likelihood):
        raise ValueError(f"`likelihood` must have the names of outputs. Received: likelihood={likelihood!r}")
    by_name = from_logits if isinstance(from_logits, dict) else dict.fromkeys(likelihood, from_logits)
    if unknown := sorted(set(by_name) - set(likelihood)):
        raise ValueError(f"`from_logits` has names that `likelihood` has not: {unknown}. {_known(likelihood)}")
    return {name: _Reading(each, by_name.get(name, True), name) for name, each in likelihood.items()}


def _known(names):
    return f"Known: {sorted(names)}"


def _wrong_names(likelihood, outputs):
    missing, unknown = sorted(set(outputs) - set(likelihood)), sorted(set(likelihood) - set(outputs))
    wrong = [f"none for {missing}"] * bool(missing) + [f"one for {unknown}, which no output is called"] * bool(unknown)
    return f"`likelihood` must have one, or None, for each of {sorted(outputs)}. Received: {' and '.join(wrong)}"


def _check_draws(model):
    """Raise if nothing in the model is drawn, and warn of noise that is active in training only."""
    off = _keras_noise(model)
    if not any(isinstance(layer, StochasticLayer) and layer.draws for layer in model._flatten_layers()):
        way_out = "Use one, such as keras_vdrop.VariationalDense, where it has a Keras layer."
        if off:
            way_out = f"Keras's Dropout is for training alone: put keras_vdrop.MonteCarloDropout in the place of {off}."
        raise ValueError(
            f"Every draw from the model {model.name!r} would be the same: it has no variational layer with a prior "
            f"or a rate. {way_out}"
        )
    if off:
        warnings.warn(
            f"Keras's own dropout is for training alone, and stays off in a MonteCarlo: that of {off}. Where it is to "
            "be drawn as well, use keras_vdrop.MonteCarloDropout.",
            stacklevel=3,
        )


def _keras_noise(model):
    """Return the names of the layers with Keras's own dropout or noise, at a rate or scale above 0."""
    found = []
    for layer in model._flatten_layers():
        if isinstance(layer, (StochasticLayer, DropIn)):
            continue
        names = ("rate", "stddev") if isinstance(layer, _KERAS_NOISE) else ("dropout", "recurrent_dropout")
        rates = [getattr(layer, name, 0.0) for name in names]
        if any(isinstance(rate, numbers.Real) and rate > 0 for rate in rates) and layer.name not in found:
            found.append(layer.name)
    return found


def _check_noise_is_a_draw(model):
    """Warn of layers that were trained with noise that no draw of their weights can produce."""
    names = [
        layer.name
        for layer, in_one_call in costs.used_repeatedly(model)
        if layer.learns_locally and (layer.estimator == "local_reparameterization" or not in_one_call)
    ]
    if names:
        warnings.warn(
            f"The layers {names} are used at several places of an example, and each place has noise of its own while "
            "they learn. No draw of their weights does that, so `MonteCarlo` does not show the uncertainty of their "
            'posterior. Learn by `estimator="flipout"`, and give a layer all places in one call, not one by one as a '
            "shared layer or `TimeDistributed` gets them.",
            stacklevel=3,
        )


def _check_outputs(model, readings):
    """Raise if a likelihood does not fit the outputs, as far as the model shows that before it is called."""
    names = output_names(model)
    if None in readings:
        if names is not None and len(names) > 1 and readings[None].likelihood is not None:
            raise ValueError(
                "A `likelihood` is that of one output; for a model of several, give a dict by name, or None. "
                f"Received: likelihood={readings[None].likelihood!r}, and the outputs {sorted(names)}"
            )
    elif names is not None and set(names) != set(readings):
        raise ValueError(_wrong_names(readings, names))
    for name, reading in readings.items():
        activation = last_activation(last_layer(model, name))
        if reading.is_classes and reading.from_logits and activation in ("softmax", "sigmoid"):
            raise ValueError(
                f"The model {model.name!r} ends in an activation that makes probabilities{reading.where}. "
                "Give `from_logits=False`."
            )
        if reading.likelihood == "normal" or isinstance(reading.likelihood, NegativeLogLikelihood):
            check_activation(model, name, stacklevel=3)


def _check_metrics(metrics, readings):
    """Raise for metrics that would take a prediction for the parameters of a distribution, or for logits."""
    for name, reading in readings.items():
        own = metrics.get(name) if isinstance(metrics, dict) else metrics
        if len(readings) > 1 and not isinstance(metrics, dict):
            continue  # only Keras knows which outputs they belong to
        for metric in keras.tree.flatten(own):
            reading.check_metric(metric)


class _Reading:
    """How a likelihood reads one output: what its samples are, which statistics it has, and how it is scored against y.

    Args:
        likelihood, from_logits: As for `MonteCarlo`.
        name: The name of the output if there are several.
    """

    def __init__(self, likelihood, from_logits, name=None):
        is_loss = hasattr(likelihood, "moments") and not isinstance(likelihood, type)
        if not (likelihood in _LIKELIHOODS or is_loss):
            raise ValueError(
                f"`likelihood` must be one of {_LIKELIHOODS}, one of `keras_vdrop.losses`, or a dict of these by the "
                f"names of outputs. Received: likelihood={likelihood!r}"
            )
        self.likelihood = likelihood
        self.from_logits = from_logits
        self.where = "" if name is None else f" for {name!r}"

    @property
    def is_classes(self):
        return self.likelihood in ("categorical", "bernoulli")

    @property
    def summary(self):
        known = {
            None: uncertainty.MOMENTS,
            "categorical": uncertainty.CATEGORICAL,
            "bernoulli": uncertainty.BERNOULLI,
        }
        return next((each for key, each in known.items() if key == self.likelihood), uncertainty.TOTAL_VARIANCE)

    def samples(self, outputs):
        """Convert outputs, of float32 or wider, to the samples that the summary takes."""
        if self.likelihood is None:
            return outputs
        if not ops.is_tensor(outputs):
            raise ValueError(
                f"A `likelihood` is that of one output; a model of several takes a dict by name, or None. "
                f"Received: likelihood={self.likelihood!r}{self.where}, and {len(outputs)} outputs"
            )
        self._check_size(outputs.shape)
        if self.likelihood == "categorical":
            return ops.softmax(outputs) if self.from_logits else outputs
        if self.likelihood == "bernoulli":
            return ops.sigmoid(outputs) if self.from_logits else outputs
        if self.likelihood == "normal":
            return outputs[..., 0], ops.square(likelihoods.scale_of(outputs[..., 1]))
        return self.likelihood.moments(outputs)

    def _check_size(self, shape):
        """Raise if the last axis of the outputs does not have the size that the likelihood takes."""
        if self.likelihood == "categorical" and shape[-1] == 1:
            raise ValueError(
                'One output is no choice between classes: give likelihood="bernoulli", of which it is the logit. '
                f"Received: outputs{self.where} of the shape {tuple(shape)}"
            )
        size = 2 if self.likelihood == "normal" else getattr(self.likelihood, "num_parameters", None)
        if size is not None and shape[-1] != size:
            raise ValueError(
                f"The likelihood takes outputs (B, ..., {size}). Received: likelihood={self.likelihood!r}, and outputs"
                f"{self.where} of the shape {tuple(shape)}"
            )

    def told(self, arrays):
        """Return the arrays as `Predictions`; raise if they should be probabilities and are not."""
        if self.is_classes and not self.from_logits and len(arrays["probability"]):
            _check_probabilities(*_range_of(arrays["probability"], self.likelihood, np))
        return Predictions(arrays)

    # Scores

    def check_metric(self, metric):
        """Raise for a metric that takes the outputs of the model, and not a prediction."""
        if self.likelihood is None:
            return
        point = "probability" if self.is_classes else "mean"
        remedy = None
        if (of_prediction := getattr(metric, "of_prediction", None)) is not None:
            remedy = f"takes the parameters of a distribution. {of_prediction}"
        elif self.is_classes and getattr(metric, "from_logits", False) is True:
            remedy = "takes logits. Give it `from_logits=False`."
        if remedy is not None:
            raise ValueError(
                f"`MonteCarlo` compares y{self.where} with the `{point}` that it predicts, and the metric "
                f"{metric.name!r} {remedy} Received: metrics with a {type(metric).__name__}"
            )

    def laid_out(self, y, found, weight):
        """Return y in the layout of its prediction, and weights that broadcast to one for each number or label."""
        point = found[_point_name(found)]
        shape, sizes = point.shape, ops.shape(point)
        if self.likelihood == "categorical":
            shape, sizes = shape[:-1], sizes[:-1]
        one_hot = self.likelihood == "categorical" and tuple(y.shape) == tuple(point.shape)
        fitting = y if one_hot else aligned(y, shape, sizes)
        if fitting is None:
            raise ValueError(
                f"Expected y of the shape of what is predicted{self.where}, {tuple(shape)}. "
                f"Received: y of the shape {tuple(y.shape)}"
            )
        if weight is not None:
            weighed = point[..., 0] if self.likelihood == "categorical" else point
            weight = weights_of(weight, weighed)
            if mask_of(point) is not None:  # on PyTorch, Keras multiplies the weights by the mask in place
                weight = weight * ops.ones_like(weighed, dtype=weight.dtype)
        return fitting, weight

    def compared(self, y, found, weight):
        """Return y, the prediction to compare it with, and weights, as Keras's losses and metrics take them.

        Keras takes the mean over the last axis and applies weights to the others, so numbers get an axis of size 1.
        """
        point = found[_point_name(found)]
        if self.likelihood is None:
            _check_same_layout(y, point)
            return y, keras.tree.map_structure(_at_least_a_column, point), weight
        y, weight = self.laid_out(y, found, weight)
        if self.likelihood == "categorical":
            return y, point, weight
        rank = len(point.shape)
        of_numbers = weight is not None and any(size != 1 for size in weight.shape[1:])
        if rank == 1 or of_numbers or mask_of(point) is not None:
            return ops.expand_dims(y, -1), _a_number_each(point), weight
        return y, point, None if weight is None else weight[..., 0]

    def loss(self, y, found, weight):
        """Return −log p(y) of the prediction: Keras's mean over labels, or the sum over the numbers of an example."""
        if self.likelihood is None:
            raise ValueError(
                f"What y{self.where} is compared with has no likelihood: give it one, or `compile` a loss."
            )
        y, weight = self.laid_out(y, found, weight)
        if not self.is_classes:
            return _MomentsNLL(name="nll")(y, _moments(found), weight)
        point = found["probability"]
        if self.likelihood == "bernoulli":
            return keras.losses.BinaryCrossentropy()(ops.expand_dims(y, -1), _a_number_each(point), weight)
        one_hot = len(y.shape) == len(point.shape)
        loss = keras.losses.CategoricalCrossentropy if one_hot else keras.losses.SparseCategoricalCrossentropy
        return loss()(y, point, weight)


def _point_name(found):
    """Return the name of the statistic that y is compared with."""
    return "probability" if "probability" in found else "mean"


def _at_least_a_column(point):
    """Return the tensor with rank 2 at least: Keras takes the mean over the last axis."""
    return point[:, None] if len(point.shape) == 1 else point


def _a_number_each(point):
    """Add a last axis of size 1, (B, ..., 1), and keep the mask."""
    return with_mask(ops.expand_dims(point, -1), mask_of(point))


def _moments(found):
    """Return the mean and the variance of y, (B, ..., 2), with the mask of the mean."""
    variance = found["aleatoric_variance"] + found["epistemic_variance"]
    return with_mask(ops.stack([found["mean"], variance], axis=-1), mask_of(found["mean"]))


def _check_same_layout(y, point):
    """Raise if y has neither the shape of the prediction nor that of its class numbers."""
    ys, points = keras.tree.flatten(y), keras.tree.flatten(point)
    if len(ys) != len(points) or any(each is None for each in ys):
        return  # Keras raises an error, or compares some of them
    for label, each in zip(ys, points):
        if aligned(label, each.shape) is None and aligned(label, each.shape[:-1]) is None:
            raise ValueError(
                f"Expected y of the shape of what is predicted, {tuple(each.shape)}, or of its class numbers, "
                f"{tuple(each.shape[:-1])}. Received: y of the shape {tuple(label.shape)}"
            )


class _MomentsNLL(NegativeLogLikelihood):
    """−log N(y; mean, variance), where the outputs (B, ..., 2) are that mean and variance."""

    def log_prob(self, y, parameters):
        return likelihoods.normal(y, parameters[..., 0], ops.sqrt(parameters[..., 1]))

    def moments(self, parameters):
        return parameters[..., 0], parameters[..., 1]


class _Seen(keras.metrics.Metric):
    """Base of metrics that collect facts in `evaluate` and report them at its end; they do not appear in the logs."""

    def result(self):
        return {}

    def report(self):
        raise NotImplementedError

    def _add(self, name, initial=0.0):
        return self.add_variable((), initializer=keras.initializers.Constant(initial), name=name)

    def _number(self, variable):
        return float(ops.convert_to_numpy(variable))


class _Finite(_Seen):
    """The number of rows, and the number of rows with NaN or infinity."""

    def __init__(self):
        super().__init__(name="finite", dtype="float32")
        self.rows, self.wrong = self._add("rows"), self._add("wrong")

    def update_state(self, found, rows):
        arrays = keras.tree.flatten(found)
        wrong = False
        for values in arrays:
            flat = ops.reshape(values, (ops.shape(values)[0], -1))
            wrong = ops.logical_or(wrong, ops.logical_not(ops.all(ops.isfinite(flat), axis=1)))
        self.rows.assign_add(ops.cast(ops.shape(arrays[0])[0], "float32"))
        self.wrong.assign_add(ops.sum(ops.cast(wrong, "float32")))

    @property
    def count(self):
        """The number of rows."""
        return int(self._number(self.rows))

    def report(self):
        _report_not_finite(int(self._number(self.wrong)), self.count)


class _Probabilities(_Seen):
    """The range of outputs that should be probabilities, and the range of their sums."""

    def __init__(self, name, likelihood):
        super().__init__(name="probabilities", dtype="float32")
        self.output, self.likelihood = name, likelihood
        self.ends = [self._add(end, math.inf if end in ("low", "least") else -math.inf) for end in _ENDS]

    def reset_state(self):
        for variable, end in zip(self.ends, _ENDS):
            variable.assign(math.inf if end in ("low", "least") else -math.inf)

    def update_state(self, found, rows):
        found = found if self.output is None else found[self.output]
        for variable, value, end in zip(self.ends, _range_of(found["probability"], self.likelihood, ops), _ENDS):
            variable.assign((ops.minimum if end in ("low", "least") else ops.maximum)(variable, value))

    def report(self):
        _check_probabilities(*map(self._number, self.ends))


class _Fit(_Seen):
    """The NLL of predicted numbers, compared with that of a normal distribution with the mean and variance of y."""

    def __init__(self, name, reading):
        super().__init__(name="fit", dtype="float32")
        self.output, self.reading = name, reading
        self.count, self.mean, self.squares, self.nll = map(self._add, ("count", "mean", "squares", "nll"))

    def update_state(self, found, rows):
        if self.output not in rows:
            return
        y, found, _ = rows[self.output]
        y, _ = self.reading.laid_out(y, found, None)
        y = ops.cast(y, "float32")
        mask = mask_of(found["mean"])
        counts = ops.ones_like(y) if mask is None else ops.ones_like(y) * weights_of(ops.cast(mask, y.dtype), y)
        count = ops.sum(counts)
        mean = ops.divide_no_nan(ops.sum(counts * y), count)
        shift, total = mean - self.mean, self.count + count
        # Combine the squared deviations of both parts. Plain sums of squares would cancel where y is far from 0.
        squares = ops.sum(counts * ops.square(y - mean))
        self.squares.assign_add(squares + ops.square(shift) * ops.divide_no_nan(self.count * count, total))
        self.mean.assign_add(shift * ops.divide_no_nan(count, total))
        self.count.assign(total)
        self.nll.assign_add(ops.sum(counts * _MomentsNLL().values(y, _moments(found))))

    def report(self):
        count, mean, squares, nll = map(self._number, (self.count, self.mean, self.squares, self.nll))
        if count < _ENOUGH or not squares > 0:
            return
        scale = math.sqrt(squares / count)
        least = 0.5 * math.log(2.0 * math.pi * math.e) + math.log(scale)
        if not nll / count > least + 0.1:
            return
        standard = abs(mean) < 3.0 and 0.3 < scale < 3.0
        way_out = (
            "Train it for longer, or look at its inputs."
            if standard
            else ("Standardise y, (y − mean) / standard deviation: the network starts from numbers of about 1.")
        )
        warnings.warn(
            f"The prediction of y{self.reading.where} is worse than none: its NLL is {nll / count:.3g} nats a number, "
            f"and that of the normal distribution with the mean {mean:.3g} and the standard deviation {scale:.3g} of y "
            f"itself is {least:.3g}. {way_out}",
            stacklevel=3,
        )


def _seen(name, reading):
    """Return the `_Seen` that an output needs, or None."""
    if reading.likelihood is None:
        return None
    if not reading.is_classes:
        return _Fit(name, reading)
    return None if reading.from_logits else _Probabilities(name, reading.likelihood)


class Predictions(dict):
    """The statistics that `MonteCarlo.predict` returns, a dict of arrays, with methods that act on them.

    The statistics are attributes as well: `predicted.mean` is `predicted["mean"]`.

    Example:
        >>> import keras, keras_vdrop as kv, numpy as np
        >>> model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(3, initial_log_variance=-2.0)])
        >>> drawn = kv.MonteCarlo(model, likelihood="categorical").predict(np.ones((20, 4)), verbose=0)
        >>> int(drawn.abstain(coverage=0.9).sum())
        2
        >>> drawn.bald().shape
        (20,)
    """

    def __dir__(self):
        return [*super().__dir__(), *self]

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}; its statistics are {sorted(self)}.")

    def stddev(self):
        """Return the standard deviation of a predicted number, in the units of y and the shape of `mean`.

        With a likelihood, it is that of y, √(aleatoric + epistemic variance), due to both data and model. Without one,
        it is that of the output over the draws, due to the model alone; the noise of y comes on top.

        Raises:
            ValueError: For classes, which have no standard deviation.
        """
        if "probability" in self:
            raise ValueError(
                "Classes have no standard deviation: see `probability`, and how sure it is in `predictive_entropy`, or "
                "give `MonteCarlo` another `likelihood`."
            )
        if "variance" in self:
            return keras.tree.map_structure(np.sqrt, self["variance"])
        return np.sqrt(self["aleatoric_variance"] + self["epistemic_variance"])

    def interval(self, coverage=0.9):
        """Return mean ± Φ⁻¹((1 + coverage) / 2)·stddev, the central interval of a normal distribution.

        With a likelihood, it contains y with probability `coverage`, if the model is calibrated and y is about normal.
        If you cannot assume that, use quantiles of draws (`functional.regression.sample_interval`) or intervals from
        validation data (`functional.conformal`). Without a likelihood, it is the interval of the output over the draws,
        and contains y less often.

        Args:
            coverage: Float in (0, 1).

        Returns:
            Two arrays of the shape of `mean`: lower, upper.

        Raises:
            ValueError: For a coverage out of range, or for classes.

        Example:
            >>> import numpy as np
            >>> from keras_vdrop.montecarlo import Predictions
            >>> zero, half = np.zeros(1), np.full(1, 0.5)
            >>> predicted = Predictions(mean=zero, aleatoric_variance=half, epistemic_variance=half)
            >>> [round(float(end[0]), 2) for end in predicted.interval(coverage=0.95)]
            [-1.96, 1.96]
        """
        reach = statistics.NormalDist().inv_cdf(0.5 + 0.5 * fraction("coverage", coverage))
        stddev = self.stddev()
        return tuple(
            keras.tree.map_structure(lambda mean, spread, side=side: mean + side * reach * spread, self["mean"], stddev)
            for side in (-1.0, 1.0)
        )

    def uncertainty(self):
        """Return the total uncertainty of each row, (B,), due to data and model (the model alone without a likelihood).

        It is the predictive entropy, in nats, or the variance, in squared units of y, summed over all values of a row.
        """
        if "predictive_entropy" in self:
            return _each_row(self["predictive_entropy"])
        if "variance" in self:
            return sum(_each_row(variance) for variance in keras.tree.flatten(self["variance"]))
        return _each_row(self["aleatoric_variance"] + self["epistemic_variance"])

    def abstain(self, coverage=0.95):
        """Return a boolean array (B,), True for the rows to hand to a person: the most uncertain, NaN first.

        Args:
            coverage: Float in [0, 1], the least share of rows to answer. On validation data, `plots.risk_coverage`
                shows how the error falls if the model answers fewer rows.

        Raises:
            ValueError: For a coverage out of range.

        Reference:
            Selective Classification for Deep Neural Networks, Geifman, El-Yaniv, 2017, https://arxiv.org/abs/1705.08500
        """
        if not 0.0 <= coverage <= 1.0:
            raise ValueError(f"`coverage` must lie between 0 and 1. Received: coverage={coverage!r}")
        uncertainty = self.uncertainty()
        handed_over = math.floor((1.0 - coverage) * len(uncertainty) + 1e-9)
        order = np.argsort(-np.nan_to_num(uncertainty, nan=np.inf, posinf=np.inf), kind="stable")
        return np.isin(np.arange(len(uncertainty)), order[:handed_over])

    def bald(self):
        """Return I[y; w | x] of each row, (B,), in nats: how much its label would tell about the weights.

        In active learning, label the rows with the highest values. For classes, it is the mutual information. For
        numbers, it is ½·log(1 + epistemic / aleatoric variance), which holds if both parts are normal. It is summed
        over all values of a row.

        Raises:
            ValueError: Without a likelihood, since only that tells which part of the variance is due to the data.

        Reference:
            Bayesian Active Learning for Classification and Preference Learning, Houlsby, Huszár, Ghahramani, Lengyel,
            2011, https://arxiv.org/abs/1112.5745
        """
        if "mutual_information" in self:
            return _each_row(self["mutual_information"])
        if "variance" in self:
            raise ValueError("What a label would tell depends on its noise: give `MonteCarlo` a `likelihood`.")
        return _each_row(0.5 * np.log1p(self["epistemic_variance"] / self["aleatoric_variance"]))


def _each_row(values):
    """Sum over all axes but the first."""
    return _flat_rows(np.asarray(values)).sum(axis=1)


def _flat_rows(values):
    """Reshape a NumPy array (B, ...), which may have no rows, to (B, n)."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _has_no_rows(inputs):
    """Return whether the inputs are arrays of 0 rows."""
    shapes = [tuple(getattr(each, "shape", ())) for each in keras.tree.flatten(inputs)]
    return bool(shapes) and all(shape[:1] == (0,) for shape in shapes)


def _has_no_batch(data):
    """Return whether a data set reports that it has no batch."""
    if isinstance(data, keras.utils.PyDataset):
        return data.num_batches == 0
    cardinality = getattr(data, "cardinality", None)  # of a `tf.data.Dataset`
    return callable(cardinality) and int(cardinality()) == 0


def _gives_no_rows(data):
    """Return whether a data set that can be read again has no batch, or a first batch of 0 rows."""
    if any(hasattr(each, "shape") for each in keras.tree.flatten(data)):
        return False
    try:
        batches = iter(data)
    except TypeError:
        return False
    if batches is data:  # a generator, for which Keras raises a clear error itself
        return False
    first = next(batches, None)
    return first is None or _has_no_rows(first)


def _nothing_to_evaluate(x):
    return f"There are no rows to evaluate. Received: x={x!r}; give data of one row at least."


def _without_rows(found):
    return keras.tree.map_structure(lambda each: each[:0], found)


def _one_row_of(inputs):
    """Return one row of zeros in the layout of inputs without rows."""

    def row(each):
        if ops.is_tensor(each):
            return ops.zeros((1, *ops.shape(each)[1:]), dtype=each.dtype)
        each = np.asarray(each)
        return np.zeros((1, *each.shape[1:]), each.dtype)

    return keras.tree.map_structure(row, inputs)


def _in_tensorflow():
    return keras.backend.backend() == "tensorflow"


def _side_by_side(function, elements):
    """Apply `function` to each element and stack the results; vectorised where the backend can vectorise draws."""
    if elements.shape[0] == 1:
        return keras.tree.map_structure(lambda each: each[None], function(elements[0]))
    if _in_tensorflow():
        import tensorflow as tf

        # `ops.vectorized_map` would warn that random numbers are drawn one element after the other.
        return tf.vectorized_map(function, elements, warn=False)
    if keras.backend.backend() == "jax":
        return ops.vectorized_map(function, elements)
    results = [function(element) for element in ops.unstack(elements)]
    return keras.tree.map_structure(lambda *each: ops.stack(each), *results)


def _traced_once(function):
    """Wrap a function so that a TensorFlow graph holds one copy of it for all calls with the same shapes."""
    if not _in_tensorflow():
        return function
    import tensorflow as tf

    return function if tf.executing_eagerly() else tf.function(function)


def _at_least_float32(x):
    return x if keras.backend.standardize_dtype(x.dtype) == "float64" else ops.cast(x, "float32")


def _rows_not_finite(result):
    """Count the rows that contain NaN or infinity."""
    arrays = keras.tree.flatten(result)
    rows = np.zeros(len(arrays[0]), bool)
    for values in arrays:
        rows |= ~_flat_rows(np.isfinite(values)).all(axis=1)
    return int(rows.sum())


def _report_not_finite(wrong, rows):
    """Warn if any rows contain NaN or infinity."""
    if wrong:
        warnings.warn(
            f"There is NaN or infinity in the predictions of {wrong} of {rows} rows: look at their inputs, and at the "
            "model's weights.",
            stacklevel=4,
        )


# The lowest and highest of the values that should be probabilities, and the lowest and highest of their sums.
_ENDS = ("low", "high", "least", "most")


def _range_of(probability, likelihood, of):
    """Return the values that `_ENDS` names, over finite values only. `of` is `numpy`, or `keras.ops` for tensors."""
    sums = of.ones_like(probability) if likelihood == "bernoulli" else of.sum(probability, axis=-1)

    def extremes(values):
        known = of.isfinite(values)
        return of.min(of.where(known, values, math.inf)), of.max(of.where(known, values, -math.inf))

    return *extremes(probability), *extremes(sums)


def _check_probabilities(low, high, least, most):
    """Raise if means are not probabilities: means of probabilities always are, and those of logits hardly ever."""
    if low < -1e-3 or high > 1 + 1e-3 or (math.isfinite(least) and max(1.0 - least, most - 1.0) > 1e-2):
        raise ValueError(
            "With `from_logits=False` the outputs must be probabilities. Received: means from "
            f"{low:g} to {high:g}, with sums from {least:g} to {most:g}; give `from_logits=True`, or end the model in "
            "a softmax or a sigmoid."
        )
