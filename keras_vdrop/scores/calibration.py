"""Scores of class probabilities, and temperature scaling: arrays in, numbers out.

`labels` are class numbers, and `probability` has a column for each class. For two classes, convert the probability p of
class 1 to `np.stack([1 - p, p], axis=-1)`.
"""

import warnings
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from keras_vdrop.scores import checks

# Tolerance for float32 rounding of a probability on the edge of a bin, in widths of a bin.
EDGE = 1e-5


def accuracy(probability: ArrayLike, labels: ArrayLike) -> float:
    """Compute the fraction of rows whose most probable class is the label.

    Args:
        probability: Array (B, C).
        labels: Array (B,) of ints in [0, C).

    Raises:
        ValueError: For probabilities that are negative or do not sum to 1, labels outside [0, C), or other shapes.

    Examples:
        >>> from keras_vdrop.scores import calibration
        >>> calibration.accuracy([[0.9, 0.1], [0.2, 0.8]], [0, 0])
        0.5
    """
    probability, labels = checks.classification(probability, labels)
    return float((probability.argmax(axis=-1) == labels).mean())


def negative_log_likelihood(probability: ArrayLike, labels: ArrayLike) -> float:
    """Compute NLL = mean of −log p(label), in nats per row; infinite if a label has probability 0.

    Args:
        probability: Array (B, C).
        labels: Array (B,) of ints in [0, C).

    Raises:
        ValueError: For probabilities that are negative or do not sum to 1, labels outside [0, C), or other shapes.

    Examples:
        >>> from keras_vdrop.scores import calibration
        >>> round(calibration.negative_log_likelihood([[0.5, 0.5], [0.5, 0.5]], [0, 1]), 3)  # log 2
        0.693
    """
    probability, labels = checks.classification(probability, labels)
    with np.errstate(divide="ignore"):
        return float(-np.log(probability[np.arange(len(labels)), labels]).mean())


