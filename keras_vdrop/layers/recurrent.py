"""Recurrent layers: weights and masks drawn once a sequence and held over its time steps."""

import keras
from keras import ops

from keras_vdrop.functional import noise
from keras_vdrop.layers.base import VariationalLayer, check_positive_int, check_rate
from keras_vdrop.posterior import VariationalWeight
from keras_vdrop.sampling import mask_shape


class RecurrentCell(VariationalLayer):
    """Mixin to a Keras cell: draws before the first time step, releases after the last.

    `keras.layers.RNN` calls the four hooks of Keras's dropout cells around its loop, which is where noise can be drawn
    once for all steps on every backend. They do not say whether it is training; the draw is ignored where it is not.
    """

    @classmethod
    def _estimators(cls):
        return ("reparameterization",)

    def __init__(self, **kwargs):
        for name in ("dropout", "recurrent_dropout"):
            check_rate(name, kwargs[name])
        check_positive_int("units", kwargs["units"])
        super().__init__(**kwargs)

    def get_dropout_mask(self, step_input):
        """Draw everything that meets the inputs: the mask, the kernel and the bias."""
        self._hold(self.kernel, self.bias)
        self._dropout_mask = self._draw_mask(step_input, self.dropout)
        return self._dropout_mask

    def get_recurrent_dropout_mask(self, step_input):
        """Draw everything that meets the state: its mask and the recurrent kernel."""
        self._hold(self.recurrent_kernel)
        self._recurrent_dropout_mask = self._draw_mask(step_input, self.recurrent_dropout)
        return self._recurrent_dropout_mask

    def reset_dropout_mask(self):
        self._release(self.kernel, self.bias)
        self._dropout_mask = None

    def reset_recurrent_dropout_mask(self):
        self._release(self.recurrent_kernel)
        self._recurrent_dropout_mask = None

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """A step is not worth computing twice, and must not draw."""
        return layer_call

    def _hold(self, *weights):
        for weight in weights:
            if isinstance(weight, VariationalWeight):
                weight.hold(self.seed_generator)

    def _release(self, *weights):
        for weight in weights:
            if isinstance(weight, VariationalWeight):
                weight.release()

    def _draw_mask(self, like, rate):
        """Bernoulli(1 − rate) / (1 − rate) for every example and channel, the same for all gates; None at rate 0."""
        if rate == 0.0:
            return None
        keep = noise.bernoulli(mask_shape(ops.shape(like)), 1.0 - rate, self.seed_generator)
        return ops.cast(keep / (1.0 - rate), self.compute_dtype)

    def _preactivation(self, inputs, state, training):
        """inputs·kernel + state·recurrent_kernel + bias, with the noise that is held."""
        noisy = self._noisy(training)
        x = self._apply(self.kernel, ops.matmul, self._masked(inputs, noisy, "_dropout_mask", self.dropout), noisy)
        state = self._masked(state, noisy, "_recurrent_dropout_mask", self.recurrent_dropout)
        x = x + self._apply(self.recurrent_kernel, ops.matmul, state, noisy)
        if self.bias is not None:
            x = x + self._apply(self.bias, lambda one, bias: one * bias, ops.ones((1, 1), x.dtype), noisy)
        return x

    def _masked(self, x, noisy, name, rate):
        """`x` times the mask that is held; a cell called outside an RNN draws one for the step."""
        if not noisy or rate == 0.0:
            return x
        mask = getattr(self, name, None)
        return x * (self._draw_mask(x, rate) if mask is None else mask)


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalLSTMCell(RecurrentCell, keras.layers.LSTMCell):
    """One step of an LSTM whose kernel and recurrent kernel are distributions, for `keras.layers.RNN`.

    i, f, o = σ(z_i), σ(z_f), σ(z_o);  c' = f·c + i·tanh(z_c);  h' = o·tanh(c')
    with z = x·W + h·R + b,  W ~ N(loc_W, exp(log_variance_W)),  R ~ N(loc_R, exp(log_variance_R))

    In training (and within `sampling()`) W and R are drawn once for the batch before the first time step and are the
    same at every step; the next call draws afresh. With `kernel_prior=None` and the two dropout rates it is the
    "variational RNN" of Gal and Ghahramani: masks that stay the same over time.

    Args:
        units: Positive int, U.
        activation, recurrent_activation, use_bias, kernel_initializer, recurrent_initializer, bias_initializer,
            unit_forget_bias, kernel_regularizer, recurrent_regularizer, bias_regularizer, kernel_constraint,
            recurrent_constraint, bias_constraint: As in `keras.layers.LSTMCell`.
        dropout, recurrent_dropout: Rates in [0, 1) at which channels of the input and of the state are dropped, by
            one mask an example for all time steps and gates.
        seed: Int for the same noise in every run, or None.
        kernel_prior: The prior of the kernel and of the recurrent kernel; else as in `VariationalDense`.
        bias_prior, kl_weight, initial_log_variance, threshold: As in `VariationalDense`.
        estimator: "reparameterization".
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        (B, D), and the states h and c, (B, U) each.

    Output shape:
        (B, U), and the new states.

    Raises:
        ValueError: For a value that is out of range.

    Example:
        >>> import keras, keras_vdrop as kv
        >>> layer = keras.layers.RNN(kv.VariationalLSTMCell(6, kl_weight=1 / 1000))
        >>> layer(keras.ops.ones((2, 5, 4))).shape == (2, 6)
        True

    Reference:
        Bayesian Sparsification of Recurrent Neural Networks, Lobacheva, Chirkova, Vetrov, 2017,
        https://arxiv.org/abs/1708.00077; A Theoretically Grounded Application of Dropout in Recurrent Neural Networks,
        Gal, Ghahramani, 2016, https://arxiv.org/abs/1512.05287
    """

    def __init__(
        self,
        units,
        activation="tanh",
        recurrent_activation="sigmoid",
        use_bias=True,
        kernel_initializer="glorot_uniform",
        recurrent_initializer="orthogonal",
        bias_initializer="zeros",
        unit_forget_bias=True,
        kernel_regularizer=None,
        recurrent_regularizer=None,
        bias_regularizer=None,
        kernel_constraint=None,
        recurrent_constraint=None,
        bias_constraint=None,
        dropout=0.0,
        recurrent_dropout=0.0,
        seed=None,
        *,
        kernel_prior="log_uniform",
        bias_prior=None,
        estimator="reparameterization",
        kl_weight=None,
        initial_log_variance=-10.0,
        threshold=3.0,
        **kwargs,
    ):
        super().__init__(
            units=units,
            activation=activation,
            recurrent_activation=recurrent_activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            recurrent_initializer=recurrent_initializer,
            bias_initializer=bias_initializer,
            unit_forget_bias=unit_forget_bias,
            kernel_regularizer=kernel_regularizer,
            recurrent_regularizer=recurrent_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            recurrent_constraint=recurrent_constraint,
            bias_constraint=bias_constraint,
            dropout=dropout,
            recurrent_dropout=recurrent_dropout,
            kernel_prior=kernel_prior,
            bias_prior=bias_prior,
            estimator=estimator,
            kl_weight=kl_weight,
            initial_log_variance=initial_log_variance,
            threshold=threshold,
            seed=seed,
            **kwargs,
        )

    def call(self, inputs, states, training=False):
        h, c = states
        i, f, z, o = ops.split(self._preactivation(inputs, h, training), 4, axis=-1)
        c = self.recurrent_activation(f) * c + self.recurrent_activation(i) * self.activation(z)
        h = self.recurrent_activation(o) * self.activation(c)
        return h, [h, c]


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalLSTM(keras.layers.RNN):
    """An LSTM whose kernel and recurrent kernel are distributions: `keras.layers.LSTM` with noise held over time.

    The same as `keras.layers.RNN(VariationalLSTMCell(...))`, with the arguments of `keras.layers.LSTM`; the equations
    are the cell's.

    Args:
        units, activation, ..., recurrent_dropout, seed: As in `VariationalLSTMCell`.
        return_sequences, return_state, go_backwards, stateful, unroll: As in `keras.layers.LSTM`.
        kernel_prior, bias_prior, estimator, kl_weight, initial_log_variance, threshold: As in `VariationalLSTMCell`.
        **kwargs: `zero_output_for_mask`, `name`, `dtype`, `trainable`; `activity_regularizer` acts on the output.

    Input shape:
        (B, T, D); optionally `initial_state`, a list of two tensors (B, U), and `mask`, (B, T).

    Output shape:
        (B, U), or (B, T, U) with `return_sequences`; with `return_state`, followed by two tensors (B, U).

    Raises:
        ValueError: For a value that is out of range, or `unroll` where T is unknown.

    Example:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalLSTM(6, return_sequences=True, kl_weight=1 / 1000)
        >>> layer(keras.ops.ones((2, 5, 4))).shape == (2, 5, 6)
        True

    Reference:
        Those of `VariationalLSTMCell`.
    """

    def __init__(
        self,
        units,
        activation="tanh",
        recurrent_activation="sigmoid",
        use_bias=True,
        kernel_initializer="glorot_uniform",
        recurrent_initializer="orthogonal",
        bias_initializer="zeros",
        unit_forget_bias=True,
        kernel_regularizer=None,
        recurrent_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        recurrent_constraint=None,
        bias_constraint=None,
        dropout=0.0,
        recurrent_dropout=0.0,
        seed=None,
        return_sequences=False,
        return_state=False,
        go_backwards=False,
        stateful=False,
        unroll=False,
        *,
        kernel_prior="log_uniform",
        bias_prior=None,
        estimator="reparameterization",
        kl_weight=None,
        initial_log_variance=-10.0,
        threshold=3.0,
        **kwargs,
    ):
        cell = VariationalLSTMCell(
            units,
            activation=activation,
            recurrent_activation=recurrent_activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            recurrent_initializer=recurrent_initializer,
            bias_initializer=bias_initializer,
            unit_forget_bias=unit_forget_bias,
            kernel_regularizer=kernel_regularizer,
            recurrent_regularizer=recurrent_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            recurrent_constraint=recurrent_constraint,
            bias_constraint=bias_constraint,
            dropout=dropout,
            recurrent_dropout=recurrent_dropout,
            seed=seed,
            kernel_prior=kernel_prior,
            bias_prior=bias_prior,
            estimator=estimator,
            kl_weight=kl_weight,
            initial_log_variance=initial_log_variance,
            threshold=threshold,
            name="cell",
            dtype=kwargs.get("dtype"),
            trainable=kwargs.get("trainable", True),
        )
        super().__init__(
            cell,
            return_sequences=return_sequences,
            return_state=return_state,
            go_backwards=go_backwards,
            stateful=stateful,
            unroll=unroll,
            activity_regularizer=activity_regularizer,
            **kwargs,
        )
        self.input_spec = keras.layers.InputSpec(ndim=3)

    def get_config(self):
        config = super().get_config()
        del config["cell"]
        own = ("name", "dtype", "trainable")
        cell = {name: value for name, value in self.cell.get_config().items() if name not in own}
        activity = keras.regularizers.serialize(self.activity_regularizer)
        return {**config, **cell, "activity_regularizer": activity}

    @classmethod
    def from_config(cls, config):
        return cls(**config)
