"""Under every dtype policy the KL and log variance are float32, and the output has the policy's compute dtype."""

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from tests.cases import CASES, array, posteriors, randomize, rates

POLICIES = ["float32", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16"]
# Embeddings take indices, which have no magnitude. Keras's own attention overflows float16 when it multiplies queries
# and keys of about 10⁴.
ATTENTION = ("attention", "attention_bias", "variational_block")
LARGE = [case for case in CASES if not case.vocabulary and case.name not in ATTENTION]


def skip_where_keras_fails(case, policy):
    """Skip the test if Keras's layer raises `UnimplementedError`.

    On most CPUs TensorFlow has no float16 convolution with channels first. If Keras's layer fails for another reason,
    such as an initializer without float16, our layer is tested all the same.
    """
    try:
        case.call(case.make_twin(dtype=policy), case.inputs())
    except Exception as error:
        if type(error).__name__ == "UnimplementedError":
            pytest.skip("Keras's own layer does not run")


@pytest.mark.parametrize("policy", POLICIES)
def test_policies(case, policy):
    skip_where_keras_fails(case, policy)
    layer = case.make(dtype=policy)
    output = case.call(layer, case.inputs(), training=True)
    assert keras.backend.standardize_dtype(output.dtype) == keras.DTypePolicy(policy).compute_dtype
    assert np.isfinite(array(output)).all()
    for weight in posteriors(layer):
        assert weight.log_variance.dtype == "float32"
    for posterior in [*posteriors(layer), *rates(layer)]:
        assert keras.backend.standardize_dtype(posterior.kl().dtype) == "float32"


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
@pytest.mark.parametrize("subject", LARGE, ids=str)
def test_large_inputs_in_float16(subject, policy):
    """Inputs of 10⁴ give finite outputs, although their square and the output's variance exceed float16."""
    skip_where_keras_fails(subject, policy)
    layer, x = subject.built(dtype=policy), 1e4 * np.sign(subject.inputs())
    randomize(layer, log_variance=(-12.0, -10.0))
    for weight in posteriors(layer):
        if weight.loc.trainable:
            weight.loc.assign(0.01 * array(weight.loc))
    for posterior in rates(layer):
        posterior.kernel.assign(0.01 * array(posterior.kernel))
    mean, output = array(subject.call(layer, x)), array(subject.call(layer, x, training=True))
    assert np.isfinite(output).all()
    # A saturated gate can hide the noise of a draw, so try several.
    assert any(not np.array_equal(array(subject.call(layer, x, training=True)), mean) for _ in range(20))
    if subject.has_kl:
        assert np.isfinite(array(kv.kl_divergence(layer)))
