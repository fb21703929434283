"""The layers: each is a Keras layer whose weights are distributions."""

from keras_vdrop.layers.convolutional import VariationalConv2D
from keras_vdrop.layers.dense import VariationalDense
from keras_vdrop.layers.recurrent import VariationalLSTM, VariationalLSTMCell

__all__ = ["VariationalConv2D", "VariationalDense", "VariationalLSTM", "VariationalLSTMCell"]
