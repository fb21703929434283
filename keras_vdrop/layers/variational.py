"""`Variational`: any Keras layer or model, run on weights that are drawn."""

import copy
import itertools
import re

import keras

from keras_vdrop import priors
from keras_vdrop.layers.base import (
    StochasticLayer,
    check_finite,
    check_log_variance,
    check_policy,
    check_positive,
    check_positive_int,
)
from keras_vdrop.posterior import LowRankUpdate, VariationalWeight, posteriors


@keras.saving.register_keras_serializable(package="keras_vdrop")
class Variational(StochasticLayer, keras.Model):
    """y = f(x; W), W ~ N(loc, exp(log_variance)): any layer or model f with distributions for weights.

    In training (and within `sampling()`) each call draws all weights W once, for the whole batch, and runs the layer on
    them. Otherwise W = loc, and 0 where pruned. What the layer updates, such as the moments of BatchNormalization, it
    updates as ever. The means are the layer's own variables, so that it is the network at the posterior mean. The KL of
    each weight to its prior is in `layer.losses`.

    A layer that has a class of its own here, such as `VariationalDense`, draws for each example, and learns from less
    noise. This one is for all others: blocks of your own, layers of other packages, whole backbones.

    Args:
        layer: A `keras.layers.Layer` or `keras.Model`. It becomes a part of this one.
        include: A regular expression, or a list of them: weights whose path below the layer one of them is found in,
            such as "attention/.*kernel". None for every kernel and table: all that trains, has at least two axes and is
            not called a bias.
        exclude: The same for weights to leave out.
        prior: "log_uniform" (prunes hardest), "ard" (prunes, and is a proper prior), "normal", a `priors.Prior`, or a
            TFP distribution.
        kl_weight: Float ≥ 0, 1 / (number of training examples); None where the `ELBO` callback sets it.
        initial_log_variance, log_variance_rate, threshold: As in `VariationalDense`.
        lora_rank: Positive int, r: each weight W stays as it is, and what is drawn and learned is an update of it,
            W + lora_alpha / r·A·B with A ~ N(loc, exp(log_variance)), (..., r), and B, (r, U), that is plain and starts
            at 0. None for distributions over the weights themselves.
        lora_alpha: Float, the factor of the update; None for r.
        seed: Int for the same noise in every run, or None.
        **kwargs: `name`, that of the layer unless it is given, and `trainable`. Its dtypes are the layer's.

    Input shape:
        What the layer takes, by position and by keyword.

    Output shape:
        What the layer gives.

    Raises:
        ValueError: For a value that is out of range, a layer that is quantized, an expression that is found in no
            path, and a layer in which there is no weight to draw.

    Example:
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

    # Only the layer's code knows how TensorFlow should call what is exported as a part of a model.
    _default_save_signature = None

    # As a layer of the family, which is asked for them: one draw of the weights for all of a call.
    estimator = "reparameterization"
    learns_locally = False

    def __init__(
        self,
        layer,
        include=None,
        exclude=None,
        prior="log_uniform",
        kl_weight=None,
        initial_log_variance=None,
        log_variance_rate=5.0,
        threshold=None,
        lora_rank=None,
        lora_alpha=None,
        seed=None,
        **kwargs,
    ):
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(f"`layer` must be a Keras layer or model, not a class. Received: layer={layer!r}")
        if "dtype" in kwargs:
            raise ValueError(f"The dtypes are those of the layer: give it `dtype`. Received: dtype={kwargs['dtype']!r}")
        for each in layer._flatten_layers():
            check_policy(each.dtype_policy)
        prior = priors.get(prior)
        if prior is None:
            raise ValueError("`prior` is needed: what it is None for is the layer itself. Received: prior=None")
        if initial_log_variance is not None:
            check_log_variance("initial_log_variance", initial_log_variance)
        check_positive("log_variance_rate", log_variance_rate)
        if threshold is not None:
            check_finite("threshold", threshold)
        if lora_rank is not None:
            check_positive_int("lora_rank", lora_rank)
        if lora_alpha is not None:
            check_finite("lora_alpha", lora_alpha)
        # Within the layer its own policy holds. Out here, weights are as they are stored.
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
        self.drawn = {}
        self._called_on = None
        self._allow_non_tensor_positional_args = True
        if layer.built:
            self.build()

    # Building

    def __call__(self, *args, **kwargs):
        if self._called_on is None:
            self._called_on = keras.tree.map_structure(_symbolic, (args, kwargs))
            if not self.built and len(args) == 1:
                # What Keras calls with arguments that have no names, it does not tell their shapes.
                self.build(keras.tree.map_structure(lambda x: x.shape, self._called_on[0][0]))
        return super().__call__(*args, **kwargs)

    def build(self, input_shape=None):
        if not self.layer.built:
            # Of layers that build what is within them when they are called, a call is what builds all.
            args, kwargs = self._called_on or ((keras.tree.map_shape_structure(keras.KerasTensor, input_shape),), {})
            self.layer(*args, **kwargs)
        draw_from = self._draw_from if self.lora_rank is None else self._draw_update
        self.drawn = {path: draw_from(name, path, variable) for name, path, variable in self._chosen()}
        self._posterior_size = sum(weight.size for weight in self.drawn.values())
        self._build_noise()

    def _chosen(self):
        """The variables to draw: of each a name of its own, its path below the layer and itself."""
        taken = {id(each) for posterior in posteriors(self.layer) for each in posterior.variables}
        pairs = [(path, each) for path, each in trained_variables(self.layer) if id(each) not in taken]
        # Layers within a layer may have one name.
        found = dict(zip(_distinct(path for path, _ in pairs), (each for _, each in pairs)))
        paths = list(filter(_is_kernel(found), found))
        if self.include is not None:
            paths = [path for path in found if _matches(self.include, path)]
        paths = [path for path in paths if not _matches(self.exclude or (), path)]
        if not paths:
            raise ValueError(
                f"There is no weight of {self.layer.name!r} to draw: `include` and `exclude` are searched in these "
                f"paths: {list(found)}. Received: include={self.include}, exclude={self.exclude}"
            )
        names = _distinct(found[path].name for path in paths)
        return [(name, path, found[path]) for name, path in zip(names, paths)]

    def _draw_from(self, name, path, loc):
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

    def _draw_update(self, name, path, kernel):
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

    def call(self, *args, training=None, **kwargs):
        # The layer within takes `training` from this one's call.
        noisy = self._noisy(training)
        values = [self._value(weight, noisy) for weight in self.drawn.values()]
        with _Drawn(values, collect_losses=True, initialize_variables=False) as scope:
            outputs = self.layer(*args, **kwargs)
        for variable in scope.updated.values():
            variable.assign(scope.get_current_value(variable))
        for loss in scope.losses:
            self.add_loss(loss + 0.0)  # another tensor: the layer within knows its own by identity
        return outputs

    def _value(self, weight, noisy):
        """A variable of the layer, and what it is in this call."""
        value = weight.mean()
        if noisy:
            value = value + weight.perturbation(self._seeds(weight.name))
        return (weight.loc, value) if weight.update is None else (weight.update.kernel, weight.update.whole(value))

    @property
    def draws(self):
        return self._posterior_size > 0

    def compute_output_spec(self, *args, training=None, **kwargs):
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, *args, **kwargs):
        args, kwargs = keras.tree.map_shape_structure(keras.KerasTensor, (args, kwargs))
        kwargs = {name.removesuffix("_shape"): each for name, each in kwargs.items()}
        return keras.tree.map_structure(lambda each: each.shape, self.compute_output_spec(*args, **kwargs))

    def compute_mask(self, inputs, previous_mask):
        """Of the first of the inputs, which are all that were given by position."""
        if not inputs or not self.layer.supports_masking:
            return None
        return self.layer.compute_mask(inputs[0], previous_mask[0])

    # What `sparsity` and `MonteCarlo` ask

    def places(self, input_shape):
        return None  # only the layer's code tells

    def uses(self, input_shape):
        """Only the layer's code tells."""
        return None

    def stock_variables(self):
        own = {id(each) for posterior in posteriors(self) for each in posterior.variables if each is not posterior.loc}
        return [each for each in self.layer.weights if id(each) not in own]

    # Saving

    def get_build_config(self):
        if self._called_on is None:
            return {"layer": self.layer.get_build_config()}
        args, kwargs = keras.tree.map_structure(_described, self._called_on)
        return {"args": list(args), "kwargs": kwargs}

    def build_from_config(self, config):
        if "args" in config:
            self._called_on = _from_described(config["args"]), _from_described(config["kwargs"])
        elif not self.layer.built:
            self.layer.build_from_config(config["layer"])
            self.layer.built = True  # which Keras sets where it calls that
        if not self.built:
            self.build()

    def get_config(self):
        layer = keras.saving.serialize_keras_object(self.layer)
        # It is compiled and built, if at all, as a part of this one.
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
        }
        return {name: value for name, value in config.items() if name != "dtype"}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        # Keras takes apart the config of a model that it makes.
        layer = keras.saving.deserialize_keras_object(copy.deepcopy(config["layer"]), custom_objects=custom_objects)
        return cls(**{**config, "layer": layer})


