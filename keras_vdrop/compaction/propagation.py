"""Propagate constants and needs through all layers of a model, and cut the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from keras_vdrop.compaction.attention import Attention
from keras_vdrop.compaction.graph import Call, Graph, Key, Shape, graph_of
from keras_vdrop.compaction.recurrent import Recurrent, TwoWays
from keras_vdrop.compaction.rules import (
    Affine,
    Concatenation,
    Cut,
    Depthwise,
    Elementwise,
    Merge,
    Normalization,
    Padding,
    PassThrough,
    Permutation,
    Regrouping,
    Rule,
    Scaling,
    Separable,
    Table,
    rewrapped,
)
from keras_vdrop.conversion import finalize_normalizations, is_graph, known_layers


def shrink(model: keras.Model, masked: bool | None = None) -> keras.Model:
    """Return a smaller copy of a model of Keras's own layers.

    Args:
        model: A Functional or Sequential model.
        masked: Whether its tensors may have masks; None to find out from its layers.
    """
    masked = _makes_masks(model) if masked is None else masked
    graph = graph_of(model)
    sizes = {key: (shape[-1] if shape else None) or 0 for key, shape in graph.shapes.items()}
    groups = _groups(model, graph, masked)
    constants = _constants(graph, groups, sizes)
    kept = _needs(graph, groups, sizes, constants)
    return _rebuild(model, *_cut(groups, constants, kept))


def _constants(graph: Graph, groups: list[Group], sizes: dict[Key, int]) -> dict[Key, np.ndarray]:
    """Return, by the key of each tensor, the values of its constant channels, and NaN for the others: forward, once."""
    group_of = {key: group for group in groups for call in group.calls for key in call.outputs}
    constants = {}
    for call in graph.calls:
        if not call.outputs:
            continue
        group = group_of[call.outputs[0]]
        values = group.rule.constants(group.input_constants(constants), [sizes[key] for key in call.outputs])
        constants.update(zip(call.outputs, values))
    return constants


def _needs(
    graph: Graph, groups: list[Group], sizes: dict[Key, int], constants: dict[Key, np.ndarray]
) -> dict[Key, np.ndarray]:
    """Return, by the key of each tensor, a mask of the channels to keep: those of the outputs, and what they need."""
    kept = {key: np.full(size, key in graph.outputs) for key, size in sizes.items()}
    before = None
    while before != _count(kept):
        before = _count(kept)
        _propagate_needs(groups, constants, kept)
        for group in groups:
            group.settle(kept)
    return kept


def _propagate_needs(groups: list[Group], constants: dict[Key, np.ndarray], kept: dict[Key, np.ndarray]) -> None:
    """Add to `kept` what its channels need, until nothing changes."""
    before = None
    while before != _count(kept):
        before = _count(kept)
        for group in reversed(groups):
            group.need(constants, kept)


def _count(kept: dict[Key, np.ndarray]) -> int:
    return sum(int(mask.sum()) for mask in kept.values())


def _cut(
    groups: list[Group], constants: dict[Key, np.ndarray], kept: dict[Key, np.ndarray]
) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """Return the changes of the layers and their smaller weights, both by name."""
    changes, weights = {}, {}
    for group in groups:
        if isinstance(group.rule.layer, layers.Layer):
            known = group.input_constants(constants)
            changes[group.name], weights[group.name] = group.rule.cut(known, *group.masks(kept))
    return changes, weights


def _rebuild(model: keras.Model, changes: dict[str, Any], weights: dict[str, list[np.ndarray]]) -> keras.Model:
    """Return a copy of the model with changed layers and these weights."""
    config = model.get_config()
    for entry in config["layers"]:
        entry.pop("build_config", None)  # it holds the old sizes
        change = changes.get(entry["config"].get("name"), {})
        if isinstance(change, layers.Layer):
            entry.update(keras.saving.serialize_keras_object(change))
        else:
            entry["config"].update(change)
    with known_layers(model):
        small = type(model).from_config(config)
    for name, values in weights.items():
        small.get_layer(name).set_weights(values)
    finalize_normalizations(small)
    return small


def _makes_masks(model: keras.Model) -> bool:
    """Return whether any layer may make a mask of positions: by its arguments, or because it runs a user's code."""
    return any(
        isinstance(layer, (layers.Masking, layers.Lambda))
        or getattr(layer, "mask_zero", False)
        or not type(layer).__module__.startswith("keras.")
        for layer in model._flatten_layers()
    )


