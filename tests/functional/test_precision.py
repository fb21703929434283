"""TF32 is off within `full_precision`, and as before afterwards."""

import keras
import pytest

import keras_vdrop as kv
from keras_vdrop.functional.precision import full_precision


def uses_tf32():
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.config.experimental.tensor_float_32_execution_enabled()
    if backend == "jax":
        import jax

        return jax.config.jax_default_matmul_precision != "highest"
    import torch

    return torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32


def test_is_off_within():
    before = uses_tf32()
    with full_precision():
        assert not uses_tf32()
    assert uses_tf32() == before


def test_is_restored_after_an_error():
    before = uses_tf32()
    with pytest.raises(ZeroDivisionError), full_precision():
        1 / 0  # noqa: B018
    assert uses_tf32() == before


NOTED = []


class Noting(keras.layers.Layer):
    """Note whether TF32 is on when the layer is called."""

    def call(self, x):
        NOTED.append(uses_tf32())
        return x


def test_compact_compares_without_it():
    model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(3), Noting()])
    NOTED.clear()
    kv.compact(model)
    # The last two calls compare the shrunk model with the large one; those before built it.
    assert NOTED[-2:] == [False, False]
