"""Convert models of Keras's own layers to variational models, and back."""

from keras_vdrop.conversion.deterministic import stock_twin, to_deterministic
from keras_vdrop.conversion.graphs import input_structure, is_graph, known_layers, take_over
from keras_vdrop.conversion.variational import to_variational

__all__ = [
    "input_structure",
    "is_graph",
    "known_layers",
    "stock_twin",
    "take_over",
    "to_deterministic",
    "to_variational",
]
