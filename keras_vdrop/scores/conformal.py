"""Split-conformal prediction: sets and intervals with guaranteed coverage, for any model.

A threshold is computed from n calibration rows on which the model was neither trained nor selected. If these rows and a
new row are exchangeable, for example independent rows of one distribution, then

    coverage ≤ P(the truth is in the set or interval) ≤ coverage + 1 / (n + 1),

where the upper bound requires that no two scores are equal. The probability is over the calibration rows and the new
row together. It is not guaranteed for each class or each input separately, nor for data of another distribution.

Reference:
    A Gentle Introduction to Conformal Prediction and Distribution-Free Uncertainty Quantification, Angelopoulos, Bates,
    2021, https://arxiv.org/abs/2107.07511
"""

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from keras_vdrop.checks import check_fraction
from keras_vdrop.scores import checks


def quantile(scores: ArrayLike, coverage: float = 0.9) -> float:
    """Return the ⌈(n + 1)·coverage⌉-th smallest of n scores. A new score is at most that with probability ≥ coverage.

    Args:
        scores: Array (n,), high where the truth of a calibration row is far from its prediction.
        coverage: Float in (0, 1).

    Raises:
        ValueError: For NaN, or fewer than coverage / (1 − coverage) scores, too few for this coverage.

    Examples:
        >>> from keras_vdrop.scores import conformal
        >>> conformal.quantile([0.3, 0.1, 0.2, 0.9], coverage=0.6)  # the 3rd of 4
        0.3

    Reference:
        A Gentle Introduction to Conformal Prediction and Distribution-Free Uncertainty Quantification, Angelopoulos,
        Bates, 2021, https://arxiv.org/abs/2107.07511
    """
    scores = checks.numbers("scores", scores, ndim=1, infinite=True)
    check_fraction("coverage", coverage)
    # The 1e-9 keeps rounding from raising a whole number to the next.
    place = math.ceil((len(scores) + 1) * coverage - 1e-9)
    if place > len(scores):
        least = math.ceil(coverage / (1.0 - coverage) - 1e-9)
        raise ValueError(
            f"A coverage of {coverage:g} requires at least {least} calibration rows. Provide more rows, or request a "
            f"coverage of at most {len(scores) / (len(scores) + 1):.3g}. Received: {len(scores)} rows"
        )
    return float(np.sort(scores)[place - 1])


def set_threshold(
    probability: ArrayLike,
    labels: ArrayLike,
    coverage: float = 0.9,
    score: Literal["lac", "aps"] = "lac",
) -> float:
    """Compute the threshold for `prediction_sets`: the `quantile` of the scores of the labels.

    Args:
        probability: Array (n, C), of calibration rows.
        labels: Array (n,) of ints in [0, C).
        coverage: Float in (0, 1), the desired frequency with which a set contains the label.
        score: "lac": 1 − p(class). Its sets are the smallest on average, and can be empty.
            "aps": Σ of the probabilities from the largest down to p(class). Its sets depend more on the difficulty of
                the row, and are larger on average.

    Returns:
        Float.

    Raises:
        ValueError: As for `quantile`; for logits, labels outside [0, C), or an unknown `score`.

    Examples:
        >>> import numpy as np
        >>> from keras_vdrop.scores import conformal
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


def prediction_sets(probability: ArrayLike, threshold: float, score: Literal["lac", "aps"] = "lac") -> np.ndarray:
    """Return the classes whose score is at most the threshold.

    Args:
        probability: Array (B, C), of new rows.
        threshold: The result of `set_threshold` with the same `score`.
        score: As for `set_threshold`.

    Returns:
        Array (B, C) of bools.

    Raises:
        ValueError: For probabilities that are negative or do not sum to 1, or an unknown `score`.

    Examples:
        >>> from keras_vdrop.scores import conformal
        >>> conformal.prediction_sets([[0.9, 0.1], [0.6, 0.4]], threshold=0.7).tolist()  # classes with p ≥ 0.3
        [[True, False], [True, True]]

    Reference:
        As for `set_threshold`
    """
    return _set_scores(checks.distribution(probability), score) <= threshold


def interval_threshold(
    prediction: ArrayLike,
    y: ArrayLike,
    scale: ArrayLike | None = None,
    coverage: float = 0.9,
) -> float:
    """Compute the threshold for `prediction_intervals`: the `quantile` of |y − prediction| / scale.

    Args:
        prediction: Array (n,), of calibration rows.
        y: Array (n,).
        scale: Array (n,), > 0, such as the predicted standard deviations, for intervals of proportional width; None for
            intervals of equal width.
        coverage: Float in (0, 1), the desired frequency with which an interval contains y.

    Returns:
        Float, in the units of y, or in multiples of `scale` if given.

    Raises:
        ValueError: As for `quantile`; for shapes that differ, or a scale that is not above 0.

    Examples:
        >>> from keras_vdrop.scores import conformal
        >>> conformal.interval_threshold([1.0, 2.0, 3.0], [1.5, 2.0, 2.0], coverage=0.5)  # the 2nd of 0, 0.5 and 1
        0.5

    Reference:
        Distribution-Free Predictive Inference for Regression, Lei et al., 2018, https://arxiv.org/abs/1604.04173
    """
    prediction, y = checks.alike(prediction=prediction, y=y)
    return quantile(np.abs(y - prediction) / _width(prediction, scale), coverage)


def prediction_intervals(
    prediction: ArrayLike,
    threshold: float,
    scale: ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the intervals prediction ± threshold·scale.

    Args:
        prediction: Array (B,), of new rows.
        threshold: The result of `interval_threshold`.
        scale: Array (B,), > 0, if the threshold was computed with one.

    Returns:
        Two arrays (B,): lower, upper.

    Raises:
        ValueError: For NaN or infinity, no rows, a scale that is not above 0, or shapes that differ.

    Examples:
        >>> from keras_vdrop.scores import conformal
        >>> threshold = conformal.interval_threshold([1.0, 2.0, 3.0], [1.5, 2.0, 2.0], coverage=0.5)
        >>> lower, upper = conformal.prediction_intervals([4.0], threshold)
        >>> float(lower[0]), float(upper[0])
        (3.5, 4.5)

    Reference:
        As for `interval_threshold`
    """
    prediction = checks.numbers("prediction", prediction)
    reach = threshold * _width(prediction, scale)
    return prediction - reach, prediction + reach


def _width(prediction: ArrayLike, scale: ArrayLike | None) -> Any:
    return 1.0 if scale is None else checks.positive("scale", checks.alike(prediction=prediction, scale=scale)[1])


def _set_scores(probability: np.ndarray, score: str) -> np.ndarray:
    """Compute the score of every class, (B, C)."""
    if score == "lac":
        return 1.0 - probability
    if score == "aps":
        order = np.argsort(-probability, axis=-1, kind="stable")
        total = np.minimum(np.cumsum(np.take_along_axis(probability, order, axis=-1), axis=-1), 1.0)
        total[:, -1] = 1.0  # undo rounding, so that a threshold of 1 gives all classes
        scores = np.empty_like(total)
        np.put_along_axis(scores, order, total, axis=-1)
        return scores
    raise ValueError(f'`score` must be "lac" or "aps". Received: score={score!r}')
