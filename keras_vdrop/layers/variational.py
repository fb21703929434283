"""`Variational`: a wrapper that runs any Keras layer or model on random weights."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import keras

from keras_vdrop import priors
from keras_vdrop.checks import check_finite, check_log_variance, check_policy, check_positive, check_positive_int
from keras_vdrop.layers.monte_carlo_dropout import take_over_dropout
from keras_vdrop.layers.stochastic import StochasticLayer
from keras_vdrop.layers.weights import distinct
from keras_vdrop.posterior import LowRankUpdate, VariationalWeight, posteriors

if TYPE_CHECKING:
    from typing_extensions import Self


@keras.saving.register_keras_serializable(package="keras_vdrop")
class Variational(StochasticLayer, keras.Model):
    """y = f(x; W), W ~ N(loc, exp(log_variance)): any layer or model f with distributions for weights.

    In training (and within `sampling()`) each call draws all weights W once, for the whole batch, and runs the layer on
    them. Otherwise W = loc, and 0 where pruned. The layer still updates its other variables, such as the moments of
    BatchNormalization. The means are the layer's own variables, so the wrapped layer is the network at the posterior
    mean. `layer.losses` holds the KL between each weight and its prior.

    A layer that has a counterpart here, such as `VariationalDense`, draws for each example and learns from less noisy
    gradients. Use `Variational` for all others: your own blocks, layers of other packages, whole backbones.

    Args:
        layer: A `keras.layers.Layer` or `keras.Model`. It becomes a part of this layer.
        include: A regular expression, or a list of them. A weight is drawn if one of them is found in its path below
            the layer; for example "attention/.*kernel". None for every kernel and table: all variables that train, have
            at least two axes and are not called a bias.
        exclude: The same for weights that are not drawn.
        prior: "log_uniform" (prunes hardest), "ard" (prunes, and is a proper prior), "normal", "scale_mixture", a
            `priors.Prior`, or a TFP distribution.
        kl_weight: Float ≥ 0, 1 / (number of training examples); None if the `ELBO` callback sets it.
        initial_log_variance, log_variance_rate, threshold: As in `VariationalDense`.
        lora_rank: Positive int, r. Each weight W then stays fixed, and the layer draws and learns an update of it:
            W + (lora_alpha / r)·A·B with A ~ N(loc, exp(log_variance)) of shape (..., r) and a plain B of shape (r, U)
            that starts at 0. None for distributions over the weights themselves.
        lora_alpha: Float, the factor in the update; None for r.
        seed: Int for the same noise in every run, or None.
        dropout: None leaves the `Dropout` and `SpatialDropout` layers inside to Keras: active in training only.
            "monte_carlo" makes them active within `sampling()` and in `MonteCarlo` too, as `MonteCarloDropout` is.
        **kwargs: `name` (by default that of the layer) and `trainable`. The dtypes are always the layer's.

    Input shape:
        That of the layer, whose arguments are taken by position and by keyword.

    Output shape:
        That of the layer.

    Raises:
        ValueError: For a value that is out of range, for a quantized layer, for an expression that matches no path, or
            if `include` and `exclude` leave no weight of the layer to draw.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> block = keras.Sequential([keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)])
        >>> layer = kv.Variational(block, kl_weight=1 / 1000)
        >>> layer(keras.ops.ones((2, 4))).shape == (2, 3)
        True
        >>> [weight.shape for weight in layer.drawn.values()] == [(4, 8), (8, 3)]
        True

    Reference:
        Weight Uncertainty in Neural Networks, Blundell et al., 2015, https://arxiv.org/abs/1505.05424
    """

    # No serving signature for TensorFlow in an exported model: only the layer's code knows how it is called.
    _default_save_signature = None

    # Attributes of all variational layers: here each call makes one draw of the weights.
    estimator = "reparameterization"
    learns_locally = False

    def __init__(
        self,
        layer: keras.layers.Layer,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        prior: Any = "log_uniform",
        kl_weight: float | None = None,
        initial_log_variance: float | None = None,
        log_variance_rate: float = 5.0,
        threshold: float | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        seed: int | None = None,
        dropout: Literal["monte_carlo"] | None = None,
        **kwargs: Any,
    ):
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(f"`layer` must be an instance of a Keras layer or model. Received: layer={layer!r}")
        if "dtype" in kwargs:
            raise ValueError(
                "`Variational` uses the dtypes of `layer`. Pass `dtype` to that layer instead. "
                f"Received: dtype={kwargs['dtype']!r}"
            )
        for each in layer._flatten_layers():
            check_policy(each.dtype_policy)
        prior = priors.get(prior)
        if prior is None:
            raise ValueError("`prior` must not be None. To use no prior, use the layer itself. Received: prior=None")
        if initial_log_variance is not None:
            check_log_variance("initial_log_variance", initial_log_variance)
        check_positive("log_variance_rate", log_variance_rate)
        if threshold is not None:
            check_finite("threshold", threshold)
        if lora_rank is not None:
            check_positive_int("lora_rank", lora_rank)
        if lora_alpha is not None:
            check_finite("lora_alpha", lora_alpha)
        if dropout not in (None, "monte_carlo"):
            raise ValueError(f'`dropout` must be None or "monte_carlo". Received: dropout={dropout!r}')
        # The wrapped layer follows its own policy. The wrapper uses weights in the dtype in which they are stored.
        arguments = {"name": layer.name, **kwargs, "dtype": layer.variable_dtype, "autocast": False}
        super().__init__(kl_weight=kl_weight, seed=seed, **arguments)
        self.layer = layer
        self.include = _patterns("include", include)
        self.exclude = _patterns("exclude", exclude)
        self.prior = prior
        self.initial_log_variance = None if initial_log_variance is None else float(initial_log_variance)
        self.log_variance_rate = float(log_variance_rate)
        self.threshold = None if threshold is None else float(threshold)
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.dropout = dropout
        self.drawn = {}
        self._called_on: Any = None
        self._allow_non_tensor_positional_args = True
        if layer.built:
            self.build()

    # Building

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._called_on is not None:
            return super().__call__(*args, **kwargs)
        self._called_on = keras.tree.map_structure(_symbolic, (args, kwargs))
        try:
            if not self.built and len(args) == 1:
                # Keras does not pass the shapes of `*args` to `build`.
                self.build(keras.tree.map_structure(lambda x: x.shape, self._called_on[0][0]))
            return super().__call__(*args, **kwargs)
        except Exception:
            self._called_on = None  # the next call may have the right arguments
            raise

    def build(self, input_shape: Any = None) -> None:
        if not self.layer.built:
            # Some layers build their sublayers only when called, so call the layer once.
            args, kwargs = self._called_on or ((keras.tree.map_shape_structure(keras.KerasTensor, input_shape),), {})
            self.layer(*args, **kwargs)
        draw_from = self._draw_from if self.lora_rank is None else self._draw_update
        self.drawn = {path: draw_from(name, path, variable) for name, path, variable in self._chosen()}
        self._posterior_size = sum(weight.size for weight in self.drawn.values())
        self._masks = take_over_dropout(self.layer) if self.dropout else []
        self._build_noise()

    def _chosen(self) -> list[tuple[str, str, Any]]:
        """Return the variables to draw, each as (unique name, path below the layer, variable)."""
        taken = {id(each) for posterior in posteriors(self.layer) for each in posterior.variables}
        pairs = [(path, each) for path, each in trained_variables(self.layer) if id(each) not in taken]
        # Sublayers may have the same name.
        found = dict(zip(distinct(path for path, _ in pairs), (each for _, each in pairs)))
        for name, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns or ():
                if not any(_matches([pattern], path) for path in found):
                    raise ValueError(
                        f"`{name}` matches no weight of {self.layer.name!r}, whose paths are {list(found)}. "
                        f"Received: {name}={pattern!r}"
                    )
        paths = list(filter(_is_kernel(found), found))
        if self.include is not None:
            paths = [path for path in found if _matches(self.include, path)]
        paths = [path for path in paths if not _matches(self.exclude or (), path)]
        if not paths:
            raise ValueError(
                f"`include` and `exclude` select no weight of {self.layer.name!r}. They are matched against these "
                f"paths: {list(found)}. Received: include={self.include}, exclude={self.exclude}"
            )
        names = distinct(found[path].name for path in paths)
        return [(name, path, found[path]) for name, path in zip(names, paths)]

    def _draw_from(self, name: str, path: str, loc: Any) -> VariationalWeight:
        return VariationalWeight(
            self,
            super().add_weight,
            name,
            tuple(loc.shape),
            prior=self.prior,
            initial_log_variance=self.initial_log_variance,
            log_variance_rate=self.log_variance_rate,
            prunable=not _is_bias(path),
            loc=loc,
        )

    def _draw_update(self, name: str, path: str, kernel: Any) -> VariationalWeight:
        return LowRankUpdate(
            self,
            super().add_weight,
            f"{name}_lora",
            kernel,
            self.lora_rank,
            self.lora_alpha,
            prior=self.prior,
            initial_log_variance=self.initial_log_variance,
            log_variance_rate=self.log_variance_rate,
        ).a

    # Calling

    def call(self, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        # Quantization replaces the variables that are drawn, and Keras quantizes inner layers without calling this one.
        for each in self.layer._flatten_layers():
            check_policy(each.dtype_policy)
        # The wrapped layer gets `training` from the context of this call.
        noisy = self._noisy(training)
        values = [self._value(weight, noisy) for weight in self.drawn.values()]
        with _Drawn(values, collect_losses=True, initialize_variables=False) as scope:
            outputs = self.layer(*args, **kwargs)
        drawn = {id(variable) for variable, _ in values} if noisy else ()
        for variable in scope.updated.values():
            if id(variable) in drawn:
                raise ValueError(
                    f"The layer {self.layer.name!r} assigns to its weight {variable.path!r} in training. A weight that "
                    "is drawn cannot be assigned to. Leave it out by `exclude`, or use a variational layer within."
                )
            variable.assign(scope.get_current_value(variable))
        for loss in scope.losses:
            self.add_loss(loss + 0.0)  # a new tensor: Keras recognizes the wrapped layer's losses by identity
        return outputs

    def _value(self, weight: VariationalWeight, noisy: bool) -> tuple[Any, Any]:
        """Return a variable of the wrapped layer and its value in this call."""
        value = weight.mean()
        if noisy:
            value = value + weight.perturbation(self._seeds(weight.name))
        return (weight.loc, value) if weight.update is None else (weight.update.kernel, weight.update.whole(value))

    @property
    def draws(self) -> bool:
        return self._posterior_size > 0

    def compute_output_spec(self, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = keras.tree.map_shape_structure(keras.KerasTensor, (args, kwargs))
        kwargs = {name.removesuffix("_shape"): each for name, each in kwargs.items()}
        return keras.tree.map_structure(lambda each: each.shape, self.compute_output_spec(*args, **kwargs))

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        """Compute the mask for the first of the inputs; `inputs` holds all positional arguments."""
        if not inputs or not self.layer.supports_masking:
            return None
        return self.layer.compute_mask(inputs[0], previous_mask[0])

    # For `sparsity` and `MonteCarlo`

    def places(self, input_shape: Sequence[int | None]) -> int | None:
        return None  # unknown: it depends on the wrapped layer's code

    def uses(self, input_shape: Sequence[int | None]) -> int | None:
        """Return None (unknown), because it depends on the wrapped layer's code."""
        return None

    def stock_variables(self) -> list[Any]:
        means = {id(getattr(posterior, "loc", None)) for posterior in posteriors(self)}
        own = {id(each) for posterior in posteriors(self) for each in posterior.variables} - means
        within = [each for each in self.layer._flatten_layers() if isinstance(each, StochasticLayer)]
        own |= {id(each) for inner in within for each in (inner._kl_weight, inner._free_bits)}
        return [each for each in self.layer.weights if id(each) not in own]

    # Saving

    def get_build_config(self) -> dict[str, Any]:
        if self._called_on is None:
            return {"layer": self.layer.get_build_config()}
        args, kwargs = (keras.tree.map_structure(_described, each) for each in self._called_on)
        return {"args": list(args), "kwargs": kwargs}

    def build_from_config(self, config: dict[str, Any]) -> None:
        if "args" in config:
            self._called_on = _from_described(config["args"]), _from_described(config["kwargs"])
        elif not self.layer.built:
            self.layer.build_from_config(config["layer"])
            self.layer.built = True  # as Keras does after it calls `build_from_config`
        if not self.built:
            self.build()

    def get_config(self) -> dict[str, Any]:
        layer: Any = keras.saving.serialize_keras_object(self.layer)
        # The wrapped layer is compiled and built only as a part of this layer.
        layer = {name: value for name, value in layer.items() if name not in ("compile_config", "build_config")}
        config = {
            **super().get_config(),
            "layer": layer,
            "include": self.include,
            "exclude": self.exclude,
            "prior": priors.serialize(self.prior),
            "initial_log_variance": self.initial_log_variance,
            "log_variance_rate": self.log_variance_rate,
            "threshold": self.threshold,
            "lora_rank": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "dropout": self.dropout,
        }
        return {name: value for name, value in config.items() if name != "dtype"}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "Self":
        # Keras modifies the config of a model when it deserializes the model.
        layer = keras.saving.deserialize_keras_object(copy.deepcopy(config["layer"]), custom_objects=custom_objects)
        return cls(**{**config, "layer": layer})


