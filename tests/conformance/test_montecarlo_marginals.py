"""A row's predictive distribution is one, whether draws are each row's own or one function for all of them."""

import numpy as np

import keras_vdrop as kv
from tests.cases import randomize
from tests.statistics import STANDARD_ERRORS

DRAWS = 250


def draws(model, x, consistent):
    sampler = kv.MonteCarlo(model, DRAWS, output="samples", seed=3, consistent=consistent, sample_batch_size=125)
    return np.swapaxes(sampler.predict(x, verbose=0), 0, 1).reshape(DRAWS, -1).astype("float64")


def means_and_errors(values):
    return values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(len(values))


def test_draws_of_rows_and_of_functions_agree(case):
    """In the mean and in the variance of every number, by an estimator whose noise is a draw of the weight."""
    model = case.model(**{"estimator": case.ours.get("estimator", "flipout")} if case.is_kernel else {})
    randomize(model, log_variance=(-3.0, -1.0))
    one, other = (draws(model, case.inputs(), consistent) for consistent in (False, True))
    centre = 0.5 * (one.mean(axis=0) + other.mean(axis=0))
    moments = {"mean": lambda values: values, "variance": lambda values: (values - centre) ** 2}
    for name, moment in moments.items():
        (a, error_a), (b, error_b) = (means_and_errors(moment(values)) for values in (one, other))
        apart = np.abs(a - b) / np.maximum(np.hypot(error_a, error_b), 1e-6)
        assert apart.max() < STANDARD_ERRORS, f"{name}: {apart.max():.1f} standard errors apart"
