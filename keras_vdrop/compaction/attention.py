"""How channels pass through attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_vdrop.compaction.graph import Call, Key, Shape
from keras_vdrop.compaction.rules import Cut, Rule, first, is_as_built, most
from keras_vdrop.functional.tensors import to_numpy


class Attention(Rule):
    """MultiHeadAttention: removes heads, and components that a head compares (`key_dim`) or carries (`value_dim`).

    What is the same for all keys, such as the key bias, adds the same number to all scores of a query, and softmax
    ignores it. Where components of the query are nonzero constants, their products with the key add up to one weighted
    sum, which a single component can hold. As attention weights sum to 1, constant components of the value come out
    unchanged, and the output bias absorbs them.
    """

    @classmethod
    def inputs(cls, call: Call) -> list[Key] | None:
        """Return the keys of query, value and key; None for a call with other tensors, or one that returns scores."""
        if call.options.get("return_attention_scores"):
            return None
        places: dict[Any, str] = {0: "query", 1: "value", 2: "key"}
        given = {places.get(place, place): keys for place, keys in call.arguments.items()}
        if not set(given) <= set(places.values()) or not {"query", "value"} <= set(given):
            return None
        value = given["value"]
        every = [*given["query"], *value, *(value if given.get("key", [None]) == [None] else given["key"])]
        keys = [key for key in every if key]
        return keys if len(keys) == len(every) == 3 else None

    @classmethod
    def fits(cls, layer: Any, inputs: Sequence[Shape]) -> bool:
        parts = (layer.query_dense, layer.key_dense, layer.value_dense, layer.output_dense)
        known = len(inputs) == 3 and not layer.get_config().get("use_gate")
        return known and all(map(is_as_built, parts)) and len(layer.output_dense.kernel.shape) == 3

    @property
    def _is_fused(self) -> bool:
        """Whether Keras calls the attention function of the backend, and does not compute the scores itself."""
        return not self.layer.dropout and all(len(shape) == 3 for each in self.shapes for shape in each)

    @property
    def _weights_sum_to_1(self) -> bool:
        """Whether a query's weights sum to 1. Where Keras computes the scores, they are 0 if all keys are masked."""
        return self._is_fused or not (self.masked or self.layer.get_config().get("sliding_window"))

    def _needed(self, known: list[np.ndarray]) -> _Projections:
        """Return the `_Projections`, with zeros wherever a component does not affect the output."""
        layer = self.layer
        parts = (layer.query_dense, layer.value_dense, layer.key_dense)
        query, value, key = (_projection(part, values) for part, values in zip(parts, known))
        output = _projection(layer.output_dense)

        varies = query.kernel.any(axis=0)
        scored = key.kernel.any(axis=0) & (varies | (query.bias != 0))
        for head, same in enumerate(scored & ~varies):
            if same.sum() > 1:
                one = np.flatnonzero(same)[0]
                key.kernel[:, head, one] = key.kernel[:, head, same] @ query.bias[head, same]
                query.bias[head, one] = 1.0
                scored[head, same] = np.arange(len(same))[same] == one
        key.bias[:] = 0.0
        for part in (query, key):
            part.keep(scored)

        constant = ~value.kernel.any(axis=0) & (self._weights_sum_to_1 | (value.bias == 0))
        output.bias += np.einsum("hd,hdo->o", np.where(constant, value.bias, 0.0), output.kernel)
        output.kernel[constant] = 0.0
        return _Projections(query, key, value, output)

    def constants(self, known: list[np.ndarray], sizes: Sequence[int]) -> list[np.ndarray]:
        output = self._needed(known).output
        return [np.where(output.kernel.any(axis=(0, 1)), np.nan, output.bias) for _ in sizes]

    def need(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> None:
        for mask, part in zip(ins, self._needed(known).of(outs[0]).inputs):
            mask |= part.kernel.any(axis=(1, 2))

    def cut(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> Cut:
        parts = self._needed(known).of(outs[0])
        heads: Any = parts.value.alive.any(axis=1)
        heads[:1] |= not heads.any()
        alive = [(parts.query.alive | parts.key.alive)[heads], parts.value.alive[heads]]
        sizes = [most(each) for each in alive]
        if self._is_fused and self.layer.key_dim == self.layer.value_dim:
            sizes = [max(sizes), max(sizes)]  # JAX requires both sizes to be equal
        scored, carried = map(first, alive, sizes)
        query, value, key = (
            part.cut(mask, heads, kept) for part, mask, kept in zip(parts.inputs, ins, (scored, carried, scored))
        )
        # Keras divides scores by the square root of `key_dim`, which changes here.
        rescale = np.sqrt(sizes[0] / self.layer.key_dim)
        query = _Projection(query.kernel * rescale, query.bias * rescale)
        kernel = np.take_along_axis(parts.output.kernel[heads], carried[..., None], axis=1)[..., outs[0]]
        weights = [query, key, value, _Projection(kernel, parts.output.bias[outs[0]])]
        use_bias = self.layer.use_bias or any(part.bias.any() for part in weights)
        changes = {
            "num_heads": int(heads.sum()),
            "key_dim": sizes[0],
            "value_dim": sizes[1],
            "output_shape": (int(outs[0].sum()),),
            "use_bias": use_bias,
        }
        return changes, [each for part in weights for each in (part.kernel, part.bias)[: 1 + use_bias]]


@dataclasses.dataclass
class _Projection:
    """Kernel (inputs, heads, size) and bias (heads, size); for the output, (heads, size, outputs) and (outputs,)."""

    kernel: np.ndarray
    bias: np.ndarray

    @property
    def alive(self) -> np.ndarray:
        """Boolean array (heads, size), True where kernel or bias is not zero."""
        return self.kernel.any(axis=0) | (self.bias != 0)

    def keep(self, mask: np.ndarray) -> None:
        """Set kernel and bias to zero where the mask is False."""
        self.kernel *= mask
        self.bias *= mask

    def cut(self, into: np.ndarray, heads: np.ndarray, kept: np.ndarray) -> _Projection:
        """Return the part for these inputs and heads, and for the indices `kept` within each head."""
        kernel = np.take_along_axis(self.kernel[into][:, heads], kept[None], axis=2)
        return _Projection(kernel, np.take_along_axis(self.bias[heads], kept, axis=1))


def _projection(dense: Any, known: np.ndarray | None = None) -> _Projection:
    """Return a layer's `_Projection` in float64, with the contribution of constant inputs folded into the bias."""
    kernel = to_numpy(dense.kernel).astype("float64")
    shape = kernel.shape[-1:] if known is None else kernel.shape[1:]
    bias = np.zeros(shape) if dense.bias is None else to_numpy(dense.bias).astype("float64")
    if known is not None:
        constant = ~np.isnan(known)
        bias = bias + np.einsum("c,chd->hd", known[constant], kernel[constant])
        kernel[constant] = 0.0
    return _Projection(kernel, bias)


@dataclasses.dataclass
class _Projections:
    query: _Projection
    key: _Projection
    value: _Projection
    output: _Projection

    @property
    def inputs(self) -> tuple[_Projection, _Projection, _Projection]:
        """The projections of the inputs, in the order of `Attention.inputs`."""
        return self.query, self.value, self.key

    def of(self, out: np.ndarray) -> _Projections:
        """Set to zero, in place, what the outputs `out` do not need; return the same object."""
        carried: Any = self.output.kernel[..., out].any(axis=-1)
        self.value.keep(carried)
        for part in (self.query, self.key):
            part.keep(carried.any(axis=1)[:, None])
        return self
