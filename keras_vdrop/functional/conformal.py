"""Split-conformal prediction: sets and intervals that hold the truth as often as they say, for any model.

A threshold comes from n calibration rows on which the model was neither trained nor selected. If they and a new row are
exchangeable, as independent rows of one distribution are, then

    coverage ≤ P(the truth is in the set or interval) ≤ coverage + 1 / (n + 1),

the upper bound where no two scores are equal. The probability is over the calibration rows and the new one together:
it is no promise for each class or each input by itself, nor for data of another distribution.

Reference:
    A Gentle Introduction to Conformal Prediction and Distribution-Free Uncertainty Quantification, Angelopoulos, Bates,
    2021, https://arxiv.org/abs/2107.07511
"""

import math

import numpy as np

from keras_vdrop.functional import checks


def quantile(scores, coverage=0.9):
    """The ⌈(n + 1)·coverage⌉-th smallest of n scores: one more score is at most that with probability ≥ coverage.

    Args:
        scores: Array (n,): how badly each calibration row's truth conforms to its prediction.
        coverage: Float in (0, 1).

    Raises:
        ValueError: For NaN, or fewer than coverage / (1 − coverage) scores, of which none is large enough.

    Example:
        >>> from keras_vdrop.functional import conformal
        >>> conformal.quantile([0.3, 0.1, 0.2, 0.9], coverage=0.6)  # the 3rd of 4
        0.3
    """
    scores = checks.numbers("scores", scores, ndim=1, infinite=True)
    coverage = checks.fraction("coverage", coverage)
    # 1e-9: what is a whole number but for rounding stays one.
    place = math.ceil((len(scores) + 1) * coverage - 1e-9)
    if place > len(scores):
        least = math.ceil(coverage / (1.0 - coverage) - 1e-9)
        raise ValueError(
            f"A coverage of {coverage:g} takes at least {least} calibration rows. Received: {len(scores)} rows; give "
            f"more, or ask for a coverage of at most {len(scores) / (len(scores) + 1):.3g}."
        )
    return float(np.sort(scores)[place - 1])


def set_threshold(probability, labels, coverage=0.9, score="lac"):
    """The threshold for `prediction_sets`: the `quantile` of the scores of the labels.

    Args:
        probability: Array (n, C), of calibration rows.
        labels: Array (n,) of ints in [0, C).
        coverage: Float in (0, 1): how often a set is to hold the label.
        score: "lac": 1 − p(class), the smallest sets on average; they can be empty.
            "aps": Σ of the probabilities from the largest down to p(class): sets that grow more with the difficulty of
                the row, and are larger on average.

    Returns:
        Float.

    Raises:
        ValueError: As `quantile` does; for logits, and labels that are no classes.

    Example:
        >>> import numpy as np
        >>> from keras_vdrop.functional import conformal
        >>> probability = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])
        >>> threshold = conformal.set_threshold(probability, [0, 0, 1, 0], coverage=0.75)
        >>> conformal.prediction_sets([[0.55, 0.45], [0.95, 0.05]], threshold).tolist()
        [[True, True], [True, False]]

    Reference:
        lac: Least Ambiguous Set-Valued Classifiers with Bounded Error Levels, Sadinle, Lei, Wasserman, 2019,
        https://arxiv.org/abs/1609.00451; aps, here without randomisation: Classification with Valid and Adaptive
        Coverage, Romano, Sesia, Candès, 2020, https://arxiv.org/abs/2006.02544
    """
    probability, labels = checks.classification(probability, labels)
    return quantile(_set_scores(probability, score)[np.arange(len(labels)), labels], coverage)


def prediction_sets(probability, threshold, score="lac"):
    """The classes whose score is at most the threshold.

    Args:
        probability: Array (B, C), of new rows.
        threshold: What `set_threshold` gave for the same `score`.
        score: As for `set_threshold`.

    Returns:
        Array (B, C) of bools.
    """
    return _set_scores(checks.distribution(probability), score) <= threshold


def interval_threshold(prediction, y, scale=None, coverage=0.9):
    """The threshold for `prediction_intervals`: the `quantile` of |y − prediction| / scale.

    Args:
        prediction: Array (n,), of calibration rows.
        y: Array (n,).
        scale: Array (n,), > 0, such as the predicted standard deviations, for intervals as wide as the model is unsure;
            or None for intervals all of one width.
        coverage: Float in (0, 1): how often an interval is to hold y.

    Returns:
        Float, in the units of y, or of `scale` where there is one.

    Raises:
        ValueError: As `quantile` does.

    Reference:
        Distribution-Free Predictive Inference for Regression, Lei et al., 2018, https://arxiv.org/abs/1604.04173
    """
    prediction, y = checks.alike(prediction=prediction, y=y)
    return quantile(np.abs(y - prediction) / _width(prediction, scale), coverage)


def prediction_intervals(prediction, threshold, scale=None):
    """prediction ± threshold·scale.

    Args:
        prediction: Array (B,), of new rows.
        threshold: What `interval_threshold` gave.
        scale: Array (B,), > 0, where the threshold was found with one.

    Returns:
        Two arrays (B,): lower, upper.

    Example:
        >>> from keras_vdrop.functional import conformal
        >>> threshold = conformal.interval_threshold([1.0, 2.0, 3.0], [1.5, 2.0, 2.0], coverage=0.5)
        >>> lower, upper = conformal.prediction_intervals([4.0], threshold)
        >>> float(lower[0]), float(upper[0])
        (3.5, 4.5)
    """
    prediction = checks.numbers("prediction", prediction)
    reach = threshold * _width(prediction, scale)
    return prediction - reach, prediction + reach


def _width(prediction, scale):
    return 1.0 if scale is None else checks.positive("scale", checks.alike(prediction=prediction, scale=scale)[1])


def _set_scores(probability, score):
    """The score (B, C) of every class."""
    if score == "lac":
        return 1.0 - probability
    if score == "aps":
        order = np.argsort(-probability, axis=-1, kind="stable")
        total = np.minimum(np.cumsum(np.take_along_axis(probability, order, axis=-1), axis=-1), 1.0)
        total[:, -1] = 1.0  # whatever rounding made of it, so that a threshold of 1 is all classes
        scores = np.empty_like(total)
        np.put_along_axis(scores, order, total, axis=-1)
        return scores
    raise ValueError(f'`score` must be "lac" or "aps". Received: score={score!r}')
