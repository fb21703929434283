"""Matrix products and convolutions in full float32 on GPUs, which by default round the factors to TF32."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Turn off TF32 within the context: functions called or traced there compute float32 products in full.

    TF32 keeps 10 of the 23 bits of a factor's fraction, so that equal models differ by 1e-3 of their outputs.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        with jax.default_matmul_precision("highest"):
            yield
    elif backend == "tensorflow":
        import tensorflow as tf

        settings = tf.config.experimental
        before = settings.tensor_float_32_execution_enabled()
        settings.enable_tensor_float_32_execution(False)
        try:
            yield
        finally:
            settings.enable_tensor_float_32_execution(before)
    elif backend == "torch":
        import torch

        switches: Any = torch.backends.cuda.matmul, torch.backends.cudnn
        before = [switch.allow_tf32 for switch in switches]
        try:
            for switch in switches:
                switch.allow_tf32 = False
            yield
        finally:
            for switch, allowed in zip(switches, before):
                switch.allow_tf32 = allowed
    else:
        yield
