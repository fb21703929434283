"""KL(q‖p) of a Gaussian posterior q = N(loc, exp(log_variance)), weight by weight, in nats.

Every function is elementwise and differentiable in `loc` and `log_variance`. In float32, its values and gradients are
finite for |loc| ≤ 10⁴ (0 included) and log variances from −80 to 40. Below, alpha = exp(log_variance) / loc² is the
noise-to-signal ratio of a weight.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from keras import ops

from keras_vdrop.functional.sparsity import log_alpha, over_groups
from keras_vdrop.functional.tensors import Tensor, TensorLike, tensors

# KL ≈ K1·(1 − sigmoid(K2 + 1.5·log alpha)) + ½·log(1 + 1/alpha). With a slope of 1.5 the sigmoid needs no logarithm.
# K1 and K2 were fitted to the exact KL with that slope (tests/functional).
_K1 = 0.63015
_EXP_MINUS_K2 = math.exp(-1.87257)

# KL ≈ ½·log(1 + t) + t²·P(t)/Q(t) with t = 1/alpha: coefficients of ascending powers, fitted by least squares to values
# and slopes of the exact KL. All are positive, so Q has no root for t ≥ 0. t²·P/Q rises to (Euler's gamma + log 2) / 2.
_P = (0.16637515, 0.026408258, 0.002882208, 0.00019013932, 0.00002089298)
_Q = (1.0, 1.0831559, 0.30479855, 0.051567974, 0.0050930282, 0.00035124801, 0.000032892934)

# Kingma, Salimans, Welling (2015), equation 14, and the constant that the equation omits.
_CUBIC = (1.16145124, -1.50204118, 0.58629921)
_CUBIC_OFFSET = 0.5 * (np.euler_gamma + math.log(2.0))

# Lower log variances are raised to this, so that loc²/variance is finite in float32 for a mean of 10⁴.
_LEAST_LOG_VARIANCE = -70.0

_LEGENDRE_NODES, _LEGENDRE_WEIGHTS = np.polynomial.legendre.leggauss(32)


def _signal_to_noise(loc: Tensor, log_variance: Tensor) -> Tensor:
    """Compute |loc| / standard deviation = 1 / sqrt(alpha)."""
    return ops.abs(loc) * ops.exp(-0.5 * ops.maximum(log_variance, _LEAST_LOG_VARIANCE))


def _by_signal_to_noise(kl: Callable[[Tensor], tuple[Tensor, Tensor]], loc: Tensor, log_variance: Tensor) -> Tensor:
    """Compute a KL that depends on t = 1/alpha = loc²/variance only.

    A custom gradient halves the number of operations of automatic differentiation.

    Args:
        kl: Function of t that returns the KL and twice its derivative.
        loc, log_variance: As for all functions here.
    """

    @ops.custom_gradient
    def value(loc, log_variance):
        loc_over_variance = loc * ops.exp(-ops.maximum(log_variance, _LEAST_LOG_VARIANCE))
        values, twice_slope = kl(loc * loc_over_variance)
        slope_in_loc = twice_slope * loc_over_variance

        def gradient(*arguments, upstream=None):  # by position or, in PyTorch, by name
            by_loc = slope_in_loc * (arguments[0] if upstream is None else upstream)
            return by_loc, -0.5 * loc * by_loc

        return values, gradient

    # In TensorFlow, a function with a custom gradient must not read variables, so it gets copies.
    loc, log_variance = (ops.copy(each) for each in tensors(loc, log_variance, least="float32"))
    if tuple(loc.shape) != tuple(log_variance.shape):  # a gradient must have the shape of its argument
        loc, log_variance = loc + ops.zeros_like(log_variance), log_variance + ops.zeros_like(loc)
    return value(loc, log_variance)


def log_uniform(loc: TensorLike, log_variance: TensorLike) -> Tensor:
    """Approximate the KL to the log-uniform prior p(|w|) ∝ 1/|w|, normalised to 0 for alpha → ∞.

    KL ≈ k1·(1 − 1/(1 + e^(−k2)·alpha^(−1.5))) + ½·log(1 + 1/alpha)

    This is the sigmoid approximation of Molchanov et al. with the slope fixed at 1.5 and the other constants refitted.
    For log alpha in [−10, 10] it is within 0.0051 nats of the exact value; with the published constants, within 0.0094.

    Args:
        loc: Tensor, the posterior mean.
        log_variance: Tensor of the same shape, the logarithm of the posterior variance.

    Returns:
        Tensor of the same shape, in nats.

    Examples:
        >>> from keras_vdrop.functional import kl
        >>> float(kl.log_uniform(0.0, 0.0))  # alpha = ∞
        0.0
        >>> round(float(kl.log_uniform(1.0, 0.0)), 2)  # alpha = 1; the exact value is 0.427
        0.43

    Reference:
        Variational Dropout Sparsifies Deep Neural Networks, Molchanov, Ashukha, Vetrov, 2017,
        https://arxiv.org/abs/1701.05369
    """
    return _by_signal_to_noise(_log_uniform, loc, log_variance)


def _log_uniform(t: Tensor) -> tuple[Tensor, Tensor]:
    # The bound keeps t^1.5 finite in float32. Beyond it, the sigmoid term is constant to within 1e-27.
    bounded = ops.minimum(t, 1e18)
    root = ops.sqrt(bounded)
    left = 1.0 / (1.0 + _EXP_MINUS_K2 * bounded * root)
    return _K1 - _K1 * left + 0.5 * ops.log1p(t), 3.0 * _K1 * _EXP_MINUS_K2 * root * left * left + 1.0 / (1.0 + t)


def log_uniform_exact(loc: TensorLike, log_variance: TensorLike) -> Tensor:
    """Compute the KL to the log-uniform prior to float32 precision; `log_uniform` is within 0.0051 nats.

    KL = 2·∫₀ˣ D(s) ds, so that dKL/d log alpha = −x·D(x), with x = 1/sqrt(2·alpha) and D Dawson's function

    The integral is computed by a rational approximation, within 4e-6 nats of the exact value and 1.1e-5 of its slope,
    on every backend and under XLA. It costs about twice as much as `log_uniform`.

    Args:
        loc: Tensor, the posterior mean.
        log_variance: Tensor of the same shape, the logarithm of the posterior variance.

    Returns:
        Tensor of the same shape, in nats.

    Examples:
        >>> from keras_vdrop.functional import kl
        >>> round(float(kl.log_uniform_exact(1.0, 0.0)), 3)  # alpha = 1
        0.427

    Reference:
        Variational Dropout Sparsifies Deep Neural Networks, Molchanov, Ashukha, Vetrov, 2017,
        https://arxiv.org/abs/1701.05369; the integral: Variational Gaussian Dropout is not Bayesian, Hron, Matthews,
        Ghahramani, 2017, https://arxiv.org/abs/1711.02989
    """
    s = _signal_to_noise(*tensors(loc, log_variance, least="float32"))
    t = ops.square(ops.minimum(s, 1e9))
    # Numerator and denominator are divided by (1 + t)⁶, so that neither they nor Q² in the gradient overflow.
    w = 1.0 / (1.0 + t)
    z = t * w
    return ops.square(z) * _homogeneous(_P, z, w) / _homogeneous(_Q, z, w) + 0.5 * ops.log1p(s * s)


def _homogeneous(coefficients: Sequence[float], z: Tensor, w: Tensor) -> Tensor:
    """Compute Σ coefficients[i]·zⁱ·wⁿ⁻ⁱ, of degree n, by Horner's rule."""
    total, power = coefficients[-1], 1.0
    for coefficient in reversed(coefficients[:-1]):
        power = power * w
        total = total * z + coefficient * power
    return total


