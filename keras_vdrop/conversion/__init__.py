"""Convert models of Keras's own layers to variational models, and back."""

from keras_vdrop.conversion.deterministic import stock_twin, to_deterministic
from keras_vdrop.conversion.graphs import finalize_normalizations, input_structure, is_graph, known_layers
from keras_vdrop.conversion.variational import to_variational

__all__ = [
    "finalize_normalizations",
    "input_structure",
    "is_graph",
    "known_layers",
    "stock_twin",
    "to_deterministic",
    "to_variational",
]
