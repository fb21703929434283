"""Priors over weights. Each prior is a class with a method `kl(loc, log_variance)`, elementwise and in nats."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import keras
from keras import ops

from keras_vdrop import distributions
from keras_vdrop.checks import check_finite, check_fraction, check_positive, check_positive_int, is_int
from keras_vdrop.functional import kl, sparsity
from keras_vdrop.variables import LogScaleOf

if TYPE_CHECKING:
    from typing_extensions import Self


class Prior:
    """Base class of priors p over weights: the parameters of p, its KL, and its config.

    To write your own prior, subclass `Prior`, define `kl` (and `get_config`, if the prior takes arguments), and
    register the class with `keras.saving.register_keras_serializable()` so that saved models can be loaded. A prior
    with learned parameters creates their variables in `add_weights`; `kl` receives them by name.

    Attributes:
        groups: Dict, the groups of weights that are kept or pruned as a whole, as keywords of
            `functional.sparsity.log_alpha`. Empty for a prior over single weights.
        threshold: Float, the log alpha above which weights are pruned if the layer has no threshold of its own. It is 3
            for single weights, which are then 95 % noise, and 5 for groups. The unneeded weights of a group become as
            noisy as the shared s² allows, so its log alpha is large even if it has a few needed weights.
        start: Float, the initial log(variance / mean square of the initial weights) of a posterior whose layer has no
            `initial_log_variance`.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> @keras.saving.register_keras_serializable()
        ... class WideNormal(kv.priors.Prior):
        ...     def kl(self, loc, log_variance):
        ...         return kv.functional.kl.normal(loc, log_variance, scale=10.0)
        >>> layer = kv.VariationalDense(1, kernel_prior=WideNormal())
        >>> round(float(layer.kernel_prior.kl(10.0, keras.ops.log(100.0))), 3)  # of N(10, 10²) to N(0, 10²)
        0.5
    """

    groups: ClassVar = {}
    start = -6.0

    @property
    def threshold(self) -> float:
        return 3.0 if self.groups.get("group_axis") is None else 5.0

    def add_weights(self, add_weight: Callable[..., Any], name: str, loc: Any) -> dict[str, Any]:
        """Create the variables of the prior: a dict keyed by the argument names of `kl` and `distribution`.

        Args:
            add_weight: `keras.layers.Layer.add_weight` of the layer.
            name: Name of the weight that has this prior.
            loc: Variable, the mean of that weight, at its initial values.
        """
        return {}

    def restart(self, parameters: dict[str, Any], loc: Any) -> None:
        """Reset the variables of the prior to their start for the current mean.

        Args:
            parameters: Dict of variables, as returned by `add_weights`.
            loc: Variable, the mean of the weight.
        """

    def kl(self, loc: Any, log_variance: Any) -> Any:
        """Compute KL(N(loc, exp(log_variance)) ‖ p), elementwise, in nats.

        Args:
            loc: Tensor, the posterior mean.
            log_variance: Tensor that broadcasts to `loc`, the log of the posterior variance.

        Returns:
            Tensor of the same shape.

        Raises:
            NotImplementedError: If the subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define kl(loc, log_variance).")

    def check(self, shape: Sequence[int], parameters: dict[str, Any] | None = None) -> None:
        """Raise an error unless this can be the prior of a weight of the given shape.

        Args:
            shape: Shape of the weight.
            parameters: Dict of variables, as returned by `add_weights`.

        Raises:
            ValueError: If the weight cannot be split into the prior's groups, or `kl` fails or is not elementwise.
        """
        sparsity.check_groups(shape, **self.groups)
        if type(self) in _ELEMENTWISE:
            return
        weight = keras.KerasTensor(shape, "float32")
        try:
            spec = _KL(self, parameters or {}).compute_output_spec(weight, weight)
        except Exception as error:
            raise ValueError(
                f"The prior {self!r} does not fit a weight of shape {tuple(shape)}: its `kl` raises an error. "
                f"Received: {type(error).__name__}: {error}"
            ) from error
        found = tuple(getattr(spec, "shape", ()))
        if found != tuple(shape):
            raise ValueError(
                f"The `kl` of a prior must return one number for each weight: a tensor of shape {tuple(shape)}. "
                f"Received: shape {found} from {self!r}"
            )

    def distribution(self, loc: Any, log_variance: Any) -> Any:
        """Return the prior as a `tfp.distributions.Distribution` over scalars, batched like `loc`.

        Raises:
            NotImplementedError: If the subclass does not define it.
        """
        raise NotImplementedError(
            f"{type(self).__name__} defines no distribution of TFP. Define the method `distribution`, or use another "
            "prior where a distribution is required."
        )

    def get_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Self":
        return cls(**config)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


