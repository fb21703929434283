"""Statistics of Monte-Carlo samples: predictive moments, entropies, mutual information.

Samples lie along the first axis, (S, B, ...). Entropies are in nats. Every statistic is a function of means over the
samples, so the samples need not be stored. A `Summary` specifies these means and the function.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_vdrop.functional.tensors import Tensor, TensorLike, tensors

__all__ = ["bernoulli", "categorical", "entropy", "moments", "normal"]


class Summary(NamedTuple):
    """Definition of statistics as a function of means over samples.

    Attributes:
        terms: Callable that maps samples (S, B, ...) and an origin (B, ...) to a dict of tensors (S, B, ...), to be
            averaged over S. The origin is any one of the samples. Subtracting it first avoids cancellation between the
            squares of numbers far from 0.
        statistics: Callable that maps the averages (B, ...) and the same origin to the dict of statistics.
    """

    terms: Callable[[Any, Any], dict[str, Any]]
    statistics: Callable[[Any, Any], dict[str, Any]]

    def of(self, samples: Any) -> dict[str, Any]:
        """Compute the statistics of stored samples."""
        origin = keras.tree.map_structure(lambda each: each[0], samples)
        means = keras.tree.map_structure(lambda each: ops.mean(each, axis=0), self.terms(samples, origin))
        return self.statistics(means, origin)


def by_name(summaries: dict[str, Summary]) -> Summary:
    """Combine summaries of several outputs into one for dicts of samples, keyed by name.

    Args:
        summaries: Dict from names to `Summary`.

    Examples:
        >>> from keras import ops
        >>> from keras_vdrop.functional import uncertainty
        >>> both = uncertainty.by_name({"a": uncertainty.MOMENTS, "b": uncertainty.CATEGORICAL})
        >>> found = both.of({"a": ops.ones((8, 2)), "b": ops.full((8, 2, 4), 0.25)})
        >>> sorted(found["a"]), found["b"]["probability"].shape == (2, 4)
        (['mean', 'variance'], True)
    """

    def terms(samples, origin):
        return {name: summary.terms(samples[name], origin[name]) for name, summary in summaries.items()}

    def statistics(means, origin):
        return {name: summary.statistics(means[name], origin[name]) for name, summary in summaries.items()}

    return Summary(terms, statistics)


def entropy(probability: TensorLike) -> Tensor:
    """Compute H = −Σ p·log p over the last axis, with 0·log 0 = 0.

    Args:
        probability: Tensor (..., C), summing to 1 over the last axis.

    Returns:
        Tensor (...), in nats.

    Examples:
        >>> from keras_vdrop.functional import uncertainty
        >>> [round(float(each), 3) for each in uncertainty.entropy([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])]
        [0.693, 1.386]
    """
    (probability,) = tensors(probability)
    tiny = 6e-8 if keras.backend.standardize_dtype(probability.dtype) == "float16" else 1e-37
    return -ops.sum(probability * ops.log(ops.maximum(probability, tiny)), axis=-1)


def moments(samples: Any) -> dict[str, Any]:
    """Compute the mean and the variance over the samples.

    Args:
        samples: Tensor (S, B, ...), or a structure of such tensors.

    Returns:
        Dict of `mean` and `variance`, each (B, ...), or a structure of such tensors.

    Raises:
        ValueError: If there are no samples.

    Examples:
        >>> from keras_vdrop.functional import uncertainty
        >>> found = uncertainty.moments([[1.0], [3.0]])  # two samples of one number
        >>> float(found["mean"][0]), float(found["variance"][0])
        (2.0, 1.0)
    """
    return MOMENTS.of(_samples(samples))


def categorical(probability: TensorLike) -> dict[str, Tensor]:
    """Split a classifier's uncertainty: H[E p] = E H[p] + mutual information.

    Args:
        probability: Tensor (S, B, ..., C), the class probabilities under each draw.

    Returns:
        Dict of `probability` (B, ..., C), the mean, and three tensors (B, ...) in nats: `predictive_entropy`, the total
        uncertainty; `expected_entropy`, the part inherent in the data (aleatoric); and `mutual_information`, the part
        that more data would remove (epistemic).

    Raises:
        ValueError: If there are no samples.

    Examples:
        >>> from keras_vdrop.functional import uncertainty
        >>> found = uncertainty.categorical([[[1.0, 0.0]], [[0.0, 1.0]]])  # two draws, each sure of another class
        >>> {name: round(float(found[name][0]), 3) for name in ("predictive_entropy", "mutual_information")}
        {'predictive_entropy': 0.693, 'mutual_information': 0.693}

    Reference:
        Bayesian Active Learning for Classification and Preference Learning, Houlsby, Huszár, Ghahramani, Lengyel, 2011,
        https://arxiv.org/abs/1112.5745; Uncertainty in Deep Learning, Gal, 2016, section 3.3
    """
    return CATEGORICAL.of(_samples(probability))


def bernoulli(probability: TensorLike) -> dict[str, Tensor]:
    """Split the uncertainty of a binary classifier, as `categorical` does.

    Args:
        probability: Tensor (S, B, ...), the probability of class 1 under each draw.

    Returns:
        Dict with the keys of `categorical`, all tensors of shape (B, ...).

    Raises:
        ValueError: If there are no samples.

    Examples:
        >>> from keras_vdrop.functional import uncertainty
        >>> found = uncertainty.bernoulli([[0.5], [0.5]])  # two draws that agree
        >>> {name: round(float(found[name][0]), 3) for name in ("expected_entropy", "mutual_information")}
        {'expected_entropy': 0.693, 'mutual_information': 0.0}

    Reference:
        As for `categorical`
    """
    return BERNOULLI.of(_samples(probability))


def normal(loc: TensorLike, scale: TensorLike) -> dict[str, Tensor]:
    """Split a regressor's variance: Var y = E[scale²] + Var[loc].

    Args:
        loc: Tensor (S, B, ...), the predicted mean under each draw.
        scale: Tensor of the same shape, the predicted standard deviation.

    Returns:
        Dict of `mean`, `aleatoric_variance` (of the data) and `epistemic_variance` (of the model), all (B, ...).

    Raises:
        ValueError: If there are no samples.

    Examples:
        >>> from keras_vdrop.functional import uncertainty
        >>> found = uncertainty.normal(loc=[[1.0], [3.0]], scale=[[2.0], [2.0]])
        >>> {name: float(value[0]) for name, value in found.items()}
        {'mean': 2.0, 'aleatoric_variance': 4.0, 'epistemic_variance': 1.0}

    Reference:
        What Uncertainties Do We Need in Bayesian Deep Learning for Computer Vision?, Kendall, Gal, 2017,
        https://arxiv.org/abs/1703.04977
    """
    loc, scale = tensors(loc, scale)
    return TOTAL_VARIANCE.of(_samples((loc, ops.square(scale))))


def _samples(samples: Any) -> Any:
    """Convert samples to tensors.

    Raises:
        ValueError: If there are no samples.
    """
    if isinstance(samples, list) and not any(isinstance(each, (dict, tuple)) for each in samples):
        samples = ops.convert_to_tensor(samples)
    samples = keras.tree.map_structure(lambda each: tensors(each)[0], samples)
    for each in keras.tree.flatten(samples):
        if len(each.shape) == 0 or each.shape[0] == 0:
            raise ValueError(
                f"Expected at least one sample, in an array of shape (S, B, ...). Received: shape {tuple(each.shape)}"
            )
    return samples


def _moment_terms(samples: Any, origin: Any) -> dict[str, Any]:
    deviation = keras.tree.map_structure(ops.subtract, samples, origin)
    return {"deviation": deviation, "square": keras.tree.map_structure(ops.square, deviation)}


def _moment_statistics(means: dict[str, Any], origin: Any) -> dict[str, Any]:
    variance = keras.tree.map_structure(
        lambda square, deviation: ops.maximum(square - ops.square(deviation), 0.0), means["square"], means["deviation"]
    )
    return {"mean": keras.tree.map_structure(ops.add, origin, means["deviation"]), "variance": variance}


def _categorical_terms(probability: Any, origin: Any) -> dict[str, Any]:
    return {"probability": probability, "entropy": entropy(probability)}


def _categorical_statistics(means: dict[str, Any], origin: Any) -> dict[str, Any]:
    predictive, expected = entropy(means["probability"]), means["entropy"]
    return {
        "probability": means["probability"],
        "predictive_entropy": predictive,
        "expected_entropy": expected,
        "mutual_information": ops.maximum(predictive - expected, 0.0),
    }


def _two_classes(probability: Any) -> Any:
    return ops.stack([1.0 - probability, probability], axis=-1)


def _bernoulli_terms(probability: Any, origin: Any) -> dict[str, Any]:
    return {"probability": probability, "entropy": entropy(_two_classes(probability))}


def _bernoulli_statistics(means: dict[str, Any], origin: Any) -> dict[str, Any]:
    result = _categorical_statistics({**means, "probability": _two_classes(means["probability"])}, origin)
    return {**result, "probability": means["probability"]}


def _total_variance_terms(samples: Any, origin: Any) -> dict[str, Any]:
    (loc, variance), (origin, _) = samples, origin
    return {"loc": _moment_terms(loc, origin), "variance": variance}


def _total_variance_statistics(means: dict[str, Any], origin: Any) -> dict[str, Any]:
    loc = _moment_statistics(means["loc"], origin[0])
    return {
        "mean": loc["mean"],
        "aleatoric_variance": means["variance"],
        "epistemic_variance": loc["variance"],
    }


MOMENTS = Summary(_moment_terms, _moment_statistics)
CATEGORICAL = Summary(_categorical_terms, _categorical_statistics)
BERNOULLI = Summary(_bernoulli_terms, _bernoulli_statistics)
# For samples (loc, variance), the mean and the variance of y under each draw.
TOTAL_VARIANCE = Summary(_total_variance_terms, _total_variance_statistics)
