"""How good stated probabilities are: arrays in, numbers out."""

import numpy as np


def accuracy(probability, labels):
    """The fraction of rows whose likeliest class is the label.

    Args:
        probability: Array (B, C).
        labels: Array (B,) of ints in [0, C).
    """
    probability, labels = _checked(probability, labels)
    return float((probability.argmax(axis=-1) == labels).mean())


def negative_log_likelihood(probability, labels):
    """NLL = mean of −log p(label), in nats a row; infinite where a label was given no probability.

    Args:
        probability: Array (B, C).
        labels: Array (B,) of ints in [0, C).
    """
    probability, labels = _checked(probability, labels)
    with np.errstate(divide="ignore"):
        return float(-np.log(probability[np.arange(len(labels)), labels]).mean())


def expected_calibration_error(probability, labels, num_bins=15):
    """ECE = Σ over bins of (rows in the bin ÷ rows)·|accuracy in the bin − mean confidence in the bin|.

    Args:
        probability: Array (B, C).
        labels: Array (B,) of ints in [0, C).
        num_bins: Positive int, bins of equal width over the confidence, the probability of the likeliest class.

    Reference:
        On Calibration of Modern Neural Networks, Guo et al., 2017, https://arxiv.org/abs/1706.04599
    """
    probability, labels = _checked(probability, labels)
    if num_bins < 1:
        raise ValueError(f"`num_bins` must be at least 1. Received: num_bins={num_bins}")
    confidence = probability.max(axis=-1)
    correct = probability.argmax(axis=-1) == labels
    # Bins are closed on the right, so that a confidence of 1 has one.
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(labels))


def _checked(probability, labels):
    """Both as float64 and int arrays, once their shapes and sums are what they must be."""
    probability, labels = np.asarray(probability, "float64"), np.asarray(labels)
    if probability.ndim != 2 or labels.shape != probability.shape[:1]:
        raise ValueError(
            "Expected probabilities of shape (B, C) and labels of shape (B,). "
            f"Received: shapes {probability.shape} and {labels.shape}"
        )
    sums = probability.sum(axis=-1)
    if not (np.abs(sums - 1.0) < 1e-3).all() or probability.min() < 0:
        raise ValueError(
            "Probabilities must be ≥ 0 and sum to 1 in every row; give the softmax of logits. "
            f"Received: sums from {sums.min()} to {sums.max()}"
        )
    return probability, labels.astype(int)
