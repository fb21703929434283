"""`VariationalWeight`, a weight with a posterior, and functions that find the posteriors of a model."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_vdrop import layouts
from keras_vdrop.functional import estimators, sparsity
from keras_vdrop.priors import Prior
from keras_vdrop.sampling import is_consistent
from keras_vdrop.variables import LogScaleOf, Scaled, VariableLike

# Lower bound of the square of a weight, relative to the mean square of its tensor.
_FLOOR = 1e-6

# Added to a log variance, it makes the variance 0 in every dtype.
_NO_VARIANCE = -1e9


class Posterior:
    """Base class of distributions whose KL is part of the loss. The regularizer `KLPenalty` adds it.

    Attributes:
        owner: The layer that the posterior belongs to. It weights the KL.
        size: Int, the number of random variables.
    """

    def __init__(self, owner: keras.layers.Layer, size: int):
        self.owner: Any = owner
        self.size = size

    @property
    def variables(self) -> list[Any]:
        """List of the variables that belong to the posterior, and no others."""
        raise NotImplementedError

    def kl(self) -> Any:
        """Compute KL(q‖p), a scalar, in nats."""
        raise NotImplementedError

    def kept(self) -> Any:
        """Return the number of random variables that `kl` counts."""
        return self.size


class KLPenalty(keras.regularizers.Regularizer):
    """Regularizer that adds the weighted KL of a whole posterior, and the penalty of the user's own regularizer.

    It is attached to one of the posterior's variables.
    """

    def __init__(self, posterior: Posterior, regularizer: Callable[[Any], Any] | None = None):
        self.posterior = posterior
        self._regularizer = regularizer

    def __call__(self, variable: Any) -> Any:
        penalty = self.posterior.owner.weighted_kl(self.posterior)
        return penalty if self._regularizer is None else penalty + self._regularizer(variable)


class VariationalWeight(VariableLike, Posterior):
    """One weight tensor with a factorised Gaussian posterior q(w) = N(loc, exp(log_variance)).

    It owns the two trainable variables, the pruning mask, the prior and the KL of the posterior to it. Its method
    `apply` applies the weight to an input with the noise of an estimator. To be variational, a layer only has to
    create its weights with `add_weight` and use them through `apply`.

    Where Keras or a user treats it as a variable (`assign`, `numpy`, `shape`, `dtype`, operations), it stands for its
    mean. Setting `trainable` freezes or unfreezes the whole posterior.

    The KL reaches `layer.losses` through a regularizer of the variables. It is therefore counted once, however often
    and wherever the layer is called, and not at all when the layer is frozen.

    Attributes:
        loc: Variable, the posterior mean, trainable.
        log_variance: Trainable, `log_variance_rate` times the stored variable; its shape broadcasts to that of `loc`.
            It is float32 under every policy (float64 in a float64 layer), as is `loc`: a float16 variance would
            underflow below 6e-8.
        mask: Boolean variable of the shape of `loc`; False where pruned.
        prior: The `Prior`.
        prior_parameters: Dict of the variables of the prior; empty for most priors.
        prunable: Whether `sparsity` and `prune` take the weight into account.
        update: The `LowRankUpdate` that the weight is part of, or None.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> options = {"kernel_initializer": "ones", "initial_log_variance": 0.0, "kernel_prior": "ard"}
        >>> layer = kv.VariationalDense(1, **options)
        >>> layer.build((None, 2))
        >>> kernel = layer.kernel
        >>> keras.ops.convert_to_numpy(kernel.mean()).tolist(), keras.ops.convert_to_numpy(kernel.log_alpha()).tolist()
        ([[1.0], [1.0]], [[0.0], [0.0]])
        >>> kernel.prune(threshold=-1.0)
        >>> int(kernel.kept())
        0
    """

    update: "LowRankUpdate | None" = None

    def __init__(
        self,
        owner: keras.layers.Layer,
        add_weight: Callable[..., Any],
        name: str,
        shape: Sequence[int],
        *,
        prior: Prior,
        initial_log_variance: float | None,
        log_variance_rate: float,
        prunable: bool = True,
        loc: Any = None,
        learn_loc: bool = True,
        log_variance_shape: Sequence[int] | None = None,
        log_variance_constraint: Any = None,
        initializer: Any = None,
        regularizer: Any = None,
        constraint: Any = None,
        **arguments: Any,
    ):
        """Create the variables with `add_weight`, which receives the remaining arguments, as in Keras.

        `loc` can be an existing variable, the weight of another layer that this posterior takes the place of. The mean
        can be constant (`learn_loc=False`). Weights can share a log variance: `log_variance_shape` only has to
        broadcast to `shape`. The log variance starts at `initial_log_variance`; if that is None, its start follows from
        the root mean square of the initial `loc`. One step of an optimizer such as Adam moves it by about
        `log_variance_rate` learning rates.
        """
        super().__init__(owner, math.prod(shape))
        self.name = name
        self.prior = prior
        self.prunable = prunable
        dtype = "float64" if owner.variable_dtype == "float64" else "float32"
        self.loc = loc
        if loc is None:
            self.loc = layouts.named_as_in_keras(add_weight, "_loc")(
                name=f"{name}_loc",
                shape=shape,
                initializer=initializer,
                regularizer=keras.regularizers.get(regularizer),
                constraint=constraint,
                dtype=dtype,
                autocast=False,
                trainable=learn_loc,
                **arguments,
            )
        self.loc.regularizer = KLPenalty(self, self.loc.regularizer)
        self._start = LogScaleOf(self.loc, 2.0, prior.start, unit=log_variance_rate)
        if initial_log_variance is not None:
            self._start = keras.initializers.Constant(initial_log_variance / log_variance_rate)
        add_weight = layouts.laid_out_like(add_weight, self.loc)
        stored = add_weight(
            name=f"{name}_log_variance",
            shape=shape if log_variance_shape is None else log_variance_shape,
            initializer=self._start,
            regularizer=_LogVariancePenalty(self),
            constraint=log_variance_constraint,
            dtype=dtype,
            autocast=False,
            **arguments,
        )
        self.log_variance = Scaled(stored, log_variance_rate)
        self.mask = add_weight(name=f"{name}_mask", shape=shape, initializer="ones", dtype="bool", trainable=False)
        self.prior_parameters = prior.add_weights(add_weight, name, self.loc)
        prior.check(shape, self.prior_parameters)
        self._learned = [variable for variable in self.variables if variable.trainable]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.loc.shape

    @property
    def dtype(self) -> str:
        return self.loc.dtype

    @property
    def value(self) -> Any:
        return self.mean()

    def assign(self, value: Any) -> Any:
        """Set the mean and return it. The variance does not change."""
        value = ops.convert_to_tensor(value, self.dtype)
        self.loc.assign(value)
        return value

    @property
    def trainable(self) -> bool:
        """Whether any variable is trainable. Setting it freezes or unfreezes mean, log variance and learned prior."""
        return any(variable.trainable for variable in self._learned)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        for variable in self._learned:
            variable.trainable = value

    @property
    def path(self) -> str:
        """The path that the weight has in the Keras layer."""
        return self.loc.path.removesuffix("_loc")

    def restart(self, relative_variance: float | None = None) -> None:
        """Reset the variance and the variables of the prior to their start for the current mean.

        Args:
            relative_variance: Float > 0, r. Each variance becomes r·loc², but at least 1e-6·r·mean(loc²); a shared
                variance becomes r·mean(loc²). None for the start that the layer specifies.
        """
        start = self._start if relative_variance is None else _relative_to(self.loc, relative_variance)
        stored = self.log_variance.variable
        values = start(stored.shape, stored.dtype)
        stored.assign(values if relative_variance is None else values / self.log_variance.factor)
        self.prior.restart(self.prior_parameters, self.loc)

    def __repr__(self) -> str:
        return f"<VariationalWeight {self.path}, shape={tuple(self.shape)}, prior={self.prior}>"

    @property
    def variables(self) -> list[Any]:
        return [self.loc, self.log_variance.variable, self.mask, *self.prior_parameters.values()]

    def _left(self) -> Any:
        """Return 1 where the weight is kept and 0 where it is pruned: a product with it is cheaper than `where`."""
        return ops.cast(self.mask, self.log_variance.dtype)

    def _location(self) -> Any:
        """Return `loc` in the dtype of the posterior, since a variable of another layer may be of lower precision."""
        return ops.cast(ops.convert_to_tensor(self.loc), self.log_variance.dtype)

    def mean(self) -> Any:
        """Return the weight of deterministic calls: `loc`, and 0 where pruned."""
        return self._location() * self._left()

    def _noise_log_variance(self) -> Any:
        """Return `log_variance`, but where the weight is pruned, and thus 0, the log of a variance that vanishes."""
        return self.log_variance.value + _NO_VARIANCE * (1.0 - self._left())

    def log_alpha(self) -> Any:
        """Compute log alpha = log(exp(log_variance) / loc²), not clipped; a weight above 3 is at least 95 % noise.

        If the prior is over groups, every weight has the log alpha of its group.
        """
        loc, log_variance = self._location(), self.log_variance.value
        return sparsity.log_alpha(loc, log_variance, **self.prior.groups)

    @property
    def threshold(self) -> float:
        """The log alpha above which weights are pruned: that of the layer if set, else that of the prior."""
        return self.prior.threshold if self.owner.threshold is None else self.owner.threshold

    def keep_mask(self, threshold: float | None = None) -> Any:
        """Return a boolean tensor, True where the weight is not pruned and would not be at the threshold.

        Args:
            threshold: Float, in units of log alpha, or None for `self.threshold`.
        """
        threshold = self.threshold if threshold is None else threshold
        loc, log_variance = self._location(), self.log_variance.value
        keep = sparsity.keep_mask(loc, log_variance, threshold, **self.prior.groups)
        return ops.logical_and(ops.convert_to_tensor(self.mask), keep)

    def prune(self, threshold: float | None = None) -> None:
        """Set every weight whose log alpha is above the threshold to 0. It stays 0 in further training."""
        keep = self.keep_mask(threshold)
        self.mask.assign(keep)
        self.loc.assign(self.mean())

    def kl(self) -> Any:
        """Compute KL(q‖p) summed over the kept weights: a scalar, in nats."""
        parameters = {name: ops.convert_to_tensor(value) for name, value in self.prior_parameters.items()}
        loc, log_variance = self._location(), self.log_variance.value
        elementwise = self.prior.kl(loc, log_variance, **parameters)
        return ops.sum(elementwise * self._left())

    def kept(self) -> Any:
        """Return the number of kept weights, a scalar."""
        return ops.sum(self._left())

    def apply(
        self,
        linear: Callable[[Any, Any], Any],
        x: Any,
        *,
        noisy: bool,
        estimator: str,
        seed: keras.random.SeedGenerator,
        sign_axes: tuple[tuple[int, ...], tuple[int, ...]] | None,
        dtype: str,
    ) -> Any:
        """Compute `linear(x, w)` with the posterior mean or with noise.

        Args:
            linear: Callable `(x, w) -> output`, linear in both.
            x: Tensor with the batch on its first axis. If it is of an integer dtype, `linear` is a lookup.
            noisy: Bool, whether to draw: with `estimator`, or under `sampling(consistent=True)` one draw for all
                examples.
            estimator: A name of `functional.estimators.ESTIMATORS`.
            seed: A `keras.random.SeedGenerator`.
            sign_axes: As for `functional.estimators.flipout`.
            dtype: Dtype of the output.

        Returns:
            The output of `linear`.
        """
        if not noisy:
            return linear(x, ops.cast(self.mean(), dtype))
        estimate = estimators.ESTIMATORS["reparameterization" if is_consistent() else estimator]
        return estimate(linear, x, self.mean(), self._noise_log_variance(), seed, sign_axes, dtype)

    def perturbation(self, seed: keras.random.SeedGenerator) -> Any:
        """Draw the deviation of the weight from its mean; 0 where pruned."""
        return estimators.perturbation(self._noise_log_variance(), seed)


class LowRankUpdate:
    """Low-rank update W + scale·A·B of a frozen weight W, with a posterior over A.

    All weights of A for the same input share a variance, so there are few variances. B is an ordinary variable. By
    default it starts at 0, and so does the update.

    Attributes:
        kernel: Variable W, (..., U), frozen.
        a: `VariationalWeight`, (..., rank).
        b: Variable, (rank, U).
        scale: Float, alpha / rank.

    Reference:
        BLoB: Bayesian Low-Rank Adaptation by Backpropagation for Large Language Models, Wang et al., 2024,
        https://arxiv.org/abs/2406.11675
    """

    def __init__(
        self,
        owner: keras.layers.Layer,
        add_weight: Callable[..., Any],
        name: str,
        kernel: Any,
        rank: int,
        alpha: float | None = None,
        a_initializer: Any = "he_uniform",
        b_initializer: Any = "zeros",
        **weight: Any,
    ):
        """Create A and B with `add_weight` of the layer; `weight` holds further arguments of `VariationalWeight`."""
        kernel.trainable = False
        outer = tuple(kernel.shape[:-1])
        self.kernel = kernel
        self.scale = 1.0 if alpha is None else alpha / rank
        self.a = VariationalWeight(
            owner,
            add_weight,
            f"{name}_a",
            (*outer, rank),
            log_variance_shape=(*outer, 1),
            initializer=keras.initializers.get(a_initializer),
            prunable=False,
            **weight,
        )
        self.a.update = self
        self.b = add_weight(
            name=f"{name}_b",
            shape=(rank, kernel.shape[-1]),
            initializer=keras.initializers.get(b_initializer),
        )

    def whole(self, a: Any) -> Any:
        """Return W + scale·A·B as a tensor, for a mean or a draw `a` of A."""
        product = ops.matmul(a, ops.cast(self.b, a.dtype))
        return ops.cast(self.kernel, a.dtype) + self.scale * product


def _relative_to(loc: Any, relative_variance: float) -> Callable[..., Any]:
    """Return an initializer of log variances: log(relative_variance·loc²), with a lower bound on loc²."""

    def initializer(shape, dtype):
        values = ops.cast(ops.convert_to_tensor(loc), dtype)
        square, mean = ops.square(values), ops.mean(ops.square(values))
        if tuple(shape) != tuple(square.shape):  # weights share a log variance
            square = ops.broadcast_to(mean, shape)
        floor = ops.where(mean > 0.0, _FLOOR * mean, _FLOOR)
        return ops.log(relative_variance * ops.maximum(square, floor))

    return initializer


class _LogVariancePenalty(keras.regularizers.Regularizer):
    """Regularizer of `log_variance` that adds the KL if `loc` is frozen, and 0 otherwise.

    Keras evaluates the regularizers of trainable variables only, so it skips the `KLPenalty` of a frozen `loc`.
    """

    def __init__(self, weight: VariationalWeight):
        self.weight = weight

    def __call__(self, log_variance: Any) -> Any:
        if self.weight.loc.trainable:
            return ops.zeros((), log_variance.dtype)
        return self.weight.owner.weighted_kl(self.weight)


def posteriors(model_or_layer: keras.Model | keras.layers.Layer) -> list[Posterior]:
    """Return every `Posterior` in a model or layer once, in the order of its variables.

    The search goes through the variables, so nesting, wrapping and sharing of layers make no difference.
    """
    penalties = (getattr(variable, "regularizer", None) for variable in model_or_layer.weights)
    return [penalty.posterior for penalty in penalties if isinstance(penalty, KLPenalty)]


def owners(some: Iterable[Posterior]) -> list[Any]:
    """Return the layers that some posteriors belong to, each once, in the order of the posteriors."""
    return list({id(posterior.owner): posterior.owner for posterior in some}.values())


def require_posteriors(model_or_layer: keras.Model | keras.layers.Layer) -> list[Posterior]:
    """Return `posteriors(model_or_layer)`, or raise if there are none.

    Raises:
        ValueError: If there is no posterior, as in a model that has not been built.
    """
    found = posteriors(model_or_layer)
    if not found:
        state = "" if model_or_layer.built else " (it has not been built: call it on some data first)"
        raise ValueError(
            "Expected at least one variational weight, such as the kernel of a `VariationalDense` layer. Received: "
            f"{model_or_layer.name!r} of type {type(model_or_layer).__name__}, which has none{state}."
        )
    return found


def prunable_weights(model_or_layer: keras.Model | keras.layers.Layer) -> list[VariationalWeight]:
    """Return the weights that `sparsity` counts: every variational kernel, table and scale, but no bias.

    Raises:
        ValueError: If there is no posterior, as in a model that has not been built.
    """
    found = require_posteriors(model_or_layer)
    return [weight for weight in found if isinstance(weight, VariationalWeight) and weight.prunable]


def require_prunable_weights(model: keras.Model) -> list[VariationalWeight]:
    """Return `prunable_weights`.

    Raises:
        ValueError: If there are none.
    """
    weights = prunable_weights(model)
    if not weights:
        raise ValueError(
            f"The model {model.name!r} has no weights that can be pruned. These are variational kernels and "
            "tables, and the scales of `VariationalGaussianDropout`. Use such layers, with a prior."
        )
    return weights


def learning_posteriors(model: keras.Model) -> list[Posterior]:
    """Return the posteriors with a trainable variable: those whose KL is part of the loss."""
    trainable = {id(variable) for variable in model.trainable_variables}
    return [each for each in posteriors(model) if any(id(variable) in trainable for variable in each.variables)]


# Sets to which every computation of a KL adds itself. Not a context variable, which threads of replicas would not see.
_records: list[set[str]] = []


@contextlib.contextmanager
def recorded_kls() -> Iterator[set[str]]:
    """Open a scope that yields a set, which is empty until a KL is computed in any thread."""
    record = set()
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)


def note_kl() -> None:
    """Tell the open scopes of `recorded_kls` that a KL is computed."""
    for record in _records:
        record.add("KL")


def kl_divergence(model_or_layer: keras.Model | keras.layers.Layer) -> Any:
    """Compute the unweighted sum of KL(posterior ‖ prior) over all posteriors: a scalar tensor, in nats.

    Args:
        model_or_layer: A built `keras.Model` or layer.

    Raises:
        ValueError: If it has no posterior.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> options = {"kernel_initializer": "ones", "initial_log_variance": 0.0, "kernel_prior": "ard"}
        >>> layer = kv.VariationalDense(1, **options)
        >>> layer.build((None, 2))
        >>> round(float(keras.ops.convert_to_numpy(kv.kl_divergence(layer))), 3)  # 2 weights with alpha = 1: 2·½·log 2
        0.693
    """
    note_kl()
    return sum(posterior.kl() for posterior in require_posteriors(model_or_layer))