class _KL(keras.Operation):
    """A prior's `kl` as an operation, so that the shape of its result can be inferred without computing it."""

    def __init__(self, prior: Prior, parameters: dict[str, Any]):
        super().__init__()
        self._prior = prior
        self._parameters = parameters

    def call(self, loc: Any, log_variance: Any) -> Any:
        parameters = {name: ops.convert_to_tensor(value) for name, value in self._parameters.items()}
        return ops.convert_to_tensor(self._prior.kl(loc, log_variance, **parameters))


@keras.saving.register_keras_serializable(package="keras_vdrop")
class LogUniform(Prior):
    """The prior p(|w|) ∝ 1/|w|, for which all magnitudes of a weight are equally likely.

    Of all priors here it prunes the most. It is improper, and so is the posterior, which is not calibrated.

    See `functional.kl.log_uniform`.

    Args:
        form: Approximation of the KL, which has no closed form: "sigmoid", within 0.0051 nats; "exact", within 4e-6
            nats; or "cubic", the polynomial of Kingma et al. 2015, which is valid for alpha ≤ 1 and so does not prune.

    Raises:
        ValueError: If `form` is unknown.

    Examples:
        >>> import keras_vdrop as kv
        >>> layer = kv.VariationalDense(1, kernel_prior=kv.priors.LogUniform("exact"))
        >>> round(float(layer.kernel_prior.kl(1.0, 0.0)), 3)  # alpha = 1
        0.427

    Reference:
        Variational Dropout Sparsifies Deep Neural Networks, Molchanov, Ashukha, Vetrov, 2017,
        https://arxiv.org/abs/1701.05369; the posterior: Variational Bayesian Dropout: Pitfalls and Fixes, Hron,
        Matthews, Ghahramani, 2018, https://arxiv.org/abs/1807.01969; cubic: Variational Dropout and the Local
        Reparameterization Trick, Kingma, Salimans, Welling, 2015, https://arxiv.org/abs/1506.02557
    """

    FORMS = tuple(kl.LOG_UNIFORM_FORMS)

    def __init__(self, form: Literal["sigmoid", "exact", "cubic"] = "sigmoid"):
        if form not in self.FORMS:
            raise ValueError(f"`form` must be one of {self.FORMS}. Received: form={form!r}")
        self.form = form

    def kl(self, loc: Any, log_variance: Any) -> Any:
        return kl.LOG_UNIFORM_FORMS[self.form](loc, log_variance)

    def distribution(self, loc: Any, log_variance: Any) -> Any:
        return distributions.log_uniform()(batch_shape=tuple(loc.shape), form=self.form)

    def get_config(self) -> dict[str, Any]:
        return {"form": self.form}