class Reliability(NamedTuple):
    """Statistics of rows that are binned by confidence, one entry per bin. Empty bins are omitted.

    Attributes:
        count: Array (K,), the number of rows in the bin.
        confidence: Array (K,), the mean probability of their most probable class.
        accuracy: Array (K,), the fraction of rows whose label is that class.
        variance: Array (K,), the unbiased estimate of the variance of the gap, accuracy − confidence, over samples of
            the same number of rows; infinite for a single row.

    Examples:
        >>> from keras_vdrop.scores import calibration
        >>> bins = calibration.reliability([[1.0, 0.0], [0.0, 1.0]], [0, 0])
        >>> bins._fields
        ('count', 'confidence', 'accuracy', 'variance')
        >>> bins.count.tolist()
        [2]
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    variance: np.ndarray


def reliability(
    probability: ArrayLike,
    labels: ArrayLike,
    num_bins: int = 15,
    binning: Literal["width", "mass"] = "width",
) -> Reliability:
    """Compute accuracy and confidence for each bin, the data of `plots.reliability_diagram`.

    Args:
        probability, labels, num_bins, binning: As for `expected_calibration_error`.

    Returns:
        A `Reliability`.

    Raises:
        ValueError: For probabilities that are negative or do not sum to 1, labels outside [0, C), other shapes, fewer
            than 1 bin, or an unknown `binning`.

    Examples:
        >>> from keras_vdrop.scores import calibration
        >>> bins = calibration.reliability([[0.75, 0.25]] * 4, [0, 0, 1, 1])
        >>> bins.count.tolist(), bins.confidence.tolist(), bins.accuracy.tolist()
        ([4], [0.75], [0.5])

    Reference:
        On Calibration of Modern Neural Networks, Guo et al., 2017, https://arxiv.org/abs/1706.04599
    """
    probability, labels = checks.classification(probability, labels)
    confidence = probability.max(axis=-1)
    correct = probability.argmax(axis=-1) == labels
    bins = _bins(confidence, num_bins, binning)
    count = np.bincount(bins, minlength=num_bins)
    rows = count > 0
    count = count[rows]

    def mean(values):
        return np.bincount(bins, weights=values, minlength=num_bins)[rows] / count

    gap = correct - confidence
    spread = mean((gap - (np.bincount(bins, weights=gap) / np.maximum(np.bincount(bins), 1))[bins]) ** 2)
    variance = np.where(count > 1, spread / np.maximum(count - 1, 1), np.inf)
    return Reliability(count, mean(confidence), mean(correct), variance)


def expected_calibration_error(
    probability: ArrayLike,
    labels: ArrayLike,
    num_bins: int = 15,
    binning: Literal["width", "mass"] = "width",
    debiased: bool = False,
) -> float:
    """Compute ECE = Σ over bins of (rows in the bin ÷ rows)·|accuracy in the bin − mean confidence in the bin|.

    Chance alone causes gaps, so even perfectly calibrated probabilities have an ECE above 0: about 0.4·√(bins ÷ rows)
    if confidence is near ½ and bins have equal mass. The mean squared gap minus the variance of the gaps,

        v = Σ (rows in the bin ÷ rows)·(gap² − variance of the gap),

    has no such bias: under perfect calibration it is 0 on average, for any number of rows. `debiased` returns its
    signed root sign(v)·√|v|, a root mean square where the ECE is a mean. Under perfect calibration it is negative about
    half the time.

    Args:
        probability: Array (B, C).
        labels: Array (B,) of ints in [0, C).
        num_bins: Positive int, the number of bins over the confidence, the probability of the most probable class.
        binning: "width" for bins of equal width, closed on the right; "mass" for bins with about the same number of
            rows, where equal confidences share a bin.
        debiased: Whether to return sign(v)·√|v|. A bin of one row has no variance estimate and counts as 0.

    Raises:
        ValueError: For probabilities that are negative or do not sum to 1, labels outside [0, C), other shapes, fewer
            than 1 bin, or an unknown `binning`.

    Examples:
        >>> from keras_vdrop.scores import calibration
        >>> calibration.expected_calibration_error([[0.75, 0.25]] * 4, [0, 0, 1, 1])
        0.25

    Reference:
        On Calibration of Modern Neural Networks, Guo et al., 2017, https://arxiv.org/abs/1706.04599; debiased:
        Verified Uncertainty Calibration, Kumar, Liang, Ma, 2019, https://arxiv.org/abs/1909.10155 (there all rows of a
        bin have one probability; here they may differ, and the variance is that of accuracy − confidence)
    """
    bins = reliability(probability, labels, num_bins, binning)
    share = bins.count / bins.count.sum()
    gap = bins.accuracy - bins.confidence
    if not debiased:
        return float((share * np.abs(gap)).sum())
    several = bins.count > 1
    square = (share * (gap**2 - bins.variance))[several].sum()
    return float(np.copysign(np.sqrt(np.abs(square)), square))


def classwise_calibration_error(
    probability: ArrayLike,
    labels: ArrayLike,
    num_bins: int = 15,
    binning: Literal["width", "mass"] = "width",
) -> float:
    """Compute 1/C·Σ over classes and bins of (rows in the bin ÷ rows)·|frequency of the class − its mean probability|.

    It takes all C probabilities of a row into account, whereas the ECE takes only the largest.

    Args:
        probability: Array (B, C).
        labels: Array (B,) of ints in [0, C).
        num_bins, binning: As for `expected_calibration_error`, but over the probability of each class in turn.

    Raises:
        ValueError: For probabilities that are negative or do not sum to 1, labels outside [0, C), other shapes, fewer
            than 1 bin, or an unknown `binning`.

    Examples:
        >>> from keras_vdrop.scores import calibration
        >>> calibration.classwise_calibration_error([[0.75, 0.25]] * 4, [0, 0, 1, 1])  # 0.25 for each class
        0.25

    Reference:
        Beyond temperature scaling, Kull et al., 2019, https://arxiv.org/abs/1910.12656
    """
    probability, labels = checks.classification(probability, labels)
    errors = [
        np.abs(np.bincount(_bins(column, num_bins, binning), weights=(labels == number) - column)).sum()
        for number, column in enumerate(probability.T)
    ]
    return float(np.mean(errors) / len(labels))


def brier_score(probability: ArrayLike, labels: ArrayLike) -> float:
    """Compute Brier = mean of Σ over classes of (p − 1[the class is the label])²: from 0, the best, to 2.

    For two classes it is twice the mean of (p − y)², which some authors call the Brier score.

    Args:
        probability: Array (B, C).
        labels: Array (B,) of ints in [0, C).

    Raises:
        ValueError: For probabilities that are negative or do not sum to 1, labels outside [0, C), or other shapes.

    Examples:
        >>> from keras_vdrop.scores import calibration
        >>> calibration.brier_score([[0.5, 0.5], [0.0, 1.0]], [0, 1])  # 0.5 and 0
        0.25

    Reference:
        Verification of Forecasts Expressed in Terms of Probability, Brier, 1950,
        https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2
    """
    probability, labels = checks.classification(probability, labels)
    truth = np.eye(probability.shape[1])[labels]
    return float(((probability - truth) ** 2).sum(axis=-1).mean())


def brier_decomposition(
    probability: ArrayLike,
    labels: ArrayLike,
    num_bins: int | None = 15,
    binning: Literal["width", "mass"] = "width",
) -> dict[str, float]:
    """Decompose Brier = reliability − resolution + uncertainty + within. The identity is exact.

    Each term is a sum over classes. For one class, let p be its probability in a row and y be 1 if it is the label and
    0 otherwise. The B rows are divided into groups of similar p; a group has n rows, and ⟨·⟩ is the mean over it:

        reliability = Σ n/B·(⟨p⟩ − ⟨y⟩)², the loss that calibration would remove;
        resolution = Σ n/B·(⟨y⟩ − mean y)², how far the groups differ;
        uncertainty = mean y·(1 − mean y), the score of always predicting the frequency;
        within = Σ n/B·(⟨(p − ⟨p⟩)²⟩ − 2·⟨(p − ⟨p⟩)(y − ⟨y⟩)⟩), the effect of differences within groups, of either sign.

    With a group for each distinct p (`num_bins=None`), `within` is 0 and the other three are Murphy's terms. This suits
    forecasts with few distinct values: if every row has its own value, reliability is the whole score. Bins hold more
    rows each, but move the effect of differences of p within a bin from reliability and resolution to `within`. With
    few rows per bin, chance raises both reliability and resolution.

    Args:
        probability: Array (B, C).
        labels: Array (B,) of ints in [0, C).
        num_bins, binning: As for `expected_calibration_error`, but over the probability of each class in turn.
            `num_bins=None` makes a group for each distinct probability.

    Returns:
        Dict of floats: `reliability`, `resolution`, `uncertainty`, `within`.

    Raises:
        ValueError: For probabilities that are negative or do not sum to 1, labels outside [0, C), other shapes, fewer
            than 1 bin, or an unknown `binning`.

    Examples:
        >>> from keras_vdrop.scores import calibration
        >>> calibration.brier_decomposition([[0.75, 0.25]] * 4, [0, 0, 1, 1])
        {'reliability': 0.125, 'resolution': 0.0, 'uncertainty': 0.5, 'within': 0.0}
        >>> calibration.brier_score([[0.75, 0.25]] * 4, [0, 0, 1, 1])
        0.625

    Reference:
        A New Vector Partition of the Probability Score, Murphy, 1973,
        https://doi.org/10.1175/1520-0450(1973)012<0595:ANVPOT>2.0.CO;2; within: Two Extra Components in the Brier
        Score Decomposition, Stephenson, Coelho, Jolliffe, 2008, https://doi.org/10.1175/2007WAF2006116.1
    """
    probability, labels = checks.classification(probability, labels)
    total = dict.fromkeys(("reliability", "resolution", "uncertainty", "within"), 0.0)
    for number, p in enumerate(probability.T):
        y = (labels == number).astype("float64")
        if num_bins is None:
            groups = np.unique(p, return_inverse=True)[1]
        else:
            groups = np.unique(_bins(p, num_bins, binning), return_inverse=True)[1]
        stated, seen = (np.bincount(groups, weights=v)[groups] / np.bincount(groups)[groups] for v in (p, y))
        total["reliability"] += ((stated - seen) ** 2).mean()
        total["resolution"] += ((seen - y.mean()) ** 2).mean()
        total["uncertainty"] += y.mean() * (1.0 - y.mean())
        total["within"] += ((p - stated) ** 2 - 2.0 * (p - stated) * (y - seen)).mean()
    return {name: float(value) for name, value in total.items()}


def fit_temperature(logits: ArrayLike, labels: ArrayLike, bounds: tuple[float, float] = (0.01, 100.0)) -> float:
    """Fit the temperature T = argmin of the mean of −log softmax(logits / T)[label], to correct a model's confidence.

    Fit it on validation data. It does not change the accuracy. The NLL is convex in 1/T, so the minimum is unique.

    Args:
        logits: Array (B, C), not probabilities; the logarithms of probabilities are fine.
        labels: Array (B,) of ints in [0, C).
        bounds: The least and the greatest T. If every label has the largest logit, the NLL is lowest at T = 0; if the
            logits are worse than uninformative, at T = ∞. In both cases the bound is returned, with a warning.

    Returns:
        Float, T; above 1 for an overconfident model.

    Raises:
        ValueError: For NaN, infinity, labels outside [0, C), or bounds that are not 0 < least < greatest.

    Examples:
        >>> from keras_vdrop.scores import calibration
        >>> round(calibration.fit_temperature([[8.0, 0.0]] * 4, [0, 0, 0, 1]), 3)  # 3 of 4: 8 / log 3
        7.282

    Reference:
        On Calibration of Modern Neural Networks, Guo et al., 2017, https://arxiv.org/abs/1706.04599
    """
    logits = np.asarray(logits, "float64")
    labels = checks.classes(labels, logits.shape)
    logits = checks.numbers("logits", logits)
    least, greatest = bounds
    if not 0.0 < least < greatest < np.inf:
        raise ValueError(f"`bounds` must be (least, greatest) with 0 < least < greatest. Received: bounds={bounds}")
    shifted = logits - logits.max(axis=-1, keepdims=True)
    target = shifted[np.arange(len(labels)), labels]

    def derivatives(inverse):
        """Return the first and second derivatives of the NLL with respect to 1/T."""
        p = np.exp(inverse * shifted)
        p /= p.sum(axis=-1, keepdims=True)
        mean = (p * shifted).sum(axis=-1)
        return (mean - target).mean(), (p * (shifted - mean[:, None]) ** 2).sum(axis=-1).mean()

    low, high = 1.0 / greatest, 1.0 / least
    for edge, sign in ((low, 1.0), (high, -1.0)):
        if sign * derivatives(edge)[0] >= 0.0:
            warnings.warn(
                f"The likelihood has no maximum at a temperature between {least:g} and {greatest:g}, so "
                f"{1.0 / edge:g} is returned. Fit the temperature on validation data, and use more rows.",
                stacklevel=2,
            )
            return 1.0 / edge
    inverse = np.clip(1.0, low, high)
    for _ in range(100):
        slope, curvature = derivatives(inverse)
        low, high = (low, inverse) if slope > 0.0 else (inverse, high)
        with np.errstate(divide="ignore", invalid="ignore"):
            step = inverse - slope / curvature
        # Newton's step, or the geometric mean of the bracket if that step would leave it.
        step = step if low < step < high else np.sqrt(low * high)
        if abs(step - inverse) <= 1e-12 * inverse:
            break
        inverse = step
    return float(1.0 / inverse)


def _bins(values: np.ndarray, num_bins: int, binning: str) -> np.ndarray:
    """Return the index of the bin, in [0, num_bins), of each value in [0, 1]."""
    if num_bins < 1:
        raise ValueError(f"`num_bins` must be at least 1. Received: num_bins={num_bins}")
    if binning == "width":
        # Bins are closed on the right, so that a confidence of 1 has a bin.
        return np.clip(np.ceil(values * num_bins - EDGE).astype(int) - 1, 0, num_bins - 1)
    if binning == "mass":
        # Bin by rank. Equal values share the middle one of their ranks.
        first, behind = (np.searchsorted(np.sort(values), values, side) for side in ("left", "right"))
        return (first + behind - 1) // 2 * num_bins // len(values)
    raise ValueError(f'`binning` must be "width" or "mass". Received: binning={binning!r}')
