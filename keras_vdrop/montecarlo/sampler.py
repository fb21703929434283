"""The model that predicts with many draws of another model's weights."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import keras
from keras import ops

from keras_vdrop.checks import check_positive_int, check_seed
from keras_vdrop.functional import uncertainty
from keras_vdrop.functional.tensors import to_numpy
from keras_vdrop.functional.tracing import in_tensorflow
from keras_vdrop.montecarlo import checks, reports
from keras_vdrop.montecarlo.draws import draw_seeds, draws_of
from keras_vdrop.montecarlo.readings import point_name, readings_of, serialized
from keras_vdrop.montecarlo.rows import (
    first_rows,
    gives_no_rows,
    has_no_batch,
    has_no_rows,
    no_rows_message,
    one_row_of,
    without_rows,
)
from keras_vdrop.outputs import output_names
from keras_vdrop.sampling import FixedSeeds, seed_generator, take_part
from keras_vdrop.targets import with_mask

if TYPE_CHECKING:
    from typing_extensions import Self

_OUTPUTS = ("statistics", "samples")
_SEED_STATE = "seed_state"


@keras.saving.register_keras_serializable(package="keras_vdrop")
class MonteCarlo(keras.Model):
    """A model that predicts with S draws of another model's weights, E_q[p(y | x, w)] ≈ mean over w_1 ... w_S ~ q.

    All draws run inside one compiled graph: `sample_batch_size` of them side by side, and these groups one after the
    other. The memory for activations therefore does not depend on S. The wrapped model does not change and stays
    deterministic, and everything in it that is not variational stays in inference mode. A layer of your own that draws
    random numbers there, with `keras.random`, draws anew for every draw. A stateful RNN starts every
    draw from its current state, and keeps that state. Masked time steps get statistics like all others, but `evaluate`
    ignores them. Saving a `MonteCarlo` saves the wrapped model, without that model's compile configuration.

    Keras's own dropout (`Dropout` and similar layers, and arguments such as `dropout=` of attention) is not drawn, and
    a warning says so. Use `MonteCarloDropout` for dropout that is to be drawn, and
    `Variational(layer, dropout="monte_carlo")` where it is within another layer.

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
            If an output has a mask, `mask` is among them: a boolean array (B, T), False for the steps to ignore.
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
            expected, or the reverse, as far as the last layer or, in `predict` and `evaluate`, the first outputs show;
            for a dict whose names are not those of the outputs. In a call, for outputs whose size does not fit the
            likelihood. In `compile`, for metrics that take a distribution's parameters or logits. In `evaluate`, for y
            or weights whose layout does not match the outputs, or for data without rows.

    Warns:
        UserWarning: For statistics of one draw; if a layer was trained with noise that no draw of its weights can
            produce, or without the full weight of its KL; if Keras's own dropout stays off; if there is an activation
            before a raw scale. In `predict` and `evaluate`, if the first logits of a binary classifier all lie between
            0 and 1; if rows contain NaN or infinity, with their number. In `evaluate`, if numbers are predicted worse
            than by the mean and variance of y, as happens if y was not standardised.

    Examples:
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
        model: keras.Model,
        num_samples: int = 32,
        likelihood: Any = None,
        from_logits: bool | dict[str, bool] = True,
        output: Literal["statistics", "samples"] = "statistics",
        seed: int | None = None,
        consistent: bool = False,
        sample_batch_size: int = 8,
        **kwargs: Any,
    ):
        check_positive_int("num_samples", num_samples)
        check_positive_int("sample_batch_size", sample_batch_size)
        if output not in _OUTPUTS:
            raise ValueError(f"`output` must be one of {_OUTPUTS}. Received: output={output!r}")
        if isinstance(model, MonteCarlo):
            raise ValueError(
                f"{model.name!r} is already a MonteCarlo. Pass the model that it wraps, its attribute `model`."
            )
        readings = readings_of(likelihood, from_logits)
        checks.check_num_samples(num_samples, output)
        check_seed(seed)
        checks.check_built(model)
        checks.check_draws(model)
        checks.check_noise_is_a_draw(model)
        checks.check_kl_weight(model)
        checks.check_outputs(model, readings)
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
        self._reports = reports.of(readings)
        self._unchecked = checks.need_outputs(model, readings)
        self.consistent = bool(consistent)
        if in_tensorflow():
            self.jit_compile = False
        self.built = True

    def build(self, input_shape: Any) -> None:
        self.built = True

    # Draws

    def samples(self, inputs: Any) -> Any:
        """Return the outputs of the wrapped model under S draws, (S, B, ...)."""
        if has_no_rows(inputs):
            return keras.tree.map_structure(lambda each: each[:, :0], self.samples(one_row_of(inputs)))
        draws, first, rest = self._draws(inputs)
        samples, _ = draws(first)
        if rest is None:
            return samples
        more = ops.map(lambda seeds: draws(seeds)[0], rest)
        count = rest.shape[0] * rest.shape[1]
        return keras.tree.map_structure(
            lambda one, others: ops.concatenate([one, ops.reshape(others, (count, *ops.shape(one)[1:]))]), samples, more
        )

    def _draws(self, inputs: Any) -> tuple[Callable[[Any], tuple[Any, dict[int, Any]]], Any, Any]:
        """Return the function `draws_of` the model, the seeds of the first group of draws, and those of the others."""
        generator = FixedSeeds(self.seed_generator.state) if self.consistent else self.seed_generator
        # XLA cannot tell where a loop ends, such as an RNN's, once TensorFlow has vectorised it.
        together = 1 if in_tensorflow() and self.jit_compile else self.sample_batch_size
        first, rest = draw_seeds(self.model, self.num_samples, together, generator)
        return draws_of(self.model, inputs, self.consistent, self._in_order), first, rest

    # Statistics

    def call(self, inputs: Any) -> Any:
        if has_no_rows(inputs):  # TensorFlow can neither vectorise draws of 0 rows nor sum them
            return without_rows(self.call(one_row_of(inputs)))
        if self.output_kind == "samples":
            return keras.tree.map_structure(lambda each: ops.swapaxes(each, 0, 1), self.samples(inputs))
        summary = self._summary()
        draws, first, rest = self._draws(inputs)
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
    def _is_named(self) -> bool:
        """Whether there are statistics for several outputs, by name."""
        return None not in self._readings

    def _summary(self) -> uncertainty.Summary:
        if self._is_named:
            return uncertainty.by_name({name: reading.summary for name, reading in self._readings.items()})
        return self._readings[None].summary

    def _interpreted(self, outputs: Any) -> Any:
        """Convert outputs to the samples that the summary takes, in float32 at least."""
        outputs = keras.tree.map_structure(_at_least_float32, outputs)
        if not self._is_named:
            return self._readings[None].samples(outputs)
        outputs = self._by_name(outputs, "outputs")
        if set(outputs) != set(self._readings):
            raise ValueError(checks.wrong_names(self._readings, outputs))
        return {name: reading.samples(outputs[name]) for name, reading in self._readings.items()}

    def _by_name(self, values: Any, what: str) -> dict[Any, Any]:
        """Return values that belong to outputs (a dict, a list in the order of the outputs, or one value) by name."""
        known = checks.known_names(self._readings)
        if isinstance(values, dict):
            if unknown := sorted(set(values) - set(self._readings)):
                raise ValueError(f"The names {unknown} of {what} are not in `likelihood`. {known}")
            return dict(values)
        values = list(values) if isinstance(values, (list, tuple)) else [values]
        names = output_names(self.model) or (tuple(self._readings) if len(self._readings) == 1 else None)
        if names is None:
            raise ValueError(f"The outputs of {self.model.name!r} have no names. Let the model return a dict. {known}")
        if len(values) != len(names):
            raise ValueError(f"Expected {what} for each of {names}. Received: {len(values)} value(s)")
        return dict(zip(names, values))

    def _in_order(self, outputs: Any) -> list[Any]:
        """Return the outputs as a flat list, in the order in which `_masked` assigns their masks."""
        return keras.tree.flatten(self._by_name(outputs, "outputs") if self._is_named else outputs)

    def _masked(self, found: Any, masks: dict[int, Any]) -> Any:
        """Add the masks of the outputs, and attach them to the statistics that y is compared with, for `evaluate`."""
        if not masks:
            return found
        by_name = found if self._is_named else {None: found}
        points = {name: each[point_name(each)] for name, each in by_name.items()}
        flat = keras.tree.flatten(points)
        in_order = [masks.get(index) for index in range(len(flat))]
        masks = keras.tree.pack_sequence_as(points, in_order)
        points = keras.tree.pack_sequence_as(points, list(map(with_mask, flat, in_order)))
        by_name = {name: _with_point(by_name[name], points[name], masks[name]) for name in sorted(by_name)}
        return by_name if self._is_named else by_name[None]

    # The interface of a Keras model

    def compile(
        self,
        optimizer: Any = None,
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        *args: Any,
        jit_compile: Literal["auto"] | bool = "auto",
        **kwargs: Any,
    ) -> None:
        """Configure `evaluate`, as in Keras. No optimizer is needed; on TensorFlow, `jit_compile="auto"` means False.

        Raises:
            ValueError: For a metric that takes a model's outputs (the parameters of a distribution, or logits) and not
                a prediction made from them.
        """
        if jit_compile == "auto" and in_tensorflow():
            jit_compile = False
        for each in (metrics, weighted_metrics):
            checks.check_metrics(each, self._readings)
        super().compile(
            optimizer, loss, loss_weights, metrics, weighted_metrics, *args, jit_compile=jit_compile, **kwargs
        )

    def compile_from_config(self, config: dict[str, Any]) -> None:
        self.compile(**keras.saving.deserialize_keras_object(config))

    def make_predict_function(self, force: bool = False) -> Callable[..., Any]:
        take_part()  # mark the scope as used: a compiled MonteCarlo draws without asking for the scope
        return super().make_predict_function(force)

    def make_test_function(self, force: bool = False) -> Callable[..., Any]:
        take_part()
        return super().make_test_function(force)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict as in Keras; return `Predictions`, a dict of them by output name, or an array of samples.

        Inputs without rows give arrays without rows. A data set without a batch does not tell their shapes.

        Raises:
            ValueError: For a data set or generator without a batch.
        """
        if has_no_rows(x):
            return self.predict_on_batch(x)
        self._check_logits(x)
        try:
            with self._restored():
                result = super().predict(x, *args, **kwargs)
        except UnboundLocalError as error:  # Keras reads the last batch, which was never set
            raise ValueError(
                "There is nothing to predict: the data have no batch. To predict 0 rows, pass arrays of 0 rows. "
                f"Received: x={x!r}"
            ) from error
        return self._as_predictions(result)

    def predict_on_batch(self, x: Any) -> Any:
        """Predict one batch; otherwise as `predict`."""
        if not has_no_rows(x):
            self._check_logits(x)
            return self._as_predictions(super().predict_on_batch(x))
        return self._as_predictions(without_rows(super().predict_on_batch(one_row_of(x))))

    def _check_logits(self, data: Any) -> None:
        """Look for probabilities in the first outputs, where the last layer does not show what they are."""
        if not self._unchecked or self.output_kind == "samples":
            return
        rows = first_rows(data, checks.ROWS)
        if rows is None:
            return
        with keras.StatelessScope(state_mapping=[(v, ops.convert_to_tensor(v)) for v in self.model.variables]):
            outputs = self.model(rows, training=False)
        outputs = self._by_name(outputs, "outputs") if self._is_named else {None: outputs}
        for name, reading in self._unchecked.items():
            checks.check_logits(to_numpy(outputs[name]), reading.likelihood, reading.where)
        self._unchecked = {}

    def _as_predictions(self, result: Any) -> Any:
        """Check the arrays, and return them in the form that `predict` documents."""
        checks.report_not_finite(checks.rows_not_finite(result), len(keras.tree.flatten(result)[0]))
        if self.output_kind == "samples":
            return result
        if not self._is_named:
            return self._readings[None].predictions(result)
        return {name: reading.predictions(result[name]) for name, reading in self._readings.items()}

    def evaluate(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as in Keras; the loss is the NLL of the prediction, unless `compile` was given one.

        Raises:
            ValueError: If there are no rows.
        """
        if has_no_rows(x) or has_no_batch(x):
            raise ValueError(no_rows_message(x))
        self._check_logits(x)
        try:
            with self._restored():
                result = super().evaluate(x, *args, **kwargs)
        except Exception as error:  # the type differs between backends
            if gives_no_rows(x):
                raise ValueError(no_rows_message(x)) from error
            raise
        if not self._reports[0].count:
            raise ValueError(no_rows_message(x))
        for report in self._reports:
            report.report()
        return result

    def test_on_batch(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch, which must have rows; otherwise as in Keras."""
        if has_no_rows(x):
            raise ValueError(no_rows_message(x))
        return super().test_on_batch(x, *args, **kwargs)

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
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

    def fit(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: a `MonteCarlo` only predicts."""
        raise NotImplementedError("A MonteCarlo only predicts: fit the model that it wraps.")

    train_on_batch = fit

    def export(
        self, filepath: str | os.PathLike, format: str = "tf_saved_model", *, input_signature: Any = None, **kwargs: Any
    ) -> None:
        """Export to a SavedModel, as in Keras. The exported model takes the inputs of the wrapped model.

        Raises:
            ValueError: For another format. The runtimes of ONNX and LiteRT have no operations for the draws, and would
                reject the file.
        """
        if format != "tf_saved_model":
            raise ValueError(
                "A MonteCarlo draws random numbers with operations that only TensorFlow runs, so it can be exported "
                'only to a SavedModel. Pass `format="tf_saved_model"`. Or export the model without noise: '
                "`keras_vdrop.compact(model)` or `keras_vdrop.to_deterministic(model)`. "
                f"Received: format={format!r}"
            )
        if input_signature is None and hasattr(self.model, "inputs"):
            input_signature = self.model.inputs if isinstance(self.model, keras.Sequential) else [self.model.input]
        super().export(filepath, format, input_signature=input_signature, **kwargs)

    @property
    def losses(self) -> list[Any]:
        """An empty list: the penalties of the wrapped model are for its training."""
        return []

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = False
    ) -> Any:
        if self.loss is not None or (not self._is_named and self.likelihood is None):
            y, point, weight = self._compared(y, y_pred, sample_weight)
            return super().compute_loss(x, y, point, weight, training)
        rows = self._rows(y, y_pred, sample_weight)
        if self._is_named and set(rows) != set(self._readings):
            raise ValueError(f"The loss requires `y` for every output. Received: y for {sorted(rows)}")
        return sum(self._readings[name].loss(*row) for name, row in rows.items())

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        rows = self._rows(y, y_pred, sample_weight)
        for report in self._reports:
            report.update_state(y_pred, rows)
        y, point, weight = self._compared(y, y_pred, sample_weight)
        return super().compute_metrics(x, y, point, weight)

    def _rows(self, y: Any, found: Any, weight: Any) -> dict[str | None, tuple[Any, Any, Any]]:
        """Return (y, statistics, weight) of every output that has a y, by name; None is the name of a single output."""
        if self.output_kind == "samples":
            raise ValueError('`evaluate` requires `output="statistics"`. Received: output="samples"')
        if not self._is_named:
            return {None: (y, found, weight)}
        y = self._by_name(y, "y")
        if weight is None or ops.is_tensor(weight):
            weight = dict.fromkeys(y, weight)
        weight = self._by_name(weight, "sample_weight")
        return {name: (y[name], found[name], weight.get(name)) for name in y}

    def _compared(self, y: Any, found: Any, weight: Any) -> tuple[Any, Any, Any]:
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

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        store[_SEED_STATE] = self.seed_generator.state

    def load_own_variables(self, store: Any) -> None:
        keys = set(store.keys())  # a store lacks some methods of a dict
        super().load_own_variables({key: store[key] for key in keys - {_SEED_STATE}})
        if _SEED_STATE in keys:
            self.seed_generator.state.assign(store[_SEED_STATE])

    def get_config(self) -> dict[str, Any]:
        model: Any = keras.saving.serialize_keras_object(self.model)
        model.pop("compile_config", None)  # not used here, but loading would need its custom objects
        return {
            **super().get_config(),
            "model": model,
            "num_samples": self.num_samples,
            "likelihood": serialized(self.likelihood),
            "from_logits": dict(self.from_logits) if isinstance(self.from_logits, dict) else self.from_logits,
            "output": self.output_kind,
            "seed": self.seed,
            "consistent": self.consistent,
            "sample_batch_size": self.sample_batch_size,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "Self":
        def loaded(value):
            if not isinstance(value, dict):
                return value
            if "class_name" in value:
                return keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
            return {name: loaded(each) for name, each in value.items()}

        return cls(**{**config, "model": loaded(config["model"]), "likelihood": loaded(config["likelihood"])})


def _with_point(found: dict[str, Any], point: Any, mask: Any) -> dict[str, Any]:
    """Return statistics with the one that y is compared with, and with its mask if that is one tensor."""
    own = {"mask": mask} if ops.is_tensor(mask) else {}
    return {**found, point_name(found): point, **own}


def _at_least_float32(x: Any) -> Any:
    return x if keras.backend.standardize_dtype(x.dtype) == "float64" else ops.cast(x, "float32")
