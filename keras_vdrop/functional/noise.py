"""Random numbers for the estimators, with a fast path for TensorFlow.

In TensorFlow, under XLA on a CPU, the default generator of `keras.random` takes 20 to 100 times as long as necessary,
because the scrambling of its key is fused into every element. Philox, requested by name, avoids this. TensorFlow's
conversion of Philox's bits to numbers still takes 2 to 10 times as long as necessary on a CPU, so it is done here.
"""

import functools
import hashlib
import math
from typing import Any

import keras
from keras import ops

from keras_vdrop.functional.tensors import DType, Tensor, TensorLike

# Coefficients of P, in ascending powers: sin(½πz) ≈ z·P(z²) within 1e-8 for |z| ≤ 1. Least squares at Chebyshev nodes.
_SINE = (1.57079632, -0.6459637604, 0.0796899226, -0.00467415067, 0.000151675118)

# TensorFlow's number of Philox.
_PHILOX = 1

# The bits of 1.0 in float32: sign and fraction are 0.
_ONE = 0x3F800000


def hash_seed(seed: int | str, *salt: int | str) -> int:
    """Hash `seed` and `salt` to a 31-bit seed.

    Neighbouring seeds give unrelated streams, which `seed + 1` does not guarantee on every backend.

    Args:
        seed: Int or str.
        *salt: Ints or strs, names for what the seed is for.

    Returns:
        Int in [0, 2³¹).

    Examples:
        >>> from keras_vdrop.functional import noise
        >>> noise.hash_seed(0, "kernel") == noise.hash_seed(0, "kernel")
        True
        >>> noise.hash_seed(0, "kernel") == noise.hash_seed(0, "bias")
        False
    """
    text = "/".join(str(part) for part in (seed, *salt))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") & 0x7FFFFFFF


def _philox(seed: keras.random.SeedGenerator) -> dict[str, Any]:
    """Return the arguments of TensorFlow's Philox operations for the next seed of a generator.

    The seed is Philox's key, and the counter starts at 0: streams of different keys are independent. (The functions of
    `tf.random` scramble the key first, which takes 40 operations and a second use of Philox.) The key differs between
    replicas, unless the generator has `same_on_replicas`.
    """
    import tensorflow as tf

    state = tf.constant([seed, 0], "int64") if isinstance(seed, int) else seed.next()
    state = tf.cast(state, "uint32")
    replica = None if getattr(seed, "same_on_replicas", False) else tf.distribute.get_replica_context()
    if replica is not None and replica.num_replicas_in_sync > 1:
        random: Any = tf.random
        state = tf.bitcast(state, "int32")
        state = random.experimental.stateless_fold_in(state, replica.replica_id_in_sync_group)
    key = tf.reshape(tf.bitcast(state, "uint64"), (1,))
    return {"key": key, "counter": tf.zeros((2,), "uint64"), "alg": _PHILOX}


