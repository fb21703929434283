"""`VariationalWeight`: a weight that is a distribution, with everything that belongs to it; and how posteriors are
found."""

import math

import keras
from keras import ops

from keras_vdrop import layouts
from keras_vdrop.functional import estimators, sparsity
from keras_vdrop.sampling import is_consistent
from keras_vdrop.variables import LogScaleOf, Scaled, VariableLike

# The least share of the mean square of the weights that a weight's square counts for.
_FLOOR = 1e-6

# Added to a log variance, it leaves a variance that is 0 in every type.
_NO_VARIANCE = -1e9


class Posterior:
    """Whatever has a KL in the loss. A regularizer, `KLPenalty`, puts it there.

    Attributes:
        owner: The layer, which weighs the KL.
        size: How many numbers it is a distribution over.
    """

    def __init__(self, owner, size):
        self.owner = owner
        self.size = size

    @property
    def variables(self):
        """What describes it, and nothing else: a list of variables."""
        raise NotImplementedError

    def kl(self):
        """KL(q‖p): a scalar, in nats."""
        raise NotImplementedError


class KLPenalty(keras.regularizers.Regularizer):
    """The regularizer of one of a posterior's variables: the KL of all of it, and whatever the user asked for."""

    def __init__(self, posterior, regularizer=None):
        self.posterior = posterior
        self._regularizer = regularizer

    def __call__(self, variable):
        penalty = self.posterior.owner.weighted_kl(self.posterior)
        return penalty if self._regularizer is None else penalty + self._regularizer(variable)


