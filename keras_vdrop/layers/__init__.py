"""Variational layers: Keras layers whose weights or inputs are random."""

from keras_vdrop.layers.attention import VariationalMultiHeadAttention
from keras_vdrop.layers.cells import VariationalGRUCell, VariationalLSTMCell, VariationalSimpleRNNCell
from keras_vdrop.layers.concrete_dropout import ConcreteDropout
from keras_vdrop.layers.convolutional import (
    VariationalConv1D,
    VariationalConv1DTranspose,
    VariationalConv2D,
    VariationalConv2DTranspose,
    VariationalConv3D,
    VariationalDepthwiseConv2D,
    VariationalSeparableConv2D,
)
from keras_vdrop.layers.dense import VariationalDense, VariationalEinsumDense
from keras_vdrop.layers.embedding import VariationalEmbedding
from keras_vdrop.layers.gaussian_dropout import VariationalGaussianDropout
from keras_vdrop.layers.monte_carlo_dropout import MonteCarloDropout
from keras_vdrop.layers.recurrent import VariationalGRU, VariationalLSTM, VariationalSimpleRNN
from keras_vdrop.layers.variational import Variational

__all__ = [
    "ConcreteDropout",
    "MonteCarloDropout",
    "Variational",
    "VariationalConv1D",
    "VariationalConv1DTranspose",
    "VariationalConv2D",
    "VariationalConv2DTranspose",
    "VariationalConv3D",
    "VariationalDense",
    "VariationalDepthwiseConv2D",
    "VariationalEinsumDense",
    "VariationalEmbedding",
    "VariationalGRU",
    "VariationalGRUCell",
    "VariationalGaussianDropout",
    "VariationalLSTM",
    "VariationalLSTMCell",
    "VariationalMultiHeadAttention",
    "VariationalSeparableConv2D",
    "VariationalSimpleRNN",
    "VariationalSimpleRNNCell",
]
