"""Checks of the arrays that are scored. Each returns NumPy arrays or numbers, or raises a `ValueError`."""

import numpy as np
from numpy.typing import ArrayLike


def numbers(name: str, values: ArrayLike, ndim: int | None = None, infinite: bool = False) -> np.ndarray:
    """Return the values as a float64 array with at least one row.

    Args:
        name: Name of the argument, for the error message.
        values: Array-like.
        ndim: The required number of axes, or None for any but 0.
        infinite: Whether ±∞ is allowed.

    Raises:
        ValueError: For NaN, infinity unless allowed, no rows, or another number of axes.
    """
    values = np.asarray(values, "float64")
    if values.ndim == 0 or len(values) == 0 or (ndim is not None and values.ndim != ndim):
        axes = "at least one axis" if ndim is None else f"{ndim} axis" if ndim == 1 else f"{ndim} axes"
        raise ValueError(f"`{name}` must have {axes} and at least one row. Received: shape {values.shape}")
    bad = np.isnan(values) if infinite else ~np.isfinite(values)
    if bad.any():
        rows = bad.reshape(len(values), -1).any(axis=1).sum()
        what = "NaN" if infinite else "NaN or infinity"
        raise ValueError(f"`{name}` must not contain {what}. Received: {what} in {rows} of {len(values)} rows")
    return values


def alike(**arrays: ArrayLike) -> tuple[np.ndarray, ...]:
    """Return float64 arrays of equal shape, in the given order.

    Raises:
        ValueError: If the shapes differ, or for values that `numbers` rejects.
    """
    checked = {name: numbers(name, values) for name, values in arrays.items()}
    if len({values.shape for values in checked.values()}) > 1:
        shapes = ", ".join(f"`{name}` {values.shape}" for name, values in checked.items())
        raise ValueError(f"Expected arrays of the same shape. Received: {shapes}")
    return tuple(checked.values())


def positive(name: str, values: ArrayLike) -> np.ndarray:
    """Return standard deviations as float64; raise a `ValueError` unless all are above 0."""
    values = np.asarray(values, "float64")
    if not (values > 0).all():
        raise ValueError(
            f"`{name}` must be above 0: it is a standard deviation, not its logarithm. "
            f"Received: values from {values.min()} up"
        )
    return values


def classes(labels: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    """Return labels (B,) as ints, for scores of shape (B, C).

    Raises:
        ValueError: For other shapes, or a label that is not an int in [0, C).
    """
    labels = np.asarray(labels)
    if len(shape) != 2 or labels.shape != shape[:1] or 0 in shape:
        raise ValueError(
            "Expected an array of shape (B, C) and labels of shape (B,). If p is the probability of class 1, pass "
            f"`np.stack([1 - p, p], axis=-1)`. Received: shapes {shape} and {labels.shape}"
        )
    numbers("labels", labels)
    if (labels != labels.astype(int)).any() or labels.min() < 0 or labels.max() >= shape[1]:
        raise ValueError(
            f"Labels must be ints from 0 to {shape[1] - 1}. Received: labels from {labels.min()} to {labels.max()}"
        )
    return labels.astype(int)


def distribution(probability: ArrayLike) -> np.ndarray:
    """Return class probabilities (B, C) as float64.

    Raises:
        ValueError: For NaN, values below 0, a row whose sum differs from 1 by 1e-3 or more, or another number of axes.
    """
    probability = np.asarray(probability, "float64")
    if probability.ndim != 2 or 0 in probability.shape:
        raise ValueError(f"Expected probabilities of shape (B, C). Received: shape {probability.shape}")
    sums = probability.sum(axis=-1)
    if not (np.abs(sums - 1.0) < 1e-3).all() or probability.min() < 0:
        missing = np.isnan(sums).sum()
        received = f"sums from {sums.min():g} to {sums.max():g}, and values from {probability.min():g} up"
        if missing:
            received = f"NaN in {missing} of {len(sums)} rows"
        raise ValueError(
            f"Probabilities must be ≥ 0 and sum to 1 in every row. Apply softmax to logits first. Received: {received}"
        )
    return probability


def classification(probability: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Check probabilities with `distribution` and labels with `classes`, and return both."""
    probability = np.asarray(probability, "float64")
    labels = classes(labels, probability.shape)
    return distribution(probability), labels