def log_uniform_cubic(log_alpha: TensorLike) -> Tensor:
    """Approximate the KL to the log-uniform prior by a cubic in alpha, for alpha ≤ 1.

    KL ≈ c0 − (½·log alpha + c1·alpha + c2·alpha² + c3·alpha³)

    Larger alpha are clipped to 1, above which the polynomial diverges. The paper leaves c0 open. With
    c0 = (γ + log 2) / 2 = 0.6352, the result is within 0.041 nats of the exact value.

    Args:
        log_alpha: Tensor, log(variance / loc²).

    Returns:
        Tensor of the same shape, in nats.

    Examples:
        >>> from keras_vdrop.functional import kl
        >>> round(float(kl.log_uniform_cubic(0.0)), 2)  # alpha = 1; the exact value is 0.427
        0.39

    Reference:
        Variational Dropout and the Local Reparameterization Trick, Kingma, Salimans, Welling, 2015,
        https://arxiv.org/abs/1506.02557
    """
    (log_alpha,) = tensors(log_alpha, least="float32")
    log_alpha = ops.minimum(log_alpha, 0.0)
    alpha = ops.exp(log_alpha)
    c1, c2, c3 = _CUBIC
    return _CUBIC_OFFSET - (0.5 * log_alpha + alpha * (c1 + alpha * (c2 + alpha * c3)))


