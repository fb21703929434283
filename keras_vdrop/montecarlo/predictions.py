"""The statistics that `MonteCarlo` returns, and decisions that follow from them."""

import math
import statistics
from typing import Any

import keras
import numpy as np

from keras_vdrop.checks import check_fraction


class Predictions(dict):
    """The statistics that `MonteCarlo.predict` returns, a dict of arrays, with methods that act on them.

    The statistics are attributes as well: `predicted.mean` is `predicted["mean"]`. If the model masks steps, `mask` is
    one of them, and the methods that add up the values of a row leave out the masked ones.

    Examples:
        >>> import keras, keras_vdrop as kv, numpy as np
        >>> model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(3, initial_log_variance=-2.0)])
        >>> drawn = kv.MonteCarlo(model, likelihood="categorical").predict(np.ones((20, 4)), verbose=0)
        >>> int(drawn.abstain(coverage=0.9).sum())
        2
        >>> drawn.bald().shape
        (20,)
    """

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}; its statistics are {sorted(self)}.")

    def stddev(self) -> Any:
        """Return the standard deviation of a predicted number, in the units of y and the shape of `mean`.

        With a likelihood, it is that of y, √(aleatoric + epistemic variance), due to both data and model. Without one,
        it is that of the output over the draws, due to the model alone; the noise of y comes on top.

        Raises:
            ValueError: For classes, which have no standard deviation.
        """
        if "probability" in self:
            raise ValueError(
                "Classes have no standard deviation. Use `probability`, and `predictive_entropy` for its uncertainty. "
                "If the outputs are not classes, pass another `likelihood` to `MonteCarlo`."
            )
        if "variance" in self:
            return keras.tree.map_structure(np.sqrt, self["variance"])
        return np.sqrt(self["aleatoric_variance"] + self["epistemic_variance"])

    def interval(self, coverage: float = 0.9) -> tuple[Any, Any]:
        """Return mean ± Φ⁻¹((1 + coverage) / 2)·stddev, the central interval of a normal distribution.

        With a likelihood, it contains y with probability `coverage`, if the model is calibrated and y is about normal.
        If you cannot assume that, use quantiles of draws (`scores.regression.sample_interval`) or intervals from
        validation data (`scores.conformal`). Without a likelihood, it is the interval of the output over the draws,
        and contains y less often.

        Args:
            coverage: Float in (0, 1).

        Returns:
            Two arrays of the shape of `mean`: lower, upper.

        Raises:
            ValueError: For a coverage out of range, or for classes.

        Examples:
            >>> import numpy as np
            >>> from keras_vdrop.montecarlo import Predictions
            >>> zero, half = np.zeros(1), np.full(1, 0.5)
            >>> predicted = Predictions(mean=zero, aleatoric_variance=half, epistemic_variance=half)
            >>> [round(float(end[0]), 2) for end in predicted.interval(coverage=0.95)]
            [-1.96, 1.96]
        """
        check_fraction("coverage", coverage)
        reach = statistics.NormalDist().inv_cdf(0.5 + 0.5 * coverage)
        stddev = self.stddev()
        lower, upper = (
            keras.tree.map_structure(lambda mean, spread, side=side: mean + side * reach * spread, self["mean"], stddev)
            for side in (-1.0, 1.0)
        )
        return lower, upper

    def uncertainty(self) -> np.ndarray:
        """Return the total uncertainty of each row, (B,), due to data and model (the model alone without a likelihood).

        It is the predictive entropy, in nats, or the variance, in squared units of y, summed over all values of a row
        that are not masked.
        """
        if "predictive_entropy" in self:
            return self._of_rows(self["predictive_entropy"])
        if "variance" in self:
            return np.asarray(sum(map(self._of_rows, keras.tree.flatten(self["variance"]))))
        return self._of_rows(self["aleatoric_variance"] + self["epistemic_variance"])

    def abstain(self, coverage: float = 0.95) -> np.ndarray:
        """Return a boolean array (B,), True for the rows to hand to a person: the most uncertain, NaN first.

        Args:
            coverage: Float in [0, 1], the least share of rows to answer. On validation data, `plots.risk_coverage`
                shows how the error falls if the model answers fewer rows.

        Raises:
            ValueError: For a coverage out of range.

        Reference:
            Selective Classification for Deep Neural Networks, Geifman, El-Yaniv, 2017, https://arxiv.org/abs/1705.08500
        """
        if not 0.0 <= coverage <= 1.0:
            raise ValueError(f"`coverage` must lie between 0 and 1. Received: coverage={coverage!r}")
        uncertainty = self.uncertainty()
        handed_over = math.floor((1.0 - coverage) * len(uncertainty) + 1e-9)
        order = np.argsort(-np.nan_to_num(uncertainty, nan=np.inf, posinf=np.inf), kind="stable")
        return np.isin(np.arange(len(uncertainty)), order[:handed_over])

    def bald(self) -> np.ndarray:
        """Return I[y; w | x] of each row, (B,), in nats: how much its label would tell about the weights.

        In active learning, label the rows with the highest values. For classes, it is the mutual information. For
        numbers, it is ½·log(1 + epistemic / aleatoric variance), which holds if both parts are normal. It is summed
        over all values of a row that are not masked.

        Raises:
            ValueError: Without a likelihood, since only that tells which part of the variance is due to the data.

        Reference:
            Bayesian Active Learning for Classification and Preference Learning, Houlsby, Huszár, Ghahramani, Lengyel,
            2011, https://arxiv.org/abs/1112.5745
        """
        if "mutual_information" in self:
            return self._of_rows(self["mutual_information"])
        if "variance" in self:
            raise ValueError(
                "`bald` requires a likelihood, which tells how noisy labels are. "
                'Pass `likelihood="categorical"` or another to `MonteCarlo`, or use `predictions.variance`.'
            )
        return self._of_rows(0.5 * np.log1p(self["epistemic_variance"] / self["aleatoric_variance"]))

    def _of_rows(self, values: Any) -> np.ndarray:
        """Sum over all axes but the first, without masked steps."""
        values = np.asarray(values)
        if "mask" in self:
            mask = np.asarray(self["mask"], bool)
            values = np.where(mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim)), values, 0.0)
        return flat_rows(values).sum(axis=1)


def flat_rows(values: np.ndarray) -> np.ndarray:
    """Reshape a NumPy array (B, ...), which may have no rows, to (B, n)."""
    return values.reshape(len(values), math.prod(values.shape[1:]))
