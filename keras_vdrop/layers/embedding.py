"""Embedding layers."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_vdrop.functional.tensors import left_along, product
from keras_vdrop.layers.weights import VariationalLayer


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalEmbedding(VariationalLayer, keras.layers.Embedding):
    """y = E[x], E ~ N(loc, exp(log_variance)): `keras.layers.Embedding` with a distribution for a table.

    In training (and within `sampling()`) the table is random. For several indices per example the default is flipout:
    one table for the batch, with signs for each example. "reparameterization" draws one for the batch;
    "local_reparameterization" draws a row for each occurrence of a word, which is not a draw of the table. Otherwise
    E = loc, and 0 where pruned. The KL of the whole table counts once, however many words a batch looks up.

    Args:
        input_dim: Positive int, V, the size of the vocabulary.
        output_dim: Positive int, U.
        embeddings_initializer, embeddings_regularizer, embeddings_constraint: As in `keras.layers.Embedding`; they
            apply to the table's mean.
        mask_zero: As in `keras.layers.Embedding`: whether index 0 is padding, to be masked.
        weights: Optional array (V, U), the initial mean.
        lora_rank, lora_alpha: As in `Variational`.
        kernel_prior: The prior of the table; `priors.ARD(group_axis=0)` prunes words.
        estimator, kl_weight, initial_log_variance, log_variance_rate, threshold, seed: As in `VariationalDense`.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        (B, ...), indices in [0, V). An index out of range gives what `keras.layers.Embedding` gives on the backend: an
        error or NaN. With TensorFlow also a `tf.RaggedTensor` of indices.

    Output shape:
        (B, ..., U); ragged if the input is.

    Raises:
        ValueError: For a value that is out of range.

    Examples:
        >>> import keras, keras_vdrop as kv, numpy as np
        >>> layer = kv.VariationalEmbedding(100, 8, mask_zero=True, kl_weight=1 / 1000)
        >>> layer(np.array([[3, 1, 4], [1, 5, 0]])).shape == (2, 3, 8)
        True

    Reference:
        Bayesian Compression for Natural Language Processing, Chirkova, Lobacheva, Vetrov, 2018,
        https://arxiv.org/abs/1810.10927
    """

    _looks_up = True

    def __init__(self, *args: Any, **kwargs: Any):
        # Given `weights`, Keras's constructor would build the layer before our constructor has finished.
        arguments = self._bind(args, kwargs)
        weights = arguments.pop("weights", None)
        super().__init__(**arguments)
        if weights is not None:
            table = weights[0] if isinstance(weights, list) and len(weights) == 1 else weights
            initializer, self.embeddings_initializer = self.embeddings_initializer, _given(table)
            self.build()
            self.embeddings_initializer = initializer

    def build(self, input_shape: Sequence[int | None] | None = None) -> None:
        if not self.built:
            super().build(input_shape)

    def call(self, inputs: Any, training: bool | None = False) -> Any:
        if hasattr(inputs, "nested_row_lengths"):  # TensorFlow's ragged tensor
            table = self.call(inputs.to_tensor(), training)
            lengths, dtype = inputs.nested_row_lengths(), inputs.row_splits.dtype
            return type(inputs).from_tensor(table, lengths=lengths, row_splits_dtype=dtype)
        taken = keras.backend.standardize_dtype(inputs.dtype) in ("int32", "int64")
        indices = inputs if taken else ops.cast(inputs, "int32")
        noisy = self._noisy(training)
        return self._with_update(self._apply(self.embeddings, _look_up, indices, noisy), _look_up, indices, noisy)

    def _adapted(self) -> Any:
        return self.embeddings

    def _dtype_with(self, x: Any) -> str:
        return self.compute_dtype  # Keras's layer casts to it, wherever it is called

    def compute_output_spec(self, inputs: Any, training: bool | None = False) -> Any:
        return super().compute_output_spec(inputs)

    def structure(self, kept: dict[str, np.ndarray]) -> dict[str, tuple[int, int]]:
        return {"words": left_along(kept["embeddings"], (0,)), "columns": left_along(kept["embeddings"], (1,))}

    def places(self, input_shape: Sequence[int | None]) -> int | None:
        return 0  # a lookup multiplies nothing

    def uses(self, input_shape: Sequence[int | None]) -> int | None:
        """Count the indices of an example, since all of them may be equal."""
        return product(input_shape[1:])

    def _sign_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (0,), (0, -1)


def _given(table: Any) -> Callable[..., Any]:
    """Return an initializer that gives this table, so that the posterior and its prior start at its scale."""

    def initializer(shape, dtype=None):
        if np.shape(table) != tuple(shape):
            raise ValueError(f"`weights` must have the shape {tuple(shape)}. Received: shape {np.shape(table)}")
        return ops.convert_to_tensor(np.asarray(table), dtype)

    return initializer


def _look_up(indices: Any, table: Any) -> Any:
    return ops.take(table, indices, axis=0)
