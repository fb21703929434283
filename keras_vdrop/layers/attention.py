"""Attention layers, composed of variational dense layers."""

import itertools
import string
from collections.abc import Sequence
from typing import Any

import keras

from keras_vdrop.functional import noise
from keras_vdrop.layers.dense import VariationalEinsumDense
from keras_vdrop.layers.weights import VariationalLayer


@keras.saving.register_keras_serializable(package="keras_vdrop")
class VariationalMultiHeadAttention(VariationalLayer, keras.layers.MultiHeadAttention):
    """softmax(Q·Kᵀ / sqrt(key_dim))·V for each head, with projections whose kernels are distributions.

    Q = query·W_q, K = key·W_k, V = value·W_v, and the output is the concatenation of the heads times W_o. This is
    Keras's `MultiHeadAttention` with a `VariationalEinsumDense` for each of the four projections (`query_dense`,
    `key_dense`, `value_dense`, `output_dense`). Flipout, the default for T > 1, gives each example its own draw;
    "reparameterization" makes one draw for the batch; "local_reparameterization" gives each token its own noise, which
    is not a draw of the weights.

    Args:
        num_heads: Positive int, H.
        key_dim: Positive int, the size of each head.
        value_dim, dropout, use_bias, output_shape, attention_axes: As in `keras.layers.MultiHeadAttention`.
        sliding_window, flash_attention, use_gate, kernel_initializer: As in `keras.layers.MultiHeadAttention`.
        bias_initializer, kernel_regularizer, bias_regularizer: As in `keras.layers.MultiHeadAttention`.
        activity_regularizer, kernel_constraint, bias_constraint: As in `keras.layers.MultiHeadAttention`. `dropout` is
            Keras's own dropout of attention scores.
        seed: Int for the same noise in every run, or None.
        kernel_prior, bias_prior, estimator, kl_weight, initial_log_variance, log_variance_rate, threshold: As in
            `VariationalDense`, for all projections.
        lora_rank, lora_alpha: As in `keras.layers.EinsumDense`, for all projections.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        query (B, T, D), value (B, S, D), optionally key (B, S, D); masks as in `keras.layers.MultiHeadAttention`.

    Output shape:
        (B, T, D), or (B, T, *output_shape); with `return_attention_scores=True` followed by the scores (B, H, T, S).

    Raises:
        ValueError: For a value that is out of range, or for shapes that do not fit each other.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> layer = kv.VariationalMultiHeadAttention(num_heads=2, key_dim=3, kl_weight=1 / 1000)
        >>> x = keras.ops.ones((2, 5, 4))
        >>> layer(x, x, use_causal_mask=True).shape == (2, 5, 4)
        True

    Reference:
        Attention Is All You Need, Vaswani et al., 2017, https://arxiv.org/abs/1706.03762; Bayesian Transformer Language
        Models for Speech Recognition, Xue et al., 2021, https://arxiv.org/abs/2102.04754
    """

    def __init__(self, *args: Any, lora_rank: int | None = None, lora_alpha: float | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha

    def build(
        self,
        query_shape: Sequence[int | None],
        value_shape: Sequence[int | None],
        key_shape: Sequence[int | None] | None = None,
    ) -> None:
        key_shape = value_shape if key_shape is None else key_shape
        if tuple(value_shape[1:-1]) != tuple(key_shape[1:-1]):
            raise ValueError(
                "All dimensions of `value` and `key`, except the last one, must be equal. Received: "
                f"value_shape={tuple(value_shape)} and key_shape={tuple(key_shape)}"
            )
        self._projections = []
        # Keras's `call` uses these attributes.
        self._query_dense = self._project(query_shape, self.key_dim, "query")
        self._key_dense = self._project(key_shape, self.key_dim, "key")
        self._value_dense = self._project(value_shape, self.value_dim, "value")
        if getattr(self, "_use_gate", False):
            self._gate_dense = self._project(query_shape, self.value_dim, "gate", activation="sigmoid")
        self._build_attention(len(value_shape) + 1)
        heads_shape = (*query_shape[:-1], self.num_heads, self.value_dim)
        output_shape = tuple(self._output_shape or (query_shape[-1],))
        self._output_dense = self._dense(heads_shape, 2, output_shape, "attention_output")
        self._build_noise()

    def _project(
        self, input_shape: Sequence[int | None], size: int, name: str, **arguments: Any
    ) -> VariationalEinsumDense:
        return self._dense(input_shape, 1, (self.num_heads, size), name, **arguments)

    def _dense(
        self,
        input_shape: Sequence[int | None],
        contracted: int,
        output_shape: Sequence[int],
        name: str,
        **arguments: Any,
    ) -> VariationalEinsumDense:
        """Build one of the projections, which contracts the last `contracted` axes of its inputs."""
        letters = iter(string.ascii_lowercase)
        # Avoid an ellipsis: with TensorFlow it makes an einsum forty times as slow.
        free, inner, outer = (
            "".join(itertools.islice(letters, count))
            for count in (len(input_shape) - contracted, contracted, len(output_shape))
        )
        layer = VariationalEinsumDense(
            f"{free}{inner},{inner}{outer}->{free}{outer}",
            output_shape=(*[None] * (len(free) - 1), *output_shape),
            bias_axes=outer if self.use_bias else None,
            name=name,
            kernel_prior=self.kernel_prior,
            bias_prior=self.bias_prior,
            estimator=self.estimator,
            kl_weight=self._initial_kl_weight,
            initial_log_variance=self.initial_log_variance,
            log_variance_rate=self.log_variance_rate,
            threshold=self.threshold,
            lora_rank=self.lora_rank,
            lora_alpha=self.lora_alpha,
            seed=None if self.seed is None else noise.hash_seed(self.seed, name),
            **self._get_common_kwargs_for_sublayer(),
            **arguments,
        )
        layer.build(input_shape)
        self._projections.append(layer)
        return layer

    @property
    def _replayed(self) -> keras.random.SeedGenerator | None:
        return self._query_dense.seed_generator

    @property
    def kl_weight(self) -> Any:
        """The factor of each projection's KL in the loss; assignable."""
        return self._query_dense.kl_weight if self.built else self._initial_kl_weight

    @kl_weight.setter
    def kl_weight(self, value: float) -> None:
        if not self.built:
            VariationalLayer.kl_weight.__set__(self, value)
            return
        for layer in self._projections:
            layer.kl_weight = value

    @property
    def free_bits(self) -> Any:
        """The KL of each projection that costs nothing, in nats per weight; assignable. None before `build`."""
        return self._query_dense.free_bits if self.built else None

    @free_bits.setter
    def free_bits(self, value: float) -> None:
        if not self.built:
            raise ValueError(
                f"The layer {self.name!r} has not been built. Build it before you set `free_bits`. "
                f"Received: free_bits={value!r}"
            )
        for layer in self._projections:
            layer.free_bits = value

    def get_config(self) -> dict[str, Any]:
        lora = {} if self.lora_rank is None else {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha}
        return {**super().get_config(), **lora}
