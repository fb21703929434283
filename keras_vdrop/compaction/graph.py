"""Who calls whom in a model."""

import dataclasses

import keras
from keras import layers


@dataclasses.dataclass(frozen=True)
class Call:
    """A layer at one place of the graph.

    Attributes:
        name: Of the layer.
        arguments: Dict from an argument's position or name to what is in it: keys of tensors, None for all else.
        masks: Keys of the tensors that it was given as masks: of places, not of channels.
        options: Dict from a name to an argument that is no tensor.
        outputs: Keys of tensors: (name of the layer that it comes from, call, index).
    """

    name: str
    arguments: dict
    masks: list
    options: dict
    outputs: list

    @property
    def inputs(self):
        """Keys of all tensors that it was given, but for the masks."""
        return [key for keys in self.arguments.values() for key in keys if key]

    @property
    def plain(self):
        """Whether the inputs are all that it was given, and none of them by name."""
        return all(isinstance(place, int) and all(keys) for place, keys in self.arguments.items())


@dataclasses.dataclass(frozen=True)
class Graph:
    """Who calls whom in a model.

    Attributes:
        calls: List of `Call`, each after those that it needs.
        shapes: Dict from a tensor's key to its shape.
        outputs: Keys of the model's outputs.
    """

    calls: list
    shapes: dict
    outputs: list


def graph_of(model):
    """The `Graph` of a Functional or Sequential model."""
    return _sequential_graph(model) if isinstance(model, keras.Sequential) else _functional_graph(model)


def _sequential_graph(model):
    before = [("", 0, 0)]
    calls, shapes = [Call("", {}, [], {}, before)], {before[0]: model.inputs[0].shape}
    for layer in model.layers:
        outputs = keras.tree.flatten(layer.output)
        keys = [(layer.name, 0, index) for index in range(len(outputs))]
        shapes.update(zip(keys, (tensor.shape for tensor in outputs)))
        calls.append(Call(layer.name, {0: before}, [], {}, keys))
        before = keys
    return Graph(calls, shapes, before)


def _functional_graph(model):
    config = model.get_config()
    by_name = {layer.name: layer for layer in model.layers}
    shapes = {}

    def leaves(value):
        """Of a serialized value, the key of each tensor, and None for everything else."""
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
                # Of any other layer, those that something reads.
                keys = sorted(key for key in shapes if key[:2] == place)
                calls.append(dataclasses.replace(call, outputs=keys))
                done.add(place)
    return Graph(calls, shapes, outputs)


def _flat(shapes):
    """A list of shapes, of one or of nested ones."""
    if all(size is None or isinstance(size, int) for size in shapes):
        return [tuple(shapes)]
    return [shape for each in shapes for shape in _flat(each)]


def _keys(value):
    """The keys in what Keras writes down for a model's outputs, which may be nested."""
    if isinstance(value, dict):
        value = [value[name] for name in sorted(value)]
    if isinstance(value[0], str):
        return [tuple(value)]
    return [key for each in value for key in _keys(each)]