@keras.saving.register_keras_serializable(package="keras_vdrop")
class ARD(Prior):
    """The prior N(0, s²) with s² fitted to each weight (automatic relevance determination). Prunes, and is proper.

    See `functional.kl.ard`.

    Args:
        group_axis: Int, an axis of the weight. All weights at one index of that axis form a group with one s², which is
            kept or pruned as a whole, so that shapes can shrink. With −1, a group holds the weights into one output
            unit, filter or gate; with −2, the weights from one input unit or channel; with 0 in an embedding, those of
            one word. None for a separate s² for every weight.
        blocks: Positive int, the number of equal blocks that make up the axis. A group takes the weights at one index
            of every block. In a recurrent kernel with `group_axis=-1`, `blocks=1` groups the weights into one gate of
            a unit; the number of gates (4 in an LSTM, 3 in a GRU) groups the weights into all gates of a unit.

    Raises:
        ValueError: If `group_axis` is not an int or None, `blocks` is not a positive int, or `blocks` is above 1
            without a `group_axis`.

    Examples:
        >>> import keras_vdrop as kv
        >>> layer = kv.VariationalDense(1, kernel_prior=kv.priors.ARD(group_axis=-1))
        >>> layer.kernel_prior
        ARD(group_axis=-1, blocks=1)
        >>> round(float(kv.priors.ARD().kl(1.0, 0.0)), 3)  # alpha = 1: ½·log 2
        0.347

    Reference:
        Variational Dropout via Empirical Bayes, Kharitonov, Molchanov, Vetrov, 2018,
        https://arxiv.org/abs/1811.00596
    """

    def __init__(self, group_axis: int | None = None, blocks: int = 1):
        if group_axis is not None and not is_int(group_axis):
            raise ValueError(f"`group_axis` must be an int or None. Received: group_axis={group_axis!r}")
        check_positive_int("blocks", blocks)
        if group_axis is None and blocks != 1:
            raise ValueError(f"`blocks` above 1 requires a `group_axis`. Received: group_axis=None, blocks={blocks}")
        self.groups = {"group_axis": None if group_axis is None else int(group_axis), "blocks": int(blocks)}

    def kl(self, loc: Any, log_variance: Any) -> Any:
        return kl.ard(loc, log_variance, **self.groups)

    def distribution(self, loc: Any, log_variance: Any) -> Any:
        variance = kl.ard_variance(loc, log_variance, **self.groups)
        return distributions.normal(ops.zeros_like(loc), ops.sqrt(variance))

    def get_config(self) -> dict[str, Any]:
        return dict(self.groups)


@keras.saving.register_keras_serializable(package="keras_vdrop")
class Normal(Prior):
    """The prior N(center, scale²) of Bayes by backprop, with a scale that by default follows from the initial weights.

    If `scale` is None or `trainable` is True, the logarithm of the scale is the variable
    `layer.kernel.prior_parameters["log_scale"]`, which is saved with the layer.

    See `functional.kl.normal`.

    Args:
        scale: The standard deviation (not the variance), > 0. None for twice the root mean square of the initial
            weights of each weight tensor; 1 if they are all 0, as biases are.
        trainable: Whether each weight tensor learns a scale of its own, which starts at `scale`.
        centered: Whether the center is the initial weights instead of 0. They are stored as the variable
            `layer.kernel.prior_parameters["center"]`. Such a prior does not prune: it does not pull weights to 0.

    Raises:
        ValueError: If `scale` is not None or a finite number > 0.

    Examples:
        >>> import keras_vdrop as kv
        >>> layer = kv.VariationalDense(1, kernel_prior=kv.priors.Normal(scale=1.0))
        >>> float(layer.kernel_prior.kl(1.0, 0.0))  # of N(1, 1) to N(0, 1)
        0.5

    Reference:
        Weight Uncertainty in Neural Networks, Blundell et al., 2015, https://arxiv.org/abs/1505.05424; centered at the
        weights of a trained network: Specifying Weight Priors in Bayesian Deep Neural Networks with Empirical Bayes,
        Krishnan, Subedar, Tickoo, 2020, https://arxiv.org/abs/1906.05323
    """

    # Wider than the default, since the posteriors of most weights end up as wide as the prior.
    start = -3.0
    _TIMES = 2.0

    def __init__(self, scale: float | None = None, trainable: bool = False, centered: bool = False):
        if scale is not None:
            check_positive("scale", scale)
        self.scale = None if scale is None else float(scale)
        self.trainable = bool(trainable)
        self.centered = bool(centered)

    def add_weights(self, add_weight: Callable[..., Any], name: str, loc: Any) -> dict[str, Any]:
        def add(parameter, shape, trainable):
            return add_weight(
                name=f"{name}_prior_{parameter}",
                shape=shape,
                initializer=self._starts(loc)[parameter],
                trainable=trainable,
                dtype="float32",
                autocast=False,
            )

        found = {}
        if self.scale is None or self.trainable:
            found["log_scale"] = add("log_scale", (), self.trainable)
        if self.centered:
            found["center"] = add("center", loc.shape, False)
        return found

    def restart(self, parameters: dict[str, Any], loc: Any) -> None:
        for name, variable in parameters.items():
            variable.assign(self._starts(loc)[name](variable.shape, variable.dtype))

    def _starts(self, loc: Any) -> dict[str, Any]:
        """Return the initializers of the variables that `add_weights` creates, by name."""
        log_scale = LogScaleOf(loc, 1.0, math.log(self._TIMES), zeros=1.0 / self._TIMES)
        if self.scale is not None:
            log_scale = keras.initializers.Constant(math.log(self.scale))
        # Copy the values: JAX may donate the buffer of a variable to a compiled step.
        center = lambda shape, dtype: ops.copy(ops.cast(ops.convert_to_tensor(loc), dtype))  # noqa: E731
        return {"log_scale": log_scale, "center": center}

    def kl(self, loc: Any, log_variance: Any, log_scale: Any = None, center: Any = None) -> Any:
        offset = loc if center is None else loc - ops.cast(center, loc.dtype)
        return kl.normal(offset, log_variance, self._scale(log_scale))

    def distribution(self, loc: Any, log_variance: Any, log_scale: Any = None, center: Any = None) -> Any:
        center = ops.zeros_like(loc) if center is None else ops.cast(center, loc.dtype)
        return distributions.normal(center, self._scale(log_scale))

    def _scale(self, log_scale: Any) -> Any:
        return self.scale if log_scale is None else ops.exp(log_scale)

    def get_config(self) -> dict[str, Any]:
        centered = {"centered": True} if self.centered else {}
        return {"scale": self.scale, "trainable": self.trainable, **centered}


