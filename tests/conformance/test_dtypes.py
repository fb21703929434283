"""Under every policy the KL and the variance are computed in float32 at least, and the output has the policy's type."""

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from tests.cases import array, posteriors, randomize

POLICIES = ["float32", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16"]


@pytest.mark.parametrize("policy", POLICIES)
def test_policies(case, policy):
    layer = case.make(dtype=policy)
    output = layer(case.inputs(), training=True)
    assert keras.backend.standardize_dtype(output.dtype) == keras.DTypePolicy(policy).compute_dtype
    assert np.isfinite(array(output)).all()
    for weight in posteriors(layer):
        assert weight.log_variance.dtype == "float32"
        assert keras.backend.standardize_dtype(weight.kl().dtype) == "float32"


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
def test_large_inputs_in_float16(case, policy):
    """10⁴ squared is beyond float16, and so would be the variance of the output."""
    layer, x = case.make(dtype=policy), 1e4 * np.sign(case.inputs())
    layer(x)
    randomize(layer, log_variance=(-12.0, -10.0))
    for weight in posteriors(layer):
        weight.loc.assign(0.01 * array(weight.loc))
    output = array(layer(x, training=True))
    assert np.isfinite(output).all()
    assert not np.array_equal(output, array(layer(x)))
    assert np.isfinite(array(kv.kl_divergence(layer)))
