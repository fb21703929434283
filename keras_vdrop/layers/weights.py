"""`VariationalLayer` and `AffineLayer`: mixins that make the weights of Keras's layers variational.

A variational layer is `class VariationalX(AffineLayer, keras.layers.X)`. The Keras layer provides the arguments, their
checks, the shapes and `build`. When `build` adds a weight that has a prior, `VariationalLayer.add_weight` returns a
`VariationalWeight`, and the layer's `call` applies it.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import keras
import numpy as np
from keras import ops

from keras_vdrop import priors
from keras_vdrop.checks import check_finite, check_log_variance, check_positive
from keras_vdrop.functional import estimators
from keras_vdrop.functional.tensors import channel_axis, is_float, left_along, product
from keras_vdrop.layers.drop_in import DropIn
from keras_vdrop.layers.stochastic import StochasticLayer, plain_variable
from keras_vdrop.posterior import LowRankUpdate, VariationalWeight, posteriors
from keras_vdrop.sampling import is_repeated

# Estimators that saved models may name but that no longer exist, and their replacements.
_RETIRED_ESTIMATORS = {"fast_local_reparameterization": "local_reparameterization"}


def distinct(names: Iterable[str]) -> list[str]:
    """Return the names as a list, with a number appended to each one that repeats an earlier name."""
    found = []
    for name in names:
        others = (f"{name}_{number}" for number in itertools.count(1))
        found.append(next(each for each in itertools.chain([name], others) if each not in found))
    return found


class VariationalLayer(DropIn, StochasticLayer):
    """Mixin that makes a Keras layer's weights variational.

    A subclass without its own constructor takes the arguments of its Keras layer, in their order, and the following.

    Args:
        *args: The arguments of the Keras layer.
        kernel_prior: Prior of every weight except the bias: "log_uniform", "ard", "normal", "scale_mixture", a
            `priors.Prior`, a TFP distribution, or None for a plain weight.
        bias_prior: The same for the bias.
        estimator: How noise enters the output: one of `functional.estimators.ESTIMATORS`; or "auto": local
            reparameterization if an example uses each element of the weight once, else flipout.
        kl_weight: As for `StochasticLayer`.
        initial_log_variance: Float, the initial log_variance. None sets the standard deviation to 5 % (22 % with a
            normal prior) of the root mean square of the initial weights, which counts as 0.1 if they are all 0.
        log_variance_rate: Float > 0. A step of an optimizer such as Adam moves log_variance by about this many learning
            rates; SGD moves it by the gradient times the learning rate times log_variance_rate².
        threshold: Float, the log alpha above which a weight is pruned; None for that of the prior: 3, or 5 if the prior
            keeps or prunes weights in groups.
        seed: As for `StochasticLayer`.
        **kwargs: The arguments of the Keras layer.

    Examples:
        >>> import keras_vdrop as kv
        >>> layer = kv.VariationalDense(3, kernel_prior="ard", bias_prior="normal", kl_weight=1 / 1000)
        >>> layer.build((None, 4))
        >>> layer.kernel.prior, layer.bias.prior
        (ARD(group_axis=None, blocks=1), Normal(scale=None, trainable=False))
    """

    def __init__(
        self,
        *args: Any,
        kernel_prior: Any = "log_uniform",
        bias_prior: Any = None,
        estimator: str = "auto",
        kl_weight: float | None = None,
        initial_log_variance: float | None = None,
        log_variance_rate: float = 5.0,
        threshold: float | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        kwargs = self._bind(args, kwargs)
        seed = kwargs.pop("seed", seed)
        estimator = _RETIRED_ESTIMATORS.get(estimator, estimator)
        if estimator not in self._estimators():
            raise ValueError(f"`estimator` must be one of {self._estimators()}. Received: estimator={estimator!r}")
        if initial_log_variance is not None:
            check_log_variance("initial_log_variance", initial_log_variance)
        check_positive("log_variance_rate", log_variance_rate)
        if threshold is not None:
            check_finite("threshold", threshold)
        kernel_prior, bias_prior = priors.get(kernel_prior), priors.get(bias_prior)
        super().__init__(kl_weight=kl_weight, seed=seed, **kwargs)
        self.kernel_prior = kernel_prior
        self.bias_prior = bias_prior
        self.estimator = estimator
        self.initial_log_variance = None if initial_log_variance is None else float(initial_log_variance)
        self.log_variance_rate = float(log_variance_rate)
        self.threshold = None if threshold is None else float(threshold)

    @classmethod
    def _estimators(cls) -> tuple[str, ...]:
        return "auto", *estimators.ESTIMATORS

    def uses(self, input_shape: Sequence[int | None]) -> int | None:
        """Return at how many positions of one example each element of a weight is used in one call.

        Args:
            input_shape: The shape of the inputs, with the batch.

        Returns:
            Int, or None if it depends on an unknown size.
        """
        return self.places(input_shape)

    @property
    def learns_locally(self) -> bool:
        """Whether the layer may use local reparameterization."""
        return self.estimator in ("auto", "local_reparameterization")

    def _estimator(self, input_shape: Sequence[int | None]) -> str:
        """Return the name of the estimator for a call on inputs of this shape."""
        if self.estimator != "auto":
            return self.estimator
        once = self.uses(tuple(input_shape)) == 1 and not (self.draws and is_repeated(self.seed_generator))
        return "local_reparameterization" if once else "flipout"

    def _sign_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return, for inputs and for outputs, the batch axis and the axes that they share with the kernel."""
        return (0, channel_axis(self)), (0, channel_axis(self))

    def places(self, input_shape: Sequence[int | None]) -> int | None:
        """Count the positions along the input axes other than the batch and those shared with the kernel."""
        shared = {axis % len(input_shape) for axis in self._sign_axes()[0]}
        return product(size for axis, size in enumerate(input_shape) if axis not in shared)

    def stock_variables(self) -> list[Any]:
        """Exclude the KL's scalars, the low-rank update and, of each posterior, everything but its mean."""
        own = {id(self._kl_weight), id(self._free_bits)}
        for posterior in posteriors(self):
            stands = getattr(posterior, "loc", None) if posterior is not self.lora_a else None
            own.update(id(variable) for variable in posterior.variables if variable is not stands)
        if self._update is not None:
            own.add(id(self._update.b))
        return [variable for variable in self.weights if id(variable) not in own]

    # Weights

    @property
    def draws(self) -> bool:
        return self._posterior_size > 0

    def build(self, input_shape: Sequence[int | None]) -> None:
        for axis in self._sign_axes()[0][1:]:
            if not -len(input_shape) <= axis < len(input_shape):
                raise ValueError(
                    f"The inputs to {self.name!r} must have more axes. Received: input_shape={tuple(input_shape)}"
                )
            if input_shape[axis] is None:
                raise ValueError(
                    f"Dimension {axis} of the inputs to {self.name!r} must be known to build its weights. Specify it "
                    f"in `keras.Input`. Received: input_shape={tuple(input_shape)}"
                )
        super().build(input_shape)

    def add_weight(
        self,
        shape: Any = None,
        initializer: Any = None,
        dtype: Any = None,
        trainable: bool = True,
        name: str | None = None,
        **arguments: Any,
    ) -> Any:
        """As in Keras, but a trainable weight with a prior becomes a `VariationalWeight`."""
        if shape is not None and None in shape:
            raise ValueError(
                f"The weight {name!r} of {self.name!r} has an unknown size. Specify all sizes in `keras.Input` or in "
                f"`output_shape`. Received: shape={tuple(shape)}"
            )
        is_bias = name is not None and "bias" in name
        prior = self.bias_prior if is_bias else self.kernel_prior
        arguments["initializer"] = initializer
        if not is_bias and getattr(self, "lora_rank", None):
            prior, trainable = None, False  # the layer learns only the low-rank update
        if prior is None or not trainable:
            return super().add_weight(shape=shape, dtype=dtype, trainable=trainable, name=name, **arguments)
        # Under `sampling(consistent=True)`, weights of the same name would have the same noise.
        taken = [each.name for each in posteriors(self) if isinstance(each, VariationalWeight) and each.owner is self]
        *_, name = distinct([*taken, name or "weight"])
        weight = VariationalWeight(
            self,
            super().add_weight,
            name,
            () if shape is None else shape,
            prior=prior,
            initial_log_variance=self.initial_log_variance,
            log_variance_rate=self.log_variance_rate,
            prunable=not is_bias,
            **arguments,
        )
        self._posterior_size += weight.size
        return weight

    _looks_up = False  # whether integer inputs are indices into the weights

    def _dtype_with(self, x: Any) -> str:
        """Return the dtype in which Keras's layer would compute with x: not its policy's if `TimeDistributed` calls."""
        weight = plain_variable(self.variable_dtype).dtype
        given = keras.backend.standardize_dtype(x.dtype)
        if given == weight or not is_float(x):
            return weight
        # Except with TensorFlow, Keras's `result_type` turns float64 into float32.
        return "float64" if "float64" in (weight, given) else keras.backend.result_type(weight, given)

    def _apply(
        self,
        weight: Any,
        linear: Callable[[Any, Any], Any],
        x: Any,
        noisy: bool,
        estimator: str | None = None,
        sign_axes: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    ) -> Any:
        """Return `linear(x, weight)` for a plain or a variational weight."""
        dtype = self._dtype_with(x)
        if not self._looks_up:  # integers are numbers, as in Keras's matrix product, and not indices
            x = ops.cast(x, dtype)
        if not isinstance(weight, VariationalWeight):
            return linear(x, ops.cast(weight, dtype))
        return weight.apply(
            linear,
            x,
            noisy=noisy,
            estimator=estimator or self._estimator(x.shape),
            seed=self._seeds(weight.name),
            sign_axes=sign_axes or self._sign_axes(),
            dtype=dtype,
        )

    # Saving

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "kernel_prior": priors.serialize(self.kernel_prior),
            "bias_prior": priors.serialize(self.bias_prior),
            "estimator": self.estimator,
            "initial_log_variance": self.initial_log_variance,
            "log_variance_rate": self.log_variance_rate,
            "threshold": self.threshold,
        }

    # LoRA and quantization, which Keras's layers apply to a plain kernel

    _update: LowRankUpdate | None = None

    def enable_lora(
        self,
        rank: int,
        a_initializer: Any = "he_uniform",
        b_initializer: Any = "zeros",
        lora_alpha: float | None = None,
    ) -> None:
        """Add a low-rank update to the kernel. Keras's `build` calls this if `lora_rank` is set; a later call fails.

        The kernel W stays fixed, and the layer learns an update: W + (lora_alpha / lora_rank)·A·B. A has a
        posterior N(loc, exp(log_variance)), in which the weights of one input share a variance. B is plain and starts
        at 0.

        Reference:
            BLoB: Bayesian Low-Rank Adaptation by Backpropagation for Large Language Models, Wang et al., 2024,
            https://arxiv.org/abs/2406.11675
        """
        kernel = self._adapted()
        if self._update is not None or isinstance(kernel, VariationalWeight) or kernel.trainable:
            raise ValueError(
                f"A low-rank update can be added to {self.name!r} only when it is built. Pass `lora_rank` to its "
                f"constructor, or convert a trained model with `keras_vdrop.to_variational(model, rank={rank})`."
            )
        if getattr(self, "groups", 1) != 1:
            raise ValueError(
                f"A grouped convolution cannot have a low-rank update. Received: groups={self.groups}, lora_rank={rank}"
            )
        if self.kernel_prior is None:
            raise ValueError(
                f"The low-rank update of {self.name!r} requires a `kernel_prior`. Received: kernel_prior=None"
            )
        self._update = LowRankUpdate(
            self,
            super().add_weight,
            "lora",
            kernel,
            rank,
            lora_alpha or self.lora_alpha,
            a_initializer,
            b_initializer,
            prior=self.kernel_prior,
            initial_log_variance=self.initial_log_variance,
            log_variance_rate=self.log_variance_rate,
        )
        self._posterior_size += self._update.a.size

    @property
    def lora_a(self) -> VariationalWeight | None:
        """A of the low-rank update, a `VariationalWeight`; None without one."""
        return None if self._update is None else self._update.a

    @property
    def lora_b(self) -> Any:
        """B of the low-rank update, a variable; None without one."""
        return None if self._update is None else self._update.b

    def _adapted(self) -> Any:
        """Return the weight that the low-rank update applies to; its last axis is that of the outputs."""
        return self.kernel

    def _with_update(self, y: Any, linear: Callable[[Any, Any], Any], x: Any, noisy: bool) -> Any:
        """Return `y`, which is `linear(x, W)`, plus what the update of W, if there is one, adds to it."""
        if self._update is None:
            return y
        inner = self._apply(self.lora_a, linear, x, noisy)
        axis = channel_axis(self)
        update = ops.matmul(ops.moveaxis(inner, axis, -1), ops.cast(self.lora_b, inner.dtype))
        return y + ops.cast(self._update.scale, y.dtype) * ops.moveaxis(update, -1, axis)

    def quantize(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__} cannot be quantized. Quantize the result of `keras_vdrop.to_deterministic`."
        )


