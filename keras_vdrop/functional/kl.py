"""KL(q‖p) of a Gaussian posterior q = N(loc, exp(log_variance)), weight by weight, in nats.

Every function is elementwise, finite at `loc = 0`, and differentiable in `loc` and `log_variance`.
In what follows alpha = exp(log_variance) / loc², the noise-to-signal ratio of a weight.
"""

import math

from keras import ops

# KL ≈ K1·(1 − sigmoid(K2 + 1.5·log alpha)) + ½·log(1 + 1/alpha). The slope 1.5 was chosen so that
# the sigmoid needs no logarithm; K1 and K2 were then fitted to the exact KL (tests/functional).
_K1 = 0.63015
_EXP_MINUS_K2 = math.exp(-1.87257)

# Kingma, Salimans, Welling (2015), equation 14.
_CUBIC = (1.16145124, -1.50204118, 0.58629921)


def _signal_to_noise(loc, log_variance):
    """|loc| / standard deviation = 1 / sqrt(alpha)."""
    return ops.abs(loc) * ops.exp(-0.5 * log_variance)


def log_uniform(loc, log_variance):
    """KL to the log-uniform prior p(|w|) ∝ 1/|w|, normalised to 0 for alpha → ∞.

    KL ≈ k1·(1 − 1/(1 + e^(−k2)·alpha^(−1.5))) + ½·log(1 + 1/alpha)

    This is the sigmoid approximation of Molchanov et al. with the slope fixed at 1.5 and the other
    constants fitted again: within 0.0051 nats of the exact value for log alpha in [−10, 10], where the
    published constants are within 0.0094.

    Args:
        loc: Tensor, the posterior mean.
        log_variance: Tensor of the same shape, the logarithm of the posterior variance.

    Returns:
        Tensor of the same shape, in nats.

    Reference:
        Variational Dropout Sparsifies Deep Neural Networks, Molchanov, Ashukha, Vetrov, 2017,
        https://arxiv.org/abs/1701.05369
    """
    s = _signal_to_noise(loc, log_variance)
    # The cube stays finite in float32; past the bound its term is constant to 1e-27.
    bounded = ops.minimum(s, 1e9)
    cube = _EXP_MINUS_K2 * bounded * bounded * bounded
    return _K1 - _K1 / (1.0 + cube) + 0.5 * ops.log1p(s * s)


def log_uniform_cubic(log_alpha):
    """KL to the log-uniform prior as a cubic in alpha, for alpha ≤ 1.

    KL ≈ −(½·log alpha + c1·alpha + c2·alpha² + c3·alpha³)

    Larger alpha are clipped to 1, past which the polynomial diverges. It differs from `log_uniform` by
    a constant of about 0.635 nats, and from that by at most 0.041.

    Args:
        log_alpha: Tensor, log(variance / loc²).

    Returns:
        Tensor of the same shape, in nats, up to that constant.

    Reference:
        Variational Dropout and the Local Reparameterization Trick, Kingma, Salimans, Welling, 2015,
        https://arxiv.org/abs/1506.02557
    """
    log_alpha = ops.minimum(log_alpha, 0.0)
    alpha = ops.exp(log_alpha)
    c1, c2, c3 = _CUBIC
    return -(0.5 * log_alpha + alpha * (c1 + alpha * (c2 + alpha * c3)))


def ard(loc, log_variance):
    """KL to a zero-mean normal prior whose variance is fitted to each weight (empirical Bayes).

    KL = ½·log(1 + 1/alpha), the minimum over s² of KL(q ‖ N(0, s²)), reached at s² = loc² + variance.

    Args:
        loc: Tensor, the posterior mean.
        log_variance: Tensor of the same shape, the logarithm of the posterior variance.

    Returns:
        Tensor of the same shape, in nats.

    Reference:
        Variational Dropout via Empirical Bayes, Kharitonov, Molchanov, Vetrov, 2018,
        https://arxiv.org/abs/1811.00596
    """
    return 0.5 * ops.log1p(ops.square(_signal_to_noise(loc, log_variance)))


def normal(loc, log_variance, scale=1.0):
    """KL to the prior N(0, scale²).

    KL = ½·(variance/scale² + loc²/scale² − 1 − log(variance/scale²))

    Args:
        loc: Tensor, the posterior mean.
        log_variance: Tensor of the same shape, the logarithm of the posterior variance.
        scale: The prior's standard deviation (not its variance).

    Returns:
        Tensor of the same shape, in nats.

    Reference:
        Weight Uncertainty in Neural Networks, Blundell et al., 2015, https://arxiv.org/abs/1505.05424
    """
    log_variance = ops.convert_to_tensor(log_variance)
    scale = ops.cast(scale, log_variance.dtype)
    log_ratio = log_variance - 2.0 * ops.log(scale)
    return 0.5 * (ops.exp(log_ratio) + ops.square(loc / scale) - 1.0 - log_ratio)