@keras.saving.register_keras_serializable(package="keras_vdrop")
class ScaleMixture(Prior):
    """The prior π·N(0, σ1²) + (1 − π)·N(0, σ2²) with σ1 > σ2: a soft spike and slab.

    The narrow normal pulls weights to 0; the wide one leaves room for those that the data need.

    See `functional.kl.scale_mixture`.

    Args:
        probability: Float in (0, 1), π, the share of the wide normal.
        scale: Float > 0, σ1, the standard deviation of the wide normal.
        narrow_scale: Float in (0, σ1), σ2, the standard deviation of the narrow normal.

    Raises:
        ValueError: If a scale is not a finite number > 0, the narrow one is not the smaller, or `probability` is not in
            (0, 1).

    Examples:
        >>> import keras_vdrop as kv
        >>> layer = kv.VariationalDense(1, kernel_prior=kv.priors.ScaleMixture(probability=0.5, scale=1.0))
        >>> round(float(layer.kernel_prior.kl(10.0, 0.0)), 3)  # far from 0, only the wide normal counts: ½·10² + log 2
        50.693

    Reference:
        Weight Uncertainty in Neural Networks, Blundell et al., 2015, https://arxiv.org/abs/1505.05424
    """

    def __init__(self, probability: float = 0.5, scale: float = 1.0, narrow_scale: float = 0.0025):
        check_positive("scale", scale)
        check_positive("narrow_scale", narrow_scale)
        if narrow_scale >= scale:
            raise ValueError(
                f"`narrow_scale` must be less than `scale`. Received: narrow_scale={narrow_scale}, scale={scale}"
            )
        check_finite("probability", probability)
        check_fraction("probability", probability)
        self.probability = float(probability)
        self.scale = float(scale)
        self.narrow_scale = float(narrow_scale)

    def kl(self, loc: Any, log_variance: Any) -> Any:
        return kl.scale_mixture(loc, log_variance, self.probability, self.scale, self.narrow_scale)

    def distribution(self, loc: Any, log_variance: Any) -> Any:
        scales = ops.cast([self.scale, self.narrow_scale], loc.dtype)
        shares = ops.cast([self.probability, 1.0 - self.probability], loc.dtype)
        return distributions.normal_mixture(shares, ops.zeros_like(scales), scales)

    def get_config(self) -> dict[str, Any]:
        return {"probability": self.probability, "scale": self.scale, "narrow_scale": self.narrow_scale}


