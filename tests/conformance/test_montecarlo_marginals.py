"""The predictive distribution of an example is the same with per-example and with consistent draws."""

import numpy as np
import pytest

import keras_vdrop as kv
from tests.cases import array, randomize
from tests.statistics import STANDARD_ERRORS

DRAWS = 250


def draws(model, x, consistent):
    """Return the draws for `x` in one batch and for the same `x` in a second batch: two arrays (B, S, ...)."""
    sampler = kv.MonteCarlo(model, DRAWS, output="samples", seed=3, consistent=consistent, sample_batch_size=DRAWS)
    return np.split(sampler.predict(np.concatenate([x, x]), batch_size=len(x), verbose=0), 2)


def flat(values):
    """Reshape draws (B, S, ...) to (S, B·...)."""
    return np.swapaxes(values, 0, 1).reshape(DRAWS, -1).astype("float64")


def means_and_errors(values):
    return values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(len(values))


@pytest.mark.slow(keep=1)
def test_draws_of_rows_and_of_functions_agree(case):
    """Mean and variance of every output agree, under an estimator whose noise is a draw of the weights.

    Consistent draws are the same for every batch; per-example draws differ. All draws differ.
    """
    model = case.model(**{"estimator": case.ours.get("estimator", "flipout")} if case.is_kernel else {})
    randomize(model, log_variance=(-3.0, -1.0))
    x = case.inputs()
    mean = array(model(x))
    (own, again), (one, other) = (draws(model, x, consistent) for consistent in (False, True))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert np.ptp(one, axis=1).max() > 1e-3
    assert not any(np.array_equal(a, b) for a, b in zip(np.swapaxes(own, 0, 1), np.swapaxes(again, 0, 1)))
    for values in (own, one):
        assert values.shape == (len(x), DRAWS, *mean.shape[1:])
        # Few units are dropped in few ways, so that some masks repeat.
        assert len(np.unique(flat(values), axis=0)) >= (DRAWS if case.is_kernel else DRAWS // 2)
    np.testing.assert_array_equal(array(model(x)), mean)

    own, one = flat(own), flat(one)
    centre = 0.5 * (own.mean(axis=0) + one.mean(axis=0))
    moments = {"mean": lambda values: values, "variance": lambda values: (values - centre) ** 2}
    for name, moment in moments.items():
        (a, error_a), (b, error_b) = (means_and_errors(moment(values)) for values in (own, one))
        apart = np.abs(a - b) / np.maximum(np.hypot(error_a, error_b), 1e-6)
        assert apart.max() < STANDARD_ERRORS, f"{name}: {apart.max():.1f} standard errors apart"
