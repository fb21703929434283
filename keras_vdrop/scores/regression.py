"""Scores and intervals of predicted distributions of numbers: arrays in, numbers and arrays out.

A normal distribution has `loc` and `scale`, its mean and standard deviation. For a `MonteCarlo`, `scale` is the square
root of the sum of its variances. Samples lie along the first axis, (S, B, ...).
"""

import math
import statistics

import numpy as np
from numpy.typing import ArrayLike

from keras_vdrop.checks import check_fraction
from keras_vdrop.scores import checks

_ERF = np.vectorize(math.erf, otypes=["float64"])


def normal_negative_log_likelihood(loc: ArrayLike, scale: ArrayLike, y: ArrayLike) -> float:
    """Compute NLL = mean of ½·log(2π·scale²) + ½·((y − loc) / scale)², in nats.

    Args:
        loc, scale, y: Arrays of one shape, in the units of y; scale > 0.

    Raises:
        ValueError: For NaN or infinity, a scale that is not above 0, no rows, or shapes that differ.

    Examples:
        >>> from keras_vdrop.scores import regression
        >>> round(regression.normal_negative_log_likelihood([0.0], [1.0], [0.0]), 3)  # ½·log 2π
        0.919
    """
    scale, z = _standardised(loc, scale, y)
    return float((0.5 * math.log(2.0 * math.pi) + np.log(scale) + 0.5 * z**2).mean())


def normal_mixture_negative_log_likelihood(loc: ArrayLike, scale: ArrayLike, y: ArrayLike) -> float:
    """Compute NLL = mean of −log (1/S)·Σ_s N(y; loc_s, scale_s²), in nats, for the average of S distributions.

    For the samples of a `MonteCarlo(output="samples")` or the members of an ensemble, this is the likelihood that
    papers report. The normal distribution with the same mean and variance only approximates the mixture.

    Args:
        loc, scale: Arrays (S, B, ...), in the units of y; scale > 0.
        y: Array (B, ...).

    Raises:
        ValueError: For NaN or infinity, a scale that is not above 0, no rows, or other shapes.

    Examples:
        >>> from keras_vdrop.scores import regression
        >>> loc, scale = [[0.0], [0.0]], [[1.0], [1.0]]  # two equal distributions
        >>> round(regression.normal_mixture_negative_log_likelihood(loc, scale, [0.0]), 3)
        0.919

    Reference:
        Dropout as a Bayesian Approximation, Gal, Ghahramani, 2016, https://arxiv.org/abs/1506.02142
    """
    scale = checks.positive("scale", checks.numbers("scale", scale))
    loc, y = checks.numbers("loc", loc), checks.numbers("y", y)
    if loc.shape != scale.shape or loc.shape[1:] != y.shape:
        raise ValueError(
            "Expected `loc` and `scale` of shape (S, B, ...) and `y` of shape (B, ...). "
            f"Received: shapes {loc.shape}, {scale.shape} and {y.shape}"
        )
    each = -0.5 * math.log(2.0 * math.pi) - np.log(scale) - 0.5 * ((y - loc) / scale) ** 2
    highest = each.max(axis=0)
    return float(-(highest + np.log(np.exp(each - highest).mean(axis=0))).mean())


def normal_crps(loc: ArrayLike, scale: ArrayLike, y: ArrayLike) -> float:
    """Compute CRPS = mean of scale·(z·(2·Φ(z) − 1) + 2·φ(z) − 1/√π) with z = (y − loc) / scale.

    The CRPS of a predicted distribution function F is ∫ (F(t) − 1[t ≥ y])² dt, in the units of y; 0 is the best. For a
    point prediction it is |y − loc|.

    Args:
        loc, scale, y: Arrays of one shape, in the units of y; scale > 0.

    Raises:
        ValueError: For NaN or infinity, a scale that is not above 0, no rows, or shapes that differ.

    Examples:
        >>> from keras_vdrop.scores import regression
        >>> round(regression.normal_crps([0.0], [1.0], [0.0]), 3)  # (√2 − 1) / √π
        0.234
        >>> round(regression.normal_crps([1.0], [1e-9], [3.0]), 3)  # |y − loc|
        2.0

    Reference:
        Strictly Proper Scoring Rules, Prediction, and Estimation, Gneiting, Raftery, 2007,
        https://doi.org/10.1198/016214506000001437
    """
    scale, z = _standardised(loc, scale, y)
    density = np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
    crps = scale * (z * _ERF(z / math.sqrt(2.0)) + 2.0 * density - 1.0 / math.sqrt(math.pi))
    return float(crps.mean())


