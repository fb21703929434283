"""Random draws for the estimators, and the one place with a backend-specific fast path.

With TensorFlow the default generator of `keras.random` spends, under XLA on a CPU, twenty to a hundred times
what the numbers cost: the scrambling of its key is fused into every element. Philox, asked for by name, does not.
What TensorFlow makes of Philox's bits still costs two to ten times what it can on a CPU, where it is made here.
"""

import functools
import hashlib
import math

import keras
from keras import ops

# sin(½πz) ≈ z·P(z²) within 1e-8 for |z| ≤ 1: least squares at Chebyshev's nodes, ascending powers.
_SINE = (1.57079632, -0.6459637604, 0.0796899226, -0.00467415067, 0.000151675118)

# The bits of 1.0 in float32: no sign, no fraction.
_ONE = 0x3F800000


def hash_seed(seed, *salt):
    """A 31-bit seed that depends on all of `seed` and `salt`, without pattern.

    Neighbouring seeds give unrelated streams, which `seed + 1` does not promise on every backend.
    """
    text = "/".join(str(part) for part in (seed, *salt))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") & 0x7FFFFFFF


def _philox_seed(seed):
    """The next seed of a generator as TensorFlow's stateless functions take it.

    It is one for each replica, unless the generator is `same_on_replicas`.
    """
    import tensorflow as tf

    if isinstance(seed, int):
        state = tf.constant([seed & 0x7FFFFFFF, 0], "int32")
    else:
        state = tf.cast(tf.math.floormod(seed.next(), 2**31 - 1), "int32")
    replica = None if getattr(seed, "same_on_replicas", False) else tf.distribute.get_replica_context()
    if replica is not None and replica.num_replicas_in_sync > 1:
        state = tf.random.experimental.stateless_fold_in(state, replica.replica_id_in_sync_group)
    return state


def normal(shape, seed, dtype="float32"):
    """Independent draws of N(0, 1).

    Args:
        shape: Tuple of ints (or scalar tensors where a size is not known).
        seed: A `keras.random.SeedGenerator`, advanced by one; or an int for the same draw every time.
        dtype: Of the result.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if dtype == "float32" and not _has_gpu():
            return _box_muller(shape, _philox_seed(seed))
        return tf.random.stateless_normal(shape, _philox_seed(seed), dtype=dtype, alg="philox")
    return keras.random.normal(shape, dtype=dtype, seed=seed)


@functools.cache
def _has_gpu():
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def _box_muller(shape, seed):
    """Draws of N(0, 1) in float32 by few operations that vectorise, with and without XLA: r·cos 2θ and r·sin 2θ.

    r = sqrt(−2·log u) and θ uniform on [−½π, ½π], where a polynomial is its sine, and its cosine a square root.

    Reference:
        A Note on the Generation of Random Normal Deviates, Box, Muller, 1958,
        https://doi.org/10.1214/aoms/1177706645
    """
    import tensorflow as tf

    count = _count(shape)
    half = (count + 1) // 2
    bits = tf.cast(_bits(2 * half, seed), "float32")
    high, low = bits[:half], bits[half:]
    u = tf.maximum(2.0**-32 * high + 0.5, 2.0**-26)
    r = tf.sqrt(-2.0 * tf.math.log(u))
    z = 2.0**-31 * low
    w = z * z
    sine = _SINE[-1]
    for coefficient in _SINE[-2::-1]:
        sine = sine * w + coefficient
    sine *= z
    square = sine * sine
    cosine = tf.sqrt(tf.maximum(1.0 - square, 0.0))
    # A concatenation of two halves is not vectorised by XLA, a choice between two is.
    draws = r * tf.where([[True], [False]], 1.0 - 2.0 * square, 2.0 * sine * cosine)
    return tf.reshape(tf.reshape(draws, (-1,))[:count], shape)


def _count(shape):
    """How many numbers that are: an int where all sizes are known."""
    import tensorflow as tf

    return math.prod(shape) if all(isinstance(size, int) for size in shape) else tf.reduce_prod(tf.stack(shape))


def _bits(count, seed):
    """So many random int32.

    In one XLA program on a CPU, a second draw of 32 bits of the same shape costs six times the first; one of 64 bits
    does not.
    """
    import tensorflow as tf

    words = tf.random.stateless_uniform(((count + 1) // 2,), seed, None, None, "int64", alg="philox")
    return tf.reshape(tf.bitcast(words, "int32"), (-1,))[:count]


def rademacher(shape, seed, dtype="float32"):
    """Independent signs, −1 or 1 with probability ½ each. Arguments as for `normal`."""
    if keras.backend.backend() == "tensorflow" and not _has_gpu():
        return ops.cast(_signs(shape, _philox_seed(seed)), dtype)
    return ops.where(uniform(shape, seed) < 0.5, ops.cast(-1, dtype), ops.cast(1, dtype))


def _signs(shape, seed):
    """−1.0 or 1.0, each from a bit: a draw of 32 bits makes 32 of them."""
    import tensorflow as tf

    count = _count(shape)
    draws = _bits((count + 31) // 32, seed)
    sign = tf.bitwise.left_shift(draws, tf.range(32)[:, None]) & -(2**31)
    signs = tf.bitcast(sign | _ONE, "float32")
    return tf.reshape(tf.reshape(signs, (-1,))[:count], shape)


def uniform(shape, seed, dtype="float32"):
    """Independent draws of U[0, 1). Arguments as for `normal`."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if dtype == "float32" and not _has_gpu():
            return _uniform(shape, _philox_seed(seed))
        return tf.random.stateless_uniform(shape, _philox_seed(seed), dtype=dtype, alg="philox")
    return keras.random.uniform(shape, dtype=dtype, seed=seed)


def _uniform(shape, seed):
    """The 23 bits of the fraction of a number in [1, 2), less 1."""
    import tensorflow as tf

    fraction = tf.bitwise.right_shift(tf.bitcast(_bits(_count(shape), seed), "uint32"), tf.constant(9, "uint32"))
    return tf.reshape(tf.bitcast(tf.cast(fraction, "int32") | _ONE, "float32") - 1.0, shape)


def bernoulli(shape, probability, seed, dtype="float32"):
    """Independent draws of 1 with the given probability, else 0. Other arguments as for `normal`."""
    return ops.cast(uniform(shape, seed) < ops.cast(probability, "float32"), dtype)


def concrete(shape, logit, temperature, seed):
    """Independent draws of a relaxed Bernoulli variable, σ((logit + logit u) / temperature) with u ~ U(0, 1): in
    float32.

    Args:
        shape: As for `normal`.
        logit: Tensor, the logit of the probability of 1, through which gradients flow.
        temperature: Float > 0; towards 0 the draws are 0 or 1.
        seed: As for `normal`.

    Reference:
        The Concrete Distribution, Maddison, Mnih, Teh, 2017, https://arxiv.org/abs/1611.00712
    """
    u = ops.clip(uniform(shape, seed), 1e-7, 1.0 - 1e-7)
    return ops.sigmoid((ops.cast(logit, "float32") + ops.log(u) - ops.log1p(-u)) / temperature)
