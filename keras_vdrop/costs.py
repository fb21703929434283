"""The cost of weights without noise: multiplications per example, and bytes."""

import gzip
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

from keras_vdrop.functional.tensors import product
from keras_vdrop.layers import Variational
from keras_vdrop.layers.stochastic import StochasticLayer
from keras_vdrop.layers.weights import VariationalLayer


def places(model_or_layer: keras.Model | keras.layers.Layer) -> dict[int, int | None]:
    """Count, for every layer, the positions of one example at which each weight is multiplied, over all calls.

    The graph of a Functional or Sequential model tells which layers it calls, how often, and on what shapes. A layer
    inside any other (a cell, a wrapped layer, a projection of attention, a layer of a subclassed model) is assumed to
    be called once for each call of the outer one, or for each time step, on the shape that it was built for.

    Args:
        model_or_layer: A built `keras.Model` or layer.

    Returns:
        Dict from the id of each of our layers to an int, or to None if that depends on an unknown size.
    """
    return {
        id(layer): known_sum(product([times, layer.places(shape)]) for shape, times in calls)
        for layer, calls in _all_calls(model_or_layer, StochasticLayer)
    }


def used_repeatedly(
    model_or_layer: keras.Model | keras.layers.Layer, calls_within: int | None = 1
) -> list[tuple[VariationalLayer | Variational, bool]]:
    """Find the layers whose weights one example uses more than once: at several positions, lookups or calls.

    Args:
        model_or_layer: As for `places`.
        calls_within: How often a layer or subclassed model that the user wrote is assumed to call each layer inside it:
            1, or None for unknown, in which case all those layers are returned.

    Returns:
        List of pairs: one of our layers that draws weights, and whether each of its calls is on several positions (or
        an unknown number). If not, an example uses the weights repeatedly because it calls the layer repeatedly.
    """
    found = []
    for layer, calls in _all_calls(model_or_layer, (VariationalLayer, Variational), calls_within):
        uses = [product([times, layer.uses(shape)]) for shape, times in calls]
        if layer.draws and known_sum(uses) != 1:
            found.append((layer, all(layer.uses(shape) != 1 for shape, _ in calls)))
    return found


def _all_calls(
    model_or_layer: keras.Model | keras.layers.Layer, cls: Any, calls_within: int | None = 1
) -> Iterable[tuple[Any, list[tuple[Any, int | None]]]]:
    """Return each layer of the given classes in a model with its calls: pairs of an input shape and a count."""
    found = {}

    def visit(layer, shape, times):
        if isinstance(layer, cls) and shape is not None:
            found.setdefault(id(layer), (layer, []))[1].append((shape, times))
        for inner, inner_shape, often in _calls(layer, shape, calls_within):
            visit(inner, inner_shape, product([times, often]))

    visit(model_or_layer, _built_shape(model_or_layer), 1)
    return found.values()


# Packages whose layers call each of their sublayers once.
_CALL_ONCE = ("keras", "keras_vdrop")


def known_sum(numbers: Iterable[int | None]) -> int | None:
    """Return the sum, or None if a number is None, which means unknown."""
    numbers = list(numbers)
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def itemsize(dtype: str) -> int:
    """Return the number of bytes per value of a dtype: 4 for "float32"."""
    return int(re.match(r"[a-z]+(\d+)", dtype)[1]) // 8


def file_sizes(path: str | os.PathLike) -> tuple[int, int]:
    """Return the bytes of a file, or of all files below a folder, and their bytes if each is compressed with gzip."""
    path = pathlib.Path(path)
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    contents = [file.read_bytes() for file in files]
    return sum(map(len, contents)), sum(len(gzip.compress(content, mtime=0)) for content in contents)


def _calls(layer: Any, shape: Any, calls_within: int | None) -> Iterator[tuple[Any, Any, int | None]]:
    """Yield the layers that a layer calls, each with the shape of its inputs and the number of calls."""
    if isinstance(layer, keras.Model) and getattr(layer, "outputs", None):
        for node in nodes(layer):
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


def nodes(graph: keras.Model, ends_at: Callable[[Any], Any] = lambda node: False) -> Iterator[Any]:
    """Yield the nodes (calls) of a Functional or Sequential model, each once, from the outputs back.

    Args:
        graph: A built model.
        ends_at: Function from a node to whether the nodes before it are left out.
    """
    entries, tensors, seen = {id(tensor) for tensor in graph.inputs}, [*graph.outputs], set()
    while tensors:
        tensor = tensors.pop()
        operation, index, _ = tensor._keras_history
        node = operation._inbound_nodes[index]
        if id(tensor) in entries or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if not ends_at(node):
            tensors += node.input_tensors


def _built_shape(layer: Any) -> Any:
    """Return the shape of the first input that a layer was built for; None if it has not been built."""
    config = layer.get_build_config() or {}
    return next(iter(config.get("shapes_dict", config).values()), None)
