"""Networks that fill a GPU, from Keras's layers and ours, for speed.py."""

import functools
import typing

import keras
from keras import layers

import keras_vdrop as kv
from keras_vdrop.functional import estimators


class Kind(typing.NamedTuple):
    """The layer classes of one variant; None for a class that it does not have."""

    dense: typing.Callable
    convolution: typing.Callable
    lstm: typing.Callable | None
    attention: typing.Callable


KERAS = Kind(layers.Dense, layers.Conv2D, layers.LSTM, layers.MultiHeadAttention)


def kinds(kl_weight):
    """Return {name: Kind}: Keras's own layers first, then ours with each estimator."""

    def ours(estimator):
        classes = kv.VariationalDense, kv.VariationalConv2D, kv.VariationalLSTM, kv.VariationalMultiHeadAttention
        kind = Kind(*(functools.partial(cls, estimator=estimator, kl_weight=kl_weight) for cls in classes))
        return kind._replace(lstm=None) if estimator == "local_reparameterization" else kind

    return {"keras.layers": KERAS, **{estimator: ours(estimator) for estimator in estimators.ESTIMATORS}}


def feedforward(scale=1):
    """Return {title: (batch size, shape of an example, network in the format of peers.py)}, all sizes / `scale`."""
    width, hidden = 4096 // scale, 256 // scale

    def block(filters):
        convolution = ("convolution", filters // scale, 3, "same")
        return [convolution, ("relu",), convolution, ("relu",), ("pool",)]

    dense = [*[("dense", width)] * 3, ("dense", 10)]
    convolutional = [*block(64), *block(128), *block(256), ("flatten",), ("dense", hidden), ("dense", 10)]
    return {
        f"{width}-{width}-{width}-10, batch {width}": (width, (width,), dense),
        f"CNN of 6 convolutions, batch {hidden}": (hidden, (32, 32, 3), convolutional),
    }


def models(scale=1):
    """Return {title: (batch size, function from a Kind to a model or None)}, all sizes / `scale`."""
    units, steps, batch, length = 512 // scale, 128 // scale, 256 // scale, 256 // scale

    def lstm(kind):
        if kind.lstm is None:
            return None
        return keras.Sequential([keras.Input((steps, units // 2)), kind.lstm(units), kind.dense(10)])

    def transformer(kind, heads=8):
        x = inputs = keras.Input((length, units))
        for _ in range(2):
            y = layers.LayerNormalization()(x)
            x = layers.Add()([x, kind.attention(heads, units // heads)(y, y)])
            y = kind.dense(4 * units, activation="relu")(layers.LayerNormalization()(x))
            x = layers.Add()([x, kind.dense(units)(y)])
        return keras.Model(inputs, kind.dense(10)(layers.GlobalAveragePooling1D()(x)))

    return {
        f"LSTM {units}, batch {batch} of {steps} steps": (batch, lstm),
        f"Transformer 2 × {units}, batch {batch // 4} of {length} tokens": (batch // 4, transformer),
    }
