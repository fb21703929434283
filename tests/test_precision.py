"""Training in other precisions reaches the ELBO of float32."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers

import keras_vdrop as kv
from keras_vdrop.cli import demo
from tests.statistics import STANDARD_ERRORS

SEEDS, BATCH, STEPS, EPOCHS = 3, 16, 88, 23  # 2,024 steps


@contextlib.contextmanager
def precision(dtype):
    """Set the dtype policy. For float64 also set the type of losses, or TensorFlow cannot add them to a penalty."""
    before = keras.config.dtype_policy(), keras.config.floatx()
    try:
        if dtype == "float64":
            keras.config.set_floatx(dtype)
        keras.config.set_dtype_policy(dtype)
        yield
    finally:
        keras.config.set_floatx(before[1])
        keras.config.set_dtype_policy(before[0])


def elbo_loss(dtype, seed):
    """Train on the digits; return the mean of the negative ELBO over the last five epochs."""
    (x, y), _ = demo.load_digits(seed=0)
    x, y = x[: BATCH * STEPS], y[: BATCH * STEPS]
    keras.utils.set_random_seed(seed)
    with precision(dtype):
        dense = kv.VariationalDense(64, activation="relu")
        model = keras.Sequential([keras.Input(x.shape[1:]), layers.Flatten(), dense, kv.VariationalDense(10)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        jit = keras.backend.backend() == "jax"  # the tests' XLA does not optimise
        model.compile(keras.optimizers.Adam(2e-3), loss, steps_per_execution=STEPS, jit_compile=jit)
        elbo = kv.ELBO(len(x), warmup_epochs=5)
        history = model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, callbacks=[elbo], verbose=0).history
    assert dense.compute_dtype == dtype.removeprefix("mixed_")
    return np.mean(history["elbo_loss"][-5:])


@pytest.fixture(scope="module")
def of_float32():
    return np.array([elbo_loss("float32", seed) for seed in range(SEEDS)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_reaches_the_elbo_of_float32(dtype, of_float32):
    if dtype == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX has float64 only if jax_enable_x64 is set before its first use")
    found = np.array([elbo_loss(dtype, seed) for seed in range(SEEDS)])
    # The standard error of the difference of two means of SEEDS runs.
    error = np.sqrt((found.var(ddof=1) + of_float32.var(ddof=1)) / SEEDS)
    assert abs(found.mean() - of_float32.mean()) <= STANDARD_ERRORS * error, (found, of_float32)
