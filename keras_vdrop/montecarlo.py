"""`MonteCarlo`: predictions from many draws of the weights, and what to do about them."""

import math
import warnings

import keras
import numpy as np
from keras import ops

from keras_vdrop import costs
from keras_vdrop.functional import likelihoods, uncertainty
from keras_vdrop.layers.base import StochasticLayer, check_positive_int
from keras_vdrop.sampling import FixedSeeds, drawing, generator_states, seed_generator, take_part

_LIKELIHOODS = (None, "categorical", "bernoulli", "normal")
_OUTPUTS = ("statistics", "samples")
_SEED_STATE = "seed_state"


@keras.saving.register_keras_serializable(package="keras_vdrop")
class MonteCarlo(keras.Model):
    """A model that predicts with S draws of another model's weights, E_q[p(y | x, w)] ≈ mean over w_1 ... w_S ~ q.

    The draws are taken inside one compiled graph, `sample_batch_size` of them side by side and the others after them,
    so memory is that of so many, whatever S. The wrapped model stays as it is and deterministic, and everything in it
    that is not variational stays in inference mode. A stateful RNN starts every draw from the state that it holds, and
    keeps it. Steps that the model masks have statistics like all others, and count in `evaluate`. It is saved with the
    wrapped model, but not with what that was compiled with.

    In TensorFlow it runs without XLA unless `compile(jit_compile=True)` asks for it: that compiles for some seconds,
    and then predicts in less time.

    `evaluate` compares y with the `probability` or the `mean`, after `compile(metrics=[...])`. The loss, unless
    `compile` is given one, is −log p(y): of the mean probability, or of the normal distribution of that mean
    and both variances.

    Args:
        model: A built `keras.Model` with at least one variational layer.
        num_samples: Positive int, S.
        likelihood: What the outputs are, and so which statistics `predict` gives:
            None: `mean` and `variance` over the draws, of each output.
            "categorical": outputs (B, ..., C): `probability`, `predictive_entropy` (total), `expected_entropy` (of the
                data), `mutual_information` (of the model), in nats.
            "bernoulli": outputs (B, ...), the probability of 1 or its logit: the same.
            "normal": outputs (B, ..., 2), the loc and the raw scale, as `losses.NormalNLL` takes them: `mean`,
                `aleatoric_variance` and `epistemic_variance`.
            A loss of `losses`, or any object with `moments(outputs)` -> (mean, variance) of y: the same three.
        from_logits: Whether the outputs of a categorical or bernoulli model are logits.
        output: "statistics", or "samples" for the outputs themselves, (B, S, ...).
        seed: Int for the same draws in every run, or None.
        consistent: Whether a draw serves all rows, in all batches and calls, instead of each its own: S functions
            drawn from the posterior, with one mask for the whole prediction.
        sample_batch_size: Positive int, how many draws are taken side by side. What comes before the first noise is
            computed once for all of them, and accelerators are better filled; memory grows with it. It changes no
            result. (In TensorFlow under XLA, which gains nothing by it, and on several replicas, draws are taken one
            after the other.)
        **kwargs: `name`, `dtype`.

    Returns:
        `predict` gives `Predictions`, a dict of arrays; or an array of samples.

    Raises:
        ValueError: For a value that is out of range; a model in which nothing is drawn; probabilities where logits are
            expected, as far as the last layer's activation tells, or the other way round; and in a call, for outputs of
            another size than the likelihood takes.

    Warns:
        UserWarning: If a layer has learned with noise that no draw of its weights makes; and in `predict`, if there are
            rows with NaN or infinity: how many.

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
        if not (likelihood in _LIKELIHOODS or hasattr(likelihood, "moments")):
            raise ValueError(
                f"`likelihood` must be one of {_LIKELIHOODS} or one of `keras_vdrop.losses`. "
                f"Received: likelihood={likelihood!r}"
            )
        if output not in _OUTPUTS:
            raise ValueError(f"`output` must be one of {_OUTPUTS}. Received: output={output!r}")
        if not model.built:
            raise ValueError(f"The model {model.name!r} has not been built: call it on some data first.")
        if not any(isinstance(layer, StochasticLayer) and layer.draws for layer in model._flatten_layers()):
            raise ValueError(
                f"Every draw from the model {model.name!r} would be the same: it has no variational layer with a prior "
                "or a rate. Use one, such as keras_vdrop.VariationalDense, where it has a Keras layer."
            )
        if from_logits and likelihood in ("categorical", "bernoulli") and _ends_in_probabilities(model):
            raise ValueError(
                f"The model {model.name!r} ends in an activation that makes probabilities. Give `from_logits=False`."
            )
        _report_noise_of_places(model)
        # Its own arithmetic, and what it hands on: the wrapped model sees to its own precision.
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
        self.consistent = bool(consistent)
        if _in_tensorflow():
            self.jit_compile = False
        self.built = True

    def build(self, input_shape):
        self.built = True

    # Draws

    def samples(self, inputs):
        """The outputs of the wrapped model under S draws, (S, B, ...)."""
        first, rest = self._seeds()
        samples = self._draws(first, inputs)
        if rest is None:
            return samples
        more = ops.map(lambda seeds: self._draws(seeds, inputs), rest)
        return keras.tree.map_structure(
            lambda one, others: ops.concatenate([one, ops.reshape(others, (-1, *ops.shape(one)[1:]))]), samples, more
        )

    def _seeds(self):
        """One for each draw and generator of noise: of the first step (s, G), and of the others, of k draws each.

        The first takes what is left of the S draws when the others take as many as go side by side, and is there even
        if none is left.
        """
        shape = self.num_samples, len(generator_states(self.model))
        generator = FixedSeeds(self.seed_generator.state) if self.consistent else self.seed_generator
        seeds = keras.random.randint(shape, 0, 2**31 - 1, seed=generator)
        # Of what TensorFlow makes of loops side by side, such as an RNN's, XLA does not see the end; and its operations
        # are left without a device, so that replicas wait for each other for ever.
        apart = _in_tensorflow() and (self.jit_compile or _has_replicas())
        together = 1 if apart else self.sample_batch_size
        first = self.num_samples % together or min(together, self.num_samples)
        if first == self.num_samples:
            return seeds, None
        return seeds[:first], ops.reshape(seeds[first:], (-1, together, shape[1]))

    def _draws(self, seeds, inputs):
        """The outputs (s, B, ...) under s draws, side by side."""
        states = generator_states(self.model)
        ids = {id(state) for state in states}
        # Of what learned with noise of each place's own, draws are like that too.
        repeated = [
            id(layer.seed_generator.state)
            for layer, _ in costs.used_repeatedly(self.model)
            if layer.estimator != "local_reparameterization"
        ]
        held = [(v, ops.convert_to_tensor(v)) for v in self.model.variables if id(v) not in ids]

        def draw(seeds):
            """The outputs when every generator of noise starts from a seed of its own, and all else is as it is."""
            started = [
                (state, ops.cast(ops.stack([seed, 0]), state.dtype)) for state, seed in zip(states, ops.unstack(seeds))
            ]
            with keras.StatelessScope(state_mapping=started + held), drawing(self.consistent, repeated) as scope:
                outputs = self.model(inputs, training=False)
            if not scope.used:
                raise ValueError(
                    f"Nothing was drawn from {self.model.name!r}: its layers are called by a function that was "
                    "compiled before, such as a `call` under `tf.function`. Leave the compiling to `MonteCarlo`."
                )
            return outputs

        return _side_by_side(draw, seeds)

    # Statistics

    def call(self, inputs):
        if self.output_kind == "samples":
            return keras.tree.map_structure(lambda each: ops.swapaxes(each, 0, 1), self.samples(inputs))
        summary = self._summary()
        first, rest = self._seeds()
        samples = self._interpreted(self._draws(first, inputs))
        origin = keras.tree.map_structure(lambda each: each[0], samples)

        def total(samples):
            return keras.tree.map_structure(lambda each: ops.sum(each, axis=0), summary.terms(samples, origin))

        totals = total(samples)
        if rest is not None:

            def add(step, totals):
                samples = self._interpreted(self._draws(ops.take(rest, step, axis=0), inputs))
                return keras.tree.map_structure(ops.add, totals, total(samples))

            totals = ops.fori_loop(0, rest.shape[0], add, totals)
        means = keras.tree.map_structure(lambda each: each / self.num_samples, totals)
        return summary.statistics(means, origin)

    def _summary(self):
        if self.likelihood is None:
            return uncertainty.MOMENTS
        if self.likelihood == "categorical":
            return uncertainty.CATEGORICAL
        if self.likelihood == "bernoulli":
            return uncertainty.BERNOULLI
        return uncertainty.TOTAL_VARIANCE

    def _interpreted(self, outputs):
        """What the summary takes of outputs: in float32 at least."""
        outputs = keras.tree.map_structure(_at_least_float32, outputs)
        if self.likelihood is None:
            return outputs
        if not ops.is_tensor(outputs):
            raise ValueError(
                f"A `likelihood` is that of one output; a model of several takes None. "
                f"Received: likelihood={self.likelihood!r}, and {len(outputs)} outputs"
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
        """Refuse outputs whose last axis has not what the likelihood takes."""
        if self.likelihood == "categorical" and shape[-1] == 1:
            raise ValueError(
                'One output is no choice between classes: give likelihood="bernoulli", of which it is the logit. '
                f"Received: outputs of the shape {tuple(shape)}"
            )
        size = 2 if self.likelihood == "normal" else getattr(self.likelihood, "num_parameters", None)
        if size is not None and shape[-1] != size:
            raise ValueError(
                f"The likelihood takes outputs (B, ..., {size}). Received: likelihood={self.likelihood!r}, and outputs "
                f"of the shape {tuple(shape)}"
            )

    # What Keras's models do

    def compile(self, optimizer=None, *args, jit_compile="auto", **kwargs):
        """As in Keras; there is no optimizer, and in TensorFlow a `jit_compile` of "auto" is False."""
        if jit_compile == "auto" and _in_tensorflow():
            jit_compile = False
        super().compile(optimizer, *args, jit_compile=jit_compile, **kwargs)

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))

    def make_predict_function(self, force=False):
        take_part()  # it draws in any scope, and compiled as it is, does not say so
        return super().make_predict_function(force)

    def make_test_function(self, force=False):
        take_part()
        return super().make_test_function(force)

    def predict(self, x, *args, **kwargs):
        """As in Keras; gives `Predictions`, or an array of samples."""
        result = super().predict(x, *args, **kwargs)
        _report_not_finite(result)
        if self.output_kind == "samples":
            return result
        if self.likelihood in ("categorical", "bernoulli") and not self.from_logits:
            _check_probabilities(result["probability"], self.likelihood)
        return Predictions(result)

    def fit(self, *args, **kwargs):
        """Not for a `MonteCarlo`."""
        raise NotImplementedError("A MonteCarlo only predicts: fit the model that it wraps.")

    train_on_batch = fit

    def export(self, filepath, format="tf_saved_model", *, input_signature=None, **kwargs):
        """As in Keras; takes the inputs that the wrapped model does."""
        if input_signature is None and hasattr(self.model, "inputs"):
            input_signature = self.model.inputs if isinstance(self.model, keras.Sequential) else [self.model.input]
        super().export(filepath, format, input_signature=input_signature, **kwargs)

    @property
    def losses(self):
        """None: the penalties of the wrapped model are for its training."""
        return []

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=False):
        if self.likelihood is None or self.loss is not None:
            return super().compute_loss(x, y, self._point(y_pred), sample_weight, training)
        point = self._point(y_pred)
        if self.likelihood == "bernoulli":
            return keras.losses.BinaryCrossentropy()(y, point, sample_weight)
        if self.likelihood == "categorical":
            one_hot = len(y.shape) == len(point.shape) and y.shape[-1] == point.shape[-1]
            loss = keras.losses.CategoricalCrossentropy if one_hot else keras.losses.SparseCategoricalCrossentropy
            return loss()(y, point, sample_weight)
        variance = y_pred["aleatoric_variance"] + y_pred["epistemic_variance"]
        return _NormalNLL(name="nll")(y, ops.stack([y_pred["mean"], variance], axis=-1), sample_weight)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return super().compute_metrics(x, y, self._point(y_pred), sample_weight)

    def _point(self, statistics):
        """What y is compared with; of rank 2 at least, as Keras takes the mean over the last axis."""
        if self.output_kind == "samples":
            raise ValueError('`evaluate` compares y with a statistic. Received: output="samples"')
        point = statistics["probability" if "probability" in statistics else "mean"]
        return keras.tree.map_structure(lambda each: each[:, None] if len(each.shape) == 1 else each, point)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store[_SEED_STATE] = self.seed_generator.state

    def load_own_variables(self, store):
        keys = set(store.keys())  # a store is not quite a dict
        super().load_own_variables({key: store[key] for key in keys - {_SEED_STATE}})
        if _SEED_STATE in keys:
            self.seed_generator.state.assign(store[_SEED_STATE])

    def get_config(self):
        loss = self.likelihood is not None and not isinstance(self.likelihood, str)
        model = keras.saving.serialize_keras_object(self.model)
        model.pop("compile_config", None)  # it would have to load, though nothing here needs it
        return {
            **super().get_config(),
            "model": model,
            "num_samples": self.num_samples,
            "likelihood": keras.saving.serialize_keras_object(self.likelihood) if loss else self.likelihood,
            "from_logits": self.from_logits,
            "output": self.output_kind,
            "seed": self.seed,
            "consistent": self.consistent,
            "sample_batch_size": self.sample_batch_size,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        for name in ("model", "likelihood"):
            if isinstance(config[name], dict):
                config[name] = keras.saving.deserialize_keras_object(config[name], custom_objects=custom_objects)
        return cls(**config)


class _NormalNLL(keras.losses.Loss):
    """−log N(y; mean, variance), summed over all that a row holds; outputs (B, ..., 2) are that mean and variance."""

    def call(self, y_true, y_pred):
        mean, variance = y_pred[..., 0], y_pred[..., 1]
        values = -likelihoods.normal(ops.reshape(y_true, ops.shape(mean)), mean, ops.sqrt(variance))
        return ops.sum(ops.reshape(values, (ops.shape(values)[0], -1)), axis=-1)


class Predictions(dict):
    """What `MonteCarlo.predict` gives: a dict of arrays, the statistics; and what to do about the rows.

    Example:
        >>> import keras, keras_vdrop as kv, numpy as np
        >>> model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(3, initial_log_variance=-2.0)])
        >>> drawn = kv.MonteCarlo(model, likelihood="categorical").predict(np.ones((20, 4)), verbose=0)
        >>> int(drawn.abstain(coverage=0.9).sum())
        2
        >>> drawn.bald().shape
        (20,)
    """

    def uncertainty(self):
        """How unsure the prediction is, for each row (B,): all of it, of the data and of the model.

        The predictive entropy in nats, or the variance in squared units of y; summed over all that a row holds.
        """
        if "predictive_entropy" in self:
            return _each_row(self["predictive_entropy"])
        if "variance" in self:
            return sum(_each_row(variance) for variance in keras.tree.flatten(self["variance"]))
        return _each_row(self["aleatoric_variance"] + self["epistemic_variance"])

    def abstain(self, coverage=0.95):
        """True for the rows to hand to a person, (B,): the most uncertain ones, those with NaN first.

        Args:
            coverage: Float in [0, 1], the share of the rows to answer at least. `plots.risk_coverage` shows on
                validation data what fewer answers save.

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
        """I[y; w | x], for each row (B,): what its label would tell of the weights, in nats; label the highest ones.

        Of classes, the mutual information. Of numbers, ½·log(1 + epistemic ÷ aleatoric variance): that of two normal
        distributions. Summed over all that a row holds.

        Raises:
            ValueError: Without a likelihood, which alone says how much of the variance is the data's.

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
    """The sums over all but the first axis."""
    values = np.asarray(values)
    return values.reshape(len(values), -1).sum(axis=1)


def _in_tensorflow():
    return keras.backend.backend() == "tensorflow"


def _has_replicas():
    """Whether TensorFlow runs the caller on several devices at once."""
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync > 1


def _side_by_side(function, elements):
    """`function` of each element, stacked; all at once where the backend can do so with random numbers in it."""
    if elements.shape[0] == 1:
        return keras.tree.map_structure(lambda each: each[None], function(elements[0]))
    if _in_tensorflow():
        import tensorflow as tf

        # Not Keras's, which warns that random numbers are drawn one element after the other.
        return tf.vectorized_map(function, elements, warn=False)
    if keras.backend.backend() == "jax":
        return ops.vectorized_map(function, elements)
    results = [function(element) for element in ops.unstack(elements)]
    return keras.tree.map_structure(lambda *each: ops.stack(each), *results)


def _at_least_float32(x):
    return x if keras.backend.standardize_dtype(x.dtype) == "float64" else ops.cast(x, "float32")


def _ends_in_probabilities(model):
    """Whether the last thing that the model does is a softmax or a sigmoid, as far as it can be seen."""
    if isinstance(model, keras.Sequential):
        last = model.layers[-1]
    elif hasattr(model, "operations"):
        last = model.operations[-1]
    else:
        return False
    while isinstance(last, keras.layers.Wrapper):
        last = last.layer
    if isinstance(last, keras.Model):
        return _ends_in_probabilities(last)
    probabilities = (keras.activations.softmax, keras.activations.sigmoid)
    return isinstance(last, keras.layers.Softmax) or getattr(last, "activation", None) in probabilities


def _report_noise_of_places(model):
    """Say which layers have learned with noise that no draw of their weights makes."""
    names = [
        layer.name
        for layer, in_one_call in costs.used_repeatedly(model)
        if layer.learns_locally and (layer.estimator == "local_reparameterization" or not in_one_call)
    ]
    if names:
        warnings.warn(
            f"The layers {names} are used at several places of an example, and each place has noise of its own while "
            "they learn. No draw of their weights does that, so what `MonteCarlo` shows is not the uncertainty of their "
            'posterior. Learn by `estimator="flipout"`, and give a layer all places in one call, not one by one as a '
            "shared layer or `TimeDistributed` gets them.",
            stacklevel=3,
        )


def _report_not_finite(result):
    """Say how many rows hold NaN or infinity."""
    arrays = keras.tree.flatten(result)
    rows = np.zeros(len(arrays[0]), bool)
    for values in arrays:
        rows |= ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if rows.any():
        warnings.warn(
            f"There is NaN or infinity in the predictions of {rows.sum()} of {len(rows)} rows: look at their inputs, "
            "and at the model's weights.",
            stacklevel=3,
        )


def _check_probabilities(probability, likelihood):
    """Means of probabilities are such; those of logits hardly ever."""
    probability = probability[np.isfinite(probability)] if likelihood == "bernoulli" else probability
    sums = np.ones(1) if likelihood == "bernoulli" else probability.sum(axis=-1)
    sums = sums[np.isfinite(sums)]
    if (probability < -1e-3).any() or (probability > 1 + 1e-3).any() or (np.abs(sums - 1.0) > 1e-2).any():
        raise ValueError(
            "With `from_logits=False` the outputs must be probabilities. Received: means from "
            f"{np.nanmin(probability):g} to {np.nanmax(probability):g}, with sums from {sums.min():g} to "
            f"{sums.max():g}; give `from_logits=True`, or end the model in a softmax or a sigmoid."
        )