class Nested(Rule):
    """A model within the model. It keeps its inputs and outputs, and is compacted on its own."""

    reads_channels = False

    @classmethod
    def inputs(cls, call: Call) -> list[Key] | None:
        return call.inputs

    def cut(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> Cut:
        small = shrink(self.layer, self.masked)
        return small.get_config(), small.get_weights()


class Wrapped(Rule):
    """TimeDistributed: the rule of the wrapped layer, with input shapes without the time axis."""

    has_sizes = True

    @staticmethod
    def _within(inputs: Sequence[Shape]) -> list[Shape]:
        return [(shape[0], *shape[2:]) for shape in inputs]

    @classmethod
    def fits(cls, layer: Any, inputs: Sequence[Shape]) -> bool:
        kind, inputs = _kind(layer.layer), cls._within(inputs)
        return len(inputs) == 1 and kind is not Table and kind.fits(layer.layer, inputs)

    def __init__(self, layer: Any, shapes: Sequence[Sequence[Shape]] = (), masked: bool = True):
        super().__init__(layer, shapes, masked)
        self.within = _kind(layer.layer)(layer.layer, [self._within(inputs) for inputs in shapes], masked)
        self.constants, self.need, self.settle = self.within.constants, self.within.need, self.within.settle

    def cut(self, known: list[np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> Cut:
        changes, weights = self.within.cut(known, ins, outs)
        return {"layer": rewrapped(self.layer.get_config()["layer"], changes)}, weights


_SAME = """
    Identity Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D GaussianDropout GaussianNoise AlphaDropout
    ActivityRegularization RepeatVector UpSampling1D UpSampling2D UpSampling3D Cropping1D Cropping2D Cropping3D
    MaxPooling1D MaxPooling2D MaxPooling3D AveragePooling1D AveragePooling2D AveragePooling3D
    GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D
    GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D
"""

_RULES = {
    PassThrough: _SAME,
    Elementwise: "Activation ReLU LeakyReLU ELU",
    Scaling: "Rescaling",
    Padding: "ZeroPadding1D ZeroPadding2D ZeroPadding3D",
    Normalization: "BatchNormalization",
    Merge: "Add Subtract Multiply Average Maximum Minimum",
    Concatenation: "Concatenate",
    Regrouping: "Flatten Reshape",
    Permutation: "Permute",
    Affine: "Dense Conv1D Conv2D Conv3D Conv1DTranspose Conv2DTranspose Conv3DTranspose",
    Separable: "SeparableConv1D SeparableConv2D",
    Depthwise: "DepthwiseConv1D DepthwiseConv2D",
    Table: "Embedding",
    Recurrent: "LSTM GRU SimpleRNN",
    TwoWays: "Bidirectional",
    Attention: "MultiHeadAttention",
    Wrapped: "TimeDistributed",
}
# The rule of each class of layers. A layer of another class keeps its channels.
RULES: dict[Any, type[Rule]] = {getattr(layers, name): rule for rule, names in _RULES.items() for name in names.split()}

# Rules of Keras's operations, by class name, because the classes are not public.
_OPERATIONS = {
    Merge: "Add Subtract Multiply Maximum Minimum",
    Concatenation: "Concatenate",
    Elementwise: "Relu Relu6 LeakyRelu Elu Selu Gelu Silu Sigmoid Softplus Softsign Tanh",
}
_OPERATION_RULE_OF = {name: rule for rule, names in _OPERATIONS.items() for name in names.split()}


def _kind(operation: Any) -> type[Rule]:
    """Return the class of the rule of a layer or another operation."""
    if isinstance(operation, layers.Layer):
        nested = isinstance(operation, keras.Model) and is_graph(operation)
        return Nested if nested else RULES.get(type(operation), Rule)
    of_keras = type(operation).__module__.startswith("keras.")
    return _OPERATION_RULE_OF.get(type(operation).__name__, Rule) if of_keras else Rule


class Group:
    """A layer that is cut, with all its calls, because the cut is the same for all; or one call of any other layer.

    Attributes:
        name: Name of the layer.
        calls: List of its calls in this group.
        rule: Its `Rule`.
    """

    def __init__(self, layer: Any, calls: list[Call], shapes: dict[Key, Shape], masked: bool, kind: type[Rule]):
        self.name = calls[0].name
        self.calls = calls
        inputs = self._known_inputs(kind, layer, shapes)
        if inputs is None:
            kind, inputs = Rule, [call.inputs for call in calls]
        self._inputs = inputs
        masked = masked or any(call.masks for call in calls)
        self.rule = kind(layer, [[shapes[key] for key in keys] for keys in self._inputs], masked)

    def _known_inputs(self, kind: type[Rule], layer: Any, shapes: dict[Key, Shape]) -> list[list[Key]] | None:
        """Return the keys of each call's inputs, in the order of the rule; None if the rule does not hold."""
        inputs = [keys for call in self.calls if (keys := kind.inputs(call)) is not None]
        if len(inputs) < len(self.calls):
            return None
        of_calls = [[shapes[key] for key in keys] for keys in inputs]
        if kind.reads_channels:
            sizes = {tuple(shape[-1] if shape else None for shape in each) for each in of_calls}
            if len(sizes) > 1 or not all(next(iter(sizes))):
                return None
        return inputs if all(kind.fits(layer, each) for each in of_calls) else None

    def input_constants(self, constants: dict[Key, np.ndarray]) -> list[np.ndarray]:
        """Return the constants of the inputs; with several calls none, because constants may differ between calls."""
        values = [constants[key] for key in self._inputs[0]]
        return values if len(self.calls) == 1 else [np.full_like(value, np.nan) for value in values]

    def masks(self, kept: dict[Key, np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return what any call keeps of its inputs and outputs; calls may differ in their number of outputs."""

        def union(every):
            longest = max(map(len, every))
            return [
                np.logical_or.reduce([kept[keys[index]] for keys in every if index < len(keys)])
                for index in range(longest)
            ]

        inputs = self._inputs if self.rule.reads_channels else [[]]
        return union(inputs), union([call.outputs for call in self.calls])

    def need(self, constants: dict[Key, np.ndarray], kept: dict[Key, np.ndarray]) -> None:
        """Add what the layer needs to `kept`, the same for all calls."""
        ins, outs = self.masks(kept)
        self.rule.need(self.input_constants(constants), ins, outs)
        self._keep(kept, ins, outs)
        for call, keys in zip(self.calls, self._inputs):
            for key in [*call.masks, *([] if self.rule.reads_channels else keys)]:
                kept[key][:] = True

    def settle(self, kept: dict[Key, np.ndarray]) -> None:
        """Add what the shapes of the layer need to `kept`."""
        ins, outs = self.masks(kept)
        self.rule.settle(outs)
        self._keep(kept, ins, outs)

    def _keep(self, kept: dict[Key, np.ndarray], ins: list[np.ndarray], outs: list[np.ndarray]) -> None:
        for call, keys in zip(self.calls, self._inputs):
            for key, mask in (*zip(keys, ins), *zip(call.outputs, outs)):
                kept[key] |= mask


def _groups(model: keras.Model, graph: Graph, masked: bool) -> list[Group]:
    operations = getattr(model, "operations", model.layers)  # a Sequential model has only layers
    by_name = {operation.name: operation for operation in operations}
    groups = []
    for name in dict.fromkeys(call.name for call in graph.calls):
        layer, calls = by_name.get(name), [call for call in graph.calls if call.name == name]
        kind = _kind(layer)
        if isinstance(layer, layers.Layer) and (layer.weights or kind.has_sizes):
            together = Group(layer, calls, graph.shapes, masked, kind)
            kind = type(together.rule)
            if kind not in (Rule, Nested):
                groups.append(together)
                continue
        groups += [Group(layer, [call], graph.shapes, masked, kind) for call in calls]
    return groups
