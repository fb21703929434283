"""log alpha, masks and counts."""

import numpy as np
import pytest

from keras_vdrop.functional import sparsity
from tests.cases import array


def test_log_alpha():
    loc, log_variance = np.array([2.0, -0.1], "float32"), np.array([-1.0, 3.0], "float32")
    np.testing.assert_allclose(array(sparsity.log_alpha(loc, log_variance)), log_variance - np.log(loc**2), rtol=1e-5)


@pytest.mark.slow
def test_log_alpha_of_a_zero_weight_is_finite_and_large():
    values = array(sparsity.log_alpha(np.array([0.0, 1e-30], "float32"), np.array([-10.0, -10.0], "float32")))
    assert np.isfinite(values).all() and (values > 50).all()


def test_keep_mask():
    loc = np.array([1.0, 1.0, 1.0, 0.0], "float32")
    log_variance = np.array([2.9, 3.0, 3.1, -100.0], "float32")
    mask = sparsity.keep_mask(loc, log_variance, 3.0)
    assert array(mask).tolist() == [1, 1, 0, 0]


def test_groups_are_kept_or_dropped_as_a_whole():
    loc = np.array([[1.0, 0.1], [0.01, 0.02]], "float32")
    log_variance = np.log(np.array([[0.1, 0.1], [1.0, 1.0]], "float32"))
    expected = np.log(np.array([0.2 / 1.01, 2.0 / 5e-4]))
    by_row = array(sparsity.log_alpha(loc, log_variance, group_axis=0))
    np.testing.assert_allclose(by_row, np.repeat(expected[:, None], 2, axis=1), rtol=1e-5)
    kept = array(sparsity.keep_mask(loc, log_variance, 3.0, group_axis=0))
    np.testing.assert_array_equal(kept, [[1, 1], [0, 0]])
    with pytest.raises(ValueError, match="group_axis=2"):
        sparsity.log_alpha(loc, log_variance, group_axis=2)


def test_groups_of_blocks_are_those_of_the_axis_taken_apart():
    rng = np.random.default_rng(0)
    loc, log_variance = rng.normal(size=(5, 6)).astype("float32"), rng.uniform(-4, 1, (5, 6)).astype("float32")
    ours = array(sparsity.log_alpha(loc, log_variance, group_axis=-1, blocks=3))
    for unit in range(2):
        variance, square = np.exp(log_variance[:, unit::2]).sum(), (loc[:, unit::2] ** 2).sum()
        np.testing.assert_allclose(ours[:, unit::2], np.log(variance / square), rtol=1e-5)
    with pytest.raises(ValueError, match="blocks=4"):
        sparsity.log_alpha(loc, log_variance, group_axis=-1, blocks=4)
