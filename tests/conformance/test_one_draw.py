"""By default, what an example sees is one draw of the weights, the same at all of its places."""

import numpy as np
import pytest

from tests.cases import CASES, array, posteriors, randomize
from tests.statistics import STANDARD_ERRORS, sample

DRAWS = 3000
WEIGHTS = [case.replace(estimator="auto") for case in CASES if case.is_kernel]
LINEAR = [
    case
    for case in WEIGHTS
    if not (case.is_rnn or case.is_cell or case.is_attention or "separable" in case.name or "activation" in case.keras)
]
OTHERS = [case for case in WEIGHTS if case not in LINEAR]


def covariance(samples):
    """Of the outputs of the first example, (S, P): the matrix (P, P), and its standard errors."""
    centred = samples - samples.mean(axis=0)
    products = centred[:, :, None] * centred[:, None, :]
    return products.mean(axis=0), products.std(axis=0) / np.sqrt(len(samples))


def assert_close(found, expected, error):
    deviation = np.abs(found - expected) / np.maximum(error, 1e-6 * np.abs(expected).max())
    assert deviation.max() < STANDARD_ERRORS, f"{deviation.max():.1f} standard errors off"


def jacobian(case, layer, x, weight):
    """∂(outputs of x)/∂(weight), (P, W), of a layer that is linear in the weight, by one call for each number."""
    loc = array(weight.loc)
    at = array(case.call(layer, x)).ravel()
    columns = []
    for index in range(loc.size):
        moved = loc.copy()
        moved.flat[index] += 1.0
        weight.loc.assign(moved)
        columns.append(array(case.call(layer, x)).ravel() - at)
    weight.loc.assign(loc)
    return np.stack(columns, axis=1)


def of_one_example(case, layer, x):
    """Draws of the outputs of one example among equal ones, (S, P)."""
    equal = np.repeat(x[:1], 2, axis=0)
    return sample(layer, (equal, equal) if case.is_attention else equal, DRAWS)[:, 0].reshape(DRAWS, -1)


@pytest.mark.parametrize("linear", LINEAR, ids=str)
def test_covariance_over_places_is_that_of_the_posterior(linear):
    """Σ over the layer's weights of J·diag(variance)·Jᵀ."""
    layer = linear.built()
    randomize(layer)
    x = linear.inputs()
    expected = 0.0
    for weight in posteriors(layer):
        derivative = jacobian(linear, layer, x[:1], weight)
        expected = expected + (derivative * np.exp(array(weight.log_variance)).ravel()) @ derivative.T
    found, error = covariance(of_one_example(linear, layer, x))
    assert_close(found, expected, error)


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_covariance_over_places_is_that_of_weights_drawn_whole(other):
    """Where outputs are not linear in the weights, of which the layer has several."""
    found = []
    for case in (other, other.replace(estimator="reparameterization")):
        layer = case.built()
        randomize(layer, log_variance=(-4.0, -1.0))
        found.append(covariance(of_one_example(case, layer, case.inputs())))
    (by_default, error), (whole, other_error) = found
    assert_close(by_default, whole, np.hypot(error, other_error))
