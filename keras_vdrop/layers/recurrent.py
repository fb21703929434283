"""Recurrent layers: `class VariationalX(RecurrentLayer, keras.layers.X)` with the class of the cell that it runs."""

import inspect
from typing import Any

import keras

from keras_vdrop.layers.cells import VariationalGRUCell, VariationalLSTMCell, VariationalSimpleRNNCell
from keras_vdrop.layers.drop_in import DropIn


class RecurrentLayer(DropIn):
    """Mixin for a Keras recurrent layer that runs one of our cells, which draws all the noise.

    The constructor bypasses that of the Keras layer, which would make a Keras cell.
    """

    _cell_class: Any = None
    cell: Any

    def __init__(self, *args: Any, **kwargs: Any):
        arguments = self._bind(args, kwargs)
        names = {*inspect.signature(self._cell_class).parameters, "implementation"}
        of_cell = {name: arguments.pop(name) for name in names & set(arguments)}
        of_both = {name: arguments[name] for name in ("dtype", "trainable") if name in arguments}
        has_cudnn = "use_cudnn" in self._keras_arguments()
        use_cudnn = arguments.pop("use_cudnn", "auto") if has_cudnn else "auto"
        if use_cudnn not in ("auto", False):
            raise ValueError(
                f'{type(self).__name__} has no cuDNN kernel. `use_cudnn` must be "auto" or False. '
                f"Received: use_cudnn={use_cudnn!r}"
            )
        cell = self._cell_class(**of_cell, **of_both, name="cell")
        keras.layers.RNN.__init__(self, cell, **arguments)
        self.use_cudnn = False
        self.input_spec = keras.layers.InputSpec(ndim=3)

    @property
    def kl_weight(self) -> Any:
        """The KL weight of the cell; assignable."""
        return self.cell.kl_weight

    @kl_weight.setter
    def kl_weight(self, value: float) -> None:
        self.cell.kl_weight = value

    @property
    def free_bits(self) -> Any:
        """The free bits of the cell; assignable."""
        return self.cell.free_bits

    @free_bits.setter
    def free_bits(self, value: float) -> None:
        self.cell.free_bits = value

    def call(self, sequences: Any, initial_state: Any = None, mask: Any = None, training: bool | None = False) -> Any:
        keras_layer: Any = super()
        try:
            return keras_layer.call(sequences, initial_state=initial_state, mask=mask, training=training)
        finally:  # Keras does not reset if a step fails
            self.cell.reset_dropout_mask()

    @classmethod
    def _own_arguments(cls) -> dict[str, inspect.Parameter]:
        return {} if cls._cell_class is None else cls._cell_class._own_arguments()

    def get_config(self) -> dict[str, Any]:
        keras_layer: Any = super()
        ours = self.cell.get_config()
        return {**keras_layer.get_config(), **{name: ours[name] for name in self._own_arguments()}}


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalLSTM(RecurrentLayer, keras.layers.LSTM):
    """An LSTM whose kernel and recurrent kernel are distributions: `keras.layers.LSTM` with noise held over time.

    It is `keras.layers.RNN(VariationalLSTMCell(...))` with the arguments of `keras.layers.LSTM`. `VariationalLSTMCell`
    has the equations.

    Args:
        *args: The arguments of `keras.layers.LSTM`, in their order: `units`, U, ..., `unroll`.
        output_dropout, weight_dropout, tied_masks, kernel_prior, bias_prior, estimator: As in `VariationalLSTMCell`.
        kl_weight, initial_log_variance, log_variance_rate, threshold: As in `VariationalLSTMCell`.
        use_cudnn: "auto" or False, both of which mean False: a cuDNN kernel cannot add the noise.
        **kwargs: `zero_output_for_mask`, `implementation`, `name`, `dtype`, `trainable`.

    Input shape:
        (B, T, D); optionally `initial_state`, a list of two tensors (B, U), and `mask`, (B, T).

    Output shape:
        (B, U), or (B, T, U) with `return_sequences`; with `return_state`, followed by two tensors (B, U).

    Raises:
        ValueError: For a value that is out of range, or for `unroll` if T is unknown.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalLSTM(6, return_sequences=True, kl_weight=1 / 1000)
        >>> layer(keras.ops.ones((2, 5, 4))).shape == (2, 5, 6)
        True

    Reference:
        Bayesian Sparsification of Recurrent Neural Networks, Lobacheva, Chirkova, Vetrov, 2017,
        https://arxiv.org/abs/1708.00077; masks: A Theoretically Grounded Application of Dropout in Recurrent Neural
        Networks, Gal, Ghahramani, 2016, https://arxiv.org/abs/1512.05287
    """

    _cell_class = VariationalLSTMCell


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalGRU(RecurrentLayer, keras.layers.GRU):
    """A GRU whose kernel and recurrent kernel are distributions: `keras.layers.GRU` with noise held over time.

    It is `keras.layers.RNN(VariationalGRUCell(...))` with the arguments of `keras.layers.GRU`. `VariationalGRUCell` has
    the equations.

    Args:
        *args: The arguments of `keras.layers.GRU`, in their order: `units`, U, ..., `reset_after`.
        output_dropout, weight_dropout, tied_masks, kernel_prior, bias_prior, estimator: As in `VariationalLSTMCell`.
        kl_weight, initial_log_variance, log_variance_rate, threshold: As in `VariationalLSTMCell`.
        use_cudnn, **kwargs: As in `VariationalLSTM`.

    Input shape:
        (B, T, D); optionally `initial_state`, a tensor (B, U), and `mask`, (B, T).

    Output shape:
        (B, U), or (B, T, U) with `return_sequences`; with `return_state`, followed by a tensor (B, U).

    Raises:
        ValueError: As for `VariationalLSTM`.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalGRU(6, kl_weight=1 / 1000)
        >>> layer(keras.ops.ones((2, 5, 4))).shape == (2, 6)
        True

    Reference:
        Bayesian Sparsification of Recurrent Neural Networks, Lobacheva, Chirkova, Vetrov, 2017,
        https://arxiv.org/abs/1708.00077; masks: A Theoretically Grounded Application of Dropout in Recurrent Neural
        Networks, Gal, Ghahramani, 2016, https://arxiv.org/abs/1512.05287
    """

    _cell_class = VariationalGRUCell


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalSimpleRNN(RecurrentLayer, keras.layers.SimpleRNN):
    """A fully connected RNN whose kernels are distributions: `keras.layers.SimpleRNN` with noise held over time.

    It is `keras.layers.RNN(VariationalSimpleRNNCell(...))` with the arguments of `keras.layers.SimpleRNN`.
    `VariationalSimpleRNNCell` has the equation.

    Args:
        *args: The arguments of `keras.layers.SimpleRNN`, in their order: `units`, U, ..., `seed`.
        output_dropout, weight_dropout, tied_masks, kernel_prior, bias_prior, estimator: As in `VariationalLSTMCell`.
        kl_weight, initial_log_variance, log_variance_rate, threshold: As in `VariationalLSTMCell`.
        **kwargs: `zero_output_for_mask`, `name`, `dtype`, `trainable`.

    Input shape:
        (B, T, D); optionally `initial_state`, a tensor (B, U), and `mask`, (B, T).

    Output shape:
        (B, U), or (B, T, U) with `return_sequences`; with `return_state`, followed by a tensor (B, U).

    Raises:
        ValueError: As for `VariationalLSTM`.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalSimpleRNN(6, kl_weight=1 / 1000)
        >>> layer(keras.ops.ones((2, 5, 4))).shape == (2, 6)
        True

    Reference:
        Bayesian Sparsification of Recurrent Neural Networks, Lobacheva, Chirkova, Vetrov, 2017,
        https://arxiv.org/abs/1708.00077; masks: A Theoretically Grounded Application of Dropout in Recurrent Neural
        Networks, Gal, Ghahramani, 2016, https://arxiv.org/abs/1512.05287
    """

    _cell_class = VariationalSimpleRNNCell