def normal(shape: tuple[int | Tensor, ...], seed: keras.random.SeedGenerator | int, dtype: DType = "float32") -> Tensor:
    """Draw independent samples of N(0, 1).

    Args:
        shape: Tuple of ints (or of scalar tensors for unknown sizes).
        seed: A `keras.random.SeedGenerator`, which advances by one, or an int for the same samples every time.
        dtype: Dtype of the result.

    Examples:
        >>> from keras import ops
        >>> from keras_vdrop.functional import noise
        >>> samples = noise.normal((2, 3), seed=0)
        >>> samples.shape == (2, 3), bool(ops.all(samples == noise.normal((2, 3), seed=0)))
        (True, True)
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if dtype == "float32" and not _has_gpu():
            return _box_muller(shape, _philox(seed))
        return tf.raw_ops.StatelessRandomNormalV2(shape=shape, dtype=dtype, **_philox(seed))
    return keras.random.normal(shape, dtype=dtype, seed=seed)


@functools.cache
def _has_gpu() -> bool:
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def _box_muller(shape: Any, philox: dict[str, Any]) -> Tensor:
    """Draw samples of N(0, 1), r·cos 2θ and r·sin 2θ, in float32.

    Here r = sqrt(−2·log u), and θ is uniform on [−½π, ½π]. In this range a polynomial approximates sin θ, and cos θ is
    the square root of 1 − sin² θ. These few operations are vectorised with and without XLA.

    Reference:
        A Note on the Generation of Random Normal Deviates, Box, Muller, 1958,
        https://doi.org/10.1214/aoms/1177706645
    """
    import tensorflow as tf

    count = _count(shape)
    half = (count + 1) // 2
    high, low = tf.unstack(tf.reshape(tf.cast(_bits(2 * half, philox), "float32"), (2, half)))
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
    # XLA does not vectorise a concatenation of the two halves, but it vectorises `where`.
    draws = r * tf.where([[True], [False]], 1.0 - 2.0 * square, 2.0 * sine * cosine)
    return tf.reshape(_first(count, draws), shape)


def _count(shape: Any) -> Any:
    """Return the number of elements of a shape: an int if all sizes are known."""
    import tensorflow as tf

    return math.prod(shape) if all(isinstance(size, int) for size in shape) else tf.reduce_prod(tf.stack(shape))


def _first(count: Any, values: Tensor) -> Tensor:
    """Return the first `count` values as a vector."""
    import tensorflow as tf

    values = tf.reshape(values, (-1,))
    return values if values.shape[0] == count else values[:count]


def _bits(count: Any, philox: dict[str, Any]) -> Tensor:
    """Draw `count` random int32.

    They are drawn as int64: in one XLA program on a CPU, a second draw of 32-bit numbers of the same shape takes six
    times as long as the first, but a second draw of 64-bit numbers does not.
    """
    import tensorflow as tf

    words = tf.raw_ops.StatelessRandomUniformFullIntV2(shape=((count + 1) // 2,), dtype="int64", **philox)
    return _first(count, tf.bitcast(words, "int32"))


def rademacher(
    shape: tuple[int | Tensor, ...], seed: keras.random.SeedGenerator | int, dtype: DType = "float32"
) -> Tensor:
    """Draw independent signs, −1 or 1 with probability ½ each.

    Args:
        shape, seed, dtype: As for `normal`.

    Returns:
        Tensor of the shape and dtype.

    Examples:
        >>> from keras_vdrop.functional import noise
        >>> sorted({float(each) for each in noise.rademacher((100,), seed=0)})
        [-1.0, 1.0]
    """
    if keras.backend.backend() == "tensorflow" and not _has_gpu():
        return ops.cast(_signs(shape, _philox(seed)), dtype)
    return ops.where(uniform(shape, seed) < 0.5, ops.cast(-1, dtype), ops.cast(1, dtype))


def _signs(shape: Any, philox: dict[str, Any]) -> Tensor:
    """Draw −1.0 or 1.0, 32 signs from each random int32."""
    import tensorflow as tf

    count = _count(shape)
    draws = _bits((count + 31) // 32, philox)
    sign = tf.bitwise.left_shift(draws, tf.range(32)[:, None]) & -(2**31)
    signs = tf.bitcast(sign | _ONE, "float32")
    return tf.reshape(_first(count, signs), shape)


def uniform(
    shape: tuple[int | Tensor, ...], seed: keras.random.SeedGenerator | int, dtype: DType = "float32"
) -> Tensor:
    """Draw independent samples of U[0, 1).

    Args:
        shape, seed, dtype: As for `normal`.

    Returns:
        Tensor of the shape and dtype.

    Examples:
        >>> from keras_vdrop.functional import noise
        >>> all(0.0 <= float(each) < 1.0 for each in noise.uniform((100,), seed=0))
        True
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if dtype == "float32" and not _has_gpu():
            return _uniform(shape, _philox(seed))
        return tf.raw_ops.StatelessRandomUniformV2(shape=shape, dtype=dtype, **_philox(seed))
    return keras.random.uniform(shape, dtype=dtype, seed=seed)


def _uniform(shape: Any, philox: dict[str, Any]) -> Tensor:
    """Draw samples of U[0, 1): 23 random bits as the fraction of a float32 in [1, 2), minus 1."""
    import tensorflow as tf

    fraction = tf.bitwise.right_shift(tf.bitcast(_bits(_count(shape), philox), "uint32"), tf.constant(9, "uint32"))
    return tf.reshape(tf.bitcast(tf.cast(fraction, "int32") | _ONE, "float32") - 1.0, shape)


def bernoulli(
    shape: tuple[int | Tensor, ...],
    probability: TensorLike,
    seed: keras.random.SeedGenerator | int,
    dtype: DType = "float32",
) -> Tensor:
    """Draw independent 1s with the given probability, else 0.

    Args:
        shape, seed, dtype: As for `normal`.
        probability: Number or tensor that broadcasts to the shape, in [0, 1].

    Returns:
        Tensor of the shape and dtype.

    Examples:
        >>> from keras_vdrop.functional import noise
        >>> [float(each) for each in noise.bernoulli((3,), probability=1.0, seed=0)]
        [1.0, 1.0, 1.0]
        >>> sorted({float(each) for each in noise.bernoulli((100,), probability=0.5, seed=0)})
        [0.0, 1.0]
    """
    return ops.cast(uniform(shape, seed) < ops.cast(probability, "float32"), dtype)


def concrete(
    shape: tuple[int | Tensor, ...],
    logit: TensorLike,
    temperature: float,
    seed: keras.random.SeedGenerator | int,
) -> Tensor:
    """Draw independent samples of a relaxed Bernoulli variable, in float32.

    A sample is σ((logit + logit(u)) / temperature) with u ~ U(0, 1).

    Args:
        shape: As for `normal`.
        logit: Tensor, the logit of the probability of 1. Gradients flow through it.
        temperature: Float > 0. As it goes to 0, the samples become 0 or 1.
        seed: As for `normal`.

    Examples:
        >>> from keras_vdrop.functional import noise
        >>> [round(float(each), 3) for each in noise.concrete((3,), logit=100.0, temperature=0.5, seed=0)]
        [1.0, 1.0, 1.0]
        >>> all(0.0 < float(each) < 1.0 for each in noise.concrete((100,), logit=0.0, temperature=2.0, seed=0))
        True

    Reference:
        The Concrete Distribution, Maddison, Mnih, Teh, 2017, https://arxiv.org/abs/1611.00712
    """
    u = ops.clip(uniform(shape, seed), 1e-7, 1.0 - 1e-7)
    return ops.sigmoid((ops.cast(logit, "float32") + ops.log(u) - ops.log1p(-u)) / temperature)