class _Drawn(keras.StatelessScope):
    """A scope in which some variables have other values, and all others keep their values from outside.

    Attributes:
        updated: The variables that were assigned to within the scope, by id.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.updated = {}

    def add_update(self, update: tuple[Any, Any]) -> None:
        variable, _ = update
        self.updated[id(variable)] = variable
        super().add_update(update)

    def get_current_value(self, variable: Any) -> Any:
        value = super().get_current_value(variable)
        if value is None and self.original_scope is not None:
            return self.original_scope.get_current_value(variable)
        return value


def trained_variables(layer: keras.layers.Layer) -> Iterator[tuple[str, Any]]:
    """Yield (path, variable) for each variable of a layer and its sublayers that trains, or would if not frozen.

    A path joins the names of the sublayers below `layer` and of the variable. Keras's own path of a variable depends on
    where the layer was built.
    """
    seen = set()

    def visit(layer, path):
        for each in layer._trainable_variables:
            if id(each) not in seen:
                seen.add(id(each))
                yield "/".join([*path, each.name]), each
        for inner in layer._flatten_layers(include_self=False, recursive=False):
            yield from visit(inner, [*path, inner.name])

    return visit(layer, [])


def _is_bias(path: str) -> bool:
    return "bias" in path.rsplit("/")[-1]


def _is_kernel(variables: Mapping[str, Any]) -> Callable[[str], bool]:
    return lambda path: len(variables[path].shape) > 1 and not _is_bias(path)


def _patterns(name: str, value: str | Sequence[str] | None) -> list[str] | None:
    """Return a checked list of regular expressions, or None."""
    if value is None:
        return None
    try:
        patterns = [value] if isinstance(value, str) else list(value)
        for pattern in patterns:
            re.compile(pattern)
    except (TypeError, re.error) as error:
        raise ValueError(
            f"`{name}` must be a regular expression, a list of them, or None: {error}. Received: {name}={value!r}"
        ) from error
    return patterns


def _matches(patterns: Iterable[str], path: str) -> bool:
    return any(re.search(pattern, path) for pattern in patterns)


def _symbolic(x: Any) -> Any:
    """Replace an array by a `KerasTensor`, with which a layer can be built; return anything else as it is."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        return x
    return keras.KerasTensor(tuple(x.shape), keras.backend.standardize_dtype(x.dtype))


def _described(x: Any) -> Any:
    """Describe an argument for a file: a tensor by its shape and dtype, numbers and strings as they are, else None."""
    if isinstance(x, keras.KerasTensor):
        return {"shape": list(x.shape), "dtype": x.dtype}
    return x if isinstance(x, (bool, int, float, str)) else None


def _from_described(value: Any) -> Any:
    """Return the arguments that `_described` has described."""
    if isinstance(value, dict) and set(value) == {"shape", "dtype"}:
        return keras.KerasTensor(tuple(value["shape"]), value["dtype"])
    if isinstance(value, dict):
        return {name: _from_described(each) for name, each in value.items()}
    return [_from_described(each) for each in value] if isinstance(value, (list, tuple)) else value
