"""Statistical assertions with a computed tolerance of five standard errors."""

import keras
import numpy as np

STANDARD_ERRORS = 5.0


def draws(function, count):
    """Stack `count` results of a function without arguments that returns a float32 tensor.

    TensorFlow runs it in one loop of a graph, because single calls are slow there.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        @tf.function
        def loop():
            results = tf.TensorArray("float32", count)
            for index in tf.range(count):
                results = results.write(index, function())
            return results.stack()

        return loop().numpy()
    return np.stack([keras.ops.convert_to_numpy(function()) for _ in range(count)])


def sample(layer, x, count=1500):
    """Return the outputs of `count` training-mode calls on one input or a tuple of inputs.

    JAX runs them in one `scan`, because single calls are slow there.
    """
    inputs = x if isinstance(x, tuple) else (x,)
    if keras.backend.backend() != "jax":
        return draws(lambda: layer(*inputs, training=True), count)
    trainable = [variable.value for variable in layer.trainable_variables]

    def call(others, _):
        output, others = layer.stateless_call(trainable, others, *inputs, training=True)
        return others, output

    _, outputs = keras.ops.scan(call, [variable.value for variable in layer.non_trainable_variables], length=count)
    return np.asarray(outputs)


def assert_mean(samples, expected):
    """Assert that every mean over the first axis is within five standard errors of `expected`."""
    samples = np.asarray(samples, "float64")
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    deviation = np.abs(samples.mean(axis=0) - expected) / np.maximum(error, 1e-12)
    assert deviation.max() < STANDARD_ERRORS, f"{deviation.max():.1f} standard errors off"


def assert_variance(samples, expected):
    """Assert that every variance over the first axis is within five standard errors of `expected`.

    The standard error is that of the sample variance of a normal variable.
    """
    samples = np.asarray(samples, "float64")
    expected = np.asarray(expected, "float64")
    error = expected * np.sqrt(2.0 / (len(samples) - 1))
    deviation = np.abs(samples.var(axis=0, ddof=1) - expected) / error
    assert deviation.max() < STANDARD_ERRORS, f"{deviation.max():.1f} standard errors off"


def assert_uncorrelated(one, other):
    """Assert that the correlation of two flattened arrays is within five standard errors of 0."""
    one, other = np.ravel(one), np.ravel(other)
    assert abs(np.corrcoef(one, other)[0, 1]) < STANDARD_ERRORS / np.sqrt(len(one))