@keras.saving.register_keras_serializable(package="keras_vdrop")
class Distribution(Prior):
    """Any `tfp.distributions.Distribution` over scalars as a prior. TensorFlow only.

    If TFP has a closed form for the KL of a normal to the distribution, that is used. Otherwise
    KL = −H(q) − E_q[log p], where Gauss–Hermite quadrature computes the expectation. Quadrature is deterministic, and
    exact if log p is a polynomial of degree up to 39.

    Args:
        distribution: A `tfp.distributions.Distribution` with scalar events and a density that is nowhere 0; otherwise
            the KL would be infinite. It can be saved if it was made from numbers, arrays, strings and other
            distributions.

    Raises:
        ValueError: On another backend, or if `distribution` is not a TFP distribution over scalars with a density that
            is nowhere 0.

    Examples:
        >>> import keras, keras_vdrop as kv  # doctest: +SKIP
        >>> from tensorflow_probability import distributions as tfd  # doctest: +SKIP
        >>> layer = kv.VariationalDense(1, kernel_prior=kv.priors.Distribution(tfd.Normal(0.0, 1.0)))  # doctest: +SKIP
        >>> float(layer.kernel_prior.kl(keras.ops.ones(()), keras.ops.zeros(())))  # doctest: +SKIP
        0.5
    """

    def __init__(self, distribution: Any):
        distributions.check(distribution)
        self._distribution = distribution

    def kl(self, loc: Any, log_variance: Any) -> Any:
        dtype = keras.backend.standardize_dtype(loc.dtype)
        return ops.cast(distributions.kl_from_normal(loc, log_variance, self._distribution), dtype)

    def distribution(self, loc: Any, log_variance: Any) -> Any:
        return self._distribution

    def __repr__(self) -> str:
        return f"Distribution({self._distribution})"

    def get_config(self) -> dict[str, Any]:
        return {"distribution": distributions.config_of(self._distribution)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Self":
        return cls(distributions.from_config(config["distribution"]))


_BY_NAME = {"log_uniform": LogUniform, "ard": ARD, "normal": Normal, "scale_mixture": ScaleMixture}
_BY_CLASS = {cls.__name__: cls for cls in (LogUniform, ARD, Normal, ScaleMixture, Distribution)}

# The KL of these priors always has the shape of the weight, so `Prior.check` skips the shape inference.
_ELEMENTWISE = (LogUniform, ARD, Normal, ScaleMixture)


def get(
    identifier: Literal["log_uniform", "ard", "normal", "scale_mixture"] | Prior | dict[str, Any] | Any | None,
) -> Prior | None:
    """Return the prior for an identifier; None, for a plain weight, stays None.

    Args:
        identifier: A `Prior`, its config, "log_uniform", "ard", "normal", "scale_mixture", a
            `tfp.distributions.Distribution`, or None.

    Raises:
        ValueError: For anything else.

    Examples:
        >>> import keras_vdrop as kv
        >>> kv.priors.get("ard")
        ARD(group_axis=None, blocks=1)
        >>> kv.priors.get(None) is None
        True
    """
    if identifier is None or isinstance(identifier, Prior):
        return identifier
    if isinstance(identifier, str) and identifier in _BY_NAME:
        return _BY_NAME[identifier]()
    if isinstance(identifier, dict):
        prior = _from_serialized(identifier)
        if isinstance(prior, Prior):
            return prior
    elif distributions.is_distribution(identifier):
        return Distribution(identifier)
    raise ValueError(
        f"Unknown prior. Expected one of {sorted(_BY_NAME)}, a keras_vdrop.priors.Prior, "
        f"a tfp.distributions.Distribution, or None for a plain weight. Received: {identifier!r}"
    )


def _from_serialized(config: dict[str, Any]) -> Any:
    """Restore the object from a config that `serialize` returned; None if the config has no class name.

    Raises:
        ValueError: If the object cannot be restored.
    """
    name, arguments = config.get("class_name"), config.get("config")
    try:
        if name in _BY_CLASS and config.get("registered_name") in (None, name, f"keras_vdrop>{name}"):
            return _BY_CLASS[name].from_config(arguments)
        return keras.saving.deserialize_keras_object(config) if isinstance(name, str) else None
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"Cannot create a prior from the config: {error}. Received: {config!r}") from error


def serialize(prior: Prior | None) -> Any:
    """Return the config from which `get` restores the prior.

    Args:
        prior: A `Prior`, or None.

    Returns:
        Dict of numbers, strings, lists and dicts; None for None.

    Raises:
        ValueError: For a `Distribution` that was not made from numbers, arrays, strings and other distributions.

    Examples:
        >>> import keras_vdrop as kv
        >>> config = kv.priors.serialize(kv.priors.Normal(scale=2.0))
        >>> kv.priors.get(config)
        Normal(scale=2.0, trainable=False)
    """
    return None if prior is None else keras.saving.serialize_keras_object(prior)
