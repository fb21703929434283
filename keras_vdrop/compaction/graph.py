"""The calls of the layers of a model, and the tensors between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import keras
from keras import layers

# The name of the layer that returns a tensor, the index of the call, and the index of the output.
Key: TypeAlias = tuple[str, int, int]
Shape: TypeAlias = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        name: Name of the layer.
        arguments: Dict from the position or name of an argument to a list: the `Key`s of its tensors, None for
            anything else.
        masks: Keys of the tensors passed as masks, which are masks of positions and not of channels.
        options: Dict from a name to an argument without tensors.
        outputs: Keys of the outputs.
    """

    name: str
    arguments: dict[int | str, Sequence[Key | None]]
    masks: list[Key]
    options: dict[str, Any]
    outputs: list[Key]

    @property
    def inputs(self) -> list[Key]:
        """Keys of all input tensors except the masks."""
        return [key for keys in self.arguments.values() for key in keys if key]

    @property
    def plain(self) -> bool:
        """Whether all arguments are tensors and positional; masks and options do not count."""
        return all(isinstance(place, int) and all(keys) for place, keys in self.arguments.items())


@dataclasses.dataclass(frozen=True)
class Graph:
    """The calls of the layers of a model.

    Attributes:
        calls: List of `Call`, each after those that compute its inputs.
        shapes: Dict from the key of a tensor to its shape.
        outputs: Keys of the model's outputs.
    """

    calls: list[Call]
    shapes: dict[Key, Shape]
    outputs: list[Key]


def graph_of(model: keras.Model) -> Graph:
    """Return the `Graph` of a Functional or Sequential model."""
    return _sequential_graph(model) if isinstance(model, keras.Sequential) else _functional_graph(model)


def _sequential_graph(model: keras.Model) -> Graph:
    before: list[Key] = [("", 0, 0)]
    calls, shapes = [Call("", {}, [], {}, before)], {before[0]: model.inputs[0].shape}
    for layer in model.layers:
        outputs = keras.tree.flatten(layer.output)
        keys = [(layer.name, 0, index) for index in range(len(outputs))]
        shapes.update(zip(keys, (tensor.shape for tensor in outputs)))
        calls.append(Call(layer.name, {0: before}, [], {}, keys))
        before = keys
    return Graph(calls, shapes, before)


def _functional_graph(model: keras.Model) -> Graph:
    config = model.get_config()
    by_name = {layer.name: layer for layer in model.layers}
    shapes = {}

    def leaves(value):
        """Return the key of each tensor in a serialized value, and None for each other leaf."""
        if isinstance(value, (list, tuple)):
            return [leaf for each in value for leaf in leaves(each)]
        if not isinstance(value, dict):
            return [None]
        if value.get("class_name") != "__keras_tensor__":
            return leaves(list(value.values()))
        key = tuple(value["config"]["keras_history"])
        shapes[key] = tuple(value["config"]["shape"])
        return [key]

    nodes = []
    for entry in config["layers"]:
        for index, node in enumerate(entry["inbound_nodes"] or [{"args": [], "kwargs": {}}]):
            arguments, masks, options = dict(enumerate(map(leaves, node["args"]))), [], {}
            for name, value in node["kwargs"].items():
                keys = leaves(value)
                if not any(keys):
                    options[name] = value
                elif name.endswith("mask"):
                    masks += [key for key in keys if key]
                else:
                    arguments[name] = keys
            nodes.append(((entry["name"], index), Call(entry["name"], arguments, masks, options, [])))
    outputs = _keys(config["output_layers"])
    shapes.update(zip(outputs, (tensor.shape for tensor in model.outputs)))

    calls, done = [], set()
    while len(calls) < len(nodes):
        for place, call in nodes:
            if place not in done and {key[:2] for key in call.inputs + call.masks} <= done:
                if call.plain and isinstance(by_name.get(call.name), (layers.RNN, layers.Bidirectional)):
                    every = _flat(by_name[call.name].compute_output_shape(shapes[call.inputs[0]]))
                    shapes.update({(*place, index): shape for index, shape in enumerate(every)})
                # For any other layer, only the outputs that something reads are known.
                keys = sorted(key for key in shapes if key[:2] == place)
                calls.append(dataclasses.replace(call, outputs=keys))
                done.add(place)
    return Graph(calls, shapes, outputs)


def _flat(shapes: Any) -> list[Shape]:
    """Return a list of shapes from one shape or a nested structure of shapes."""
    if all(size is None or isinstance(size, int) for size in shapes):
        return [tuple(shapes)]
    return [shape for each in shapes for shape in _flat(each)]


def _keys(value: Any) -> list[Key]:
    """Return the keys in the `output_layers` of a config, which may be nested."""
    if isinstance(value, dict):
        value = [value[name] for name in sorted(value)]
    if isinstance(value[0], str):
        return [tuple(value)]
    return [key for each in value for key in _keys(each)]
