"""What weights cost without noise: the multiplications of one example, and the bytes that hold them."""

import gzip
import pathlib
import re

import keras

from keras_vdrop.layers import Variational
from keras_vdrop.layers.base import StochasticLayer, VariationalLayer, product


def places(model_or_layer):
    """At how many places of one example each weight of a layer is multiplied, over all calls of the layer.

    A Functional or Sequential model says how often it calls which layer, on what shapes. A layer within any other (a
    cell, a wrapped layer, a projection of attention, a layer of a subclassed model) is taken to be called once for each
    call of that, or for each step, on the shape that it was built for.

    Args:
        model_or_layer: A built `keras.Model` or layer.

    Returns:
        Dict from the id of each of our layers to an int, or to None where it depends on a size that is not known.
    """
    return {
        id(layer): known_sum(product([times, layer.places(shape)]) for shape, times in calls)
        for layer, calls in _all_calls(model_or_layer, StochasticLayer)
    }


def used_repeatedly(model_or_layer, calls_within=1):
    """The layers of which one example uses a weight more than once: at several places, in lookups, or call by call.

    Args:
        model_or_layer: As for `places`.
        calls_within: How often a layer or a subclassed model of the user's is taken to call each layer within it: 1, or
            None where that is not known, so that those layers are all among the found.

    Returns:
        List of pairs: each of those of our layers that draw weights, and whether all uses are in one call.
    """
    found = []
    for layer, calls in _all_calls(model_or_layer, (VariationalLayer, Variational), calls_within):
        uses = [product([times, layer.uses(shape)]) for shape, times in calls]
        if layer.draws and known_sum(uses) != 1:
            found.append((layer, all(layer.uses(shape) != 1 for shape, _ in calls)))
    return found


def _all_calls(model_or_layer, cls, calls_within=1):
    """Each layer of one class, or of several, within a model, with its calls: the shapes of inputs, and how often."""
    found = {}

    def visit(layer, shape, times):
        if isinstance(layer, cls) and shape is not None:
            found.setdefault(id(layer), (layer, []))[1].append((shape, times))
        for inner, inner_shape, often in _calls(layer, shape, calls_within):
            visit(inner, inner_shape, product([times, often]))

    visit(model_or_layer, _built_shape(model_or_layer), 1)
    return found.values()


# The packages whose layers call each layer within them once.
_CALL_ONCE = ("keras", "keras_vdrop")


def known_sum(numbers):
    """Their sum; None where one of them is not known."""
    numbers = list(numbers)
    return None if None in numbers else sum(numbers)


def itemsize(dtype):
    """How many bytes a number of a dtype takes: 4 for "float32"."""
    return int(re.match(r"[a-z]+(\d+)", dtype)[1]) // 8


def file_sizes(path):
    """Of a file, or of all files below a folder: (bytes, bytes after gzip of each file)."""
    path = pathlib.Path(path)
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    contents = [file.read_bytes() for file in files]
    return sum(map(len, contents)), sum(len(gzip.compress(content, mtime=0)) for content in contents)


def _calls(layer, shape, calls_within):
    """What a layer calls: each layer, the shape of its inputs, and how often."""
    outputs = getattr(layer, "outputs", None)
    if isinstance(layer, keras.Model) and outputs:
        for node in _nodes(layer.inputs, outputs):
            if isinstance(node.operation, keras.layers.Layer) and node.input_tensors:
                yield node.operation, node.input_tensors[0].shape, 1
        return
    if isinstance(layer, (keras.layers.RNN, keras.layers.TimeDistributed)):
        times = shape[1] if shape else 1
    else:
        is_known = type(layer).__module__.partition(".")[0] in _CALL_ONCE
        times = 1 if is_known else calls_within
    for inner in layer._flatten_layers(include_self=False, recursive=False):
        yield inner, _built_shape(inner), times


def _nodes(inputs, outputs):
    """The calls between the symbolic inputs and outputs of a model, each once."""
    entries, tensors, found = {id(tensor) for tensor in inputs}, [*outputs], {}
    while tensors:
        tensor = tensors.pop()
        operation, index, _ = tensor._keras_history
        node = operation._inbound_nodes[index]
        if id(tensor) not in entries and id(node) not in found:
            found[id(node)] = node
            tensors += node.input_tensors
    return found.values()


def _built_shape(layer):
    """The shape, of the first of its inputs, that a layer was built for; None where it has not been."""
    config = layer.get_build_config() or {}
    return next(iter(config.get("shapes_dict", config).values()), None)
