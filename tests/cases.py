"""Every public layer, listed once with an input and its Keras twin. The conformance tests run over all of them."""

import dataclasses

import keras
import numpy as np
from keras import layers

import keras_vdrop as kv
from keras_vdrop.posterior import variational_weights


@dataclasses.dataclass(frozen=True)
class Case:
    """A variational layer as the conformance tests use it.

    Attributes:
        name: Of the case.
        cls: The layer's class.
        twin: The Keras layer that it stands for.
        shape: Of an input, with the batch.
        keras: Arguments of both.
        ours: Arguments of the variational layer alone.
    """

    name: str
    cls: type
    twin: type
    shape: tuple
    keras: dict
    ours: dict = dataclasses.field(default_factory=dict)

    def make(self, **arguments):
        """The variational layer; a cell within `keras.layers.RNN`."""
        layer = self.cls(**{"kl_weight": 0.01, **self.keras, **self.ours, **arguments})
        return layers.RNN(layer, dtype=arguments.get("dtype")) if self.is_cell else layer

    def make_twin(self):
        """The Keras layer with the same arguments; a cell within `keras.layers.RNN`."""
        layer = self.twin(**self.keras)
        return layers.RNN(layer) if self.is_cell else layer

    def model(self, **arguments):
        """A model of the layer alone."""
        return keras.Sequential([keras.Input(self.shape[1:]), self.make(**arguments)])

    def inputs(self, seed=0):
        return np.random.default_rng(seed).normal(size=self.shape).astype("float32")

    @property
    def is_cell(self):
        """Whether it is one step of an RNN."""
        return self.name.split("_")[1:2] == ["cell"]

    @property
    def is_rnn(self):
        """Whether it is a whole RNN."""
        return issubclass(self.cls, layers.RNN)

    def __str__(self):
        return self.name


DENSE = (kv.VariationalDense, layers.Dense)
CONV_2D = (kv.VariationalConv2D, layers.Conv2D)
LSTM_CELL = (kv.VariationalLSTMCell, layers.LSTMCell)
LSTM = (kv.VariationalLSTM, layers.LSTM)

CASES = [
    Case("dense", *DENSE, (4, 5), {"units": 3, "activation": "tanh"}),
    Case("dense_sequence", *DENSE, (4, 2, 5), {"units": 3}, {"bias_prior": "ard", "estimator": "flipout"}),
    Case("dense_one_draw", *DENSE, (4, 5), {"units": 3, "use_bias": False}, {"estimator": "reparameterization"}),
    Case("dense_normal", *DENSE, (4, 5), {"units": 3}, {"kernel_prior": "normal", "bias_prior": kv.priors.Normal(0.5)}),
    Case("conv_2d", *CONV_2D, (3, 6, 5, 4), {"filters": 6, "kernel_size": 3, "padding": "same", "groups": 2}),
    Case(
        "conv_2d_strides",
        *CONV_2D,
        (3, 6, 5, 2),
        {"filters": 3, "kernel_size": (3, 2), "strides": 2, "activation": "relu"},
        {"bias_prior": "normal", "estimator": "flipout"},
    ),
    Case(
        "conv_2d_dilation",
        *CONV_2D,
        (3, 2, 6, 7),
        {"filters": 3, "kernel_size": 2, "dilation_rate": 2, "data_format": "channels_first"},
        {"kernel_prior": "ard", "bias_prior": "ard", "estimator": "reparameterization"},
    ),
    Case("lstm_cell", *LSTM_CELL, (3, 4, 5), {"units": 3}),
    Case("lstm", *LSTM, (3, 4, 5), {"units": 3, "return_sequences": True}, {"bias_prior": "normal"}),
    Case(
        "lstm_unrolled",
        *LSTM,
        (3, 4, 5),
        {"units": 3, "unroll": True, "go_backwards": True, "use_bias": False},
        {"kernel_prior": "ard"},
    ),
]


def posteriors(layer_or_model):
    """The variational weights, of which every case has at least one."""
    weights = variational_weights(layer_or_model)
    assert weights
    return weights


def randomize(layer_or_model, log_variance=(-4.0, 1.0)):
    """Give every posterior means of size 1 and log variances in a range, so that all its terms matter."""
    rng = np.random.default_rng(0)
    for weight in posteriors(layer_or_model):
        weight.loc.assign(rng.normal(size=weight.shape))
        weight.log_variance.assign(rng.uniform(*log_variance, size=weight.shape))


def array(tensor):
    """Any tensor or variable as a float NumPy array."""
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32")))