def sample_crps(samples: ArrayLike, y: ArrayLike) -> float:
    """Compute CRPS = mean of E|x − y| − ½·E|x − x'|, with E|x − x'| over the S·(S − 1) pairs of different samples.

    This is the fair form: for any S, its expectation is the CRPS of the distribution that the samples come from. (Over
    all S² pairs, it would be the CRPS of the S samples themselves, which is higher by E|x − x'| / (2·S).) With few
    samples it can be below 0.

    Args:
        samples: Array (S, B, ...), S ≥ 2, in the units of y.
        y: Array (B, ...).

    Raises:
        ValueError: For NaN or infinity, fewer than 2 samples, or other shapes.

    Examples:
        >>> from keras_vdrop.scores import regression
        >>> regression.sample_crps([[0.0], [2.0]], [4.0])  # ½·(4 + 2) − ½·2
        2.0

    Reference:
        Fair scores for ensemble forecasts, Ferro, 2014, https://doi.org/10.1002/qj.2270
    """
    samples, y = _samples(samples, y)
    count = len(samples)
    error = np.abs(samples - y).mean(axis=0)
    # Σ over pairs of |x − x'|: counted from 0, the i-th smallest is the greater in i pairs, the smaller in S − 1 − i.
    rank = (2.0 * np.arange(count) - count + 1.0).reshape(-1, *[1] * y.ndim)
    spread = (rank * np.sort(samples, axis=0)).sum(axis=0) / (count * (count - 1))
    return float((error - spread).mean())


def normal_interval(loc: ArrayLike, scale: ArrayLike, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Compute loc ± Φ⁻¹((1 + level) / 2)·scale, the central interval that contains y with probability `level`.

    Args:
        loc, scale: Arrays of one shape, in the units of y; scale > 0.
        level: Float in (0, 1).

    Returns:
        Two arrays of that shape: lower, upper.

    Raises:
        ValueError: For NaN or infinity, a scale that is not above 0, shapes that differ, or a level outside (0, 1).

    Examples:
        >>> from keras_vdrop.scores import regression
        >>> lower, upper = regression.normal_interval([0.0], [1.0], level=0.95)
        >>> round(float(upper[0]), 2)
        1.96
    """
    loc, scale = checks.alike(loc=loc, scale=scale)
    check_fraction("level", level)
    quantile = statistics.NormalDist().inv_cdf(0.5 + 0.5 * level)
    reach = quantile * checks.positive("scale", scale)
    return loc - reach, loc + reach


def sample_interval(samples: ArrayLike, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Compute the quantiles (1 − level) / 2 and (1 + level) / 2 of the samples.

    The quantile p is at rank p·(S + 1). For any continuous distribution, a new sample lies between the i-th and the
    j-th smallest of S samples with probability (j − i) / (S + 1), which for these ranks is `level`.

    Args:
        samples: Array (S, B, ...), in the units of y: samples of y itself, including the noise of the data.
        level: Float in (0, 1).

    Returns:
        Two arrays (B, ...): lower, upper.

    Raises:
        ValueError: For fewer than 2 / (1 − level) − 1 samples, too few for this level.

    Examples:
        >>> import numpy as np
        >>> from keras_vdrop.scores import regression
        >>> lower, upper = regression.sample_interval(np.arange(1.0, 20.0)[:, None], level=0.9)  # 1 ... 19
        >>> round(float(lower[0]), 6), round(float(upper[0]), 6)
        (1.0, 19.0)
    """
    samples = checks.numbers("samples", samples)
    check_fraction("level", level)
    least = math.ceil(2.0 / (1.0 - level) - 1.0 - 1e-9)
    if len(samples) < least:
        raise ValueError(
            f"A level of {level:g} requires at least {least} samples. Draw more samples, or request a level of at most "
            f"{(len(samples) - 1) / (len(samples) + 1):.3g}. Received: {len(samples)} samples"
        )
    lower, upper = np.quantile(samples, [0.5 - 0.5 * level, 0.5 + 0.5 * level], axis=0, method="weibull")
    return lower, upper


def interval_coverage(lower: ArrayLike, upper: ArrayLike, y: ArrayLike) -> float:
    """Compute the fraction of y in [lower, upper]. For calibrated predictions it is near the level of the intervals.

    Args:
        lower, upper, y: Arrays of one shape.

    Raises:
        ValueError: If a lower end is above the upper one, for NaN, or if the shapes differ.

    Examples:
        >>> from keras_vdrop.scores import regression
        >>> regression.interval_coverage(lower=[0.0, 0.0], upper=[1.0, 1.0], y=[0.5, 2.0])
        0.5
    """
    lower, upper = (np.asarray(end, "float64") for end in (lower, upper))
    y = checks.numbers("y", y)
    if lower.shape != y.shape or upper.shape != y.shape:
        raise ValueError(
            f"Expected arrays of the same shape. Received: shapes {lower.shape}, {upper.shape} and {y.shape}"
        )
    wrong = ~(lower <= upper)
    if wrong.any():
        raise ValueError(
            f"`lower` must not exceed `upper`. Received: lower > upper, or NaN, at {wrong.sum()} of {y.size} positions"
        )
    return float(((lower <= y) & (y <= upper)).mean())


def _standardised(loc: np.ndarray, scale: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale, and (y − loc) / scale."""
    loc, scale, y = checks.alike(loc=loc, scale=scale, y=y)
    return checks.positive("scale", scale), (y - loc) / scale


def _samples(samples: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    samples, y = checks.numbers("samples", samples), checks.numbers("y", y)
    if samples.shape[1:] != y.shape or len(samples) < 2:
        raise ValueError(
            "Expected at least two `samples`, of shape (S, B, ...), and `y` of shape (B, ...). "
            f"Received: shapes {samples.shape} and {y.shape}"
        )
    return samples, y
