"""What a copy of a model is given of the model: weights, states, what is frozen, and what it was compiled with."""

import copy

import keras
import numpy as np
from keras import ops

from keras_vdrop.conversion.graphs import children, is_graph
from keras_vdrop.layers import VariationalGaussianDropout
from keras_vdrop.layers.base import _unset
from keras_vdrop.posterior import VariationalWeight, posteriors


def stock_weights(layer):
    """The weights of a model or layer that Keras's own layers have too: of a posterior its mean, of noise nothing."""
    ours_alone = set()
    for posterior in posteriors(layer):
        owner = posterior.owner
        ours_alone.update(map(id, (owner.kl_weight, owner.free_bits, *posterior.variables)))
        if isinstance(posterior, VariationalWeight) and not isinstance(owner, VariationalGaussianDropout):
            ours_alone.discard(id(posterior.loc))
    return [variable for variable in layer.weights if id(variable) not in ours_alone]