class _Drawn(keras.StatelessScope):
    """A scope in which some variables have other values, and all others the value that they have outside of it.

    Attributes:
        updated: The variables that were assigned to within it, by id.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.updated = {}

    def add_update(self, update):
        variable, _ = update
        self.updated[id(variable)] = variable
        super().add_update(update)

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        if value is None and self.original_scope is not None:
            return self.original_scope.get_current_value(variable)
        return value


def trained_variables(layer):
    """What optimizers train of a layer and of all within it, or would if it were not frozen: paths and variables.

    A path is made of the names of the layers below the first, and of the variable's: Keras's own depends on where the
    layer was built.
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


def _is_bias(path):
    return "bias" in path.rsplit("/")[-1]


def _is_kernel(variables):
    return lambda path: len(variables[path].shape) > 1 and not _is_bias(path)


def _patterns(name, value):
    """A list of regular expressions, or None."""
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


def _matches(patterns, path):
    return any(re.search(pattern, path) for pattern in patterns)


def _distinct(names):
    """The names, with a number behind those that were there before: a list."""
    found = []
    for name in names:
        others = (f"{name}_{number}" for number in itertools.count(1))
        found.append(next(each for each in itertools.chain([name], others) if each not in found))
    return found


def _symbolic(x):
    """What stands for an array where a layer is built."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        return x
    return keras.KerasTensor(tuple(x.shape), keras.backend.standardize_dtype(x.dtype))


def _described(x):
    """What a file says of an argument: a dict of a tensor's shape and dtype; nothing of what is no number or word."""
    if isinstance(x, keras.KerasTensor):
        return {"shape": list(x.shape), "dtype": x.dtype}
    return x if isinstance(x, (bool, int, float, str)) else None


def _from_described(value):
    """The arguments that `_described` described."""
    if isinstance(value, dict) and set(value) == {"shape", "dtype"}:
        return keras.KerasTensor(tuple(value["shape"]), value["dtype"])
    if isinstance(value, dict):
        return {name: _from_described(each) for name, each in value.items()}
    return [_from_described(each) for each in value] if isinstance(value, (list, tuple)) else value