class AffineLayer(VariationalLayer):
    """Mixin for activation(linear(x, kernel) + bias); the subclass defines `linear`."""

    # The name of the outputs, and the axes of the kernel that index them.
    _outputs: Any = "units", (-1,)

    def linear(self, x: Any, kernel: Any) -> Any:
        """Apply the layer's operation, which is linear in the input and in the kernel."""
        raise NotImplementedError

    def transform(self, x: Any, noisy: bool) -> Any:
        """Compute the layer without bias and activation; by default `linear` with one kernel."""
        return self._with_update(self._apply(self.kernel, self.linear, x, noisy), self.linear, x, noisy)

    def structure(self, kept: dict[str, np.ndarray]) -> dict[str, tuple[int, int]]:
        """Count the outputs that have at least one kept weight."""
        name, axes = self._outputs
        return {name: left_along(kept["kernel"], axes)}

    def call(self, inputs: Any, training: bool | None = False) -> Any:
        noisy = self._noisy(training)
        x = self.transform(inputs, noisy)
        if self.bias is not None:
            x = x + self._broadcast_bias(x, noisy)
        return x if self.activation is None else self.activation(x)

    def _broadcast_bias(self, x: Any, noisy: bool) -> Any:
        """Return the bias, shaped to be added to `x`; a variational bias is the weight of an input that is always 1."""
        rank = len(x.shape)
        shape = [1] * (rank - len(self.bias.shape)) + list(self.bias.shape)
        if channel_axis(self) == 1:
            shape = [1, -1] + [1] * (rank - 2)
        if not isinstance(self.bias, VariationalWeight):
            return ops.reshape(ops.cast(self.bias, self._dtype_with(x)), shape)
        ones = ops.ones((ops.shape(x)[0], *[1] * (rank - 1)), x.dtype)
        every_axis = tuple(range(rank))
        add = lambda one, bias: one * ops.reshape(bias, shape)  # noqa: E731
        # Each example has a single 1 as input, so it uses the bias once.
        estimator = "local_reparameterization" if self.estimator == "auto" else self.estimator
        return self._apply(self.bias, add, ones, noisy, estimator, sign_axes=(every_axis, every_axis))
