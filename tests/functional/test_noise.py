"""The draws: their moments, their independence and their seeds; the same in a compiled function."""

import keras
import numpy as np
import pytest
from keras import ops
from scipy import stats

from keras_vdrop.functional import noise
from tests.cases import array
from tests.statistics import assert_mean, assert_uncorrelated, assert_variance

N = 200_000


def generator(seed=0):
    return keras.random.SeedGenerator(noise.hash_seed(seed))


def compiled(function):
    """The function under XLA, where the backend has it without a trainer."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    return function


@pytest.fixture(params=[lambda f: f, compiled], ids=["eager", "compiled"])
def run(request):
    return request.param


def test_normal(run):
    seeds = generator()
    values = array(run(lambda: noise.normal((N,), seeds))())
    assert_mean(values, 0.0)
    assert_variance(values, 1.0)
    assert stats.kstest(values, "norm").pvalue > 1e-6
    assert_uncorrelated(values[1:], values[:-1])


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 0)])
@pytest.mark.parametrize("draw", [noise.normal, noise.rademacher, noise.uniform])
def test_draws_of_any_shape(run, draw, shape):
    values = array(run(lambda: draw(shape, 7))())
    assert values.shape == shape and np.isfinite(values).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("draw", [noise.rademacher, noise.uniform])
def test_draws_of_any_type(run, draw, dtype):
    values = run(lambda: draw((1000,), 7, dtype))()
    if not (dtype == "float64" and keras.backend.backend() == "jax"):  # which has none unless it is asked to
        assert keras.backend.standardize_dtype(values.dtype) == dtype
    assert_mean(array(ops.cast(values, "float32")), {noise.rademacher: 0.0, noise.uniform: 0.5}[draw])


def test_normal_has_the_tails_of_a_normal():
    values = np.abs(array(noise.normal((4_000_000,), 11)))
    for sigmas in (3.0, 4.0):
        assert_mean(values > sigmas, 2 * stats.norm.sf(sigmas))
    assert 4.5 < values.max() < 7.0


def test_rademacher(run):
    seeds = generator()
    values = array(run(lambda: noise.rademacher((N,), seeds))())
    assert set(np.unique(values)) == {-1.0, 1.0}
    assert_mean(values, 0.0)
    words = -(-N // 32)  # 32 signs are those of one word, where they are packed
    for lag in (1, words):
        assert_uncorrelated(values[lag:], values[:-lag])


@pytest.mark.parametrize("probability", [0.1, 0.75])
def test_bernoulli(run, probability):
    seeds = generator()
    values = array(run(lambda: noise.bernoulli((N,), probability, seeds))())
    assert set(np.unique(values)) == {0.0, 1.0}
    assert_mean(values, probability)


def test_every_draw_differs(run):
    seeds = generator()
    step = run(lambda: noise.normal((N,), seeds))
    one, other = array(step()), array(step())
    assert_uncorrelated(one, other)


def test_neighbouring_seeds_are_unrelated():
    seeds = [generator(seed) for seed in range(4)]
    draws = [array(noise.normal((1000,), g)) for _ in range(3) for g in seeds]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert_uncorrelated(one, other)


def test_same_seed_same_draw():
    np.testing.assert_array_equal(array(noise.normal((5,), generator(3))), array(noise.normal((5,), generator(3))))
    np.testing.assert_array_equal(array(noise.normal((5,), 3)), array(noise.normal((5,), 3)))


@pytest.mark.slow
def test_hash_depends_on_seed_and_salt():
    assert len({noise.hash_seed(seed, salt) for seed in range(100) for salt in ("a", "b")}) == 200
    assert all(0 <= noise.hash_seed(seed) < 2**31 for seed in range(100))


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="MirroredStrategy is TensorFlow's")
def test_replicas_draw_different_noise():
    """In a process of its own: a machine's devices are split before TensorFlow first uses them."""
    import subprocess
    import sys

    script = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras
from keras_vdrop.functional import noise
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    seeds = keras.random.SeedGenerator(1)
draws = strategy.run(lambda: noise.normal((4,), seeds)).values
assert len(draws) == 2 and (draws[0].numpy() != draws[1].numpy()).all(), draws
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_concrete_is_bernoulli_as_the_temperature_falls():
    logit = np.float32(np.log(0.2 / 0.8))
    hard = array(noise.concrete((100_000,), logit, 1e-3, keras.random.SeedGenerator(0)))
    assert abs((hard > 0.5).mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / hard.size)
    assert ((hard > 0.01) & (hard < 0.99)).mean() < 0.01
    soft = array(noise.concrete((100_000,), logit, 0.5, keras.random.SeedGenerator(0)))
    # P(σ((logit + L) / t) > ½) = P(L > −logit), whatever the temperature
    assert abs((soft > 0.5).mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / soft.size)
    assert np.isfinite(soft).all() and soft.min() >= 0 and soft.max() <= 1


def test_uniform():
    draws = array(noise.uniform((100_000,), keras.random.SeedGenerator(0)))
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 5 / np.sqrt(12 * draws.size)
    assert abs(draws.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / draws.size)
