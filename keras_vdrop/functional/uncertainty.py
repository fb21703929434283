"""What a set of Monte-Carlo samples says: predictive moments, entropies, mutual information.

Samples lie along the first axis, (S, B, ...). Entropies are in nats.
"""

from keras import ops


def moments(samples):
    """Mean and variance over the samples.

    Args:
        samples: Tensor (S, B, ...).

    Returns:
        Two tensors (B, ...).
    """
    return ops.mean(samples, axis=0), ops.var(samples, axis=0)


def entropy(probability):
    """H = −Σ p·log p over the last axis, with 0·log 0 = 0.

    Args:
        probability: Tensor (..., C), summing to 1 over the last axis.

    Returns:
        Tensor (...), in nats.
    """
    tiny = ops.cast(1e-37, probability.dtype) if probability.dtype != "float16" else 6e-8
    return -ops.sum(probability * ops.log(ops.maximum(probability, tiny)), axis=-1)


def categorical(probability):
    """Split a classifier's uncertainty: H[E p] = E H[p] + mutual information.

    Args:
        probability: Tensor (S, B, ..., C), the class probabilities under every draw.

    Returns:
        Dict of `probability` (B, ..., C), the mean, and three tensors (B, ...) in nats: `predictive_entropy`, the
        total; `expected_entropy`, the part that lies in the data (aleatoric); `mutual_information`, the
        part that more data would remove (epistemic).

    Reference:
        Uncertainty in Deep Learning, Gal, 2016, section 3.3
    """
    mean = ops.mean(probability, axis=0)
    predictive = entropy(mean)
    expected = ops.mean(entropy(probability), axis=0)
    return {
        "probability": mean,
        "predictive_entropy": predictive,
        "expected_entropy": expected,
        "mutual_information": ops.maximum(predictive - expected, 0.0),
    }


def bernoulli(probability):
    """The same for the probability of 1.

    Args:
        probability: Tensor (S, B, ...).

    Returns:
        Dict as of `categorical`, all of shape (B, ...).
    """
    result = categorical(ops.stack([1.0 - probability, probability], axis=-1))
    return {**result, "probability": result["probability"][..., 1]}


def normal(loc, scale):
    """Split a regressor's variance: Var y = E[scale²] + Var[loc].

    Args:
        loc: Tensor (S, B, ...), the predicted mean under every draw.
        scale: Tensor of the same shape, the predicted standard deviation.

    Returns:
        Dict of `mean`, `aleatoric_variance` (the data's) and `epistemic_variance` (the model's), all (B, ...).
    """
    mean, epistemic = moments(loc)
    aleatoric = ops.mean(ops.square(scale), axis=0)
    return {"mean": mean, "aleatoric_variance": aleatoric, "epistemic_variance": epistemic}