class VariationalWeight(VariableLike, Posterior):
    """One weight tensor with a factorised Gaussian posterior q(w) = N(loc, exp(log_variance)).

    It owns the two trainable variables, the mask of what pruning left, the prior and the KL between them, and it
    applies itself to an input with the estimator's noise. A layer gets one by `add_weight` and uses
    `apply`; that is all a layer needs to be variational.

    Where Keras and users take it for a variable, it is its mean: `assign`, `numpy`, `shape`, `dtype`, operations.
    Setting `trainable` freezes or frees all of it.

    The KL reaches `layer.losses` as the regularizer of the variables, so it is counted once, however
    often and wherever the layer is called, and is gone when the layer is frozen.

    Attributes:
        loc: Variable, the posterior mean, trainable.
        log_variance: Of the same shape, trainable: `log_variance_rate` times the variable that is stored. Both are
            float32 under every policy (float64 in a float64 layer): a float16 variance would underflow below 6e-8.
        mask: Boolean variable of the same shape; False where pruned.
        prior: The `Prior`.
        prior_parameters: What the prior learns, a dict of variables; empty for most.
        prunable: Whether `sparsity` and `prune` take it into account.
        update: The `LowRankUpdate` that it is a part of, or None.
    """

    update = None

    def __init__(
        self,
        owner,
        add_weight,
        name,
        shape,
        *,
        prior,
        initial_log_variance,
        log_variance_rate,
        prunable=True,
        loc=None,
        learn_loc=True,
        log_variance_shape=None,
        log_variance_constraint=None,
        initializer=None,
        regularizer=None,
        constraint=None,
        **arguments,
    ):
        """Create the variables by `add_weight`, whose arguments the others are, as in Keras.

        `loc` can be a variable that there is, in whose layer's place the posterior stands. It can be a constant
        (`learn_loc=False`), and weights can share a log variance: its shape
        needs only be broadcast to theirs. It starts at `initial_log_variance`, or where that is None, as the size of
        the initial `loc` has it. An optimizer's step moves it by `log_variance_rate` learning rates.
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
    def shape(self):
        return self.loc.shape

    @property
    def dtype(self):
        return self.loc.dtype

    @property
    def value(self):
        return self.mean()

    def assign(self, value):
        """Set the mean, and return it; the variance stays."""
        value = ops.convert_to_tensor(value, self.dtype)
        self.loc.assign(value)
        return value

    @property
    def trainable(self):
        """Whether any of it learns. Setting it freezes or frees all that does: mean, log variance and prior."""
        return any(variable.trainable for variable in self._learned)

    @trainable.setter
    def trainable(self, value):
        for variable in self._learned:
            variable.trainable = value

    @property
    def path(self):
        """That of the weight of Keras's layer."""
        return self.loc.path.removesuffix("_loc")

    def restart(self, relative_variance=None):
        """Set the variance and what the prior learns as they start for the mean that there is now.

        Args:
            relative_variance: Float > 0, r: each variance is then r·loc², at least a millionth of r·mean(loc²). None
                for the start that the layer was given.
        """
        start = self._start if relative_variance is None else _relative_to(self.loc, relative_variance)
        stored = self.log_variance.variable
        values = start(stored.shape, stored.dtype)
        stored.assign(values if relative_variance is None else values / self.log_variance.factor)
        self.prior.restart(self.prior_parameters, self.loc)

    def __repr__(self):
        return f"<VariationalWeight {self.path}, shape={tuple(self.shape)}, prior={self.prior}>"

    @property
    def variables(self):
        return [self.loc, self.log_variance.variable, self.mask, *self.prior_parameters.values()]

    def _left(self):
        """1 where the weight is left and 0 where it is pruned: a product with it costs less than `where`."""
        return ops.cast(self.mask, self.log_variance.dtype)

    def _location(self):
        """`loc` as a tensor in the precision of the posterior: a variable of another layer may have less."""
        return ops.cast(ops.convert_to_tensor(self.loc), self.log_variance.dtype)

    def mean(self):
        """The weight that prediction uses: `loc`, and 0 where pruned."""
        return self._location() * self._left()

    def _noise_log_variance(self):
        """`log_variance`, and that of no noise at all where pruned: such a weight is 0."""
        return self.log_variance.value + _NO_VARIANCE * (1.0 - self._left())

    def log_alpha(self):
        """log(exp(log_variance) / loc²), not clipped; a weight above 3 is 95 % noise.

        With a prior over groups it is that of the weight's group.
        """
        loc, log_variance = self._location(), self.log_variance.value
        return sparsity.log_alpha(loc, log_variance, **self.prior.groups)

    @property
    def threshold(self):
        """The layer's, or the prior's where the layer was given none: the log alpha above which weights go."""
        return self.prior.threshold if self.owner.threshold is None else self.owner.threshold

    def keep_mask(self, threshold=None):
        """True where the weight is neither pruned nor would be at this threshold on log alpha; None is its own."""
        threshold = self.threshold if threshold is None else threshold
        loc, log_variance = self._location(), self.log_variance.value
        keep = sparsity.keep_mask(loc, log_variance, threshold, **self.prior.groups)
        return ops.logical_and(ops.convert_to_tensor(self.mask), keep)

    def prune(self, threshold=None):
        """Set to 0, now and through further training, every weight whose log alpha is above the threshold."""
        keep = self.keep_mask(threshold)
        self.mask.assign(keep)
        self.loc.assign(self.mean())

    def kl(self):
        """KL(q‖p) summed over the weights that are not pruned: a scalar, in nats."""
        parameters = {name: ops.convert_to_tensor(value) for name, value in self.prior_parameters.items()}
        loc, log_variance = self._location(), self.log_variance.value
        elementwise = self.prior.kl(loc, log_variance, **parameters)
        return ops.sum(elementwise * self._left())

    def apply(self, linear, x, *, noisy, estimator, seed, sign_axes, dtype):
        """`linear(x, w)`: with the posterior mean, or with noise.

        Args:
            linear: Callable `(x, w) -> output`, linear in both.
            x: Tensor, the batch on its first axis; where it is of an integer type, `linear` is a lookup.
            noisy: Bool. The noise is the estimator's, or under `sampling(consistent=True)` one draw for all examples.
            estimator: A name of `functional.estimators.ESTIMATORS`.
            seed: A `keras.random.SeedGenerator`.
            sign_axes: As for `functional.estimators.flipout`.
            dtype: Of the output.

        Returns:
            What `linear` returns.
        """
        if not noisy:
            return linear(x, ops.cast(self.mean(), dtype))
        estimate = estimators.ESTIMATORS["reparameterization" if is_consistent() else estimator]
        return estimate(linear, x, self.mean(), self._noise_log_variance(), seed, sign_axes, dtype)

    def perturbation(self, seed):
        """A draw of what noise adds to the mean; 0 where pruned."""
        return estimators.perturbation(self._noise_log_variance(), seed)


