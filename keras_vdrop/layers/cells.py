"""Cells of recurrent layers, which draw weights and masks once per sequence and use them at all of its time steps.

A cell is `class VariationalXCell(RecurrentCell, keras.layers.XCell)` with the equations of one step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_vdrop.checks import check_positive_int, check_rate
from keras_vdrop.functional import noise
from keras_vdrop.functional.tensors import equal_parts
from keras_vdrop.layers.held import Held, Product
from keras_vdrop.layers.weights import VariationalLayer
from keras_vdrop.posterior import VariationalWeight
from keras_vdrop.sampling import FixedSeeds, advance, is_consistent, mask_shape

# The operands of a cell's two products; also the rows of a two-dimensional bias.
_INPUTS, _STATE = 0, 1


class RecurrentCell(VariationalLayer):
    """Mixin for a Keras cell that draws before the first time step and discards the draws after the last.

    `keras.layers.RNN` calls the four hooks of Keras's dropout cells before and after its loop. There noise can be drawn
    once for all steps on every backend. The hooks do not receive `training`, so they prepare both products, without and
    with noise. A compiled graph drops the one that is not used.

    Args:
        *args: The arguments of the Keras cell; `dropout` and `recurrent_dropout` in [0, 1).
        estimator: "reparameterization" for one draw of the weights for the batch, which is also what "auto" means; or
            "flipout", which adds signs for each example.
        output_dropout: Rate in [0, 1) at which channels of the output are dropped, but not those of the state.
        weight_dropout: Rate in [0, 1) at which individual recurrent weights are dropped.
        tied_masks: Whether all gates share the masks of the inputs and of the state.
        **kwargs: As for `VariationalLayer`.
    """

    def __init__(
        self,
        *args: Any,
        estimator: str = "auto",
        output_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        tied_masks: bool = True,
        **kwargs: Any,
    ):
        kwargs = self._bind(args, kwargs)
        rates = {"output_dropout": output_dropout, "weight_dropout": weight_dropout}
        for name in ("dropout", "recurrent_dropout", *rates):
            check_rate(name, {**rates, **kwargs}.get(name, 0.0))
        if "units" in kwargs:
            check_positive_int("units", kwargs["units"])
        super().__init__(estimator=estimator, **kwargs)
        self.output_dropout = float(output_dropout)
        self.weight_dropout = float(weight_dropout)
        self.tied_masks = bool(tied_masks)

    @classmethod
    def _estimators(cls) -> tuple[str, ...]:
        return "auto", "reparameterization", "flipout"

    @property
    def learns_locally(self) -> bool:
        return False

    def build(self, input_shape: Sequence[int | None]) -> None:
        super().build(input_shape)
        groups = {} if self.kernel_prior is None else self.kernel_prior.groups
        gates = self.kernel.shape[-1] // self.units
        if groups.get("group_axis") in (-1, 1) and groups.get("blocks", 1) not in (1, gates):
            raise ValueError(
                f"The kernels of {self.name!r} hold {gates} gates side by side, so `blocks` must be 1 or {gates}. "
                f"Received: kernel_prior={self.kernel_prior}"
            )

    # Drawing

    _held: Held | None = None

    def get_dropout_mask(self, step_input: Any) -> None:
        """Draw what the inputs are multiplied by. `keras.layers.RNN` calls this before the first step."""
        # Draw from a copy of the generator's state: a sequence without noise must not advance the generator.
        self._held = Held(ops.convert_to_tensor(self.seed_generator.state) if self.draws else None)
        self._held.products[_INPUTS] = self._both_products(_INPUTS, step_input)

    def get_recurrent_dropout_mask(self, step_input: Any) -> None:
        """Draw what the state is multiplied by, and the mask of the output."""
        self._held.products[_STATE] = self._both_products(_STATE, step_input)
        self._held.output_mask = self._output_mask(step_input)

    def reset_dropout_mask(self) -> None:
        """Discard the draws, and advance the generator if they were used. `keras.layers.RNN` calls this at the end."""
        if self._held is not None and self._held.used and self.draws:
            advance(self.seed_generator)
        self._held = None

    def reset_recurrent_dropout_mask(self) -> None:
        """Do nothing: `reset_dropout_mask` has discarded all draws."""

    @property
    def draws(self) -> bool:
        rates = self.dropout, self.recurrent_dropout, self.output_dropout, self.weight_dropout
        return super().draws or any(rates)

    def _seeds(self, purpose: str = "noise") -> keras.random.SeedGenerator:
        if self._held is None:
            return super()._seeds(purpose)
        return FixedSeeds(self._held.state, noise.hash_seed(purpose))

    def rematerialized_call(self, layer_call: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """Do not recompute a single step: that is not worth its cost, and a step must not draw."""
        return layer_call

    def _both_products(self, operand: int, like: Any) -> tuple[Product, ...]:
        return tuple(self._product(operand, like, noisy) for noisy in (False, True))

    def _product(self, operand: int, like: Any, noisy: bool) -> Product:
        """Make the `Product` of the inputs or of the state; `like` is a tensor of their shape."""
        name = ("inputs", "state")[operand]
        weight = (self.kernel, self.recurrent_kernel)[operand]
        rate = (self.dropout, self.recurrent_dropout)[operand]
        weight_rate = (0.0, self.weight_dropout)[operand]
        matrix, bias = self._mean(weight), self._bias_row(operand, self._mean)
        if not noisy:
            return Product(self.units, matrix, bias)
        flips, signs = None, None
        if self.estimator == "flipout" and self._posterior_size and not is_consistent():
            shape = ops.shape(like)[0], weight.shape[-1]
            signs = self._signs(shape, f"signs of the product of the {name}")
        if isinstance(weight, VariationalWeight):
            delta = self._perturbation(weight)
            if signs is None:
                matrix = matrix + delta
            else:
                flips = delta, self._signs(ops.shape(like), f"signs of the {name}"), signs
        if weight_rate:
            keep = self._bernoulli(weight.shape, weight_rate, "dropped weights")
            matrix = matrix * keep
            flips = flips and (flips[0] * keep, *flips[1:])
        if bias is not None and isinstance(self.bias, VariationalWeight):
            delta = self._bias_row(operand, self._perturbation)
            bias = bias + (delta if signs is None else delta * signs)
        count = 1 if self.tied_masks or not rate else weight.shape[-1] // self.units
        masks = [self._draw_mask(like, rate, f"mask {gate} of the {name}") for gate in range(count)]
        return Product(self.units, matrix, bias, flips, masks)

    def _mean(self, weight: Any) -> Any:
        return ops.cast(weight.mean() if isinstance(weight, VariationalWeight) else weight, self.compute_dtype)

    def _perturbation(self, weight: VariationalWeight) -> Any:
        return ops.cast(weight.perturbation(self._seeds(weight.name)), self.compute_dtype)

    def _signs(self, shape: Any, purpose: str) -> Any:
        return noise.rademacher(shape, self._seeds(purpose), self.compute_dtype)

    def _bias_row(self, row: int, of: Callable[[Any], Any]) -> Any:
        """Return what `of(bias)` adds to one product: its row if it has two, else all of it for the inputs' product."""
        if self.bias is None:
            return None
        if len(self.bias.shape) == 2:
            return of(self.bias)[row]
        return of(self.bias) if row == _INPUTS else None

    def _output_mask(self, like: Any) -> Any:
        return self._draw_mask(like, self.output_dropout, "mask of the output")

    def _draw_mask(self, like: Any, rate: float, purpose: str) -> Any:
        """Draw a mask for every example and channel; None at rate 0."""
        return self._bernoulli(mask_shape(ops.shape(like)), rate, purpose) if rate else None

    def _bernoulli(self, shape: Any, rate: float, purpose: str) -> Any:
        """Draw from Bernoulli(1 − rate) / (1 − rate)."""
        keep = noise.bernoulli(shape, 1.0 - rate, self._seeds(purpose))
        return ops.cast(keep / (1.0 - rate), self.compute_dtype)

    # For the equations of a step

    def _products(self, inputs: Any, state: Any, noisy: bool) -> list[Product]:
        """Return the products held for this sequence. A cell that is called outside an RNN draws for this step."""
        if self._held is None:
            return [self._product(operand, like, noisy) for operand, like in enumerate((inputs, state))]
        self._held.used |= noisy
        return [product[noisy] for product in self._held.products]

    def _output(self, h: Any, noisy: bool) -> Any:
        if not noisy or not self.output_dropout:
            return h
        return h * (self._output_mask(h) if self._held is None else self._held.output_mask)

    # For `sparsity`

    def places(self, input_shape: Sequence[int | None]) -> int | None:
        return 1  # per step

    _gate_names: tuple[str, ...] = ()

    def structure(self, kept: dict[str, np.ndarray]) -> dict[str, tuple[int, int]]:
        """Count the hidden units, in all and for each gate, that still depend on the inputs or the state."""
        columns = kept["kernel"].any(axis=0) | kept["recurrent_kernel"].any(axis=0)
        gates = columns.reshape(-1, self.units)
        alive = {"units": gates.any(axis=0), **{f"{name} gate": gate for name, gate in zip(self._gate_names, gates)}}
        return {name: (int(each.sum()), self.units) for name, each in alive.items()}

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "output_dropout": self.output_dropout,
            "weight_dropout": self.weight_dropout,
            "tied_masks": self.tied_masks,
        }


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalLSTMCell(RecurrentCell, keras.layers.LSTMCell):
    """One step of an LSTM whose kernel and recurrent kernel are distributions, for `keras.layers.RNN`.

    i, f, o = σ(z_i), σ(z_f), σ(z_o);  c' = f·c + i·tanh(z_c);  h' = o·tanh(c')
    with z = x·W + h·R + b,  W ~ N(loc_W, exp(log_variance_W)),  R ~ N(loc_R, exp(log_variance_R))

    In training (and within `sampling()`) W, R and every mask are drawn before the first time step and stay the same at
    every step; the next call draws new ones. With `kernel_prior=None` and dropout rates it is the "variational RNN" of
    Gal and Ghahramani. In prediction there is no noise.

    Args:
        *args: The arguments of `keras.layers.LSTMCell`, in their order: `units`, U, ..., `seed`.
        dropout, recurrent_dropout: Rates in [0, 1) at which channels of the input and of the state are dropped.
        output_dropout: Rate in [0, 1) at which channels of the output are dropped, but not those of the state.
        weight_dropout: Rate in [0, 1) at which individual recurrent weights are dropped (DropConnect).
        tied_masks: Whether all gates share the masks of the inputs and of the state; if not, each gate has its own.
        kernel_prior: The prior of the kernel and of the recurrent kernel; otherwise as in `VariationalDense`.
        estimator: "auto" or "reparameterization" for one draw of the weights for the batch, with as many products as a
            plain LSTM; or "flipout" for signs of each example, the same at every step, with twice as many products.
        bias_prior, kl_weight, initial_log_variance, log_variance_rate, threshold: As in `VariationalDense`.
        **kwargs: `name`, `dtype`, `trainable`; `implementation`, which has no effect: with tied masks, one product
            covers all gates.

    Input shape:
        (B, D), and the states h and c, (B, U) each.

    Output shape:
        (B, U), and the new states h and c.

    Raises:
        ValueError: For a value that is out of range.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = keras.layers.RNN(kv.VariationalLSTMCell(6, kl_weight=1 / 1000))
        >>> layer(keras.ops.ones((2, 5, 4))).shape == (2, 6)
        True

    Reference:
        Bayesian Sparsification of Recurrent Neural Networks, Lobacheva, Chirkova, Vetrov, 2017,
        https://arxiv.org/abs/1708.00077; masks: A Theoretically Grounded Application of Dropout in Recurrent Neural
        Networks, Gal, Ghahramani, 2016, https://arxiv.org/abs/1512.05287; dropped weights: Regularizing and Optimizing
        LSTM Language Models, Merity, Keskar, Socher, 2018, https://arxiv.org/abs/1708.02182
    """

    _gate_names = ("input", "forget", "cell", "output")

    def call(self, inputs: Any, states: Any, training: bool | None = False) -> tuple[Any, Any]:
        noisy = self._noisy(training)
        h, c = states
        of_inputs, of_state = self._products(inputs, h, noisy)
        i, f, z, o = equal_parts(of_inputs(inputs) + of_state(h), 4)
        c = self.recurrent_activation(f) * c + self.recurrent_activation(i) * self.activation(z)
        h = self.recurrent_activation(o) * self.activation(c)
        return self._output(h, noisy), [h, c]


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalGRUCell(RecurrentCell, keras.layers.GRUCell):
    """One step of a GRU whose kernel and recurrent kernel are distributions, for `keras.layers.RNN`.

    z, r = σ(x·W_z + b_z + h·R_z + c_z), σ(x·W_r + b_r + h·R_r + c_r)
    h' = z·h + (1 − z)·tanh(x·W_h + b_h + r·(h·R_h + c_h))

    With `reset_after=False` the candidate is tanh(x·W_h + b_h + (r·h)·R_h), and c = 0. W, R and masks are drawn as in
    `VariationalLSTMCell`.

    Args:
        *args: The arguments of `keras.layers.GRUCell`, in their order: `units`, U, ..., `reset_after`, `seed`.
        output_dropout, weight_dropout, tied_masks, kernel_prior, bias_prior, estimator: As in `VariationalLSTMCell`.
        kl_weight, initial_log_variance, log_variance_rate, threshold, **kwargs: As in `VariationalLSTMCell`.

    Input shape:
        (B, D), and the state h, (B, U).

    Output shape:
        (B, U), and the new state.

    Raises:
        ValueError: For a value that is out of range.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = keras.layers.RNN(kv.VariationalGRUCell(6, kl_weight=1 / 1000))
        >>> layer(keras.ops.ones((2, 5, 4))).shape == (2, 6)
        True

    Reference:
        As for `VariationalLSTMCell`.
    """

    _gate_names = ("update", "reset", "candidate")

    def call(self, inputs: Any, states: Any, training: bool | None = False) -> tuple[Any, Any]:
        noisy = self._noisy(training)
        (h,) = keras.tree.flatten(states)
        of_inputs, of_state = self._products(inputs, h, noisy)
        x_z, x_r, x_h = equal_parts(of_inputs(inputs), 3)
        if self.reset_after:
            h_z, h_r, h_h = equal_parts(of_state(h), 3)
        else:
            h_h = None  # it depends on r
            h_z, h_r = equal_parts(of_state(h, last=2), 2)
        z, r = self.recurrent_activation(x_z + h_z), self.recurrent_activation(x_r + h_r)
        h_h = of_state(r * h, first=2) if h_h is None else r * h_h
        candidate = self.activation(x_h + h_h)
        h = z * h + (1 - z) * candidate
        return self._output(h, noisy), keras.tree.pack_sequence_as(states, [h])


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalSimpleRNNCell(RecurrentCell, keras.layers.SimpleRNNCell):
    """One step of a fully connected RNN whose kernel and recurrent kernel are distributions, for `keras.layers.RNN`.

    h' = tanh(x·W + h·R + b), with W, R and masks drawn as in `VariationalLSTMCell`.

    Args:
        *args: The arguments of `keras.layers.SimpleRNNCell`, in their order: `units`, U, ..., `seed`.
        output_dropout, weight_dropout, tied_masks, kernel_prior, bias_prior, estimator: As in `VariationalLSTMCell`.
        kl_weight, initial_log_variance, log_variance_rate, threshold: As in `VariationalLSTMCell`.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        (B, D), and the state h, (B, U).

    Output shape:
        (B, U), and the new state.

    Raises:
        ValueError: For a value that is out of range.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = keras.layers.RNN(kv.VariationalSimpleRNNCell(6, kl_weight=1 / 1000))
        >>> layer(keras.ops.ones((2, 5, 4))).shape == (2, 6)
        True

    Reference:
        As for `VariationalLSTMCell`.
    """

    def call(self, inputs: Any, states: Any, training: bool | None = False) -> tuple[Any, Any]:
        noisy = self._noisy(training)
        (h,) = keras.tree.flatten(states)
        of_inputs, of_state = self._products(inputs, h, noisy)
        h = self.activation(of_inputs(inputs) + of_state(h))
        return self._output(h, noisy), keras.tree.pack_sequence_as(states, [h])
