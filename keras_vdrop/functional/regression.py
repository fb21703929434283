"""How good a predicted distribution of a number is: arrays in, numbers out.

A normal one has `loc` and `scale`, its mean and standard deviation: of the variances that a `MonteCarlo` gives, the
root of their sum. Samples lie along the first axis, (S, B, ...).
"""

import math
import statistics

import numpy as np

from keras_vdrop.functional import checks

_ERF = np.vectorize(math.erf, otypes=["float64"])


def normal_negative_log_likelihood(loc, scale, y):
    """NLL = mean of ½·log(2π·scale²) + ½·((y − loc) / scale)², in nats.

    Args:
        loc, scale, y: Arrays of one shape, in the units of y; scale > 0.
    """
    scale, z = _standardised(loc, scale, y)
    return float((0.5 * math.log(2.0 * math.pi) + np.log(scale) + 0.5 * z**2).mean())


def normal_mixture_negative_log_likelihood(loc, scale, y):
    """NLL = mean of −log (1/S)·Σ_s N(y; loc_s, scale_s²), in nats: of the mean of S predicted distributions.

    Of the samples of a `MonteCarlo(output="samples")`, or of the members of an ensemble, this is the likelihood that
    papers report; the normal distribution with the same mean and variance is an approximation of the mixture.

    Args:
        loc, scale: Arrays (S, B, ...), in the units of y; scale > 0.
        y: Array (B, ...).
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


def normal_crps(loc, scale, y):
    """CRPS = mean of scale·(z·(2·Φ(z) − 1) + 2·φ(z) − 1/√π), z = (y − loc) / scale; in the units of y, 0 the best.

    CRPS = ∫ (F(t) − 1[t ≥ y])² dt of the predicted distribution function F; for a point it is |y − loc|.

    Args:
        loc, scale, y: Arrays of one shape, in the units of y; scale > 0.

    Reference:
        Strictly Proper Scoring Rules, Prediction, and Estimation, Gneiting, Raftery, 2007,
        https://doi.org/10.1198/016214506000001437
    """
    scale, z = _standardised(loc, scale, y)
    density = np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
    crps = scale * (z * _ERF(z / math.sqrt(2.0)) + 2.0 * density - 1.0 / math.sqrt(math.pi))
    return float(crps.mean())


def sample_crps(samples, y):
    """CRPS = mean of E|x − y| − ½·E|x − x'|, E|x − x'| over the S·(S − 1) pairs of different samples.

    The fair form: on average it is the CRPS of the distribution that the samples are of, for any S. (Over all S²
    pairs, it would be that of the S samples themselves, which is more, by E|x − x'| / (2·S).) Of few samples, it can
    be below 0.

    Args:
        samples: Array (S, B, ...), S ≥ 2, in the units of y.
        y: Array (B, ...).

    Reference:
        Fair scores for ensemble forecasts, Ferro, 2014, https://doi.org/10.1002/qj.2270
    """
    samples, y = _samples(samples, y)
    count = len(samples)
    error = np.abs(samples - y).mean(axis=0)
    # Σ over pairs of |x − x'|: the i-th smallest is the greater one in i pairs, and the smaller one in S − 1 − i.
    rank = (2.0 * np.arange(count) - count + 1.0).reshape(-1, *[1] * y.ndim)
    spread = (rank * np.sort(samples, axis=0)).sum(axis=0) / (count * (count - 1))
    return float((error - spread).mean())


def normal_interval(loc, scale, level=0.9):
    """loc ± Φ⁻¹((1 + level) / 2)·scale: the central interval that holds y with the probability `level`.

    Args:
        loc, scale: Arrays of one shape, in the units of y; scale > 0.
        level: Float in (0, 1).

    Returns:
        Two arrays of that shape: lower, upper.

    Example:
        >>> from keras_vdrop.functional import regression
        >>> lower, upper = regression.normal_interval([0.0], [1.0], level=0.95)
        >>> round(float(upper[0]), 2)
        1.96
    """
    loc, scale = checks.alike(loc=loc, scale=scale)
    quantile = statistics.NormalDist().inv_cdf(0.5 + 0.5 * checks.fraction("level", level))
    reach = quantile * checks.positive("scale", scale)
    return loc - reach, loc + reach


def sample_interval(samples, level=0.9):
    """The quantiles (1 − level) / 2 and (1 + level) / 2 of the samples, at the places p·(S + 1) of their order.

    Between the i-th and the j-th of S samples, one more of the same distribution lies with the probability
    (j − i) / (S + 1), whatever the distribution: with those places, that is `level`.

    Args:
        samples: Array (S, B, ...), in the units of y: draws of y itself, noise of the data included.
        level: Float in (0, 1).

    Returns:
        Two arrays (B, ...): lower, upper.

    Raises:
        ValueError: For fewer samples than 2 / (1 − level) − 1, whose extremes are not that far apart.
    """
    samples, level = checks.numbers("samples", samples), checks.fraction("level", level)
    least = math.ceil(2.0 / (1.0 - level) - 1.0 - 1e-9)
    if len(samples) < least:
        raise ValueError(
            f"A level of {level:g} takes at least {least} samples. Received: {len(samples)}; draw more, or ask for a "
            f"level of at most {(len(samples) - 1) / (len(samples) + 1):.3g}."
        )
    lower, upper = np.quantile(samples, [0.5 - 0.5 * level, 0.5 + 0.5 * level], axis=0, method="weibull")
    return lower, upper


def interval_coverage(lower, upper, y):
    """The fraction of y in [lower, upper]; near the interval's level where the prediction is calibrated.

    Args:
        lower, upper, y: Arrays of one shape.

    Raises:
        ValueError: For a lower end above the upper one, NaN, or shapes that differ.
    """
    lower, upper = (np.asarray(end, "float64") for end in (lower, upper))
    y = checks.numbers("y", y)
    if lower.shape != y.shape or upper.shape != y.shape:
        raise ValueError(f"Expected arrays of one shape. Received: {lower.shape}, {upper.shape} and {y.shape}")
    wrong = ~(lower <= upper)
    if wrong.any():
        raise ValueError(f"`lower` must be at most `upper`. Received: so not in {wrong.sum()} of {y.size} places")
    return float(((lower <= y) & (y <= upper)).mean())


def _standardised(loc, scale, y):
    """The scale, and (y − loc) / scale."""
    loc, scale, y = checks.alike(loc=loc, scale=scale, y=y)
    return checks.positive("scale", scale), (y - loc) / scale


def _samples(samples, y):
    samples, y = checks.numbers("samples", samples), checks.numbers("y", y)
    if samples.shape[1:] != y.shape or len(samples) < 2:
        raise ValueError(
            "Expected `samples` of shape (S, B, ...), at least two of them, and `y` of shape (B, ...). "
            f"Received: shapes {samples.shape} and {y.shape}"
        )
    return samples, y
