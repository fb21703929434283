"""How well a score tells what a model should not be trusted with: arrays in, numbers out.

All scores are uncertainties: the higher, the less sure, as `predictive_entropy` and `mutual_information` of a
`MonteCarlo` are. Of a confidence, give 1 − confidence.
"""

import numpy as np

from keras_vdrop.functional import checks


def auroc(inside, outside):
    """P(score outside > score inside) + ½·P(they are equal): from ½, which tells nothing, to 1.

    The area under the curve of true against false positives, and Mann and Whitney's U over the number of pairs.

    Args:
        inside: Array (N,), scores of rows of the training distribution.
        outside: Array (M,), scores of rows out of it.

    Example:
        >>> from keras_vdrop.functional import detection
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


def aupr(inside, outside):
    """Σ over thresholds, from the highest, of (rise of recall)·precision: average precision, rows outside positive.

    It depends on how many of the rows are outside: a score that tells nothing has M / (N + M). With rows inside as
    positive, it is `aupr(-outside, -inside)`.

    Args:
        inside: Array (N,), scores of rows of the training distribution.
        outside: Array (M,), scores of rows out of it.

    Reference:
        As for `auroc`
    """
    inside, outside = _scores(inside, outside)
    false, true = _flagged(inside, outside)
    precision = true / (true + false)
    recall = true / len(outside)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def fpr_at_tpr(inside, outside, tpr=0.95):
    """FPR95: the least fraction of rows inside that is flagged where at least 95 % of the rows outside are.

    Rows outside are the positive ones. With rows inside as positive, as in some papers, it is
    `fpr_at_tpr(-outside, -inside)`.

    Args:
        inside: Array (N,), scores of rows of the training distribution.
        outside: Array (M,), scores of rows out of it.
        tpr: Float in (0, 1), the fraction of rows outside to find.

    Reference:
        Deep Anomaly Detection with Outlier Exposure, Hendrycks, Mazeika, Dietterich, 2019,
        https://arxiv.org/abs/1812.04606
    """
    tpr = checks.fraction("tpr", tpr)
    inside, outside = _scores(inside, outside)
    needed = int(np.ceil(tpr * len(outside) - 1e-9))
    threshold = np.sort(outside)[len(outside) - needed]
    return float((inside >= threshold).mean())


def risk_coverage(uncertainty, loss):
    """(k / B, mean loss of the k rows of least uncertainty), for k = 1 ... B: what answering fewer rows saves.

    Where rows are equally uncertain, the mean over all orders of them.

    Args:
        uncertainty: Array (B,).
        loss: Array (B,), the loss of every row, such as 1 where the answer is wrong and 0 where it is right.

    Returns:
        Two arrays (B,): coverage, rising to 1, and risk.

    Reference:
        Selective Classification for Deep Neural Networks, Geifman, El-Yaniv, 2017, https://arxiv.org/abs/1705.08500
    """
    uncertainty = checks.numbers("uncertainty", uncertainty, ndim=1, infinite=True)
    loss = checks.numbers("loss", loss, ndim=1)
    if loss.shape != uncertainty.shape:
        raise ValueError(
            f"`uncertainty` and `loss` must be of one shape. Received: shapes {uncertainty.shape} and {loss.shape}"
        )
    order = np.argsort(uncertainty, kind="stable")
    _, group = np.unique(uncertainty[order], return_inverse=True)
    mean = np.bincount(group, weights=loss[order]) / np.bincount(group)
    count = np.arange(1, len(loss) + 1)
    return count / len(loss), np.cumsum(mean[group]) / count


def aurc(uncertainty, loss):
    """AURC = mean of the risk over the coverages 1/B ... 1: the less, the better the order of the uncertainties.

    Args:
        uncertainty, loss: As for `risk_coverage`.

    Reference:
        Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers, Geifman, Uziel, El-Yaniv, 2019,
        https://arxiv.org/abs/1805.08206
    """
    return float(risk_coverage(uncertainty, loss)[1].mean())


def excess_aurc(uncertainty, loss):
    """E-AURC = AURC − that of the best order, by the loss itself; 0 where no row that is worse is held to be surer.

    Args:
        uncertainty, loss: As for `risk_coverage`.

    Reference:
        As for `aurc`
    """
    return aurc(uncertainty, loss) - aurc(loss, loss)


def _scores(inside, outside):
    return (checks.numbers(name, v, 1, infinite=True) for name, v in (("inside", inside), ("outside", outside)))


def _flagged(inside, outside):
    """Rows inside and outside with at least that score, for every distinct score, from the highest."""
    thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
    return (len(rows) - np.searchsorted(np.sort(rows), thresholds) for rows in (inside, outside))