# The functions of (loc, log_variance) that approximate KL(q ‖ log-uniform), by their names.
LOG_UNIFORM_FORMS = {
    "sigmoid": log_uniform,
    "exact": log_uniform_exact,
    "cubic": lambda loc, log_variance: log_uniform_cubic(log_alpha(loc, log_variance)),
}


def ard(loc: TensorLike, log_variance: TensorLike, group_axis: int | None = None, blocks: int = 1) -> Tensor:
    """Compute the KL to a zero-mean normal prior with a variance fitted to each weight or group (empirical Bayes).

    KL = ½·log(1 + 1/alpha), the minimum over s² of KL(q ‖ N(0, s²)), reached at s² = loc² + variance.
    For a group of n weights: Σ ½·(log s² − log_variance) with one s² = Σ (loc² + variance) / n.

    Args:
        loc: Tensor, the posterior mean.
        log_variance: Tensor of the same shape, the logarithm of the posterior variance.
        group_axis, blocks: As for `functional.sparsity.log_alpha`.

    Returns:
        Tensor of the same shape, in nats. With groups, only the sum over a group is a KL: that of the group.

    Raises:
        ValueError: If the weight has no axis `group_axis`, or the axis cannot be divided into `blocks` equal blocks.

    Examples:
        >>> from keras_vdrop.functional import kl
        >>> round(float(kl.ard(1.0, 0.0)), 3)  # alpha = 1: ½·log 2
        0.347

    Reference:
        Variational Dropout via Empirical Bayes, Kharitonov, Molchanov, Vetrov, 2018,
        https://arxiv.org/abs/1811.00596
    """
    if group_axis is None:
        return _by_signal_to_noise(_ard, loc, log_variance)
    loc, log_variance = tensors(loc, log_variance, least="float32")
    return 0.5 * (ops.log(ard_variance(loc, log_variance, group_axis, blocks)) - log_variance)


