"""How many weights a model still needs, and setting the others to zero."""

import dataclasses
import math
import warnings

import numpy as np
from keras import ops

from keras_vdrop.costs import itemsize, known_sum, places
from keras_vdrop.layers.base import check_finite, product
from keras_vdrop.posterior import prunable_weights


@dataclasses.dataclass(frozen=True)
class LayerSparsity:
    """A row of the report: the variational kernels of one layer.

    Attributes:
        name: Of the layer, with the names of the models and wrappers around it.
        weights: How many weights it has, biases not counted.
        left: How many of them are not pruned, nor would be at the report's threshold.
        bytes: What the Keras layer that it stands for stores: kernels and biases, of its dtype.
        bytes_left: The same without the weights that go: the values that are left, not where they are. To need no more
            is the business of `compact` or of a compressed file.
        multiply_adds: Of one example, by the kernels: a weight counts once for every place at which it meets the
            inputs (positions of a convolution's outputs, of a transposed one's inputs, steps, tokens) in every call.
            0 for a lookup. None where a size is not known, such as that of a `keras.Input((None,))`.
        multiply_adds_left: The same of the weights that are left; of 0 weights, 0.
        structure: Dict from what the weights make up to (left, all): "units", "filters" or "channels", outputs into
            which any weight is left; of an embedding "words" and "columns" with anything left, of a recurrent layer
            "units" and gates that still depend on the inputs or the state.
    """

    name: str
    weights: int
    left: int
    bytes: int = 0
    bytes_left: int = 0
    multiply_adds: int | None = None
    multiply_adds_left: int | None = None
    structure: dict = dataclasses.field(default_factory=dict)

    @property
    def counts(self):
        """The numbers that add up over layers, in the order of the attributes."""
        names = ("weights", "left", "bytes", "bytes_left", "multiply_adds", "multiply_adds_left")
        return tuple(getattr(self, name) for name in names)

    @property
    def ratio(self):
        """weights ÷ left; infinite where none is left."""
        return self.weights / self.left if self.left else math.inf


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """What `sparsity` found; prints as a table.

    Its `weights`, `left`, `ratio`, `bytes`, `bytes_left`, `multiply_adds` and `multiply_adds_left` are those of all
    rows together.

    Attributes:
        layers: Tuple of `LayerSparsity`, in the order of the model.
    """

    layers: tuple

    @property
    def total(self):
        """The `LayerSparsity` of all rows together; of its `structure`, the gates are left out."""
        structure = {}
        for layer in self.layers:
            for name, counts in layer.structure.items():
                if not name.endswith(" gate"):
                    structure[name] = tuple(map(sum, zip(counts, structure.get(name, (0, 0)))))
        rows = [layer.counts for layer in self.layers] or [(0,) * 6]
        return LayerSparsity("total", *map(known_sum, zip(*rows)), structure=structure)

    @property
    def weights(self):
        """How many weights all layers have, biases not counted."""
        return self.total.weights

    @property
    def left(self):
        """How many of them are left."""
        return self.total.left

    @property
    def ratio(self):
        """weights ÷ left; infinite where none is left."""
        return self.total.ratio

    @property
    def bytes(self):
        """What the Keras layers store of which rows tell, biases and all; other layers are not counted."""
        return self.total.bytes

    @property
    def bytes_left(self):
        """The same without the weights that go."""
        return self.total.bytes_left

    @property
    def multiply_adds(self):
        """Of one example; None where it is None in any row."""
        return self.total.multiply_adds

    @property
    def multiply_adds_left(self):
        """The same of the weights that are left."""
        return self.total.multiply_adds_left

    def __str__(self):
        rows = [*self.layers, self.total]
        table = [("layer", "weights", "left", "left %", "ratio", "bytes", "left", "multiply-adds", "left")]
        table += [_cells(row) for row in rows]
        widths = [max(map(len, column)) for column in zip(*table)]
        head, *lines = ("  ".join(map(_aligned, cells, widths, range(len(cells)))) for cells in table)
        lines = ["\n".join([line, *_structure_lines(row)]) for line, row in zip(lines, rows)]
        rule = "-" * len(head)
        return "\n".join([head, rule, *lines[:-1], rule, lines[-1]])