class LowRankUpdate:
    """What a layer learns of a weight W that stays: W + scale·A·B, with a posterior over A.

    What meets one input shares a variance, so that there are few of them. B is plain and starts at 0, and so does the
    update.

    Attributes:
        kernel: Variable W, (..., U).
        a: `VariationalWeight`, (..., rank).
        b: Variable, (rank, U).
        scale: Float, alpha / rank.

    Reference:
        BLoB: Bayesian Low-Rank Adaptation by Backpropagation for Large Language Models, Wang et al., 2024,
        https://arxiv.org/abs/2406.11675
    """

    def __init__(
        self,
        owner,
        add_weight,
        name,
        kernel,
        rank,
        alpha=None,
        a_initializer="he_uniform",
        b_initializer="zeros",
        **weight,
    ):
        """Create A and B by `add_weight` of the layer; `weight` are arguments of a `VariationalWeight`."""
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

    def whole(self, a):
        """W + scale·A·B, of a mean or a draw of A: a tensor."""
        product = ops.matmul(a, ops.cast(self.b, a.dtype))
        return ops.cast(self.kernel, a.dtype) + self.scale * product


def _relative_to(loc, relative_variance):
    """An initializer of log variances: log(relative_variance·loc²), with a floor for what is 0."""

    def initializer(shape, dtype):
        values = ops.cast(ops.convert_to_tensor(loc), dtype)
        square, mean = ops.square(values), ops.mean(ops.square(values))
        if tuple(shape) != tuple(square.shape):  # of a log variance that weights share
            square = ops.broadcast_to(mean, shape)
        floor = ops.where(mean > 0.0, _FLOOR * mean, _FLOOR)
        return ops.log(relative_variance * ops.maximum(square, floor))

    return initializer


class _LogVariancePenalty(keras.regularizers.Regularizer):
    """The regularizer of `log_variance`, which speaks only where `loc` is frozen and so cannot.

    Keras evaluates the regularizers of trainable variables alone.
    """

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, log_variance):
        if self.weight.loc.trainable:
            return ops.zeros((), log_variance.dtype)
        return self.weight.owner.weighted_kl(self.weight)


def posteriors(model_or_layer):
    """Every `Posterior` in a model or layer, once, in the order of its variables.

    Found through the variables, so that it makes no difference how layers are nested, wrapped or shared.
    """
    penalties = (getattr(variable, "regularizer", None) for variable in model_or_layer.weights)
    return [penalty.posterior for penalty in penalties if isinstance(penalty, KLPenalty)]


def require_posteriors(model_or_layer):
    """The same, where there must be some.

    Raises:
        ValueError: Where there is none, or the model has not been built yet.
    """
    found = posteriors(model_or_layer)
    if not found:
        state = "" if model_or_layer.built else " (it has not been built: call it on some data first)"
        raise ValueError(
            f"Expected at least one variational weight, such as a VariationalDense layer has. Received: "
            f"{model_or_layer.name!r} of type {type(model_or_layer).__name__}, which has none{state}."
        )
    return found


def prunable_weights(model_or_layer):
    """The weights that `sparsity` counts: every variational kernel, table and scale, but no bias.

    Raises:
        ValueError: Where there is no variational weight, or the model has not been built yet.
    """
    found = require_posteriors(model_or_layer)
    return [weight for weight in found if isinstance(weight, VariationalWeight) and weight.prunable]


def learning_posteriors(model):
    """Those of which anything is trainable: whose KL is in the loss."""
    trainable = {id(variable) for variable in model.trainable_variables}
    return [each for each in posteriors(model) if any(id(variable) in trainable for variable in each.variables)]


def kl_divergence(model_or_layer):
    """Σ KL(posterior ‖ prior) over all posteriors, in nats, not weighted: a scalar tensor.

    Args:
        model_or_layer: A built `keras.Model` or layer.

    Raises:
        ValueError: If it has no variational weight.
    """
    return sum(posterior.kl() for posterior in require_posteriors(model_or_layer))