def _ard(t: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * ops.log1p(t), 1.0 / (1.0 + t)


def ard_variance(
    loc: TensorLike,
    log_variance: TensorLike,
    group_axis: int | None = None,
    blocks: int = 1,
) -> Tensor:
    """Compute the variance s² of the ARD prior: loc² + variance, or its mean over the group.

    Raises:
        ValueError: If the weight has no axis `group_axis`, or the axis cannot be divided into `blocks` equal blocks.

    Examples:
        >>> from keras import ops
        >>> from keras_vdrop.functional import kl
        >>> loc, log_variance = [[1.0, 3.0]], [[0.0, 0.0]]
        >>> ops.convert_to_numpy(kl.ard_variance(loc, log_variance)).tolist()
        [[2.0, 10.0]]
        >>> ops.convert_to_numpy(kl.ard_variance(loc, log_variance, group_axis=0)).tolist()
        [[6.0, 6.0]]

    Reference:
        As for `ard`
    """
    loc, log_variance = tensors(loc, log_variance, least="float32")
    second_moment = ops.square(loc) + ops.exp(log_variance)
    if group_axis is None:
        return second_moment
    return over_groups(ops.mean, second_moment, group_axis, blocks)


def normal(loc: TensorLike, log_variance: TensorLike, scale: TensorLike = 1.0) -> Tensor:
    """Compute the KL to the prior N(0, scale²).

    KL = ½·(variance/scale² + loc²/scale² − 1 − log(variance/scale²))

    Args:
        loc: Tensor, the posterior mean.
        log_variance: Tensor of the same shape, the logarithm of the posterior variance.
        scale: The prior's standard deviation (not its variance).

    Returns:
        Tensor of the same shape, in nats.

    Examples:
        >>> from keras_vdrop.functional import kl
        >>> float(kl.normal(0.0, 0.0)), float(kl.normal(1.0, 0.0))  # of N(0, 1) and N(1, 1) to N(0, 1)
        (0.0, 0.5)

    Reference:
        Weight Uncertainty in Neural Networks, Blundell et al., 2015, https://arxiv.org/abs/1505.05424
    """
    loc, log_variance = tensors(loc, log_variance, least="float32")
    scale = ops.cast(scale, log_variance.dtype)
    log_ratio = log_variance - 2.0 * ops.log(scale)
    return 0.5 * (ops.exp(log_ratio) + ops.square(loc / scale) - 1.0 - log_ratio)


def scale_mixture(
    loc: TensorLike,
    log_variance: TensorLike,
    probability: float,
    scale: float,
    narrow_scale: float,
) -> Tensor:
    """Compute the KL to a mixture of two normals, p(w) = π·N(0, σ1²) + (1 − π)·N(0, σ2²) with σ1 > σ2.

    KL = KL(q ‖ N(0, σ1²)) − log π − E_q[softplus(c − k·w²)],
    c = log((1 − π)·σ1 / (π·σ2)),  k = ½·(1/σ2² − 1/σ1²)

    Gauss–Legendre quadrature computes the expectation over the interval where neither softplus nor q is negligible. It
    has no Monte-Carlo noise, takes no logarithm of 0 far from the mean, and is within 1e-3 nats of the exact value.

    Args:
        loc: Tensor, the posterior mean.
        log_variance: Tensor of the same shape, the logarithm of the posterior variance.
        probability: Float in (0, 1), π.
        scale, narrow_scale: Floats > 0, the standard deviations σ1 > σ2.

    Returns:
        Tensor of the same shape, in nats.

    Examples:
        >>> from keras_vdrop.functional import kl
        >>> far = kl.scale_mixture(10.0, 0.0, probability=0.5, scale=1.0, narrow_scale=0.01)
        >>> round(float(far), 3)  # far from 0, only the wide normal counts: ½·10² + log 2
        50.693

    Reference:
        Weight Uncertainty in Neural Networks, Blundell et al., 2015, https://arxiv.org/abs/1505.05424
    """
    c = math.log((1.0 - probability) * scale / (probability * narrow_scale))
    k = 0.5 * (narrow_scale**-2 - scale**-2)
    loc, log_variance = tensors(loc, log_variance, least="float32")
    deviation = ops.exp(0.5 * log_variance)
    # Beyond `reach`, softplus is below about e^−16 of its maximum; beyond 6 standard deviations, q is. The limits are
    # in standard deviations from `loc`, which stay distinct in float32 even if the weights round to `loc`.
    reach = math.sqrt((max(c, 0.0) + 16.0) / k)
    inverse = ops.exp(-0.5 * log_variance)
    low, high = (ops.clip((end - loc) * inverse, -6.0, 6.0) for end in (-reach, reach))
    half, middle = 0.5 * (high - low), 0.5 * (high + low)

    def term(node, weight):
        z = middle + float(node) * half
        return float(weight) * ops.softplus(c - k * ops.square(loc + deviation * z)) * ops.exp(-0.5 * ops.square(z))

    expectation = half / math.sqrt(2.0 * math.pi) * sum(term(*pair) for pair in zip(_LEGENDRE_NODES, _LEGENDRE_WEIGHTS))
    return normal(loc, log_variance, scale) - math.log(probability) - expectation
