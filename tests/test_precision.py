"""Training in other precisions reaches the ELBO of float32."""

import keras
import numpy as np
import pytest

import keras_vdrop as kv
from keras_vdrop.cli import demo

SEEDS, EPOCHS = 4, 87  # 23 steps each, 2,001 in all


def elbo_loss(dtype, seed):
    """Train the digits model under a dtype policy; return the mean of the negative ELBO over the last five epochs."""
    (x, y), _ = demo.load_digits(seed=0)
    keras.utils.set_random_seed(seed)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model = demo.network(kv.VariationalDense, kv.VariationalConv2D)
        elbo = kv.ELBO(len(x), warmup_epochs=20)
        history = demo.train(model, x, y, epochs=EPOCHS, callbacks=[elbo], verbose=0).history
    finally:
        keras.config.set_dtype_policy(before)
    assert model.layers[-1].kernel.log_variance.dtype == ("float64" if dtype == "float64" else "float32")
    return np.mean(history.history["elbo_loss"][-5:])


@pytest.fixture(scope="module")
def of_float32():
    return np.array([elbo_loss("float32", seed) for seed in range(SEEDS)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_reaches_the_elbo_of_float32(dtype, of_float32):
    if dtype == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX has float64 only if jax_enable_x64 is set before its first use")
    found = np.array([elbo_loss(dtype, seed) for seed in range(SEEDS)])
    # The difference of two means of SEEDS runs, within 5 of its standard errors.
    error = np.sqrt((found.var(ddof=1) + of_float32.var(ddof=1)) / SEEDS)
    assert abs(found.mean() - of_float32.mean()) <= 5 * error, (found, of_float32)
