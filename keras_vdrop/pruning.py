"""Counting the weights that a model needs, and setting the others to zero."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np

from keras_vdrop.checks import check_finite
from keras_vdrop.costs import itemsize, known_sum, places
from keras_vdrop.functional.tensors import product, to_numpy
from keras_vdrop.posterior import VariationalWeight, prunable_weights
from keras_vdrop.warning import warn

# The columns of a printed `Sparsity`.
COLUMNS = ("layer", "weights", "kept", "kept %", "ratio", "bytes", "kept", "multiply-adds", "kept")


@dataclasses.dataclass(frozen=True)
class LayerSparsity:
    """A row of the report: the variational kernels of one layer.

    Attributes:
        name: Name of the layer, prefixed with those of the models and wrappers around it.
        weights: Number of weights, without biases.
        left: Number of kept weights: not pruned yet, and not pruned at the report's threshold either.
        bytes: Size of the kernels and biases of the layer's Keras counterpart, in the layer's dtype.
        bytes_left: The same without the pruned weights. It counts the values, not their indices. To reach that size,
            use `compact` or compress the file.
        multiply_adds: Multiply-adds of the kernels for one example. In every call, a weight counts once for each
            position at which it is applied: positions of a convolution's outputs, or of a transposed convolution's
            inputs, time steps, tokens. 0 for a lookup. None if a size is unknown, as in `keras.Input((None,))`.
        multiply_adds_left: The same for the kept weights; 0 if there are none.
        structure: Dict from a kind of part to (kept, all). For most layers, "units", "filters" or "channels" are kept
            if any weight into them is kept; in an embedding, "words" and "columns" if any of their weights is; in a
            recurrent layer, "units" and gates if they still depend on the inputs or the state.
    """

    name: str
    weights: int
    left: int
    bytes: int = 0
    bytes_left: int = 0
    multiply_adds: int | None = None
    multiply_adds_left: int | None = None
    structure: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def counts(self) -> tuple[int | None, ...]:
        """The attributes that are summed over layers, in order."""
        names = ("weights", "left", "bytes", "bytes_left", "multiply_adds", "multiply_adds_left")
        return tuple(getattr(self, name) for name in names)

    @property
    def ratio(self) -> float:
        """weights ÷ left; infinite if no weight is kept."""
        return self.weights / self.left if self.left else math.inf


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """The result of `sparsity`, which prints as a table.

    Its `weights`, `left`, `ratio`, `bytes`, `bytes_left`, `multiply_adds` and `multiply_adds_left` are totals over all
    rows.

    Attributes:
        layers: Tuple of `LayerSparsity`, in the order of the model.
    """

    layers: tuple[LayerSparsity, ...]

    @property
    def total(self) -> LayerSparsity:
        """The totals over all rows as a `LayerSparsity`; its `structure` omits gates."""
        structure = {}
        for layer in self.layers:
            for name, counts in layer.structure.items():
                if not name.endswith(" gate"):
                    structure[name] = tuple(map(sum, zip(counts, structure.get(name, (0, 0)))))
        rows = [layer.counts for layer in self.layers] or [(0,) * 6]
        return LayerSparsity("total", *map(known_sum, zip(*rows)), structure=structure)

    @property
    def weights(self) -> int:
        """Number of weights in all layers, without biases."""
        return self.total.weights

    @property
    def left(self) -> int:
        """Number of kept weights."""
        return self.total.left

    @property
    def ratio(self) -> float:
        """weights ÷ left; infinite if no weight is kept."""
        return self.total.ratio

    @property
    def bytes(self) -> int:
        """Size of the Keras counterparts of the layers in the report, with biases; other layers do not count."""
        return self.total.bytes

    @property
    def bytes_left(self) -> int:
        """The same without the pruned weights."""
        return self.total.bytes_left

    @property
    def multiply_adds(self) -> int | None:
        """Multiply-adds for one example; None if it is None in any row."""
        return self.total.multiply_adds

    @property
    def multiply_adds_left(self) -> int | None:
        """The same for the kept weights."""
        return self.total.multiply_adds_left

    def __str__(self) -> str:
        rows = [*self.layers, self.total]
        table = [COLUMNS, *map(cells_of, rows)]
        widths = [max(map(len, column)) for column in zip(*table)]
        head, *lines = ("  ".join(map(_aligned, cells, widths, range(len(cells)))) for cells in table)
        lines = [f"{line}\n  {structure_of(row)}" if row.structure else line for line, row in zip(lines, rows)]
        rule = "-" * len(head)
        return "\n".join([head, rule, *lines[:-1], rule, lines[-1]])


def cells_of(row: LayerSparsity) -> tuple[str, ...]:
    """Format the cells of one row of the table, which are under `COLUMNS`."""
    count = ["-" if number is None else f"{number:,}" for number in row.counts]
    percent, ratio = f"{100 * row.left / max(row.weights, 1):.2f}", f"{row.ratio:.1f}x" if row.left else "-"
    return (row.name, *count[:2], percent, ratio, *count[2:])


def _aligned(cell: str, width: int, column: int) -> str:
    return f"{cell:>{width}}" if column else f"{cell:<{width}}"


def structure_of(row: LayerSparsity) -> str:
    """Format the structure of one row, such as "units 5 of 16"; empty if it has none."""
    return ", ".join(f"{name} {left:,} of {count:,}" for name, (left, count) in row.structure.items())


def sparsity(model: keras.Model | keras.layers.Layer, threshold: float | None = None) -> Sparsity:
    """Count the weights that a model needs, those whose log alpha is at most the threshold, and what they cost.

    Args:
        model: A built model or layer with at least one variational kernel.
        threshold: Float, in units of log alpha, or None for each layer's own. The default of a layer is 3, at which a
            pruned weight is at least 95 % noise, and 5 for groups of weights.

    Returns:
        `Sparsity`, with `.weights`, `.left`, `.ratio`, `.bytes`, `.bytes_left`, `.multiply_adds`, `.multiply_adds_left`
        and `.layers`. It does not count layers without a variational kernel, or products of two activations, such as
        the scores of attention.

    Raises:
        ValueError: If the threshold is not finite, or the model has no posterior.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> model = keras.Sequential([keras.Input((8, 8, 1)), kv.VariationalConv2D(4, 3)])
        >>> report = kv.sparsity(model, threshold=50.0)
        >>> report.weights, report.bytes, report.multiply_adds
        (36, 160, 1296)
    """
    names, kept = {}, {}
    for weight in _prunable(model, threshold):
        mask = to_numpy(weight.keep_mask(threshold))
        kept.setdefault(weight.owner, {})[weight.name] = mask
        names[weight.owner] = row_name(model, weight)
    all_places = places(model)
    return Sparsity(tuple(_row(names[owner], owner, kept[owner], all_places.get(id(owner))) for owner in kept))


def _row(name: str, owner: Any, kept: dict[str, np.ndarray], places: int | None) -> LayerSparsity:
    """Make the row of a layer from the masks of its kept weights and the number of positions."""
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


def prune(model: keras.Model | keras.layers.Layer, threshold: float | None = None) -> Sparsity:
    """Set every weight whose log alpha is above the threshold to zero, in place and permanently.

    The mask persists through further training, saving and loading. Fit again to fine-tune the kept weights.

    Args:
        model: A built model or layer with at least one variational kernel.
        threshold: As for `sparsity`.

    Returns:
        The `Sparsity` after pruning.

    Raises:
        ValueError: As for `sparsity`.

    Warns:
        UserWarning: Names layers of which no weight is kept.

    Examples:
        >>> import keras, keras_vdrop as kv
        >>> model = keras.Sequential([keras.Input((2,)), kv.VariationalDense(2, kernel_initializer="ones")])
        >>> kernel = model.layers[0].kernel
        >>> _ = kernel.log_variance.assign([[-6.0, 6.0], [-6.0, 6.0]])  # the log alphas, as the means are 1
        >>> kv.prune(model).left
        2
        >>> keras.ops.convert_to_numpy(kernel.mean()).tolist()
        [[1.0, 0.0], [1.0, 0.0]]
    """
    for weight in _prunable(model, threshold):
        weight.prune(threshold)
    report = sparsity(model, threshold)
    warn_of_empty_layers(report)
    return report


def warn_of_empty_layers(report: Sparsity) -> None:
    """Warn about layers of which no weight is kept: their outputs are the same for every input."""
    empty = [row.name for row in report.layers if not row.left]
    if empty:
        warn(
            f"No weights are kept in {', '.join(empty)}: the outputs there do not depend on the inputs. To keep more "
            "weights, raise the threshold, or train with a KL weight that is lower (`ELBO(temperature=...)`) or rises "
            "later.",
        )


def _prunable(model: keras.Model | keras.layers.Layer, threshold: float | None) -> list[VariationalWeight]:
    if threshold is not None:
        check_finite("threshold", threshold)
    return prunable_weights(model)


def row_name(model: keras.Model | keras.layers.Layer, weight: VariationalWeight) -> str:
    """Return the path of the weight's layer below the model: "dense", "encoder/dense", "lstm/cell"."""
    # The layer always creates the log variance itself; `loc` may belong to another layer.
    parts = weight.log_variance.path.split("/")[:-1]
    if len(parts) > 1 and parts[0] == model.name:
        parts = parts[1:]
    return "/".join(parts)
