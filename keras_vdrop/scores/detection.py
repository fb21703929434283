"""How well a score detects inputs on which a model is unreliable: arrays in, numbers out.

All scores are uncertainties, higher if the model is less sure, such as `predictive_entropy` and `mutual_information` of
a `MonteCarlo`. For a confidence, pass 1 − confidence. "Inside" rows come from the training distribution, "outside" rows
do not.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from keras_vdrop.checks import check_fraction
from keras_vdrop.scores import checks


def auroc(inside: ArrayLike, outside: ArrayLike) -> float:
    """Compute AUROC = P(score outside > score inside) + ½·P(they are equal): ½ for an uninformative score, 1 at best.

    It is the area under the curve of true against false positives, and the Mann–Whitney U divided by the number of
    pairs.

    Args:
        inside: Array (N,), scores of rows inside.
        outside: Array (M,), scores of rows outside.

    Raises:
        ValueError: For NaN, no rows, or another number of axes.

    Examples:
        >>> from keras_vdrop.scores import detection
        >>> detection.auroc(inside=[0.1, 0.2, 0.5], outside=[0.5, 0.9])
        0.9166666666666666

    Reference:
        A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks, Hendrycks, Gimpel,
        2017, https://arxiv.org/abs/1610.02136
    """
    inside, outside = _scores(inside, outside)
    inside = np.sort(inside)
    below, up_to = (np.searchsorted(inside, outside, side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2.0 * len(inside)))


def aupr(inside: ArrayLike, outside: ArrayLike) -> float:
    """Compute the average precision, Σ (increase of recall)·precision over thresholds from the highest down.

    Rows outside are the positives. The result depends on their share: an uninformative score has M / (N + M). With rows
    inside as the positives, use `aupr(-outside, -inside)`.

    Args:
        inside: Array (N,), scores of rows inside.
        outside: Array (M,), scores of rows outside.

    Raises:
        ValueError: For NaN, no rows, or another number of axes.

    Examples:
        >>> from keras_vdrop.scores import detection
        >>> detection.aupr(inside=[0.1, 0.2], outside=[0.8, 0.9])
        1.0

    Reference:
        As for `auroc`
    """
    inside, outside = _scores(inside, outside)
    false, true = _flagged(inside, outside)
    precision = true / (true + false)
    recall = true / len(outside)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def fpr_at_tpr(inside: ArrayLike, outside: ArrayLike, tpr: float = 0.95) -> float:
    """Compute FPR95, the fraction of rows inside that is flagged when at least 95 % of rows outside are flagged.

    Rows outside are the positives. With rows inside as the positives, as in some papers, use
    `fpr_at_tpr(-outside, -inside)`.

    Args:
        inside: Array (N,), scores of rows inside.
        outside: Array (M,), scores of rows outside.
        tpr: Float in (0, 1), the fraction of rows outside to detect, 0.95 for FPR95.

    Raises:
        ValueError: For NaN, no rows, another number of axes, or a `tpr` outside (0, 1).

    Examples:
        >>> from keras_vdrop.scores import detection
        >>> detection.fpr_at_tpr(inside=[0.1, 0.2, 0.3, 0.9], outside=[0.5, 0.8])  # at the threshold 0.5
        0.25

    Reference:
        Deep Anomaly Detection with Outlier Exposure, Hendrycks, Mazeika, Dietterich, 2019,
        https://arxiv.org/abs/1812.04606
    """
    check_fraction("tpr", tpr)
    inside, outside = _scores(inside, outside)
    needed = int(np.ceil(tpr * len(outside) - 1e-9))
    threshold = np.sort(outside)[len(outside) - needed]
    return float((inside >= threshold).mean())


def risk_coverage(uncertainty: ArrayLike, loss: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Compute the risk-coverage curve: (k / B, mean loss of the k least uncertain rows), for k = 1 ... B.

    The risk of equally uncertain rows is averaged over all orders of them.

    Args:
        uncertainty: Array (B,).
        loss: Array (B,), the loss of each row, such as 1 for a wrong answer and 0 for a right one.

    Returns:
        Two arrays (B,): coverage, rising to 1, and risk.

    Raises:
        ValueError: For NaN, an infinite loss, no rows, or arrays that differ in shape or have another number of axes.

    Examples:
        >>> from keras_vdrop.scores import detection
        >>> coverage, risk = detection.risk_coverage(uncertainty=[0.9, 0.1], loss=[1, 0])
        >>> coverage.tolist(), risk.tolist()
        ([0.5, 1.0], [0.0, 0.5])

    Reference:
        Selective Classification for Deep Neural Networks, Geifman, El-Yaniv, 2017, https://arxiv.org/abs/1705.08500
    """
    uncertainty = checks.numbers("uncertainty", uncertainty, ndim=1, infinite=True)
    loss = checks.numbers("loss", loss, ndim=1)
    if loss.shape != uncertainty.shape:
        raise ValueError(
            f"`uncertainty` and `loss` must have the same shape. Received: shapes {uncertainty.shape} and {loss.shape}"
        )
    order = np.argsort(uncertainty, kind="stable")
    _, group = np.unique(uncertainty[order], return_inverse=True)
    mean = np.bincount(group, weights=loss[order]) / np.bincount(group)
    count = np.arange(1, len(loss) + 1)
    return count / len(loss), np.cumsum(mean[group]) / count


def aurc(uncertainty: ArrayLike, loss: ArrayLike) -> float:
    """Compute AURC, the mean risk over the coverages 1/B ... 1. A better ranking of the losses gives a lower AURC.

    Args:
        uncertainty, loss: As for `risk_coverage`.

    Raises:
        ValueError: As for `risk_coverage`.

    Examples:
        >>> from keras_vdrop.scores import detection
        >>> detection.aurc(uncertainty=[0.9, 0.1], loss=[1, 0])  # the mean of 0 and 0.5
        0.25

    Reference:
        Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers, Geifman, Uziel, El-Yaniv, 2019,
        https://arxiv.org/abs/1805.08206
    """
    return float(risk_coverage(uncertainty, loss)[1].mean())


def excess_aurc(uncertainty: ArrayLike, loss: ArrayLike) -> float:
    """Compute E-AURC = AURC − AURC of the ideal order, by loss; 0 if rows of higher loss are always more uncertain.

    Args:
        uncertainty, loss: As for `risk_coverage`.

    Raises:
        ValueError: As for `risk_coverage`.

    Examples:
        >>> from keras_vdrop.scores import detection
        >>> detection.excess_aurc(uncertainty=[0.9, 0.1], loss=[1, 0])
        0.0
        >>> detection.excess_aurc(uncertainty=[0.1, 0.9], loss=[1, 0])  # 0.75 − 0.25
        0.5

    Reference:
        As for `aurc`
    """
    return aurc(uncertainty, loss) - aurc(loss, loss)


def _scores(inside: ArrayLike, outside: ArrayLike) -> Iterator[np.ndarray]:
    return (checks.numbers(name, v, 1, infinite=True) for name, v in (("inside", inside), ("outside", outside)))


def _flagged(inside: np.ndarray, outside: np.ndarray) -> Iterator[np.ndarray]:
    """Count the rows inside and outside that reach each distinct score, from the highest score down."""
    thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
    return (len(rows) - np.searchsorted(np.sort(rows), thresholds) for rows in (inside, outside))
