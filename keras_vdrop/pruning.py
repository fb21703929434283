"""How many weights a model still needs, and setting the others to zero."""

import dataclasses
import math
import warnings

import numpy as np
from keras import ops

from keras_vdrop.layers.base import check_finite
from keras_vdrop.posterior import prunable_weights


@dataclasses.dataclass(frozen=True)
class LayerSparsity:
    """A row of the report: the variational kernels of one layer.

    Attributes:
        name: Of the layer, with the names of the models and wrappers around it.
        weights: How many weights it has, biases not counted.
        left: How many of them are not pruned, nor would be at the report's threshold.
        structure: Dict from what the weights make up to (left, all): of an embedding "words" with anything left, of a
            recurrent layer "units" and gates that still depend on the inputs or the state.
    """

    name: str
    weights: int
    left: int
    structure: dict = dataclasses.field(default_factory=dict)

    @property
    def ratio(self):
        """weights ÷ left; infinite where none is left."""
        return self.weights / self.left if self.left else math.inf


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """What `sparsity` found; prints as a table.

    Attributes:
        layers: Tuple of `LayerSparsity`, in the order of the model.
    """

    layers: tuple

    @property
    def weights(self):
        """How many weights all layers have, biases not counted."""
        return sum(layer.weights for layer in self.layers)

    @property
    def left(self):
        """How many of them are left."""
        return sum(layer.left for layer in self.layers)

    @property
    def ratio(self):
        """weights ÷ left; infinite where none is left."""
        return LayerSparsity("total", self.weights, self.left).ratio

    def __str__(self):
        rows = [*self.layers, LayerSparsity("total", self.weights, self.left)]
        width = max(len("layer"), *(len(row.name) for row in rows))
        lines = [f"{'layer':<{width}}  {'weights':>11}  {'left':>11}  {'left %':>7}  {'ratio':>9}"]
        for row in rows:
            percent = 100 * row.left / row.weights
            lines.append(
                f"{row.name:<{width}}  {row.weights:>11,}  {row.left:>11,}  {percent:>7.2f}  {row.ratio:>8.1f}x"
            )
            if row.structure:
                parts = (f"{name} {left:,} of {count:,}" for name, (left, count) in row.structure.items())
                lines.append("  " + ", ".join(parts))
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def sparsity(model, threshold=None):
    """Count the weights that a model needs: those whose log alpha is at most the threshold.

    Args:
        model: A built model or layer with at least one variational kernel.
        threshold: Float in units of log alpha, or None for each layer's own (3.0 unless it was given another).
            At 3 a weight that goes is at least 95 % noise.

    Returns:
        `Sparsity`, with `.weights`, `.left`, `.ratio` and `.layers`.

    Raises:
        ValueError: For a threshold that is not finite, or a model without a variational weight.
    """
    layers = {}
    for weight in _prunable(model, threshold):
        _, kept = layers.setdefault(weight.owner, (_row_name(model, weight), {}))
        kept[weight.name] = ops.convert_to_numpy(weight.keep_mask(_threshold(weight, threshold)))
    rows = []
    for owner, (name, kept) in layers.items():
        weights, left = (sum(int(count(mask)) for mask in kept.values()) for count in (np.size, np.count_nonzero))
        rows.append(LayerSparsity(name, weights, left, owner.structure(kept)))
    return Sparsity(tuple(rows))


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
        weight.prune(_threshold(weight, threshold))
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


def _threshold(weight, threshold):
    return weight.owner.threshold if threshold is None else threshold


def _row_name(model, weight):
    """The path of the layer below the model: "dense", "encoder/dense", "lstm/cell"."""
    parts = weight.loc.path.split("/")[:-1]
    if len(parts) > 1 and parts[0] == model.name:
        parts = parts[1:]
    return "/".join(parts)