def _cells(row):
    """What a line of the table says of a row."""
    count = ["-" if number is None else f"{number:,}" for number in row.counts]
    percent, ratio = f"{100 * row.left / max(row.weights, 1):.2f}", f"{row.ratio:.1f}x"
    return (row.name, *count[:2], percent, ratio, *count[2:])


def _aligned(cell, width, column):
    return f"{cell:>{width}}" if column else f"{cell:<{width}}"


def _structure_lines(row):
    parts = (f"{name} {left:,} of {count:,}" for name, (left, count) in row.structure.items())
    return ["  " + ", ".join(parts)] if row.structure else []


def sparsity(model, threshold=None):
    """Count the weights that a model needs: those whose log alpha is at most the threshold; and what they cost.

    Args:
        model: A built model or layer with at least one variational kernel.
        threshold: Float in units of log alpha, or None for each layer's own; where it was given none, that is 3, at
            which a weight that goes is at least 95 % noise, and 5 for groups of weights.

    Returns:
        `Sparsity`, with `.weights`, `.left`, `.ratio`, `.bytes`, `.bytes_left`, `.multiply_adds`, `.multiply_adds_left`
        and `.layers`. Layers without a variational kernel are not counted, nor are products of two activations, such as
        attention's scores.

    Raises:
        ValueError: For a threshold that is not finite, or a model without a variational weight.

    Example:
        >>> import keras, keras_vdrop as kv
        >>> model = keras.Sequential([keras.Input((8, 8, 1)), kv.VariationalConv2D(4, 3)])
        >>> report = kv.sparsity(model, threshold=50.0)
        >>> report.weights, report.bytes, report.multiply_adds
        (36, 160, 1296)
    """
    names, kept = {}, {}
    for weight in _prunable(model, threshold):
        mask = ops.convert_to_numpy(weight.keep_mask(threshold))
        kept.setdefault(weight.owner, {})[weight.name] = mask
        names[weight.owner] = row_name(model, weight)
    all_places = places(model)
    return Sparsity(tuple(_row(names[owner], owner, kept[owner], all_places.get(id(owner))) for owner in kept))


def _row(name, owner, kept, places):
    """What the report says of a layer, from what is kept of its weights and the places of each."""
    weights, left = (sum(int(count(mask)) for mask in kept.values()) for count in (np.size, np.count_nonzero))
    stored = sum(math.prod(variable.shape) for variable in owner.stock_variables())
    size = itemsize(owner.variable_dtype)
    return LayerSparsity(
        name,
        weights,
        left,
        bytes=size * stored,
        bytes_left=size * (stored - (weights - left)) if stored else 0,
        multiply_adds=product([weights, places]),
        multiply_adds_left=product([left, places]),
        structure=owner.structure(kept),
    )


def prune(model, threshold=None):
    """Set every weight whose log alpha is above the threshold to zero, in place and for good.

    The mask stays through further training, saving and loading: fit again to fine-tune what is left.

    Args:
        model: A built model or layer with at least one variational kernel.
        threshold: As for `sparsity`.

    Returns:
        The `Sparsity` after it.

    Raises:
        ValueError: As `sparsity`.

    Warns:
        UserWarning: Of layers of which nothing is left.
    """
    for weight in _prunable(model, threshold):
        weight.prune(threshold)
    report = sparsity(model, threshold)
    warn_of_empty_layers(report)
    return report


def warn_of_empty_layers(report):
    """Warn of layers of which nothing is left: their outputs are the same for every input."""
    empty = [row.name for row in report.layers if not row.left]
    if empty:
        warnings.warn(
            f"Nothing is left of {', '.join(empty)}: the output does not depend on the input there. A higher threshold "
            "keeps more; so does, in training, a smaller weight of the KL (`ELBO(temperature=...)`) or a later one.",
            stacklevel=3,
        )


def _prunable(model, threshold):
    if threshold is not None:
        check_finite("threshold", threshold)
    return prunable_weights(model)


def row_name(model, weight):
    """The path of the layer below the model: "dense", "encoder/dense", "lstm/cell"."""
    # Of the variables, it is this one that the layer has made itself.
    parts = weight.log_variance.path.split("/")[:-1]
    if len(parts) > 1 and parts[0] == model.name:
        parts = parts[1:]
    return "/".join(parts)
