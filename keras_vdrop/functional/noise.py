"""Random draws for the estimators, and the one place with a backend-specific fast path.

With TensorFlow the default generator of `keras.random` spends, under XLA on a CPU, twenty to a hundred times
what the numbers cost: the scrambling of its key is fused into every element. Philox, asked for by name, does not.
"""

import hashlib

import keras
from keras import ops


def hash_seed(seed, *salt):
    """A 31-bit seed that depends on all of `seed` and `salt`, without pattern.

    Neighbouring seeds give unrelated streams, which `seed + 1` does not promise on every backend.
    """
    text = "/".join(str(part) for part in (seed, *salt))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") & 0x7FFFFFFF


def _philox_seed(seed):
    """The next seed of a generator as TensorFlow's stateless functions take it, one for each replica."""
    import tensorflow as tf

    if isinstance(seed, int):
        state = tf.constant([seed & 0x7FFFFFFF, 0], "int32")
    else:
        state = tf.cast(tf.math.floormod(seed.next(), 2**31 - 1), "int32")
    replica = tf.distribute.get_replica_context()
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

        return tf.random.stateless_normal(shape, _philox_seed(seed), dtype=dtype, alg="philox")
    return keras.random.normal(shape, dtype=dtype, seed=seed)


def rademacher(shape, seed, dtype="float32"):
    """Independent signs, −1 or 1 with probability ½ each. Arguments as for `normal`."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        bits = tf.random.stateless_uniform(
            shape, _philox_seed(seed), minval=None, maxval=None, dtype="int32", alg="philox"
        )
        negative = bits < 0
    else:
        negative = keras.random.uniform(shape, seed=seed) < 0.5
    return ops.where(negative, ops.cast(-1, dtype), ops.cast(1, dtype))


def uniform(shape, seed, dtype="float32"):
    """Independent draws of U[0, 1). Arguments as for `normal`."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.random.stateless_uniform(shape, _philox_seed(seed), dtype=dtype, alg="philox")
    return keras.random.uniform(shape, dtype=dtype, seed=seed)


def bernoulli(shape, probability, seed, dtype="float32"):
    """Independent draws of 1 with the given probability, else 0. Other arguments as for `normal`."""
    return ops.cast(uniform(shape, seed) < probability, dtype)


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
    return ops.sigmoid((logit + ops.log(u) - ops.log1p(-u)) / temperature)
